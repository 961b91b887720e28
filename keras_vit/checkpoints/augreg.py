"""The files of "How to train your ViT?" (AugReg, arXiv 2106.10270), `gs://vit_models/augreg/`: their names and their index.

759 pre-trained files, each fine-tuned up to 68 times. Each name found here is an argument for a constructor's `weights`:

    keras_vit.ViT_B16(weights=augreg.recommended("B/16", "imagenet2012"))
    augreg.query(name="B/16", ds="i1k", adapt_ds="imagenet2012", resolution=224)[0].file

Levels of augmentation: files say none, light0, light1, medium1, medium2, strong1, strong2. The recipe in big_vision says light1
and light2 for the two light ones: light1 is RandAugment(2, 0) without Mixup, light2 RandAugment(2, 10) with Mixup 0.2. That the
files' light0 and light1 are these, in this order, is inferred, not published; medium and strong are spelled alike.

timm's files are not always those the authors recommend, so that the same model scores otherwise there: see `TIMM`.
"""

import collections.abc
import csv
import dataclasses
import difflib
import functools
import math
import numbers
import re
import typing

from keras_vit import errors
from keras_vit.checkpoints import fetch
from keras_vit.checkpoints.weights import IMAGENET21K, google

INDEX = "gs://vit_models/augreg/index.csv"
NAMES = ("Ti/16", "S/32", "S/16", "B/32", "B/16", "B/8", "L/16", "R+Ti/16", "R26+S/32", "R50+L/32")

_MODELS = {name.replace("/", "_").replace("+", "_"): name for name in NAMES}
_CLASSES = {"i1k": 1000, "i21k": IMAGENET21K, "i21k_30": IMAGENET21K}
_ADAPT_CLASSES = {"imagenet2012": 1000, "cifar100": 100, "resisc45": 45, "oxford_iiit_pet": 37, "kitti": 4}
_STEPS = {"0": 500, "2": 2500, "10": 10_000, "20": 20_000}  # thousands in a name: steps

# One grammar, filled with values to print a name and with patterns to parse one
_PRETRAINED = "{model}-{ds}-{epochs}ep-lr_{lr}-aug_{aug}-wd_{wd}-do_{do}-sd_{sd}"
_ADAPTED = "--{adapt_ds}-steps_{thousands}k-lr_{adapt_lr}-res_{adapt_resolution}"
_PATTERNS = dict(
    model="|".join(_MODELS), ds="|".join(_CLASSES), epochs="30|300", aug="none|light[01]|medium[12]|strong[12]",
    **dict.fromkeys(("lr", "wd", "do", "sd", "adapt_lr"), r"\d\.(?:0|\d*[1-9])"),
    adapt_ds="|".join(_ADAPT_CLASSES), thousands="|".join(_STEPS), adapt_resolution="224|384",
)  # fmt: skip
_GROUPS = {field: f"(?P<{field}>{pattern})" for field, pattern in _PATTERNS.items()}
_NAME = re.compile(rf"{_PRETRAINED.format(**_GROUPS)}(?:{_ADAPTED.format(**_GROUPS)})?(?:\.npz)?")
_TYPES = dict.fromkeys(("epochs", "adapt_steps", "adapt_resolution"), int)
_TYPES |= dict.fromkeys(("lr", "wd", "do", "sd", "adapt_lr"), float)
_EXAMPLE = "B_16-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.0-sd_0.0"


def parse(name):
    """The fields of an AugReg file name, with or without ".npz", or None if it is no such name.

    Returns:
        A dict with the index's columns, typed as there: name ("R50+L/32"), ds, epochs, lr, aug, wd, do, sd and, of a fine-tuned
        file, adapt_ds, adapt_steps (500 is written "steps_0k", 2500 "steps_2k"), adapt_lr, adapt_resolution; and `model`, the
        name as files spell it ("R50_L_32").
    """
    found = _NAME.fullmatch(name)
    if found is None:
        return None
    fields = {key: _TYPES.get(key, str)(text) for key, text in found.groupdict().items() if text is not None}
    if "thousands" in fields:
        fields["adapt_steps"] = _STEPS[fields.pop("thousands")]
    return {"name": _MODELS[fields["model"]], **fields}


def format(**fields):
    """The file name of these fields, without ".npz": the inverse of `parse`; `model` may be left out.

    Raises:
        errors.ArgumentError: fields are missing, unknown, or not what `parse` gives back.
    """
    expected = {**fields, "name": _spell(fields.get("name"))}
    expected.setdefault("model", next((model for model, name in _MODELS.items() if name == expected["name"]), None))
    try:
        values = {key: _TYPES.get(key, str)(value) for key, value in expected.items()}
        text = _PRETRAINED.format(**values)
        if "adapt_ds" in fields:
            text += _ADAPTED.format(**values, thousands=values["adapt_steps"] // 1000)
        fits = parse(text) == expected
    except (KeyError, TypeError, ValueError, OverflowError):
        fits = False
    if not fits:
        raise errors.ArgumentError(f"augreg.format: {fields} name no file; expected fields as in augreg.parse({_EXAMPLE!r}).")
    return text


def weights(name, mib=None):
    """The `Weights` record of an AugReg file name, with or without ".npz".

    Raises:
        errors.ArgumentError: not a name of this grammar.
    """
    fields = parse(name)
    if fields is None:
        raise errors.ArgumentError(
            f"{name!r}: expected an AugReg file name such as {_EXAMPLE!r}, optionally with a fine-tuning part; "
            "keras_vit.augreg.query() lists them."
        )
    adapted = fields.get("adapt_ds")
    return google(
        f"augreg/{name.removesuffix('.npz')}",
        mib,
        resolution=fields.get("adapt_resolution", 224),
        classes=_ADAPT_CLASSES[adapted] if adapted else _CLASSES[fields["ds"]],
        tuned=adapted is not None,
    )


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """One row of the index: a fine-tuned file and the pre-trained one it started from.

    Accuracies are fractions. Where the index has no number it is NaN, or None for whole numbers: B/8 has neither `params` nor
    `infer_samples_per_sec`.

    Args:
        name, ds, epochs: the model, and on what it was pre-trained: "i1k" and "i21k" for 300 epochs, "i21k_30" for 30.
        lr, aug, wd, do, sd: learning rate, augmentation, weight decay, dropout and stochastic depth of pre-training.
        best_val, final_val, final_test: accuracies in pre-training.
        adapt_ds, adapt_lr, adapt_steps, adapt_resolution: the fine-tuning, with batches of 512.
        adapt_final_val, adapt_final_test: accuracies after it; for imagenet2012 "test" is the official validation set.
        params: rounded to 10,000; 110.95 million for R50+L/32, which has 328.99: `recommended` uses the exact counts.
        infer_samples_per_sec: images/s at this resolution on a V100, measured with timm.
        filename, adapt_filename: of the pre-trained and of the fine-tuned file, without ".npz".
    """

    name: str
    ds: str
    epochs: int | None
    lr: float
    aug: str
    wd: float
    do: float
    sd: float
    best_val: float
    final_val: float
    final_test: float
    adapt_ds: str
    adapt_lr: float
    adapt_steps: int
    adapt_resolution: int
    adapt_final_val: float
    adapt_final_test: float
    params: int | None
    infer_samples_per_sec: float
    filename: str
    adapt_filename: str

    @property
    def file(self):
        """What to pass as `weights=` for the fine-tuned model."""
        return self.adapt_filename

    @property
    def top1(self):
        """Test accuracy after fine-tuning, in percent."""
        return round(100 * self.adapt_final_test, 3)


COLUMNS = {field.name: field.type for field in dataclasses.fields(Row)}


class Pick(typing.NamedTuple):
    """A recommended pre-trained file and its ImageNet-1k classifier; `params` is exact, with 1,000 classes at 224."""

    filename: str
    file: str
    mib: int | None  # of the pre-trained file
    params: int
    adapt_resolution: int
    infer_samples_per_sec: float
    top1: float


# The original's README and notebook; parameter counts: its models_test.py
RECOMMENDED = {
    parse(file)["name"]: Pick(file, f"{file}--imagenet2012-steps_20k-lr_{lr}-res_{side}", mib, params, side, speed, top1)
    for file, mib, params, lr, side, speed, top1 in (
        ("L_16-i21k-300ep-lr_0.001-aug_strong1-wd_0.1-do_0.0-sd_0.0", 1243, 304_326_632, 0.01, 384, 49.87, 85.588),
        ("B_16-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.0-sd_0.0", 391, 86_567_656, 0.03, 384, 137.92, 85.486),
        ("S_16-i21k-300ep-lr_0.001-aug_light1-wd_0.03-do_0.0-sd_0.0", 115, 22_050_664, 0.03, 384, 300.12, 83.728),
        ("R50_L_32-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.1-sd_0.1", 1337, 328_994_856, 0.01, 384, 326.73, 85.992),
        ("R26_S_32-i21k-300ep-lr_0.001-aug_light1-wd_0.1-do_0.0-sd_0.0", 170, 36_431_912, 0.01, 384, 560.40, 83.846),
        ("Ti_16-i21k-300ep-lr_0.001-aug_none-wd_0.03-do_0.0-sd_0.0", 37, 5_717_416, 0.03, 384, 609.58, 78.220),
        ("B_32-i21k-300ep-lr_0.001-aug_light1-wd_0.1-do_0.0-sd_0.0", 398, 88_224_232, 0.01, 384, 954.94, 83.586),
        ("S_32-i21k-300ep-lr_0.001-aug_none-wd_0.1-do_0.0-sd_0.0", 118, 22_878_952, 0.01, 384, 2153.94, 79.584),
        ("R_Ti_16-i21k-300ep-lr_0.001-aug_none-wd_0.03-do_0.0-sd_0.0", 40, 6_337_704, 0.03, 384, 2425.77, 75.402),
        ("B_8-i21k-300ep-lr_0.001-aug_medium2-wd_0.1-do_0.0-sd_0.0", None, 86_576_872, 0.03, 224, math.nan, 85.578),
    )
}

# timm's pre-trained and ImageNet-1k files (at 384, B/8 at 224) where they are not those of RECOMMENDED
TIMM = (
    "B_16-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.01-res_384",
    "B_32-i21k-300ep-lr_0.001-aug_medium1-wd_0.03-do_0.0-sd_0.0",
    "B_32-i21k-300ep-lr_0.001-aug_light1-wd_0.1-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.03-res_384",
    "B_8-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.0-sd_0.0",
    "B_8-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.01-res_224",
    "L_16-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.1-sd_0.1",
    "L_16-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.1-sd_0.1--imagenet2012-steps_20k-lr_0.01-res_384",
    "R26_S_32-i21k-300ep-lr_0.001-aug_medium2-wd_0.03-do_0.0-sd_0.0",
    "R26_S_32-i21k-300ep-lr_0.001-aug_medium2-wd_0.03-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.03-res_384",
    "R50_L_32-i21k-300ep-lr_0.001-aug_medium2-wd_0.1-do_0.0-sd_0.0",
    "R50_L_32-i21k-300ep-lr_0.001-aug_medium2-wd_0.1-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.01-res_384",
    "S_32-i21k-300ep-lr_0.001-aug_light1-wd_0.03-do_0.0-sd_0.0",
    "S_32-i21k-300ep-lr_0.001-aug_light1-wd_0.03-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.03-res_384",
)


def query(**columns):
    """The rows of the published index that have these values, best first by `adapt_final_val`, their final validation accuracy.

    The index (51,509 rows) is fetched once and kept as checkpoints are, by `keras_vit.checkpoints.fetch`.

    Args:
        columns: columns of `Row`, each with a value or a collection of values; `resolution` is short for `adapt_resolution`, and
            a name may be spelled as in files (`model="B_16"` as parsed, too).

    Returns:
        A list of `Row`; empty where no row has all of these values.

    Raises:
        errors.ArgumentError: no such column, or a value that does not occur in it.
        errors.DataError: the index is not the table it is known to be. errors.DownloadError: it cannot be had.
    """
    rows = found = _read(*fetch.fetch(INDEX))
    for key, wanted in columns.items():
        column = {"resolution": "adapt_resolution", "model": "name"}.get(key, key)
        _check("column", column, COLUMNS)
        values = [wanted] if isinstance(wanted, str) or not isinstance(wanted, collections.abc.Iterable) else list(wanted)
        values = [_spell(value) for value in values] if column == "name" else values
        known = list(dict.fromkeys(getattr(row, column) for row in rows))
        for value in values:
            _check(column, value, known)
        values = set(values)
        found = [row for row in found if getattr(row, column) in values]
    return sorted(found, key=lambda row: -math.inf if math.isnan(row.adapt_final_val) else row.adapt_final_val, reverse=True)


def recommended(name=None, adapt_ds=None, resolution=None, *, max_params=None, min_images_per_second=None):
    """The name of the file to take, for `weights=`: a pre-trained file or, with `adapt_ds`, a fine-tuned one.

    Rule for a model (section 4.5 of the paper): of its files pre-trained for 300 epochs on ImageNet-21k (`ds` "i21k") the one of
    highest final validation accuracy in pre-training (`final_val`); of its fine-tunings the one of highest `adapt_final_val`.
    Among several models: the one whose fine-tuned file has the highest top-1 accuracy and fits the budget.

    The ten pre-trained files and their ImageNet-1k classifiers are built in (`RECOMMENDED`); the index is fetched only for
    another data set, for 224 pixels (but B/8), and where a built-in file is too slow but one of 224 might not be.

    Args:
        name: model, "B/16" or "B_16"; None compares all ten.
        adapt_ds: "imagenet2012", "cifar100", "resisc45", "oxford_iiit_pet" or "kitti"; None gives the pre-trained file, models
            being compared by their built-in ImageNet-1k classifiers.
        resolution: of the fine-tuning, 224 or 384; None takes the best.
        max_params: most parameters, counted with 1,000 classes at 224.
        min_images_per_second: least throughput at its resolution on a V100, as the index states it; B/8 has none stated and
            never fits.

    Raises:
        errors.ArgumentError: an argument is not usable, or nothing fits; those of `query` where the index is needed.
    """
    name = _spell(name)
    asked = {"name": name, "adapt_ds": adapt_ds, "resolution": resolution}
    for (what, value), known in zip(asked.items(), (NAMES, _ADAPT_CLASSES, (224, 384))):
        _check(what, value, (None, *known))
    if resolution and not adapt_ds:
        raise errors.ArgumentError(f"augreg.recommended: resolution={resolution} is that of a fine-tuning; give adapt_ds too.")
    most, least = (math.inf if max_params is None else max_params), min_images_per_second
    if not isinstance(most, numbers.Real) or not isinstance(least or 0, numbers.Real):
        raise errors.ArgumentError(f"augreg.recommended: a budget must be a number, got {max_params!r} and {least!r}.")

    def fits(row):
        return resolution in (None, row.adapt_resolution) and (least is None or row.infer_samples_per_sec >= least)

    picks = {pick.filename: pick for key, pick in RECOMMENDED.items() if name in (None, key) and pick.params <= most}
    rows = [pick for pick in picks.values() if fits(pick)]
    decided = resolution == 384 or all(fits(pick) or math.isnan(pick.infer_samples_per_sec) for pick in picks.values())
    if adapt_ds and not (adapt_ds == "imagenet2012" and decided):
        rows = [row for row in query(adapt_ds=adapt_ds) if row.filename in picks and fits(row)]
        rows = {row.filename: row for row in reversed(rows)}.values()  # the best of each, which came first
    if not rows:
        asked |= {"max_params": max_params, "min_images_per_second": least}
        asked = ", ".join(f"{key}={value!r}" for key, value in asked.items() if value is not None)
        raise errors.ArgumentError(f"augreg.recommended: nothing fits {asked}; augreg.RECOMMENDED has all parameters and speeds.")
    best = max(rows, key=lambda row: row.top1)
    return best.file if adapt_ds else best.filename


def _spell(name):
    """A model's name as the index spells it."""
    return _MODELS.get(name, name) if isinstance(name, str) else name


def _check(what, value, known):
    """Refuses a value that does not occur, naming those nearest to it, or all of a few."""
    if value not in list(known):
        text = [str(each) for each in known]
        near = text if len(text) < 25 else difflib.get_close_matches(str(value), text, 3) or [*text[:3], "..."]
        raise errors.ArgumentError(f"augreg: {what} {value!r} does not occur; expected one of {', '.join(near)}.")


@functools.lru_cache(maxsize=1)
def _read(path, sha256):
    """The index as a tuple of rows, read once for each content of the file."""
    rows, line = [], 1
    try:
        with open(path, newline="", encoding="utf-8") as file:
            for line, cells in enumerate(csv.reader(file), 1):
                if line == 1 and cells != list(COLUMNS):
                    raise ValueError(f"expected the columns {', '.join(COLUMNS)}, got {', '.join(cells)[:500]}")
                if len(cells) != len(COLUMNS):
                    raise ValueError(f"expected {len(COLUMNS)} cells, got {len(cells)}")
                if line > 1:
                    rows.append(Row(*map(_cell, COLUMNS, COLUMNS.values(), cells)))
        if not rows:
            raise ValueError("expected rows, got none")
    except (ValueError, csv.Error) as error:
        raise errors.DataError(f"{path}, line {line}: not the AugReg index: {error}. Check its source.") from error
    return tuple(rows)


def _cell(column, kind, text):
    try:
        if not text:
            return {float: math.nan, int | None: None}[kind]
        return kind(text) if kind in (str, float) else int(text.removesuffix(".0"))
    except (KeyError, ValueError):
        raise ValueError(f"expected {'text' if kind is str else 'a number'} as {column}, got {text!r}") from None
