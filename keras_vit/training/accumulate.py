"""Gradients of a batch that goes through the model in parts, as pure functions, on TensorFlow, JAX and PyTorch."""

import keras
from keras import ops, tree

from keras_vit.errors import ArgumentError


def divided(data, parts, devices=1):
    """Every (b, ...) of `data` as (parts, b / parts, ...).

    A part takes equally many examples of each of `devices`, over which the batch is spread in order, so that none has to move.

    Raises:
        ArgumentError: the batch cannot be divided so.
    """

    def divide(x):
        if isinstance(x.shape[0], int) and x.shape[0] % (parts * devices):
            raise ArgumentError(
                f"A batch of {x.shape[0]} cannot be cut into {parts} equal parts"
                f"{f' on each of {devices} devices' if devices > 1 else ''}; change either."
            )
        if devices == 1:
            return ops.reshape(x, (parts, -1, *x.shape[1:]))
        x = ops.swapaxes(ops.reshape(x, (devices, parts, -1, *x.shape[1:])), 0, 1)
        return ops.reshape(x, (parts, -1, *x.shape[3:]))

    return tree.map_structure(divide, data)


def differentiated(function, weights):
    """(loss, rest, gradients) of `function(weights) -> (loss, rest)`; a weight that it does not use has gradient 0."""
    return _DIFFERENTIATED[keras.config.backend()](function, weights)


def accumulated(function, zeros, state, data, parts, devices=1):
    """Means over the parts of a batch, which are taken one after the other.

    Args:
        function: (state, part of `data`) -> (summed, state, kept); a pure function; `kept` is float32 (b / parts, c).
        zeros: structure of what is summed, all 0, as a function that makes it. On TensorFlow without XLA they may be scalars,
            which saves the memory of as many arrays, and a pass through it.
        state: list of tensors that goes from one part to the next.
        data: structure of (b, ...) tensors.
        parts: how many; with 1 it is `function(state, data)` itself.
        devices: over which a batch is spread, see `divided`.

    Returns:
        (mean of `summed` over the parts, last state, `kept` of all parts one after the other along its first axis).
    """
    if parts == 1:
        return function(state, data)
    cut = divided(data, parts, devices)
    summed, state, kept = _LOOPS[keras.config.backend()](function, zeros(), state, cut, parts)
    if devices > 1:  # back in the batch's own order
        apart = ops.reshape(kept, (parts, devices, -1, *kept.shape[2:]))
        kept = ops.swapaxes(apart, 0, 1)
        kept = ops.reshape(kept, (-1, *kept.shape[3:]))
    else:
        kept = ops.reshape(kept, (-1, *kept.shape[2:]))
    return tree.map_structure(lambda total: total / parts, summed), state, kept


def _tensorflow_differentiated(function, weights):
    import tensorflow as tf

    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(weights)
        loss, rest = function(weights)
    gradients = tape.gradient(loss, weights, unconnected_gradients=tf.UnconnectedGradients.ZERO)
    return loss, rest, [tf.convert_to_tensor(gradient) for gradient in gradients]  # that of a gathered table is sparse


def _jax_differentiated(function, weights):
    import jax

    (loss, rest), gradients = jax.value_and_grad(function, has_aux=True)(weights)
    return loss, rest, gradients


def _torch_differentiated(function, weights):
    import torch

    leaves = [weight if weight.requires_grad else weight.detach().requires_grad_() for weight in weights]
    with torch.enable_grad():
        loss, rest = function(leaves)
        gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
    gradients = [torch.zeros_like(leaf) if gradient is None else gradient for leaf, gradient in zip(leaves, gradients)]
    loss, *rest = tree.map_structure(lambda t: t.detach(), (loss, *rest))
    return loss, tuple(rest), gradients


def _tensorflow_loop(function, zeros, state, cut, parts):
    import tensorflow as tf

    shapes = []

    def body(i, summed, state, kept):
        more, state, scores = function(state, tree.map_structure(lambda t: tf.gather(t, i), cut))
        shapes[:] = [tree.map_structure(lambda t: t.shape, more)]
        return i + 1, tree.map_structure(tf.add, summed, more), state, kept.write(i, scores)

    def grows(zero):  # a scalar, to the shape of what is added
        return tf.TensorShape(None) if zero.shape.rank == 0 else zero.shape

    kept = tf.TensorArray(tf.float32, parts)
    start = (tf.zeros((), tf.int32), zeros, state, kept)
    shape = (tf.TensorShape(()), tree.map_structure(grows, zeros), [value.shape for value in state], None)
    again = dict(shape_invariants=shape, parallel_iterations=1, maximum_iterations=parts)
    _, summed, state, kept = tf.while_loop(lambda i, *_: i < parts, body, start, **again)
    return tree.map_structure(tf.ensure_shape, summed, shapes[0]), state, kept.stack()


def _jax_loop(function, zeros, state, cut, parts):
    import jax

    def body(carried, part):
        summed, state = carried
        more, state, kept = function(state, part)
        return (jax.tree.map(jax.numpy.add, summed, more), state), kept

    (summed, state), kept = jax.lax.scan(body, (zeros, state), cut)
    return summed, state, kept


def _torch_loop(function, zeros, state, cut, parts):
    kept = []
    for i in range(parts):
        more, state, scores = function(state, tree.map_structure(lambda x, i=i: x[i], cut))
        zeros = tree.map_structure(lambda a, b: a + b, zeros, more)
        kept.append(scores)
    return zeros, state, ops.stack(kept)


_DIFFERENTIATED = {"tensorflow": _tensorflow_differentiated, "jax": _jax_differentiated, "torch": _torch_differentiated}
_LOOPS = {"tensorflow": _tensorflow_loop, "jax": _jax_loop, "torch": _torch_loop}
