"""Learning-rate schedules."""

import math

import keras
from keras import ops

from keras_vit.errors import ArgumentError

DECAYS = ("cosine", "linear")


@keras.saving.register_keras_serializable("keras_vit")
class WarmupDecay(keras.optimizers.schedules.LearningRateSchedule):
    """Linear warm-up times a decay that ends at the last step: `create_learning_rate_schedule` of the original.

    Steps count from 0, so with warm-up the first update has learning rate 0. After `total_steps` it stays at its end.

    Args:
        total_steps: the step at which the decay ends.
        base: learning rate after the warm-up.
        decay_type: "cosine", to 0, or "linear", to `linear_end`.
        warmup_steps: 0 for none; less than `total_steps`.
        linear_end: where the linear decay ends.

    Raises:
        ArgumentError: another decay, or no step left after the warm-up.
    """

    def __init__(self, total_steps, base, decay_type="cosine", warmup_steps=0, linear_end=1e-5):
        if decay_type not in DECAYS:
            raise ArgumentError(f"WarmupDecay: decay_type must be one of {DECAYS}, got {decay_type!r}.")
        if not 0 <= warmup_steps < total_steps:
            raise ArgumentError(
                f"WarmupDecay: warmup_steps must be at least 0 and less than total_steps, got {warmup_steps} of {total_steps}. "
                "Warm up for fewer steps or train for more."
            )
        self.total_steps, self.base, self.decay_type = total_steps, base, decay_type
        self.warmup_steps, self.linear_end = warmup_steps, linear_end

    def __call__(self, step):
        """Step, a number or a scalar tensor -> float32 scalar tensor."""
        step = ops.cast(step, "float32")
        progress = ops.clip((step - self.warmup_steps) / (self.total_steps - self.warmup_steps), 0.0, 1.0)
        if self.decay_type == "linear":
            rate = self.linear_end + (self.base - self.linear_end) * (1.0 - progress)
        else:
            rate = self.base * 0.5 * (1.0 + ops.cos(math.pi * progress))
        return rate * ops.minimum(1.0, step / self.warmup_steps) if self.warmup_steps else rate

    def get_config(self):
        names = ("total_steps", "base", "decay_type", "warmup_steps", "linear_end")
        return {name: getattr(self, name) for name in names}
