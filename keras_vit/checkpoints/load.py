"""Loading by plan and commit: rename, adapt, check everything, then assign. The model is untouched unless all fits."""

import dataclasses
import fnmatch

import keras
import numpy as np

from keras_vit import errors
from keras_vit.checkpoints import files

_SHOWN = 8  # entries of each list in an error


def named_weights(model, skip=()):
    """{name: variable} of all weights, `layer/.../weight`; the weights of a nested model get its name in front.

    Args:
        model: a Keras model.
        skip: names of layers to leave out.
    """
    found = {}
    for layer in model.layers:
        if layer.name in skip:
            continue
        if isinstance(layer, keras.Model):
            found.update({f"{layer.name}/{name}": weight for name, weight in named_weights(layer).items()})
            continue
        for weight in layer.weights:
            parts = weight.path.split("/")
            found["/".join(parts[parts.index(layer.name) :])] = weight
    return found


def to_numpy(weight):
    """A copy of a variable's value."""
    return keras.ops.convert_to_numpy(keras.ops.convert_to_tensor(weight))


@dataclasses.dataclass
class _Plan:
    """What one layout makes of a file: where every weight comes from, what is dropped, and what does not fit."""

    layout: str
    sources: dict = dataclasses.field(default_factory=dict)  # our name -> {part index: (original name, transform)}
    ignored: list = dataclasses.field(default_factory=list)
    adapted: dict = dataclasses.field(default_factory=dict)  # our name -> what its adapter does, None for nothing
    problems: dict = dataclasses.field(default_factory=dict)  # heading -> [entries]

    def blame(self, heading, entry):
        self.problems.setdefault(heading, []).append(entry)

    def count(self):
        return sum(map(len, self.problems.values()))


def _plan(layout, names, weights, archive, adapters, ignore, reset):
    plan = _Plan(layout)
    for original in archive.entries:
        claims = names.to_ours(original)
        if len(claims) != 1:
            heading = "names in the file that no rule claims" if not claims else "names in the file that several rules claim"
            plan.blame(heading, original)
            continue
        ours, transform = claims[0]
        if any(fnmatch.fnmatchcase(ours, pattern) for pattern in ignore):
            plan.ignored.append(original)
        elif ours in weights and ours not in reset:
            plan.sources.setdefault(ours, {})[transform.index] = (original, transform)
        elif ours not in reset:
            plan.blame("names in the file for a weight that the model does not have", f"{original} (our {ours})")
    for ours, weight in weights.items():
        if ours in reset:
            continue
        parts = plan.sources.get(ours, {})
        for original, transform in names.to_original(ours) or [(f"{ours}, which has no rule", None)]:
            if transform is None or transform.index not in parts:
                plan.blame("weights of the model that the file does not fill", f"{ours} (expected {original})")
        for original, transform in parts.values():
            shape, expected = archive.entries[original][0], transform.file_shape(weight.shape)
            if ours in adapters:
                try:
                    plan.adapted[ours] = adapters[ours].describe(shape, weight.shape[-1])
                except errors.CheckpointMismatchError as error:
                    plan.blame("arrays that cannot be adapted", str(error))
            elif shape != expected:
                plan.blame("arrays of another shape", f"{original}: expected {expected}, got {shape}")
    return plan


def _read(plan, weights, archive, adapters):
    """{our name: float32 array} for every planned weight; problems of value go to the plan."""
    arrays = {}
    for ours, parts in plan.sources.items():
        weight = weights[ours]
        target = None
        for original, transform in parts.values():
            array = archive.read(original)
            bad = array.size - np.count_nonzero(np.isfinite(array))
            if bad:
                plan.blame("arrays with values that are not finite", f"{original}: {bad} of {array.size}")
            if weight.dtype == "float16" and array.size and np.abs(array).max() > np.finfo("float16").max:
                plan.blame("arrays that overflow the model's float16", f"{original}: largest {np.abs(array).max():g}")
            if plan.adapted.get(ours):
                target = adapters[ours](array)
            elif transform.of == 1:
                target = array
            else:
                target = np.empty(weight.shape, np.float32) if target is None else target
                transform.place(array, target)
        arrays[ours] = target
    return arrays


def load(weights, archive, layouts, *, adapters=None, ignore=(), reset=(), what="the model"):
    """Fills `weights` from a file in any of `layouts`: the one whose whole plan succeeds.

    Args:
        weights: {our name: variable}, all of which are filled.
        archive: an open `files.Npz`.
        layouts: {layout name: Names}.
        adapters: {our name: adapter} for weights that may be resampled, such as `adapt.Positions`.
        ignore: patterns of our names (`"pre_logits/*"`); what they match in the file is dropped, and reported.
        reset: our names set to zero instead of taken from the file (a new head).
        what: how the model is called in messages.

    Returns:
        dict(layout, adapted, ignored, reset), lists of text.

    Raises:
        errors.CheckpointMismatchError: with every list of what does not fit; no weight was changed.
        errors.CheckpointFormatError: an array is damaged; no weight was changed.
    """
    adapters = adapters or {}
    plans = [_plan(layout, names, weights, archive, adapters, ignore, reset) for layout, names in layouts.items()]
    plan = min(plans, key=_Plan.count)
    arrays = {} if plan.problems else _read(plan, weights, archive, adapters)
    if plan.problems:
        raise errors.CheckpointMismatchError(_report(plan, archive, what))
    for ours, array in arrays.items():
        weights[ours].assign(array)
    for ours in reset:
        weights[ours].assign(np.zeros(weights[ours].shape, np.float32))
    return dict(layout=plan.layout, adapted=list(filter(None, plan.adapted.values())), ignored=plan.ignored, reset=list(reset))


def _report(plan, archive, what):
    lines = [f"{archive.path} does not fit {what}; the model was not changed. Read as layout {plan.layout!r}, the nearest:"]
    for heading, entries in plan.problems.items():
        more = f" ... and {len(entries) - _SHOWN} more" if len(entries) > _SHOWN else ""
        lines.append(f"- {heading} ({len(entries)}): {'; '.join(entries[:_SHOWN])}{more}")
    lines.append("Choose the variant that the file was made for; drop arrays on purpose with ignore=('pre_logits/*', ...).")
    return "\n".join(lines)


def save(weights, path, names, metadata=None):
    """Writes `weights` ({our name: variable}) to an .npz in the layout of `names`, whole or not at all."""
    arrays = {}
    for ours, weight in weights.items():
        written = names.to_original(ours)
        if not written:
            raise errors.CheckpointMismatchError(
                f"{path}: weight {ours} has no name in this layout; save the model as .keras instead. Nothing was written."
            )
        value = to_numpy(weight)
        for original, transform in written:
            arrays[original] = np.asarray(transform.take(value), np.float32)
    files.write(path, arrays, metadata)
