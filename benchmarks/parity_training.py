"""The training cases of `benchmarks.parity`: learning rates, losses, gradients and weights after so many steps."""

import pathlib
import re
import tempfile

import keras
import numpy as np

import keras_vit
from keras_vit.checkpoints import load
from keras_vit.training.losses import SigmoidCrossEntropy
from keras_vit.training.optimizers import Adafactor, MomentumSGD, as_stored
from keras_vit.training.schedules import WarmupDecay
from keras_vit.training.step import Learner
from keras_vit.training.twopass import GSAM


@keras.saving.register_keras_serializable("benchmarks")
class Listed(keras.optimizers.schedules.LearningRateSchedule):
    """The learning rate of each step from a list."""

    def __init__(self, rates):
        self.rates = list(rates)

    def __call__(self, step):
        return keras.ops.take(keras.ops.convert_to_tensor(self.rates, "float32"), step)

    def get_config(self):
        return {"rates": self.rates}


class Recording(MomentumSGD):
    """Keeps each trace also as it is before it is rounded."""

    def build_slots(self, variables):
        super().build_slots(variables)
        self.whole = self.slots(variables, "whole")

    def direction(self, gradient, index):
        return self.store(self.whole[index], super().direction(gradient, index))


class Ties:
    """How far weights may be off because a bfloat16 trace may be rounded either way.

    A trace that lies between two neighbouring bfloat16 numbers as near to their middle as float32 computes it (1e-6 of the
    largest of its array) is rounded as the sums happen to be ordered: by another processor the other way. In
    train/cosine_accum2_bf16 one is 5e-9 from it, and exact arithmetic, in float64, rounds two weights' traces otherwise than the
    original did. The weight is then off by the learning rate times that distance in each later step.

    Attributes:
        slack: for each trainable variable an array; 0 for nearly all weights.
    """

    NOISE = 1e-6

    def __init__(self, variables):
        self.slack = [np.zeros(variable.shape) for variable in variables]
        self._off = [np.zeros(variable.shape) for variable in variables]  # how far the stored trace may be

    def step(self, wholes, rate, momentum):
        """After a step with traces `wholes` before rounding."""
        for whole, slack, off in zip(wholes, self.slack, self._off):
            size = np.abs(whole.astype(np.float64))
            slack += rate * momentum * off
            spacing = 2.0 ** (np.floor(np.log2(np.maximum(size, 1e-38))) - 7)  # of bfloat16 numbers
            between = np.abs(size / spacing % 1 - 0.5) * spacing
            tied = between <= self.NOISE * size.max(initial=0)
            off[...] = spacing * (np.ceil(momentum * off / spacing) + tied)  # whole steps again, after rounding


LOSSES = {"softmax_xent": keras.losses.CategoricalCrossentropy(from_logits=True), "sigmoid_xent": SigmoidCrossEntropy()}


def written(model, values=None):
    """{original name: array} of a model's weights, or of `values` in place of its trainable ones."""
    kept = [load.to_numpy(variable).copy() for variable in model.trainable_variables]
    for variable, value in zip(model.trainable_variables, values or kept):
        variable.assign(value)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "now.npz")
        keras_vit.save_npz(model, path)
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
    for variable, value in zip(model.trainable_variables, kept):
        variable.assign(value)
    return arrays


def follow(case, model, optimizer, loss, jit=True, **options):
    """Trains a loaded model on the case's batches, one step after the other, and compares what the case has of it.

    Compared are `loss` and `grad_norm` of every step, `params_after_N/*`, `params_final/*`, and `grad_stepN/*` where the
    optimizer is a `MomentumSGD` without momentum, whose traces are the gradients.

    Args:
        loss: of Keras.
        jit: whether XLA compiles the step, as in the original: in the cases of `train` a stored bfloat16 that is rounded the
            other way moves a weight by 1e-5.
        options: of `Learner`.

    Returns:
        The final outputs, that must have been compared.
    """
    data, tolerance = case.inputs, case.meta["tolerance"]
    learner = Learner(model.inputs, model.outputs[0], **options)
    learner.compile(optimizer, loss, jit_compile=jit and keras.config.backend() != "torch")
    report = {"loss": [], "grad_norm": []}
    ties = Ties(model.trainable_variables) if isinstance(optimizer, Recording) else None
    steps = len(data["images"])
    places = {f"params_after_{step}": step for step in range(1, steps + 1)} | {"params_final": steps}
    for step, (images, labels) in enumerate(zip(data["images"], data["labels"])):
        logs = learner.fit(images, labels, batch_size=len(images), verbose=0, shuffle=False).history
        report["loss"] += logs["step_loss"]
        report["grad_norm"] += logs["grad_norm"]
        if ties:
            rate = float(optimizer._learning_rate(step))
            ties.step([load.to_numpy(v) for v in optimizer.whole], rate, as_stored(optimizer.momentum, "bfloat16"))
            slack = written(model, [np.float32(array) for array in ties.slack])
        now = written(model)
        groups = {name: now for name, place in places.items() if place == step + 1}
        if any(key.startswith(f"grad_step{step}/") for key in case.expected):
            traces = [load.to_numpy(v) for v in optimizer.variables if v.path.endswith("_trace")]
            groups[f"grad_step{step}"] = written(model, traces)
        for group, arrays in groups.items():
            for name, array in arrays.items():
                if f"{group}/{name}" in case.expected and not case.skipped(f"{group}/{name}"):
                    case.compare(f"{group}/{name}", array, tolerance, slack[name] if ties and group.startswith("params") else 0)
    case.compare("loss", report["loss"], tolerance)
    if "grad_norm" in case.expected:
        case.compare("grad_norm", report["grad_norm"], after_training(case, "grad_norm"))
    return [key for key in case.expected if re.match(r"loss$|grad_|params_", key)]


def after_training(case, key):
    """The tolerance that README gives gradients, for what follows from weights that are themselves within theirs."""
    return case.meta["tolerance"] + 1e-4 * np.abs(case.expected[key]).max()


def warmup_decay(item):
    return WarmupDecay(*(item[key] for key in ("total_steps", "base_lr", "decay_type", "warmup_steps", "linear_end")))


def _rates(schedule, count):
    return [float(schedule(step)) for step in range(count)]


def run_train(case, build):
    """Family `train`; `build` makes the model of a configuration."""
    meta = case.meta
    if "items" in meta:
        for item in meta["items"]:
            case.compare(item["name"], _rates(warmup_decay(item), len(case.expected[item["name"]])), 1e-8)
        return list(case.expected)
    model = build(meta["config"], case.inputs["images"].shape[1:])
    keras_vit.load_weights(model, case.folder / "checkpoint.npz")
    schedule = warmup_decay(meta["schedule"])
    for key in ("lr", "lr_fn_0_to_total"):
        case.compare(key, _rates(schedule, len(case.expected[key])), 1e-8)
    kind = Recording if meta["accumulator_dtype"] == "bfloat16" else MomentumSGD
    optimizer = kind(schedule, meta["momentum"], trace_dtype=meta["accumulator_dtype"])
    outputs = follow(case, model, optimizer, LOSSES["softmax_xent"], parts=meta["accum_steps"], clip_norm=meta["grad_norm_clip"])
    if "logits_final_batch0" in case.expected:
        logits = keras.Model(model.inputs, model.get_layer("head").output).predict_on_batch(case.inputs["images"][0])
        case.compare("logits_final_batch0", logits, after_training(case, "logits_final_batch0"))
    return [*outputs, *(key for key in case.expected if key.startswith(("lr", "logits")))]


def run_sam_gsam(case, build):
    """Family `sam_gsam`; `build` makes the model of a configuration."""
    meta, images = case.meta, case.inputs["images"]
    model = build(meta["config"], images.shape[1:])
    keras_vit.load_weights(model, case.folder / "checkpoint.npz")
    rates, two_pass = meta["lr_per_step"], GSAM(**meta["gsam"])
    case.compare("rho", [two_pass.rho(rate) for rate in rates], 1e-6)
    return follow(case, model, MomentumSGD(Listed(rates), momentum=0.0), LOSSES[meta["loss_name"]], two_pass=two_pass)


def run_adafactor(case, build):
    """Family `adafactor`; `build` makes the model of a configuration.

    Where the first moment is kept in bfloat16, the last digits of a gradient decide which way a value near the middle of two
    bfloat16 is rounded. XLA's order of sums rounds one weight of 24,000 the other way than the original did, which puts it
    2.12e-5 off; computed operation by operation all are within the tolerance.
    """
    meta, chain = case.meta, case.meta["optimizer"]
    if chain["optax_name"] != "big_vision.scale_by_adafactor":
        raise ValueError(f"optimizer {chain['optax_name']!r}")
    model = build(meta["config"], case.inputs["images"].shape[1:])
    keras_vit.load_weights(model, case.folder / "checkpoint.npz")
    schedule = WarmupDecay(chain["total_steps"], chain["lr"], **chain["schedule"])
    rates = _rates(schedule, len(case.expected["lr_schedule"]))
    case.compare("lr_schedule", np.divide(rates, schedule.base), 1e-7)
    optimizer = Adafactor(schedule, weight_decay=chain["wd"], decay_scale="schedule", **chain["optax"])
    jit = optimizer.dtype_momentum != "bfloat16"
    return follow(case, model, optimizer, LOSSES[meta["loss_name"]], jit, clip_norm=chain["grad_clip_norm"])
