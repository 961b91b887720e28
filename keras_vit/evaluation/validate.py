"""A data set classified once, example by example: files that cannot be read are counted and named, and a killed run goes on.

    source = pipeline.open_source("imagenet/val", None, on_error="keep")
    found = validate(model.predict_on_batch, source, size=224, batch=64, state="val.json", identity=identity(model))
    found.evaluation.accuracy

Whatever gives scores for images can be validated: a classifier, or a pair of towers with the classes' texts.
"""

import dataclasses
import hashlib
import json
import pathlib
import time

import keras
import numpy as np

from keras_vit import errors
from keras_vit.checkpoints import files, load
from keras_vit.data.pixels import Pixels
from keras_vit.evaluation import classify

EVERY = 1000  # examples between two writings of the state
GOOGLE = Pixels()
_FORMAT = 1


@dataclasses.dataclass(frozen=True, eq=False)
class Validation:
    """What `validate` found.

    Attributes:
        evaluation: an `Evaluation`, of all examples.
        unreadable: [(file, reason)] of a folder's files that could not be read; wrong answers, as `Evaluation.unreadable` says.
        resumed: how many examples an earlier run had done.
        images_per_second: of this run, reading included, without its first batch, which compiles, if there are others; None
            where nothing was left to do.
    """

    evaluation: classify.Evaluation
    unreadable: list
    resumed: int
    images_per_second: float | None


def validate(predict, source, *, size, batch, pixels=GOOGLE, identity="", state=None, every=EVERY, **options):
    """Classifies every example of a data set once.

    Args:
        predict: numpy images (b, height, width, 3) -> (b, classes) scores.
        source: of `pipeline.open_source`; a folder by on_error="keep", if its broken files shall not be fatal.
        size: height and width of the images, one number or (height, width).
        batch: images at once; the last ones may be fewer.
        pixels: the checkpoint's preprocessing.
        identity: text that says which model this is, for the state; see `identity`.
        state: file of the counts so far, or None. It is replaced in one step about every `every` examples and at the end. Where
            it is there already the run goes on from it, to the very figures of a run that was never interrupted; if that was
            finished, nothing is read again. Remove it to begin anew.
        every: examples between two writings.
        **options: of `classify.evaluate_scores`.

    Returns:
        A `Validation`.

    Raises:
        errors.DataError: the state is of another model, data set or setting (named), or none; a file could not be read, and a
            moment later it could; what `evaluate_scores` raises.
        errors.ArgumentError: as `evaluate_scores`.
        tf.errors.OpError: an example of another data set than a folder cannot be read; see `pipeline.raise_unreadable`.
    """
    from keras_vit.data import pipeline  # imports TensorFlow

    tally = classify.Tally(source.num_classes, **options)
    size = tuple(map(int, size)) if isinstance(size, (tuple, list)) else (size, size)
    asked = _asked(source, size, batch, pixels, identity, options)
    unreadable = _read(state, asked, tally) if state and pathlib.Path(state).exists() else []
    resumed = written = tally.examples

    def miss(numbers):
        for path, label, why in pipeline.why_unreadable(source, numbers) if numbers else ():
            tally.miss(label)
            unreadable.append((path, why))

    def save():
        if state:
            _write(state, asked, tally, unreadable)

    began, images, first = time.perf_counter(), 0, None
    batches = pipeline.numbered_batches(source, size=size, batch=batch, pixels=pixels, start=resumed)
    for numbers, *given in batches.as_numpy_iterator() if resumed != source.num_examples else ():
        scores, labels = keras.ops.convert_to_numpy(predict(given[0])), given[1]
        for part in np.split(np.arange(len(numbers)), np.flatnonzero(np.diff(numbers) > 1) + 1):
            miss(range(tally.examples, numbers[part[0]]))
            tally.add(scores[part], labels[part])
        images += len(numbers)
        first = first or (images, time.perf_counter())
        if tally.examples - written >= every:
            save()
            written = tally.examples
    ended = time.perf_counter()
    if source.paths:
        miss(range(tally.examples, source.num_examples))
    evaluation = tally.evaluation()
    if tally.examples != resumed:
        save()
    if first and images > first[0]:
        images, began = images - first[0], first[1]
    return Validation(evaluation, unreadable, resumed, images / (ended - began) if first else None)


def identity(model):
    """Text that is the same for models of the same name, input and weights, to the last bit."""
    digest = hashlib.sha256(repr((model.name, model.input_shape)).encode())
    for name, variable in load.named_weights(model).items():
        digest.update(name.encode() + np.ascontiguousarray(load.to_numpy(variable)).tobytes())
    return digest.hexdigest()


def _asked(source, size, batch, pixels, identity, options):
    """What must be the same for counts to be added up."""
    sets = options.get("sets")
    sets = sets and hashlib.sha256(json.dumps([list(map(int, each)) for each in sets]).encode()).hexdigest()
    asked = dict(
        format=_FORMAT, model=identity, size=size, batch=batch, preprocessing=pixels.asdict(), options=options | dict(sets=sets),
        backend=keras.config.backend(), data=source.fingerprint(),
    )  # fmt: skip
    return json.loads(json.dumps(asked))


def _write(state, asked, tally, unreadable):
    path = pathlib.Path(state)
    if not path.parent.is_dir():
        raise errors.ArgumentError(f"{path}: its folder does not exist; create it first.")
    with files.replacing(path) as temporary:
        record = dict(of=asked, counts=tally.record(), unreadable=unreadable)
        pathlib.Path(temporary).write_text(json.dumps(record), encoding="utf-8")


def _read(state, asked, tally):
    """Brings the counts of a state into the tally, and returns what could not be read."""
    try:
        record = json.loads(pathlib.Path(state).read_text(encoding="utf-8"))
        of, counts = record["of"], record["counts"]
        different = [key for key in asked if of.get(key) != asked[key]]
        if not different:
            tally.restore(counts)
            return [(str(path), str(why)) for path, why in record["unreadable"]]
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise errors.DataError(
            f"{state}: expected the state of an evaluation, it cannot be read ({type(error).__name__}: {error}). Remove it to "
            "begin anew, or name another file."
        ) from error
    changes = "; ".join(f"{key} was {_short(of.get(key))}, is {_short(asked[key])}" for key in different)
    raise errors.DataError(
        f"{state}: it holds the counts of another evaluation: {changes}. Repeat that one, or name another file for this one."
    )


def _short(value):
    text = json.dumps(value)
    return text if len(text) <= 120 else f"{text[:100]}..."
