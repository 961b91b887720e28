"""Optimizers with the originals' arithmetic: learning rates and weight decay by name, and steps that can be held back."""

import difflib
import fnmatch
import math
import re

import keras
import ml_dtypes
import numpy as np
from keras import ops

from keras_vit.errors import ArgumentError

TRACE_DTYPES = ("float32", "bfloat16")
DECAY_SCALES = ("learning_rate", "schedule")
KERNELS = ("*kernel",)  # of all layers here: `kernel`, `qkv_kernel`, `out_kernel`
LINEAR_PROBE = (("head/*", 1.0), ("*", 0.0))
# Options of Keras that fail or compute something else under a strategy, and what to use
BROKEN_OPTIONS = {
    "clipnorm": "Learner(clip_norm=...) of training.step, which clips the global norm after the all-reduce",
    "global_clipnorm": "Learner(clip_norm=...) of training.step, which clips after the all-reduce",
    "clipvalue": "Learner(clip_norm=...) of training.step, which clips the global norm after the all-reduce",
    "gradient_accumulation_steps": "Learner(parts=...) of training.step, which accumulates inside the step",
    "ema_overwrite_frequency": "use_ema=True alone: `fit` puts the averages in place at its end; keras.callbacks.SwapEMAWeights "
    "evaluates them before",
}


class Optimizer(keras.optimizers.Optimizer):
    """What the optimizers here share: `weight -= factor * (learning_rate * direction + decay * weight)`, in float32.

    The direction is each one's own, the factor comes from `rules`, and the decay is decoupled (arXiv 1711.05101), of the weights
    that `decay_on` names. Patterns are those of `fnmatch`, on a variable's path: "block_3/*", "*/attention/*", "head/kernel".
    `rules=LINEAR_PROBE` freezes all but the head. (`layer.trainable = False` saves the gradient too.)

    Args:
        learning_rate: number or schedule.
        rules: (pattern, factor) pairs; of those that fit a variable the first counts, and without one the factor is 1. A factor
            of 0 freezes, against weight decay too, and keeps no slots.
        weight_decay: at least 0.
        decay_on: pattern or patterns of what is decayed; the kernels by default, as in big_vision.
        decay_scale: "learning_rate": the decay of a step is weight_decay times its learning rate, as in PyTorch and Keras.
            "schedule": weight_decay times the schedule over its `base`, as in big_vision; where the learning rate is a number,
            weight_decay itself.
        **kwargs: of `keras.optimizers.Optimizer`.

    Attributes:
        factors: of each variable it was built on, in their order.
        guard: None, or a boolean () while a step is applied. Where it is False, weights, slots, moving averages and the count of
            steps stay as they are.

    Raises:
        ArgumentError: a value out of range, an option of Keras that is wrong under a strategy; in `build`: a pattern that fits no
            variable.
    """

    def __init__(
        self, learning_rate, *, rules=(), weight_decay=0.0, decay_on=KERNELS, decay_scale="learning_rate", name=None, **kwargs
    ):
        label = type(self).__name__
        for option, ours in BROKEN_OPTIONS.items():
            if kwargs.get(option):
                raise ArgumentError(f"{label}: {option}={kwargs[option]} is wrong under a strategy; use {ours}.")
        rules = tuple((str(pattern), float(factor)) for pattern, factor in rules)
        for pattern, factor in rules:
            _require(0 <= factor < math.inf, f"{label}: the factor of rule {pattern!r} must be at least 0", factor)
        weight_decay = float(weight_decay or 0)
        _require(0 <= weight_decay < math.inf, f"{label}: weight_decay must be at least 0", weight_decay)
        _require(decay_scale in DECAY_SCALES, f"{label}: decay_scale must be one of {DECAY_SCALES}", decay_scale)
        if weight_decay and decay_scale == "schedule" and callable(learning_rate) and not getattr(learning_rate, "base", 0):
            raise ArgumentError(
                f"{label}: decay_scale='schedule' divides by the schedule's `base`, which is 0 or missing in {learning_rate!r}; "
                "take training.schedules.WarmupDecay, or decay_scale='learning_rate'."
            )
        super().__init__(learning_rate=learning_rate, name=name, **kwargs)
        # Keras's own `weight_decay` stays None, by which it leaves the decay to `update_step`.
        self.rules, self.decay, self.decay_scale = rules, weight_decay, decay_scale
        self.decay_on = (decay_on,) if isinstance(decay_on, str) else tuple(decay_on)
        self.guard = None

    def build(self, variables):
        """Makes the slots of all variables.

        Raises:
            ArgumentError: a pattern fits none of them.
        """
        if self.built:
            return
        paths = [variable.path for variable in variables]
        self._check_fit("rules", [pattern for pattern, _ in self.rules], paths)
        if self.decay:
            self._check_fit("decay_on", self.decay_on, paths)
        super().build(variables)
        self.factors = [next((factor for p, factor in self.rules if fnmatch.fnmatchcase(path, p)), 1.0) for path in paths]
        self._decayed = [self.decay > 0 and any(fnmatch.fnmatchcase(path, p) for p in self.decay_on) for path in paths]
        self.build_slots([variable if factor else None for variable, factor in zip(variables, self.factors)])

    def build_slots(self, variables):
        """Makes what the optimizer keeps for each variable.

        Args:
            variables: Keras variables, in the order of `build`; None in place of frozen ones.
        """
        raise NotImplementedError

    def slots(self, variables, suffix, dtype="float32", shape=lambda variable: variable.shape):
        """A slot of zeros for each variable, in a list; None where the variable or its shape is None."""
        shapes = [None if variable is None else shape(variable) for variable in variables]
        return [
            None if size is None else self.add_variable(size, dtype=dtype, name=f"{variable.path.replace('/', '_')}_{suffix}")
            for variable, size in zip(variables, shapes)
        ]

    def direction(self, gradient, index):
        """What a learning rate of 1 would take from a variable, after bringing its slots up to date.

        Args:
            gradient: float32.
            index: of the variable among those it was built on.
        """
        raise NotImplementedError

    def update_step(self, gradient, variable, learning_rate):
        index = self._get_variable_index(variable)  # Keras has no public way to the slots of a variable
        factor = self.factors[index]
        if not factor:
            return
        rate = ops.cast(learning_rate, "float32")
        step = rate * factor * self.direction(ops.cast(ops.convert_to_tensor(gradient), "float32"), index)
        if self._decayed[index]:
            step = step + self._decay_rate(rate) * self.decay * factor * ops.cast(variable, "float32")
        self.assign_sub(variable, ops.cast(step, variable.dtype))

    def store(self, slot, value):
        """Puts a float32 value into a slot and returns it, not yet rounded; where `guard` is False, what was there."""
        if self.guard is not None:  # not by `assign`: a value that is used before it is chosen costs a copy of the slot
            value = _chosen(self.guard, value, ops.cast(slot, "float32"))
        super().assign(slot, ops.cast(value, slot.dtype))
        return value

    def moved(self, slot, value, momentum):
        """The moving average `(1 - momentum) * value + momentum * slot`, stored.

        As optax has it, the momentum beside a slot is rounded to the slot's type: 0.9 is 0.8984375 in bfloat16.
        """
        return self.store(slot, (1 - momentum) * value + as_stored(momentum, slot.dtype) * ops.cast(slot, "float32"))

    def apply(self, grads, trainable_variables=None):
        guard = self.guard  # this replica's own: under tf.distribute another one clears the attribute before this one has ended
        made = self.iterations + 0  # a tensor: TensorFlow would read the variable itself only after it has been counted up
        super().apply(grads, trainable_variables)
        averages = self._model_variables_moving_average if self.use_ema else ()
        for variable, average in zip(self._trainable_variables, averages):
            if average is not None:
                momentum = ops.where(made > 0, ops.cast(self.ema_momentum, average.dtype), ops.zeros((), average.dtype))
                new = momentum * average + (1 - momentum) * ops.cast(variable, average.dtype)
                average.assign(new if guard is None else _chosen(guard, new, average))
        if guard is not None:
            self.iterations.assign(_chosen(guard, self.iterations, made))

    def _update_model_variables_moving_average(self, trainable_variables):
        """Nothing: `apply` does it, since Keras would move the averages where `guard` is False. There is no public way."""

    def finalize_variable_values(self, var_list):
        super().finalize_variable_values(var_list)
        if self.use_ema and keras.config.backend() == "jax":  # there both hold one buffer now, and the next `fit` fails
            for variable in var_list:
                variable.assign(ops.copy(variable))

    def assign(self, variable, value):
        super().assign(variable, self._guarded(value, variable))

    def assign_add(self, variable, value):
        super().assign_add(variable, self._guarded(value, -0.0))

    def assign_sub(self, variable, value):
        super().assign_sub(variable, self._guarded(value, 0.0))

    def exclude_from_weight_decay(self, var_list=None, var_names=None):
        """Refused: Keras would not heed it here."""
        raise ArgumentError(f"{type(self).__name__}: use decay_on=PATTERNS, which names what is decayed, in place of exclusions.")

    def get_config(self):
        own = dict(weight_decay=self.decay, decay_on=list(self.decay_on), decay_scale=self.decay_scale)
        return {**super().get_config(), "rules": [list(rule) for rule in self.rules], **own}

    def _guarded(self, value, kept):
        return value if self.guard is None else _chosen(self.guard, value, kept)

    def _decay_rate(self, rate):
        if self.decay_scale == "learning_rate":
            return rate
        return rate / self._learning_rate.base if callable(self._learning_rate) else 1.0  # Keras names its schedule so

    def _check_fit(self, argument, patterns, paths):
        for pattern in patterns:
            if not any(fnmatch.fnmatchcase(path, pattern) for path in paths):
                near = difflib.get_close_matches(pattern.replace("*", ""), paths, 3, cutoff=0.0)
                raise ArgumentError(
                    f"{type(self).__name__}: {pattern!r} of {argument} fits none of {len(paths)} variables; the nearest paths: "
                    f"{', '.join(near)}."
                )


def _chosen(guard, new, old):
    new = ops.convert_to_tensor(new)
    return ops.where(guard, new, ops.convert_to_tensor(old, new.dtype))


def as_stored(number, dtype):
    """A number as a variable of that type would hold it."""
    return float(np.asarray(number, ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype))


def _require(fits, expected, got):
    if not fits:
        raise ArgumentError(f"{expected}, got {got!r}.")


@keras.saving.register_keras_serializable("keras_vit")
class MomentumSGD(Optimizer):
    """`trace = gradient + momentum * trace; weight -= learning_rate * trace`: `optax.sgd` of the original.

    `keras.optimizers.SGD` keeps the learning rate inside its trace, which under a schedule is another method. As in the original,
    a bfloat16 trace is rounded when it is stored, the update takes the unrounded sum, and the momentum is rounded too (0.9 is
    then 0.8984375).

    Args:
        learning_rate: number or schedule.
        momentum: from 0 to 1.
        trace_dtype: "float32" or "bfloat16".
        **kwargs: of `Optimizer`: rules, weight_decay, ...

    Raises:
        ArgumentError: a value out of range.
    """

    def __init__(self, learning_rate=0.03, momentum=0.9, trace_dtype="float32", name="momentum_sgd", **kwargs):
        _require(0 <= momentum <= 1, "MomentumSGD: momentum must be from 0 to 1", momentum)
        _require(trace_dtype in TRACE_DTYPES, f"MomentumSGD: trace_dtype must be one of {TRACE_DTYPES}", trace_dtype)
        super().__init__(learning_rate, name=name, **kwargs)
        self.momentum, self.trace_dtype = momentum, trace_dtype

    def build_slots(self, variables):
        self._traces = self.slots(variables, "trace", self.trace_dtype)

    def direction(self, gradient, index):
        stored = self._traces[index]
        return self.store(stored, gradient + as_stored(self.momentum, self.trace_dtype) * ops.cast(stored, "float32"))

    def get_config(self):
        return {**super().get_config(), "momentum": self.momentum, "trace_dtype": self.trace_dtype}


@keras.saving.register_keras_serializable("keras_vit")
class AdamW(Optimizer):
    """Adam with decoupled weight decay (arXiv 1711.05101), as `optax.scale_by_adam` in big_vision.

    Epsilon is added to the root of the corrected second moment (algorithm 1 of arXiv 1412.6980, as in PyTorch); that of
    `keras.optimizers.AdamW` is added to the uncorrected one.

    Args:
        learning_rate: number or schedule.
        beta_1, beta_2: decay of the moments, at least 0 and less than 1.
        epsilon: above 0.
        moment_dtype: of the first moment, "float32" or "bfloat16" (big_vision's `mu_dtype`); it is rounded when it is stored, and
            `beta_1` beside it. The second is float32.
        **kwargs: of `Optimizer`: rules, weight_decay, ...

    Raises:
        ArgumentError: a value out of range.
    """

    def __init__(
        self, learning_rate=1e-3, beta_1=0.9, beta_2=0.999, epsilon=1e-8, moment_dtype="float32", name="adam_w", **kwargs
    ):
        for label, beta in (("beta_1", beta_1), ("beta_2", beta_2)):
            _require(0 <= beta < 1, f"AdamW: {label} must be at least 0 and less than 1", beta)
        _require(0 < epsilon < math.inf, "AdamW: epsilon must be above 0", epsilon)
        _require(moment_dtype in TRACE_DTYPES, f"AdamW: moment_dtype must be one of {TRACE_DTYPES}", moment_dtype)
        super().__init__(learning_rate, name=name, **kwargs)
        self.beta_1, self.beta_2, self.epsilon, self.moment_dtype = beta_1, beta_2, epsilon, moment_dtype

    def build_slots(self, variables):
        self._first = self.slots(variables, "first", self.moment_dtype)
        self._second = self.slots(variables, "second")

    def direction(self, gradient, index):
        step = ops.cast(self.iterations, "float32") + 1
        first = self.moved(self._first[index], gradient, self.beta_1) / (1 - self.beta_1**step)
        second = self.moved(self._second[index], ops.square(gradient), self.beta_2) / (1 - self.beta_2**step)
        return first / (ops.sqrt(second) + self.epsilon)

    def get_config(self):
        own = dict(beta_1=self.beta_1, beta_2=self.beta_2, epsilon=self.epsilon, moment_dtype=self.moment_dtype)
        return {**super().get_config(), **own}


@keras.saving.register_keras_serializable("keras_vit")
class Adafactor(Optimizer):
    """Adafactor as "Scaling Vision Transformers" modifies it (arXiv 2106.04560): `scale_by_adafactor` of big_vision's `optax.py`.

    Of the second moment over the two largest axes only the means along each are kept (arXiv 1804.04235), where both have at least
    `min_dim_size_to_factor`. There is a first moment, and the learning rate is not relative to the weights' size. Weight decay as
    in big_vision is `decay_scale="schedule"`.

    A variable that holds several of the original's side by side has an attribute `fused_axis`, the axis that counts them; each
    has its own statistics and clipping. `layers.Attention` sets it on `qkv_kernel` and `qkv_bias`.

    Args:
        learning_rate: number or schedule.
        min_dim_size_to_factor: least size of the second largest axis of what is factored.
        decay_rate, decay_offset, beta2_cap: at step t = 0, 1, ... the second moment decays by
            min(beta2_cap, 1 - (t - decay_offset + 1) ** -decay_rate); steps before the offset count as the one there.
        clipping_threshold: largest root mean square of a variable's direction, before the first moment; None does not clip.
        momentum: of the first moment, less than 1; None or 0 for none.
        dtype_momentum: "float32" or "bfloat16"; the first moment is rounded when it is stored, and `momentum` beside it.
        epsilon: added to the squared gradient; above 0.
        **kwargs: of `Optimizer`: rules, weight_decay, ...

    Raises:
        ArgumentError: a value out of range.
    """

    def __init__(
        self, learning_rate=1e-3, min_dim_size_to_factor=32, decay_rate=0.8, decay_offset=0, beta2_cap=0.999,
        clipping_threshold=None, momentum=0.9, dtype_momentum="bfloat16", epsilon=1e-30, name="adafactor", **kwargs,
    ):  # fmt: skip
        _require(min_dim_size_to_factor >= 1, "Adafactor: min_dim_size_to_factor must be at least 1", min_dim_size_to_factor)
        _require(decay_rate > 0, "Adafactor: decay_rate must be above 0", decay_rate)
        _require(0 <= beta2_cap < 1, "Adafactor: beta2_cap must be at least 0 and less than 1", beta2_cap)
        _require((clipping_threshold or 0) >= 0, "Adafactor: clipping_threshold must be above 0 or None", clipping_threshold)
        _require(0 <= (momentum or 0) < 1, "Adafactor: momentum must be at least 0 and less than 1", momentum)
        _require(dtype_momentum in TRACE_DTYPES, f"Adafactor: dtype_momentum must be one of {TRACE_DTYPES}", dtype_momentum)
        _require(epsilon > 0, "Adafactor: epsilon must be above 0", epsilon)
        super().__init__(learning_rate, name=name, **kwargs)
        self.min_dim_size_to_factor, self.decay_rate, self.decay_offset = min_dim_size_to_factor, decay_rate, decay_offset
        self.beta2_cap, self.clipping_threshold, self.epsilon = beta2_cap, clipping_threshold, epsilon
        self.momentum, self.dtype_momentum = momentum, dtype_momentum

    def build_slots(self, variables):
        self._fused = [getattr(variable, "fused_axis", None) for variable in variables]
        self._factored = [() if v is None else self._largest(v.shape, fused) for v, fused in zip(variables, self._fused)]
        factored = [v if axes else None for v, axes in zip(variables, self._factored)]
        whole = [None if axes else v for v, axes in zip(variables, self._factored)]
        axes = {v.path: axes for v, axes in zip(variables, self._factored) if axes}
        self._rows = self.slots(factored, "rows", shape=lambda v: _without(v.shape, axes[v.path][1]))
        self._columns = self.slots(factored, "columns", shape=lambda v: _without(v.shape, axes[v.path][0]))
        self._second = self.slots(whole, "second")
        self._traces = self.slots(variables, "trace", self.dtype_momentum) if self.momentum else None

    def _largest(self, shape, fused):
        """(second largest, largest) of the axes, the later of equal ones counting as larger; () where that is not factored."""
        axes = sorted((axis for axis in range(len(shape)) if axis != fused), key=lambda axis: shape[axis])[-2:]
        return tuple(axes) if len(axes) == 2 and shape[axes[0]] >= self.min_dim_size_to_factor else ()

    def direction(self, gradient, index):
        step = ops.maximum(ops.cast(self.iterations, "float32") - self.decay_offset, 0.0) + 1
        beta = ops.minimum(self.beta2_cap, 1 - step**-self.decay_rate)
        square = ops.square(gradient) + self.epsilon

        def moved(slot, value):
            return self.store(slot, beta * slot + (1 - beta) * value)

        if self._factored[index]:
            second, largest = self._factored[index]
            rows = moved(self._rows[index], ops.mean(square, axis=largest, keepdims=True))
            columns = moved(self._columns[index], ops.mean(square, axis=second, keepdims=True))
            update = gradient * (rows / ops.mean(rows, axis=second, keepdims=True)) ** -0.5 * columns**-0.5
        else:
            update = gradient * moved(self._second[index], square) ** -0.5
        if self.clipping_threshold:
            axes = tuple(axis for axis in range(len(update.shape)) if axis != self._fused[index])
            root = ops.sqrt(ops.mean(ops.square(update), axis=axes, keepdims=True))
            update = update / ops.maximum(1.0, root / self.clipping_threshold)
        return self.moved(self._traces[index], update, self.momentum) if self.momentum else update

    def get_config(self):
        factoring = ("min_dim_size_to_factor", "decay_rate", "decay_offset", "beta2_cap", "clipping_threshold", "epsilon")
        return {**super().get_config(), **{name: getattr(self, name) for name in (*factoring, "momentum", "dtype_momentum")}}


def _without(shape, axis):
    return (*shape[:axis], 1, *shape[axis + 1 :])


def layerwise_decay(model, decay):
    """`rules` of learning rates that fall towards the image: the layer decay of BEiT (arXiv 2106.08254, `optim_factory.py`).

    With n blocks, `block_i` has factor decay ** (n - i), all layers before `block_0` have decay ** (n + 1), those after the last
    block (norm, pooling, head) have 1.

    Args:
        model: functional, with layers `block_0`, `block_1`, ... and trainable weights.
        decay: above 0, at most 1.

    Returns:
        A list of (pattern, factor).

    Raises:
        ArgumentError: no blocks, or another decay.
    """
    _require(0 < decay <= 1, "layerwise_decay: decay must be above 0 and at most 1", decay)
    numbers = [int(found[1]) if (found := re.fullmatch(r"block_(\d+)", layer.name)) else None for layer in model.layers]
    blocks = [number for number in numbers if number is not None]
    if not blocks:
        raise ArgumentError(
            f"layerwise_decay: {model.name!r} has no layers block_0, block_1, ...; write rules for its own: "
            f"{', '.join(layer.name for layer in model.layers[:6])}, ..."
        )
    depth, before, rules = max(blocks) + 1, True, []
    for layer, number in zip(model.layers, numbers):
        before = before and number is None
        if layer.trainable_variables and (before or number is not None):
            rules.append((f"{layer.name}/*", decay ** (depth + 1 if before else depth - number)))
    return rules
