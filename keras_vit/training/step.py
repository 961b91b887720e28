"""The train step: `fit` of a `Learner` makes the original's update, the same on one device and on many."""

import functools

import keras
import numpy as np
from keras import ops, tree

from keras_vit import zoo
from keras_vit.errors import ArgumentError
from keras_vit.training.accumulate import accumulated, differentiated
from keras_vit.training.optimizers import BROKEN_OPTIONS
from keras_vit.training.twopass import global_norm

_APART = 0x9E3779B1  # what the seeds of two replicas differ by


class Learner(keras.Model):
    """A functional model whose `fit` makes one update from a batch: accumulate, reduce over replicas, clip, check, apply.

    A batch goes through the model in `parts`, one by one; the gradient is the mean over them and over all replicas, as in the
    original's `accumulate_gradient`; only then is its global norm clipped. Weights that `rules` of the optimizer freeze count in
    no norm. A step whose loss or gradient is not finite changes no weight and none of the slots of this package's optimizers.
    (Other optimizers may then see a gradient of zeros.) Layers are shared with the model it is made from:

        learner = Learner(model.inputs, model.outputs, parts=8, clip_norm=1.0)
        learner.compile(MomentumSGD(schedule), loss)
        learner.fit(batches)

    Beside `loss` and the metrics, which Keras averages over an epoch, the logs of a step have

        step_loss: the loss of this step's whole batch, before the update.
        grad_norm: the global norm of its gradient, before clipping.
        healthy: 1.0, or 0.0 where the step was not made because a number is not finite.

    Under `tf.distribute` dropout draws other masks on each replica. With `mixed_float16` a gradient that overflows is no fault as
    long as the loss scale of Keras can still fall.

    Args:
        inputs, outputs: of a functional model with one output.
        parts: how many; the batch of a replica must be a multiple.
        clip_norm: the gradient's largest global norm; None or 0 does not clip.
        two_pass: a `twopass.GSAM` for sharpness-aware training, or None.
        objective: an `objectives.Objective` in place of the compiled loss alone, or None.
        steps_on_device: updates that one call of the compiled function makes, on TensorFlow; callbacks run after each such call,
            with the logs of its last step. For TPUs.

    Raises:
        ArgumentError: an argument is out of range; in `compile`: an option or the strategy in use is broken; in `fit`: the batch
            is no multiple.
    """

    def __init__(self, inputs, outputs, *, parts=1, clip_norm=None, two_pass=None, objective=None, steps_on_device=1, **kwargs):
        if parts < 1 or steps_on_device < 1 or (clip_norm or 0) < 0:
            raise ArgumentError(
                "Learner: parts and steps_on_device must be at least 1 and clip_norm at least 0, got "
                f"parts={parts}, steps_on_device={steps_on_device}, clip_norm={clip_norm}."
            )
        if steps_on_device > 1 and keras.config.backend() != "tensorflow":
            raise ArgumentError(f"Learner: steps_on_device is for TensorFlow, not {keras.config.backend()}; leave it at 1.")
        super().__init__(inputs, outputs, **kwargs)
        self.parts, self.clip_norm, self.two_pass, self.steps_on_device = parts, clip_norm, two_pass, steps_on_device
        self.objective = objective
        self.frozen = list(objective.frozen) if objective else []  # which Keras tracks, so that their weights reach the step
        self._replicated = None

    def compile(self, optimizer, loss=None, **kwargs):
        """As in Keras, whose options that do not work under the strategy in use are refused."""
        if keras.config.backend() == "tensorflow":
            zoo.check_strategy(self, own_loop=True)
        if keras.config.backend() == "tensorflow" and self.distribute_strategy.num_replicas_in_sync > 1:
            inner = _inner(optimizer)
            for option, ours in BROKEN_OPTIONS.items():
                if getattr(inner, option, None):
                    raise ArgumentError(f"Learner: {option} of {inner.name!r} is wrong under tf.distribute; use {ours}.")
            if kwargs.get("steps_per_execution", 1) > 1:
                raise ArgumentError("Learner: steps_per_execution fails under tf.distribute; use Learner(steps_on_device=...).")
            if kwargs.get("jit_compile") is True:
                raise ArgumentError("Learner: jit_compile=True fails under tf.distribute; leave it out.")
        if self.two_pass and keras.config.backend() == "tensorflow" and any(_rematted(layer) for layer in self.layers):
            raise ArgumentError(
                "Learner: on TensorFlow a model with rematerialisation cannot take two passes (SAM, GSAM); build it without, or "
                "use JAX."
            )
        super().compile(optimizer, loss, **kwargs)

    def train_step(self, *args):
        return _STEPS[keras.config.backend()](self, *args)

    def loss_of(self, weights, others, data, scale=None):
        """The loss as a pure function.

        Args:
            weights: values of the trainable variables, or None for the variables themselves.
            others: values of the other variables.
            data: (images, labels[, weights of examples]).
            scale: None, or what the loss is multiplied by.

        Returns:
            (scaled loss, (loss, other variables' values afterwards, scores)).
        """
        x, y, weight = keras.utils.unpack_x_y_sample_weight(data)
        mapping = list(zip(self.non_trainable_variables, others))
        if weights is not None:
            mapping += zip(self.trainable_variables, weights)
        with keras.StatelessScope(state_mapping=mapping, collect_losses=True) as scope:
            if self.objective:
                loss, scores = self.objective(self, x, y, weight)
            else:
                scores = self(x, training=True)
                loss = self.compute_loss(x, y, scores, weight, training=True)
            others = [scope.get_current_value(variable) for variable in self.non_trainable_variables]
        return loss if scale is None else loss * scale, (loss, others, scores)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        return super().compute_loss(x, self._labels(y), y_pred, sample_weight, training)

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        return super().compute_metrics(x, self._labels(y), y_pred, sample_weight)

    def _labels(self, y):
        return self.objective.labels(y) if self.objective and y is not None else y

    def gradient(self, weights, others, data, scale=None, own=None, devices=1):
        """The gradient of a batch at given weights, taken part by part: a pure function.

        Args:
            weights, others, data, scale: as in `loss_of`, but that `weights` are values always.
            own: the trainable variables themselves, if `weights` are theirs and the backend differentiates by variables.
            devices: over which the batch is spread in order.

        Returns:
            ((loss, gradients), others, scores).
        """

        one_by_one = _one_by_one(self)

        def part(others, data):
            def loss_at(given):
                return self.loss_of(None if own else given, others, data, scale)

            _, (loss, others, scores), gradients = differentiated(loss_at, own or weights)
            if scale is not None:
                gradients = [g / ops.cast(scale, g.dtype) for g in gradients]
            return (loss, gradients), others, ops.cast(scores, "float32")

        def zeros():
            return ops.zeros(()), [ops.zeros(() if one_by_one else w.shape, w.dtype) for w in weights]

        return accumulated(part, zeros, others, data, self.parts, devices)

    def update(self, gradient, weights, learning_rate, scale):
        """What a step applies: two-pass, clipping and the check of its numbers.

        Args:
            gradient: weights, own -> ((loss, gradients), others, scores), reduced over replicas; `own` says that these are the
                variables' values.
            weights: values of the trainable variables.
            learning_rate: of this step, or None where nothing asks for it.
            scale: the loss scale, or None.

        Returns:
            (gradients, others, scores, report), where report has step_loss, grad_norm and healthy.
        """
        factors = getattr(_inner(self.optimizer), "factors", [1.0] * len(weights))

        def taken(weights, own):
            """Without the gradients of weights that the optimizer leaves as they are."""
            (loss, gradients), others, scores = gradient(weights, own)
            return loss, [g if factor else ops.zeros_like(g) for g, factor in zip(gradients, factors)], others, scores

        loss, gradients, others, scores = taken(weights, True)
        norm = global_norm(gradients)
        if self.two_pass:
            moved = self.two_pass.perturbed(weights, gradients, norm, learning_rate)
            _, robust, _, _ = taken(moved, False)
            gradients = self.two_pass.combined(gradients, robust, norm)
            norm = global_norm(gradients)
        healthy = ops.isfinite(norm)
        if scale is not None:  # an overflow that a smaller scale would not have had
            healthy = ops.logical_or(healthy, scale > 1)
        healthy = ops.logical_and(healthy, ops.isfinite(loss))
        if self.clip_norm:
            short = norm < self.clip_norm
            if _one_by_one(self):
                divisor = ops.where(short, 1.0, norm / self.clip_norm)
                gradients = [g / ops.cast(divisor, g.dtype) for g in gradients]
            else:  # the original's own operations, of which XLA makes one pass, with the original's rounding
                gradients = [ops.where(short, g, g / ops.cast(norm, g.dtype) * self.clip_norm) for g in gradients]
        report = {"step_loss": loss, "grad_norm": norm, "healthy": ops.cast(healthy, "float32")}
        return gradients, others, scores, report, healthy

    def predict_on_batch(self, x):
        """(n, ...) -> (n, classes) scores as an array, computed by all replicas of this process, for any n.

        (Under `tf.distribute` Keras's own gives every score once for each replica.)
        """
        x = np.asarray(x)
        if keras.config.backend() == "jax" and keras.distribution.distribution() is not None:
            call = _distributed_call
        elif keras.config.backend() == "tensorflow" and (
            self.distribute_strategy.num_replicas_in_sync > 1 or _beyond(self.distribute_strategy)
        ):
            call = _replicated_call
        else:
            return super().predict_on_batch(x)
        if self._replicated is None:
            self._replicated = call(self)
        return self._replicated(x)

    def make_train_function(self, force=False):
        """As in Keras, but that it also works for several steps on the device and for several workers."""
        zoo.build_optimizer(self)
        if keras.config.backend() != "tensorflow" or (self.steps_on_device == 1 and not _beyond(self.distribute_strategy)):
            return super().make_train_function(force)
        if self.train_function is None or force:
            self.train_function = _device_loop(self)

    def _maybe_symbolic_build(self, iterator=None, data_batch=None):
        strategy = self.distribute_strategy
        if iterator is not None and _beyond(strategy):  # there Keras reduces the batch, which fails (keras#20585)
            first = next(next(each for *_, each in iterator))
            iterator, data_batch = None, tree.map_structure(lambda v: strategy.experimental_local_results(v)[0], first)
        super()._maybe_symbolic_build(iterator=iterator, data_batch=data_batch)


def _rematted(layer):
    return getattr(layer, "_remat_mode", None) is not None


def _inner(optimizer):
    """What an optimizer that scales the loss applies."""
    return getattr(optimizer, "inner_optimizer", optimizer)


def _scaled(optimizer):
    return hasattr(optimizer, "inner_optimizer") or bool(optimizer.loss_scale_factor)


def _padded(x, multiple):
    """x (n, ...) with its last row repeated until n is a multiple."""
    return np.concatenate([x, np.repeat(x[-1:], -len(x) % multiple, axis=0)])


def _batch_axis():
    """Over how many devices JAX divides a batch."""
    distribution = keras.distribution.distribution()
    if distribution is None or distribution.batch_dim_name is None:
        return 1
    return dict(zip(distribution.device_mesh.axis_names, distribution.device_mesh.shape))[distribution.batch_dim_name]


def _replicated_call(model):
    """(n, ...) -> (n, classes) of a model under a strategy of `tf.distribute`."""
    import tensorflow as tf

    strategy = model.distribute_strategy
    call = tf.function(lambda pieces: strategy.run(lambda x: model(x, training=False), args=(pieces,)), autograph=False)
    local = len(strategy.extended.worker_devices)

    def scores(x):
        pieces = np.split(_padded(x, local), local)
        values = strategy.experimental_distribute_values_from_function(
            lambda context: tf.constant(pieces[_local(context, local)])
        )
        found = strategy.experimental_local_results(call(values))
        return np.concatenate([each.numpy() for each in found])[: len(x)]

    return scores


def _distributed_call(model):
    """(n, ...) -> (n, classes) of a model under a `keras.distribution`; all processes call it together, with the same images."""
    import jax

    distribution = keras.distribution.distribution()
    mesh, spec = distribution.device_mesh.backend_mesh, jax.sharding.PartitionSpec
    spread, whole = (jax.sharding.NamedSharding(mesh, spec(axis)) for axis in (distribution.batch_dim_name, None))
    variables = (model.trainable_variables, model.non_trainable_variables)
    call = jax.jit(lambda state, x: model.stateless_call(*state, x, training=False)[0], out_shardings=whole)

    def scores(x):
        model.jax_state_sync()
        padded = _padded(x, _batch_axis())
        pieces = jax.make_array_from_callback(padded.shape, spread, lambda place: padded[place])
        return np.asarray(call([[v.value for v in each] for each in variables], pieces))[: len(x)]

    return scores


def _local(context, count):
    """The number of a replica among the `count` of its worker."""
    return context.replica_id_in_sync_group % count


def _tensorflow_step(model, data):
    import tensorflow as tf

    replica = tf.distribute.get_replica_context()
    replicas = replica.num_replicas_in_sync
    x, y, weight = keras.utils.unpack_x_y_sample_weight(data)
    data = (x, y) if weight is None else (x, y, weight)
    optimizer, own = model.optimizer, [v.value for v in model.trainable_variables]
    scale = optimizer.scale_loss(tf.ones(())) if _scaled(optimizer) else None
    before = [tf.convert_to_tensor(v.value) for v in model.non_trainable_variables]
    seeds = [v.path.endswith("seed_generator_state") for v in model.non_trainable_variables]

    def apart(states, sign):
        """Seeds that are the same on every replica as seeds that are not, and back."""
        if replicas == 1:
            return states
        number = tf.cast(replica.replica_id_in_sync_group, tf.int64) * sign * _APART
        return [s + tf.cast(tf.stack([number, 0]), s.dtype) if is_seed else s for s, is_seed in zip(states, seeds)]

    def reduced(weights, at_variables):
        taken = model.gradient(weights, apart(before, 1), data, scale, own if at_variables else None)
        (loss, gradients), others, scores = taken
        if replicas > 1:  # Keras has divided the loss by the number of replicas
            loss, *gradients = replica.all_reduce(tf.distribute.ReduceOp.SUM, [loss, *gradients])
        return (loss, gradients), apart(others, -1), scores

    weights = [tf.convert_to_tensor(value) for value in own] if model.two_pass else own
    rate = tf.cast(optimizer.learning_rate, tf.float32) if model.two_pass else None
    gradients, others, scores, report, healthy = model.update(reduced, weights, rate, scale)
    for variable, old, new in zip(model.non_trainable_variables, before, others):
        if new is not old:
            variable.assign(new)
    if replicas > 1:  # the optimizer sums them over the replicas once more
        gradients = [g / replicas for g in gradients]
    if scale is not None:
        gradients = [g * tf.cast(scale, g.dtype) for g in gradients]
    inner = _inner(optimizer)

    def apply():
        optimizer.apply(gradients, model.trainable_variables)
        return healthy

    if replicas == 1 and _one_by_one(model):
        tf.cond(healthy, apply, lambda: healthy)
    elif hasattr(inner, "guard"):
        inner.guard = healthy
        apply()
        inner.guard = None
    else:
        if scale is None:
            gradients = [tf.where(healthy, g, tf.zeros_like(g)) for g in gradients]
        apply()
    whole = report["step_loss"]
    model._loss_tracker.update_state(whole, sample_weight=tf.shape(x)[0])  # as the train step of Keras does
    logs = model.compute_metrics(x, y, scores, weight)
    if replicas > 1:  # so that every worker has the same
        logs = dict(zip(logs, replica.all_reduce(tf.distribute.ReduceOp.MEAN, list(logs.values()))))
    return {**logs, **report}


def _jax_step(model, state, data):
    import jax

    trainable, non_trainable, optimizer, metrics = state
    x, y, weight = keras.utils.unpack_x_y_sample_weight(data)
    data = (x, y) if weight is None else (x, y, weight)
    with keras.StatelessScope(state_mapping=zip(model.optimizer.variables, optimizer)):
        scale = model.optimizer.scale_loss(jax.numpy.ones(())) if _scaled(model.optimizer) else None
        rate = ops.convert_to_tensor(model.optimizer.learning_rate) if model.two_pass else None

    def gradient(weights, at_variables):
        return model.gradient(weights, non_trainable, data, scale, devices=_batch_axis())

    gradients, others, scores, report, healthy = model.update(gradient, trainable, rate, scale)
    if scale is not None:
        gradients = [g * scale.astype(g.dtype) for g in gradients]
    updated = model.optimizer.stateless_apply(optimizer, gradients, trainable)
    keep = functools.partial(jax.tree.map, lambda new, old: jax.numpy.where(healthy, new, old))
    trainable, optimizer, others = keep((*updated, others), (trainable, optimizer, non_trainable))
    logs, metrics = model._update_metrics_variables(metrics, report["step_loss"], x, y, scores, weight)
    return {**logs, **report}, (trainable, others, optimizer, metrics)


def _torch_step(model, data):
    import torch

    x, y, weight = keras.utils.unpack_x_y_sample_weight(data)
    data = (x, y) if weight is None else (x, y, weight)
    optimizer, own = model.optimizer, [v.value for v in model.trainable_variables]
    before = [v.value for v in model.non_trainable_variables]
    scale = optimizer.scale_loss(torch.ones(())) if _scaled(optimizer) else None

    def gradient(weights, at_variables):
        return model.gradient(weights, before, data, scale, own if at_variables else None)

    rate = ops.convert_to_tensor(optimizer.learning_rate) if model.two_pass else None
    with torch.no_grad():
        gradients, others, scores, report, healthy = model.update(gradient, own, rate, scale)
        if scale is not None:
            gradients = [g * scale.to(g.dtype) for g in gradients]
        if healthy:
            for variable, old, new in zip(model.non_trainable_variables, before, others):
                if new is not old:
                    variable.assign(new)
            optimizer.apply(gradients, model.trainable_variables)
        model._loss_tracker.update_state(report["step_loss"], sample_weight=x.shape[0])
        return {**model.compute_metrics(x, y, scores, weight), **report}


_STEPS = {"tensorflow": _tensorflow_step, "jax": _jax_step, "torch": _torch_step}


def _beyond(strategy):
    """Whether a `tf.distribute` strategy reaches beyond this machine, or to a TPU: Keras 3 cannot reduce its results."""
    return strategy.cluster_resolver is not None


def _one_by_one(model):
    """Whether operations run one by one, each a pass through memory: on TensorFlow without XLA, which compiles all for a TPU."""
    return keras.config.backend() == "tensorflow" and not (model.jit_compile or _beyond(model.distribute_strategy))


def _device_loop(model):
    import tensorflow as tf

    strategy = model.distribute_strategy
    step = model.train_step
    if model.jit_compile and strategy.num_replicas_in_sync == 1:
        step = tf.function(step, jit_compile=True, autograph=False)

    def once(iterator):
        logs = strategy.run(step, args=(next(iterator),))
        return {name: strategy.experimental_local_results(value)[0] for name, value in logs.items()}

    @tf.function(autograph=False)  # which would rewrite all of Keras: 10 s
    def several(iterator):
        logs = once(iterator)
        if model.steps_on_device == 1:
            return logs

        def body(i, logs):
            new = once(iterator)
            return i + 1, {**new, "healthy": tf.minimum(new["healthy"], logs["healthy"])}

        _, logs = tf.while_loop(lambda i, _: i < model.steps_on_device, body, (1, logs), parallel_iterations=1)
        return logs

    return several
