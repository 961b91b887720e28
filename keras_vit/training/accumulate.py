"""Gradient accumulation inside the train step, for TensorFlow and JAX."""

import keras
from keras import ops, tree

from keras_vit.errors import ArgumentError


class Accumulating(keras.Model):
    """A functional model whose `fit` sends a batch through in parts, one by one, and updates once with the mean gradient.

    The loss is the mean over the parts, so that loss and update are those of the whole batch, as in the original's
    `accumulate_gradient`; clipping and momentum, in the optimizer, see the mean. (Keras's own `gradient_accumulation_steps`
    spreads one update over several batches, and fails under a strategy.) Layers are shared with the model it is made from:

        Accumulating(model.inputs, model.outputs, parts=8)

    Args:
        inputs, outputs: of a functional model.
        parts: how many; the batch must be a multiple.

    Raises:
        ArgumentError: on PyTorch, or `parts` is less than 1; in `fit`: the batch is no multiple.
    """

    def __init__(self, inputs, outputs, parts, **kwargs):
        if keras.config.backend() not in _STEPS:
            raise ArgumentError(
                f"Accumulating: works on {' and '.join(_STEPS)}, not on {keras.config.backend()}; train with accum_steps=1."
            )
        if parts < 1:
            raise ArgumentError(f"Accumulating: parts must be at least 1, got {parts}.")
        super().__init__(inputs, outputs, **kwargs)
        self.parts = parts

    def train_step(self, *args):
        return _STEPS[keras.config.backend()](self, *args)


def _divide(data, parts):
    """Every (b, ...) of `data` as (parts, b / parts, ...)."""

    def divide(x):
        if isinstance(x.shape[0], int) and x.shape[0] % parts:
            raise ArgumentError(f"Accumulating: a batch of {x.shape[0]} cannot be cut into {parts} equal parts; change either.")
        return ops.reshape(x, (parts, -1, *x.shape[1:]))

    return tree.map_structure(divide, data)


def _tensorflow_step(model, data):
    import tensorflow as tf

    x, y, weight = keras.utils.unpack_x_y_sample_weight(data)
    divided = _divide((x, y) if weight is None else (x, y, weight), model.parts)
    variables = model.trainable_weights

    def add_part(i, sums):
        part = tree.map_structure(lambda t: tf.gather(t, i), divided)
        x, y, weight = keras.utils.unpack_x_y_sample_weight(part)
        with tf.GradientTape() as tape:
            scores = model(x, training=True)
            loss = model.compute_loss(x, y, scores, weight, training=True)
            scaled = model.optimizer.scale_loss(loss)
        model._loss_tracker.update_state(loss, sample_weight=tf.shape(y)[0])  # as the train step of Keras does
        model.compute_metrics(x, y, scores, weight)
        gradients = tape.gradient(scaled, variables, unconnected_gradients=tf.UnconnectedGradients.ZERO)
        return i + 1, [total + gradient for total, gradient in zip(sums, gradients)]

    zeros = [tf.zeros(v.shape, v.dtype) for v in variables]
    again = dict(parallel_iterations=1, maximum_iterations=model.parts)
    _, sums = tf.while_loop(lambda i, _: i < model.parts, add_part, (0, zeros), **again)
    model.optimizer.apply_gradients([(total / model.parts, v) for total, v in zip(sums, variables)])
    return model.get_metrics_result()


def _jax_step(model, state, data):
    import jax

    trainable, non_trainable, optimizer, metrics = state
    x, y, weight = keras.utils.unpack_x_y_sample_weight(data)
    gradient_of = jax.value_and_grad(model.compute_loss_and_updates, has_aux=True)

    def add_part(carried, part):
        sums, non_trainable, total = carried
        x, y, weight = keras.utils.unpack_x_y_sample_weight(part)
        (_, (loss, scores, non_trainable, _)), gradients = gradient_of(
            trainable, non_trainable, metrics, x, y, weight, training=True, optimizer_variables=optimizer
        )
        return (jax.tree.map(jax.numpy.add, sums, gradients), non_trainable, total + loss), scores

    start = (jax.tree.map(jax.numpy.zeros_like, trainable), non_trainable, 0.0)
    divided = _divide((x, y) if weight is None else (x, y, weight), model.parts)
    (sums, non_trainable, total), scores = jax.lax.scan(add_part, start, divided)
    gradients = jax.tree.map(lambda total: total / model.parts, sums)
    trainable, optimizer = model.optimizer.stateless_apply(optimizer, gradients, trainable)
    scores = jax.tree.map(lambda s: s.reshape(-1, *s.shape[2:]), scores)
    logs, metrics = model._update_metrics_variables(metrics, total / model.parts, x, y, scores, weight)
    return logs, (trainable, non_trainable, optimizer, metrics)


_STEPS = {"tensorflow": _tensorflow_step, "jax": _jax_step}
