"""Learning-rate schedules."""

import math

import keras
from keras import ops

from keras_vit.errors import ArgumentError

DECAYS = ("cosine", "linear", "rsqrt")


@keras.saving.register_keras_serializable("keras_vit")
class WarmupDecay(keras.optimizers.schedules.LearningRateSchedule):
    """Linear warm-up times a decay, times a linear cool-down: `create_learning_rate_schedule` of the originals.

    Cosine and linear are those of vision_transformer and of big_vision, rsqrt and the cool-down those of big_vision. Steps count
    from 0, so with warm-up the first update has learning rate 0. After `total_steps` it stays as it is there.

    Args:
        total_steps: the step at which the decay ends.
        base: learning rate after the warm-up.
        decay_type: "cosine", to 0; "linear", to `linear_end`; "rsqrt", base / sqrt(1 + t / timescale) with t steps since the
            warm-up.
        warmup_steps: 0 for none; less than `total_steps`.
        linear_end: learning rate at the end of the linear decay (big_vision's `end` is a share of `base`, 0 by default).
        timescale: of rsqrt, in steps; above 0.
        cooldown_steps: over so many last steps it falls linearly to 0; 0 for none.

    Raises:
        ArgumentError: another decay, a number out of range, or no step left between warm-up and cool-down.
    """

    def __init__(
        self, total_steps, base, decay_type="cosine", warmup_steps=0, linear_end=1e-5, timescale=10_000, cooldown_steps=0
    ):
        if decay_type not in DECAYS:
            raise ArgumentError(f"WarmupDecay: decay_type must be one of {DECAYS}, got {decay_type!r}.")
        if not total_steps >= 1:
            raise ArgumentError(f"WarmupDecay: total_steps must be at least 1, got {total_steps}.")
        if not 0 <= warmup_steps < total_steps:
            raise ArgumentError(
                f"WarmupDecay: warmup_steps must be at least 0 and less than total_steps, got {warmup_steps} of {total_steps}. "
                "Warm up for fewer steps or train for more."
            )
        if not 0 <= cooldown_steps <= total_steps - warmup_steps:
            raise ArgumentError(
                f"WarmupDecay: cooldown_steps must be at least 0 and at most the {total_steps - warmup_steps} steps after the "
                f"warm-up, got {cooldown_steps}."
            )
        for name, value in (("base", base), ("linear_end", linear_end)):
            if not 0 <= value < math.inf:
                raise ArgumentError(f"WarmupDecay: {name} must be at least 0 and finite, got {value}.")
        if not 0 < timescale < math.inf:
            raise ArgumentError(f"WarmupDecay: timescale must be above 0 and finite, got {timescale}.")
        self.total_steps, self.base, self.decay_type = total_steps, base, decay_type
        self.warmup_steps, self.linear_end = warmup_steps, linear_end
        self.timescale, self.cooldown_steps = timescale, cooldown_steps

    def __call__(self, step):
        """Step, a number or a scalar tensor -> float32 scalar tensor."""
        step = ops.minimum(ops.cast(step, "float32"), float(self.total_steps))
        since = ops.maximum(step - self.warmup_steps, 0.0)
        progress = since / (self.total_steps - self.warmup_steps)
        if self.decay_type == "linear":
            rate = self.linear_end + (self.base - self.linear_end) * (1.0 - progress)
        elif self.decay_type == "cosine":
            rate = self.base * 0.5 * (1.0 + ops.cos(math.pi * progress))
        else:
            rate = self.base / ops.sqrt(1.0 + since / self.timescale)
        if self.warmup_steps:
            rate = rate * ops.minimum(1.0, step / self.warmup_steps)
        if self.cooldown_steps:
            rate = rate * ops.minimum(1.0, (self.total_steps - step) / self.cooldown_steps)
        return rate

    def get_config(self):
        names = ("total_steps", "base", "decay_type", "warmup_steps", "linear_end", "timescale", "cooldown_steps")
        return {name: getattr(self, name) for name in names}
