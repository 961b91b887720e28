"""The optimizer of the original: `optax.chain(clip_by_global_norm(...), sgd(momentum=0.9, accumulator_dtype=...))`."""

import keras
from keras import ops

from keras_vit.errors import ArgumentError

TRACE_DTYPES = ("float32", "bfloat16")


def clip_by_global_norm(gradients, limit):
    """Gradients as they are while their global norm is less than `limit`, else `gradient / norm * limit`, as in optax.

    Args:
        gradients: list of tensors, None among them allowed.
        limit: above 0.
    """
    norm = ops.sqrt(sum(ops.sum(ops.square(ops.cast(g, "float32"))) for g in gradients if g is not None))

    def clip(g):
        return ops.where(norm < limit, g, g / ops.cast(norm, g.dtype) * limit)

    return [None if g is None else clip(g) for g in gradients]


@keras.saving.register_keras_serializable("keras_vit")
class MomentumSGD(keras.optimizers.Optimizer):
    """`trace = gradient + momentum * trace; weight -= learning_rate * trace`, after clipping by global norm.

    `keras.optimizers.SGD` keeps the learning rate inside its trace, which under a schedule is another method. As in the original,
    a bfloat16 trace is rounded when it is stored, the update takes the unrounded sum, and the momentum is rounded too (0.9 is
    then 0.8984375).

    Args:
        learning_rate: number or schedule.
        momentum: in [0, 1).
        clip_norm: the gradient's largest global norm; 0 or None does not clip.
        trace_dtype: "float32" or "bfloat16".
        **kwargs: of `keras.optimizers.Optimizer`.

    Raises:
        ArgumentError: another dtype.
    """

    def __init__(self, learning_rate=0.03, momentum=0.9, clip_norm=None, trace_dtype="float32", name="momentum_sgd", **kwargs):
        if trace_dtype not in TRACE_DTYPES:
            raise ArgumentError(f"MomentumSGD: trace_dtype must be one of {TRACE_DTYPES}, got {trace_dtype!r}.")
        super().__init__(learning_rate=learning_rate, name=name, **kwargs)
        self.momentum, self.clip_norm, self.trace_dtype = momentum, clip_norm, trace_dtype
        self._rounded_momentum = float(ops.cast(ops.cast(momentum, trace_dtype), "float32"))

    def build(self, variables):
        if self.built:
            return
        super().build(variables)
        self._traces = [
            self.add_variable(v.shape, dtype=self.trace_dtype, name=f"{v.path.replace('/', '_')}_trace") for v in variables
        ]

    def apply(self, grads, trainable_variables=None):
        if self.clip_norm:
            grads = clip_by_global_norm(grads, self.clip_norm * (self.loss_scale_factor or 1.0))
        super().apply(grads, trainable_variables)

    def update_step(self, gradient, variable, learning_rate):
        stored = self._traces[self._get_variable_index(variable)]
        trace = ops.cast(gradient, "float32") + self._rounded_momentum * ops.cast(stored, "float32")
        self.assign(stored, ops.cast(trace, stored.dtype))
        self.assign_sub(variable, ops.cast(ops.cast(learning_rate, "float32") * trace, variable.dtype))

    def get_config(self):
        own = dict(momentum=self.momentum, clip_norm=self.clip_norm, trace_dtype=self.trace_dtype)
        return {**super().get_config(), **own}
