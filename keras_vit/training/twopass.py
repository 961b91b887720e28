"""Sharpness-aware gradients: SAM (arXiv 2010.01412) and GSAM (arXiv 2203.08065), of any gradient function, on every backend.

The arithmetic is that of big_vision's `trainers/proj/gsam/gsam.py`. Both gradients are those of the whole batch: over all parts
and all replicas. (The SAM paper's experiments perturb each device's weights by its own gradient, so that their numbers depend on
how many devices there are; these do not.)
"""

import dataclasses

import keras
from keras import ops

from keras_vit.errors import ArgumentError


@dataclasses.dataclass(frozen=True)
class GSAM:
    """Surrogate-gap guided sharpness-aware minimisation, for `Learner(two_pass=...)`. A step takes two passes over its batch.

    The weights are moved by rho along the gradient, where rho goes from `rho_max` at the learning rate `lr_max` to `rho_min` at
    `lr_min`. The gradient there, less `alpha` times the part of the clean gradient that is orthogonal to it, is the step's.

    Args:
        rho_max, rho_min: how far the weights are moved, above 0.
        alpha: share of the orthogonal part; 0 for none.
        lr_max, lr_min: learning rates between which rho goes; when equal, rho is `rho_max`.
        adaptive_perturbation: whether each weight is moved in proportion to its size (ASAM, arXiv 2102.11600).
        minimize_fp: True minimises the perturbed loss and the gap; False the loss itself and the gap.

    Raises:
        ArgumentError: a rho that is not above 0, or learning rates in the wrong order.
    """

    rho_max: float = 0.6
    rho_min: float = 0.1
    alpha: float = 0.6
    lr_max: float = 1.0
    lr_min: float = 0.0
    adaptive_perturbation: bool = False
    minimize_fp: bool = True

    def __post_init__(self):
        if not 0 < self.rho_min <= self.rho_max or not self.lr_min <= self.lr_max:
            raise ArgumentError(
                "GSAM: expected 0 < rho_min <= rho_max and lr_min <= lr_max, got "
                f"rho_min={self.rho_min}, rho_max={self.rho_max}, lr_min={self.lr_min}, lr_max={self.lr_max}."
            )

    def rho(self, learning_rate):
        """How far the weights are moved at a learning rate."""
        if self.lr_max == self.lr_min:
            return self.rho_max
        share = (learning_rate - self.lr_min) / (self.lr_max - self.lr_min)
        return self.rho_min + (self.rho_max - self.rho_min) * share

    def perturbed(self, weights, gradients, norm, learning_rate):
        """The moved weights.

        Args:
            weights, gradients: lists of tensors.
            norm: the global norm of all gradients.
            learning_rate: of this step.
        """
        scale = self.rho(learning_rate) / (norm + 1e-12)

        def move(weight, gradient):
            step = ops.cast(scale * ops.cast(gradient, "float32"), weight.dtype)
            return weight + (ops.abs(weight) * step if self.adaptive_perturbation else step)

        return [move(weight, gradient) for weight, gradient in zip(weights, gradients)]

    def combined(self, clean, robust, norm):
        """The step's gradient.

        Args:
            clean: gradients at the weights; its global norm is `norm`.
            robust: gradients at the moved weights.
        """
        if self.alpha == 0 and self.minimize_fp:
            return robust
        minimised, other = (robust, clean) if self.minimize_fp else (clean, robust)
        length = global_norm(minimised) if self.minimize_fp else norm
        units = [g / ops.cast(length, g.dtype) for g in minimised]
        along = sum(ops.sum(ops.cast(u * g, "float32")) for u, g in zip(units, other))
        sign = -self.alpha if self.minimize_fp else self.alpha
        return [m + sign * (o - ops.cast(along, o.dtype) * u) for m, o, u in zip(minimised, other, units)]


def SAM(rho=0.05, adaptive_perturbation=False):
    """Sharpness-aware minimisation: the gradient at weights moved by `rho` along the gradient. A `GSAM` of that kind."""
    return GSAM(rho, rho, alpha=0.0, adaptive_perturbation=adaptive_perturbation)


def global_norm(tensors):
    """The square root of the sum of all squares, float32 ()."""
    return ops.sqrt(sum(_sum_of_squares(ops.cast(t, "float32")) for t in tensors))


def _sum_of_squares(tensor):
    if keras.config.backend() == "tensorflow":  # in one pass through memory
        import tensorflow as tf

        return 2 * tf.nn.l2_loss(tensor)
    return ops.sum(ops.square(tensor))
