"""The cases of `benchmarks.parity` that are training objectives: the distillation loss of DeiT, and its gradients."""

import re

import keras
import numpy as np

from keras_vit.training.accumulate import differentiated
from keras_vit.training.objectives import Distillation

KEY = re.compile(
    r"(?:grad\.)?(?:(ce|label_smoothing_0\.1|soft_target_ce|bce)\.)?(none|soft|hard)(?:\.alpha([\d.]+)\.tau([\d.]+?))?"
)


class _Student:
    """What a `Distillation` needs of its learner: the base loss."""

    def __init__(self, loss):
        self.loss = loss

    def compute_loss(self, x, y, scores, weight, training):
        return self.loss(y, scores)


def run_deit_loss(case):
    """Every combination of base loss, type, share and temperature, and what the loss's gradients of both heads are."""
    given, tolerance = case.inputs, case.meta["tolerance"]
    classes = given["logits"].shape[-1]
    hard, soft = np.eye(classes, dtype="float32")[given["labels"]], given["soft_targets"]
    bases = {
        "ce": (keras.losses.CategoricalCrossentropy(from_logits=True), hard),
        "label_smoothing_0.1": (keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=0.1), hard),
        "soft_target_ce": (keras.losses.CategoricalCrossentropy(from_logits=True), soft),
        "bce": (keras.losses.BinaryCrossentropy(from_logits=True), soft),
    }

    for key in case.expected:
        of = key.removesuffix(".logits").removesuffix(".logits_kd")
        base, kind, alpha, tau = KEY.fullmatch(of).groups()
        loss, labels = bases[base or "ce"]
        targets = keras.ops.convert_to_tensor(np.concatenate([labels, given["teacher_logits"]], -1))

        def at(heads, loss=loss, kind=kind, alpha=alpha, tau=tau, targets=targets):
            objective = Distillation(kind, float(tau or 1), float(alpha or 0), heads=lambda x, training: heads, classes=classes)
            student = _Student(lambda y, scores: loss(objective.labels(y), scores))
            return objective(student, None, targets, None)

        heads = [keras.ops.convert_to_tensor(given[name]) for name in ("logits", "logits_kd")]
        got, _, gradients = differentiated(at, heads)
        if key.startswith("grad."):
            got = gradients[key.endswith("_kd")]
        case.compare(key, keras.ops.convert_to_numpy(got), tolerance)
    return list(case.expected)
