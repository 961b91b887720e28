"""Loading by plan and commit: rename, adapt, check everything, then assign. The model is untouched unless all fits."""

import collections.abc
import contextlib
import contextvars
import dataclasses
import fnmatch
import functools
import math

import keras
import numpy as np

from keras_vit import errors
from keras_vit.checkpoints import files
from keras_vit.checkpoints.transforms import Whole

_SHOWN = 8  # entries of each list in an error
MAX_LAYERS = 1024  # that one array may stack


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
class Plan:
    """What one layout makes of a file: which weights every array fills, what is dropped, and what does not fit."""

    layout: str
    targets: dict = dataclasses.field(default_factory=dict)  # original name -> [(our name, transform, layer)]
    ignored: list = dataclasses.field(default_factory=list)
    adapted: dict = dataclasses.field(default_factory=dict)  # adapter -> ({our name: original name}, what it does or None)
    constants: dict = dataclasses.field(default_factory=dict)  # original name -> (original name of the weight beside it, make)
    problems: dict = dataclasses.field(default_factory=dict)  # heading -> [entries]

    def blame(self, heading, entry):
        self.problems.setdefault(heading, []).append(entry)

    def count(self):
        return sum(map(len, self.problems.values()))


def _matches(name, patterns):
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _plan(layout, names, weights, archive, adapters, ignore, reset):
    """The `Plan` of one layout."""
    plan, wanted = Plan(layout), {}
    pieces = {ours: names.to_original(ours) for ours in weights if ours not in reset}
    for ours, found in pieces.items():
        for original, transform, layer in found:
            wanted.setdefault(original, []).append((ours, transform, layer))
    for original, (shape, _) in archive.entries.items():
        claims = names.to_ours(original, min(shape[0], MAX_LAYERS) if shape else 1)
        constant = None if claims else names.constant(original)
        if constant:
            ours, make = constant
            if _matches(ours, ignore):
                plan.ignored.append(original)
            elif ours in pieces:
                plan.constants[original] = pieces[ours][0].original, make
            else:
                plan.blame("names in the file for a weight that the model does not have", f"{original} (beside our {ours})")
        elif not claims:
            if names.is_beside(original):
                plan.ignored.append(original)
            else:
                plan.blame("names in the file that no rule claims", original)
        elif all(_matches(ours, ignore) for ours, *_ in claims):
            plan.ignored.append(original)
        elif original in wanted:
            plan.targets[original] = wanted[original]
        elif not any(ours in reset for ours, *_ in claims):
            plan.blame("names in the file for a weight that the model does not have", f"{original} (our {claims[0][0]})")
    for ours, found in pieces.items():
        missing = [piece.original for piece in found if piece.original not in plan.targets]
        for original in missing if found else [f"{ours}, which has no rule"]:
            plan.blame("weights of the model that the file does not fill", f"{ours} (expected {original})")
    after = {original: archive.entries[original][0] for original in plan.targets}
    for adapter in adapters:
        own = {ours: original for original, targets in plan.targets.items() for ours, *_ in targets if ours in adapter.names}
        if own:
            try:
                shapes, does = adapter.plan({ours: after[original] for ours, original in own.items()})
            except errors.CheckpointMismatchError as error:
                plan.blame("arrays that cannot be adapted", str(error))
                continue
            plan.adapted[adapter] = own, does
            after.update({own[ours]: shape for ours, shape in shapes.items()})
    for original, targets in plan.targets.items():
        for ours, transform, layer in targets:
            expected = transform.file_shape(weights[ours].shape)
            expected = expected if layer is None else (len(targets), *expected)
            if after[original] != expected:
                got = archive.entries[original][0]
                plan.blame("arrays of another shape", f"{original}: expected {expected}, got {got}")
                break
    return plan


def best_plan(weights, archive, layouts, *, adapters=(), ignore=(), reset=()):
    """The `Plan` of the first layout that fits, else of the one with the fewest problems; from names and shapes alone.

    Args: as `load`.
    """
    best = None
    for layout, names in layouts.items():
        plan = _plan(layout, names, weights, archive, adapters, ignore, reset)
        best = plan if best is None or plan.count() < best.count() else best
        if not plan.problems:
            break
    return best


def _scan(plan, weights, archive):
    """Reads every planned array once without keeping it: damage raises, values that cannot be used raise together.

    Returns:
        Our names of the weights that are all zeros.
    """
    problems, largests = [], {}
    for original, targets in plan.targets.items():
        bad, largest = archive.scan(original)
        for ours, *_ in targets:
            largests[ours] = max(largest, largests.get(ours, 0))
        if bad:
            problems.append(f"{original}: {bad} of {math.prod(archive.entries[original][0])} values are not finite")
        if largest > 65504 and any(weights[ours].dtype == "float16" for ours, *_ in targets):
            problems.append(f"{original}: its largest value, {largest:g}, overflows the model's float16")
    if problems:
        raise errors.CheckpointFormatError(
            f"{archive.path}: {_listed(problems)}. The model was not changed; get an intact file from its publisher."
        )
    return [ours for ours, largest in largests.items() if not largest]


def _constants(plan, archive, grid):
    """{original name: [dtype, values], or None where they are made again}, of the plan's arrays that are no weights.

    Raises:
        errors.CheckpointMismatchError: one is not what follows from the weight beside it, or no count.
    """
    kept, problems = {}, []
    for original, (beside, make) in plan.constants.items():
        shape, dtype = archive.entries[original]
        if make is not None:
            expected = make(archive.entries[beside][0], grid)
            same = expected.shape == shape and expected.dtype == dtype and np.array_equal(archive.exact(original), expected)
            if not same:
                problems.append(f"{original}: expected {expected.dtype} {expected.shape} as {beside} asks for, got another array")
            kept[original] = None
        elif shape == () and dtype.kind in "iu":
            kept[original] = [dtype.str, int(archive.exact(original))]
        else:
            problems.append(f"{original}: expected one whole number, got {dtype} {shape}")
    if problems:
        raise errors.CheckpointMismatchError(
            f"{archive.path}: arrays that are no weights differ from what the model computes: {_listed(problems)}. The model was "
            "not changed; get an intact file, or pass grid=(h, w) if its grid is not square."
        )
    return kept


def _reader(plan, weights, archive):
    """our name -> its float32 array, read from the file when asked for, so that never all of them are held."""
    pieces = {}
    for original, targets in plan.targets.items():
        for ours, transform, layer in targets:
            pieces.setdefault(ours, []).append((original, transform, layer))
    adapters = {ours: (adapter, own) for adapter, (own, does) in plan.adapted.items() if does for ours in own}

    def read(ours):
        if ours not in pieces:  # reset
            return np.zeros(weights[ours].shape, np.float32)
        if ours in adapters:
            adapter, own = adapters[ours]
            return adapter({name: archive.read(original) for name, original in own.items()})[ours]
        if pieces[ours][0][1] == Whole():
            ((original, _, layer),) = pieces[ours]
            return archive.read(original, layer)
        array = np.empty(weights[ours].shape, np.float32)
        for original, transform, layer in pieces[ours]:
            transform.place(archive.read(original, layer), array)
        return array

    return read


def _assign(weights, read):
    for ours, weight in weights.items():
        weight.assign(read(ours))


_pending = contextvars.ContextVar("pending", default=None)


@contextlib.contextmanager
def without_first_values():
    """Within it weights are made without values, and those that `load` fills get the file's as their first ones at its end.

    It saves the time and the memory of random values that nobody sees. What Keras did not take this way is assigned.
    """
    token = _pending.set([])
    try:
        with keras.StatelessScope():
            yield
        for weights, read in _pending.get():
            _assign(weights, read)
    finally:
        _pending.reset(token)


def _fill_later(weights, read):
    """Has weights that were made without a value initialised with `read(name)`."""
    left = dict(weights)
    for ours, weight in weights.items():

        def first_value(shape, dtype, ours=ours):
            del left[ours]
            return keras.ops.convert_to_tensor(read(ours), dtype)

        weight._initializer = first_value  # Keras calls it when the scope ends; if not, the weight is still among those left
    _pending.get().append((left, read))


def load(weights, archive, layouts, *, adapters=(), ignore=(), reset=(), grid=None, what="the model"):
    """Fills `weights` from a file in any of `layouts`: the first one whose whole plan succeeds.

    The file is read twice, first to check every value and then to assign, so that neither a damaged file changes the model nor
    more than an array at a time is held beside it.

    Args:
        weights: {our name: variable}, all of which are filled.
        archive: an open `files.Reader`.
        layouts: {layout name: Names}.
        adapters: for weights that may be resampled, such as `adapt.Positions`.
        ignore: patterns of our names (`"pre_logits/*"`); what they match in the file is dropped, and reported.
        reset: our names set to zero instead of taken from the file (a new head).
        grid: (h, w) of the file's positions where they are not a square.
        what: how the model is called in messages.

    Returns:
        dict(layout, adapted, ignored, reset, zeros): lists of text, zeros being our names of weights that are all 0; stored:
        {original name: dtype} of arrays that are no float32; and constants: {original name: [dtype, value] or None}, see `save`.

    Raises:
        errors.CheckpointMismatchError: with every list of what does not fit; no weight was changed.
        errors.CheckpointFormatError: an array is damaged or has values that are not finite; no weight was changed.
    """
    best = best_plan(weights, archive, layouts, adapters=adapters, ignore=ignore, reset=reset)
    if best.problems:
        raise errors.CheckpointMismatchError(_report(best, archive, what))
    constants = _constants(best, archive, grid)
    zeros = _scan(best, weights, archive)
    fill = _assign if _pending.get() is None else _fill_later
    fill(weights, _reader(best, weights, archive))
    return dict(
        layout=best.layout,
        adapted=[does for _, does in best.adapted.values() if does],
        ignored=best.ignored,
        reset=list(reset),
        zeros=zeros,
        stored={name: archive.entries[name][1].str for name in best.targets if archive.entries[name][1].str != "<f4"},
        constants=constants,
    )


def _listed(entries):
    more = f" ... and {len(entries) - _SHOWN} more" if len(entries) > _SHOWN else ""
    return "; ".join(entries[:_SHOWN]) + more


def _report(plan, archive, what):
    lines = [f"{archive.path} does not fit {what}; the model was not changed. Read as layout {plan.layout!r}, the nearest:"]
    for heading, entries in plan.problems.items():
        lines.append(f"- {heading} ({len(entries)}): {_listed(entries)}")
    lines.append("Choose the variant that the file was made for; drop arrays on purpose with ignore=('pre_logits/*', ...).")
    return "\n".join(lines)


def save(weights, path, names, metadata=None, stored=None, constants=None, grid=None):
    """Writes `weights` ({our name: variable}) to a file in the layout of `names`, whole or not at all.

    Args:
        stored: {original name: dtype} of arrays to write in another type than float32, where that loses nothing.
        constants: {original name: [dtype, value], or None to make it} of arrays that are no weights; None writes all that the
            layout has.
        grid: (h, w) of the positions where they are not a square.
    """
    arrays, others = {}, {}
    for ours, weight in weights.items():
        for original, make in names.constants_beside(ours):
            if constants is None or original in constants:
                dtype, value = (constants or {}).get(original) or ("<i8", 0)
                others[original] = make(tuple(weight.shape), grid) if make else np.asarray(value, dtype)
        pieces = names.to_original(ours)
        if not pieces:
            raise errors.CheckpointMismatchError(
                f"{path}: weight {ours} has no name in this layout; save the model as .keras instead. Nothing was written."
            )
        value = np.asarray(to_numpy(weight), np.float32)
        for original, transform, layer in pieces:
            arrays.setdefault(original, {})[layer] = transform.take(value)
    for original, layers in arrays.items():
        array = layers[None] if None in layers else np.stack([layers[i] for i in range(len(layers))])
        arrays[original] = files.narrowed(array, np.dtype((stored or {}).get(original, "<f4")))
    files.write(path, arrays | others, metadata)


class _Converted(collections.abc.Mapping):
    """{original name: array} made from another file's arrays, one at a time as they are asked for.

    Args:
        archive: an open `files.Reader`.
        sources: {original name: {layer or None: (name in the archive, layer in it or None)}}.
        constants: {original name: name in the archive} of arrays that are no weights.
    """

    def __init__(self, archive, sources, constants):
        self.archive, self.sources, self.constants = archive, sources, constants
        self._read = functools.lru_cache(1)(archive.read)  # neighbours come out of the same stack

    def __iter__(self):
        return iter([*self.sources, *self.constants])

    def __len__(self):
        return len(self.sources) + len(self.constants)

    def _layer(self, name, layer):
        return self._read(name) if layer is None else self._read(name)[layer]

    def __getitem__(self, name):
        if name in self.constants:
            return self.archive.exact(self.constants[name])
        layers = self.sources[name]
        stored = {self.archive.entries[source][1] for source, _ in layers.values()}
        if None in layers:
            array = self._layer(*layers[None])
        else:
            first = self._layer(*layers[0])
            array = np.empty((len(layers), *first.shape), np.float32)
            for index, source in layers.items():
                array[index] = self._layer(*source)
        return files.narrowed(array, stored.pop()) if len(stored) == 1 and stored != {np.dtype("<f4")} else array


def convert(archive, path, read, write):
    """Writes a file's arrays in another layout, through names alone: renamed, stacked or taken apart, their bits and types kept.

    Arrays of several types that become one are written as float32. No more than an array and its neighbour are held at a time.

    Args:
        archive: an open `files.Reader`.
        path: the .npz to write, whole or not at all.
        read, write: `Names` of the file and of the one to write.

    Returns:
        Names of arrays that are left out, since such files hold them for something else.

    Raises:
        errors.CheckpointMismatchError: arrays that the other layout cannot express, all by name; nothing was written.
        errors.CheckpointFormatError: an array is damaged or holds no floats; nothing was written.
    """
    sources, constants, left_out, problems = {}, {}, [], []
    for original, (shape, _) in archive.entries.items():
        claims = read.to_ours(original, shape[0] if shape and shape[0] <= MAX_LAYERS else 0)
        constant = None if claims else read.constant(original)
        if constant:
            constants.update({to: original for to, make in write.constants_beside(constant[0]) if make == constant[1]})
        elif not claims and not read.is_beside(original):
            problems.append(f"{original}: the file's layout has no such array")
        elif not claims:
            left_out.append(original)
        for ours, transform, layer in claims:
            pieces = [piece for piece in write.to_original(ours) if piece.transform == transform]
            if len(pieces) != 1:
                problems.append(f"{original}: the layout to write has no array for our {ours}")
            elif sources.setdefault(pieces[0].original, {}).setdefault(pieces[0].layer, (original, layer)) != (original, layer):
                problems.append(f"{original}: another array has become {pieces[0].original} already")
    for to, layers in sources.items():
        shapes = {archive.entries[original][0][layer is not None :] for original, layer in layers.values()}
        if None not in layers and (len(shapes) > 1 or set(layers) != set(range(len(layers)))):
            problems.append(f"{to}: expected layers 0 to {max(layers)} of one shape, got {sorted(layers)} of {sorted(shapes)}")
    if problems:
        raise errors.CheckpointMismatchError(
            f"{archive.path}: {_listed(problems)}. Nothing was written; choose another layout, or load the file into its model "
            "and use keras_vit.save_npz."
        )
    files.write(path, _Converted(archive, sources, constants), archive.metadata)
    return left_out
