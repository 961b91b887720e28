"""Classification: names for predictions, and how good they are on a data set."""

import dataclasses
import heapq
import json
import math
import pathlib
import re

import keras
import numpy as np

from keras_vit import errors, zoo
from keras_vit.checkpoints.fetch import STORAGE, fetch
from keras_vit.checkpoints.weights import IMAGENET21K

_IMAGENET1K = f"{STORAGE}/download.tensorflow.org/data/imagenet_class_index.json"  # of keras.applications
_IMAGENET21K = f"{STORAGE}/bit_models/imagenet21k_wordnet_ids.txt", f"{STORAGE}/bit_models/imagenet21k_wordnet_lemmas.txt"

_WORDNET = re.compile(r"n\d{8}")

BINS = 15  # of the calibration (Guo et al., section 5)
CONFUSION = 4096  # classes up to which a confusion matrix is kept: 128 MiB
TINY = float(np.finfo(np.float32).tiny)  # below it a probability counts as this
Z = 1.959963984540054  # 97.5% of a normal distribution lie below


def imagenet_ids():
    """The 1,000 WordNet ids of ImageNet-1k (ILSVRC 2012) in the order of its labels, which is sorted."""
    return pathlib.Path(__file__).with_name("imagenet1k.txt").read_text(encoding="ascii").split()


def check_classes(names, classes, where):
    """Refuses a data set of ImageNet of which a model of 1,000 classes would take the labels for others.

    Args:
        names: of the data set's classes, in the order of its labels.
        classes: how many the model tells apart.
        where: what holds the data, for the message.

    Raises:
        errors.DataError: there are WordNet ids among the names, and they are not the 1,000 of ImageNet-1k; those that are missing
            or too many are named.
    """
    if classes != 1000 or not any(_WORDNET.fullmatch(name) for name in names):
        return
    expected = imagenet_ids()
    missing, strange = sorted(set(expected) - set(names)), sorted(set(names) - set(expected))
    if missing or strange:
        told = [f"{len(each)} {what}: {_few(each)}" for each, what in ((missing, "missing"), (strange, "unknown")) if each]
        raise errors.DataError(
            f"{where}: expected the 1,000 classes of ImageNet-1k, WordNet ids n01440764 to n15075141, got {len(names):,}; "
            f"{'; '.join(told)}. Labels follow the sorted names, so that a gap shifts all behind it: restore the classes with "
            "their images, and move out what is none."
        )


def _few(names, most=8):
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def class_names(classes):
    """[(WordNet id, name)] of ImageNet-1k (1,000 classes) or of ImageNet-21k (21,843, in Google's own order); fetched and cached.

    Raises:
        errors.ArgumentError: another number of classes, whose names only the caller knows.
    """
    if classes == 1000:
        index = json.loads(fetch(_IMAGENET1K).path.read_text())
        names = [tuple(index[str(i)]) for i in range(1000)]
    elif classes == IMAGENET21K:
        ids, lemmas = (fetch(url).path.read_text().splitlines() for url in _IMAGENET21K)
        names = list(zip(ids, lemmas))
    else:
        raise errors.ArgumentError(
            f"class names are known for 1000 and {IMAGENET21K} classes, not for {classes}; pass labels=[...] of that length."
        )
    if len(names) != classes:
        raise errors.DataError(
            f"the list of class names has {len(names)} entries, expected {classes}; fetch it anew: delete it from the cache "
            "and its record from the lock file."
        )
    return names


def decode_predictions(predictions, top=5, labels=None):
    """The best classes of each row of scores.

    Args:
        predictions: (b, classes) scores, as a model's `predict` returns them.
        top: how many classes for each row.
        labels: names of the classes; by default those of ImageNet-1k or 21k, by the number of columns.

    Returns:
        A list for each row: [(WordNet id, or the label again, name, score)], best first.

    Raises:
        errors.ArgumentError: not (b, classes); labels of another length; or all classes score the same, as under the zeroed
            heads of the original `imagenet21k` files.
    """
    scores = np.asarray(keras.ops.convert_to_numpy(predictions))
    if scores.ndim != 2:
        raise errors.ArgumentError(f"decode_predictions: expected scores of shape (batch, classes), got {scores.shape}.")
    if scores.size and scores.shape[1] > 1 and np.all(scores == scores[:, :1]):
        raise errors.ArgumentError(
            "decode_predictions: every class has the same score, so there is no best one: the head is zeroed (weights "
            "'imagenet21k') or not trained. Use weights='augreg' or 'imagenet', or fine-tune with classes=N."
        )
    names = class_names(scores.shape[1]) if labels is None else [(label, label) for label in labels]
    if len(names) != scores.shape[1]:
        raise errors.ArgumentError(f"decode_predictions: expected {scores.shape[1]} labels, got {len(names)}.")
    best = np.argsort(-scores, axis=1, kind="stable")[:, :top]
    return [[(*names[i], float(row[i])) for i in order] for row, order in zip(scores, best)]


@dataclasses.dataclass(frozen=True)
class Real:
    """Accuracy against sets of labels.

    Attributes:
        examples: those that have a label at all.
        accuracy: share of them whose best class is in their set.
        interval: (low, high), see `wilson_interval`.
    """

    examples: int
    accuracy: float
    interval: tuple


@dataclasses.dataclass(frozen=True, eq=False)
class Evaluation:
    """What `evaluate` found.

    Attributes:
        examples: how many, those that could not be read included.
        accuracy: top-1, the share of examples whose label has the best score.
        interval: (low, high) of the accuracy, see `wilson_interval`.
        top5: share of examples whose label is among the best five; None with five classes or fewer.
        nll: negative log-likelihood of the labels in nats, mean over the examples.
        ece: expected calibration error (Guo et al., arXiv 1706.04599, equation 3), with `BINS` equal bins.
        calibration: (bins, 3): examples, mean confidence and accuracy of each bin; NaN where it is empty.
        class_examples: (classes,) of each label.
        class_accuracy: (classes,), NaN for a class without examples.
        confusion: (classes, classes) counts, labels in rows, predictions in columns; None with more than `CONFUSION` classes.
        worst: [(index, label, predicted, probability of the predicted)] of the wrong predictions of highest loss, that first;
            index counts the examples from 0 in the order of the batches.
        real: a `Real`, or None where no sets of labels were given.
        unreadable: how many of the examples could not be read (`Tally.miss`). They count as wrong in every accuracy, and not at
            all in nll, ece, calibration and confusion.
    """

    examples: int
    accuracy: float
    interval: tuple
    top5: float | None
    nll: float
    ece: float
    calibration: np.ndarray
    class_examples: np.ndarray
    class_accuracy: np.ndarray
    confusion: np.ndarray | None
    worst: list
    real: Real | None
    unreadable: int = 0


def evaluate(model, batches, **options):
    """Runs a classifier over a data set once, and says how good it is.

    Args:
        model: (b, H, W, 3) -> (b, classes) scores.
        batches: finite iterable of (images, labels); labels are one-hot (b, classes) or whole numbers (b,).
        **options: of `evaluate_scores`; with `from_logits=True` for a model that ends in logits.

    Returns:
        An `Evaluation`.

    Raises:
        errors.ArgumentError: the model's head is zeroed, and what `evaluate_scores` raises.
    """
    return evaluate_scores(_scored(model, batches, "evaluate"), **options)


def evaluate_scores(batches, *, from_logits=False, multi_label=False, worst=24, sets=None):
    """`evaluate` of scores that are there already; memory does not grow with the number of examples.

    A tie counts against the model: a label is in the top k if fewer than k other classes score as high or higher, and the
    prediction of an example whose label ties is one of the others. So a model that prefers nothing has accuracy 0.

    Args:
        batches: finite iterable of (scores, labels), (b, classes) and as in `evaluate`.
        from_logits: scores are logits, not probabilities.
        multi_label: the probabilities are those of a sigmoid, for each class on its own. The prediction is still the best class;
            the likelihood is that of the label being on and all other classes off.
        worst: how many mistakes to list.
        sets: None, or for each example, in order, the collection of classes that are right (`real.sets`); examples of an empty
            one do not count in `Evaluation.real`. Everything else is against the labels.

    Returns:
        An `Evaluation`.

    Raises:
        errors.ArgumentError: shapes that do not fit, or scores that are no probabilities where they should be.
        errors.DataError: no examples, a score that is NaN or infinite, a label outside of the classes, or not as many sets as
            examples.
    """
    tally = None
    for scores, labels in batches:
        scores = np.asarray(keras.ops.convert_to_numpy(scores), np.float64)
        if tally is None:
            if scores.ndim != 2:
                raise errors.ArgumentError(
                    f"evaluate: expected scores of shape (batch, classes), got {scores.shape}; evaluate a model that has one "
                    "score for each class."
                )
            tally = Tally(scores.shape[1], from_logits, multi_label, worst, sets)
        tally.add(scores, labels)
    if tally is None or not tally.examples:
        raise errors.DataError("evaluate: the data set has no examples; check its split.")
    return tally.evaluation()


def accuracy(model, batches):
    """Share of examples whose label has the best score; a tie counts against the model.

    Args:
        model: (b, H, W, 3) -> (b, classes) scores, logits or probabilities.
        batches: finite iterable of (images, labels) as in `evaluate`.

    Raises:
        errors.ArgumentError: the model's head is zeroed. errors.DataError: there are no examples, or a score is NaN or infinite.
    """
    right = count = 0
    for scores, labels in _scored(model, batches, "accuracy"):
        others, _ = _others(scores, _whole_labels(scores, np.asarray(labels), count), count)
        right += int(np.sum(others == 0))
        count += len(scores)
    if not count:
        raise errors.DataError("accuracy: the data set has no examples; check its split.")
    return right / count


def wilson_interval(right, examples):
    """(low, high): the 95% interval of a share, of `right` out of `examples` (Wilson, JASA 22, 1927).

    It says how far the share moves with the draw of the test examples, not with the seed of the training.
    """
    share = right / examples
    center = (share + Z**2 / (2 * examples)) / (1 + Z**2 / examples)
    half = Z / (1 + Z**2 / examples) * math.sqrt(share * (1 - share) / examples + Z**2 / (4 * examples**2))
    return max(0.0, center - half), min(1.0, center + half)


def _scored(model, batches, asked):
    """(scores, labels) of each batch."""
    if zoo.zero_head(model):
        raise errors.ArgumentError(
            f"{asked}: the head of {model.name!r} is all zeros and prefers no class; fine-tune it or load weights with a head."
        )
    for images, labels in batches:
        yield keras.ops.convert_to_numpy(model.predict_on_batch(np.asarray(images))), labels  # JAX takes no TensorFlow tensors


def _whole_labels(scores, labels, before):
    """(b,) int64 of one-hot or whole labels; `before` is the number of examples before them."""
    if labels.ndim == 2 and labels.shape == scores.shape:
        labels = labels.argmax(axis=1)
    elif labels.shape != scores.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
        raise errors.ArgumentError(
            f"evaluate: the scores have shape {scores.shape}, so expected one-hot labels of that shape or whole numbers of shape "
            f"{scores.shape[:1]}, got {labels.dtype} of shape {labels.shape}; do data set and model have the same classes?"
        )
    outside = (labels < 0) | (labels >= scores.shape[1])
    if outside.any():
        place = int(np.argmax(outside))
        raise errors.DataError(
            f"evaluate: example {before + place} has the label {labels[place]}, expected 0 to {scores.shape[1] - 1}; "
            "does the split have labels?"
        )
    return labels.astype(np.int64)


def _others(scores, labels, before):
    """How many other classes score as high as the label or higher, (b,), and the best class, never the label if it ties.

    `before` is the number of the first example.
    """
    broken = ~np.isfinite(scores.max(axis=1))  # a class may be ruled out by a logit of minus infinity
    if broken.any():
        raise errors.DataError(
            f"evaluate: the scores of example {before + int(np.argmax(broken))} are NaN or infinite; check the image and the "
            "weights."
        )
    rows = np.arange(len(scores))
    own = scores[rows, labels]
    others = np.sum(scores >= own[:, None], axis=1) - 1
    rivals = scores.copy()
    rivals[rows, labels] = -np.inf
    return others, np.where(others == 0, labels, rivals.argmax(axis=1))


class Tally:
    """The sums behind an `Evaluation`, example by example in their order; what `record` gives brings them back.

    Args:
        classes: how many.
        from_logits, multi_label, worst, sets: of `evaluate_scores`.
    """

    _COUNTS = ("examples", "right", "in_five", "set_examples", "set_right", "unreadable")

    def __init__(self, classes, from_logits=False, multi_label=False, worst=24, sets=None):
        self.from_logits, self.multi_label, self.sets = from_logits, multi_label, sets
        self.examples = self.right = self.in_five = self.set_examples = self.set_right = self.unreadable = 0
        self.nll = 0.0
        self.bins = np.zeros((BINS, 3))  # examples, sum of confidences, right ones
        self.classes = np.zeros((classes, 2), np.int64)  # examples, right ones
        self.confusion = np.zeros((classes, classes), np.int64) if classes <= CONFUSION else None
        self.worst, self.mistakes = worst, []  # a heap of (loss, -index, label, predicted, probability), the mildest on top

    def add(self, scores, labels):
        """Counts a batch: scores (b, classes), labels as in `evaluate`. Raises as `evaluate_scores` does."""
        scores = np.asarray(keras.ops.convert_to_numpy(scores), np.float64)
        if scores.ndim != 2 or scores.shape[1] != len(self.classes):
            raise errors.ArgumentError(
                f"evaluate: expected scores of shape (batch, {len(self.classes)}), got {scores.shape}; do data set and model "
                "have the same classes?"
            )
        labels = _whole_labels(scores, np.asarray(labels), self.examples)
        others, predicted = _others(scores, labels, self.examples)
        loss, probability = self._likelihood(scores, labels, predicted)
        right = others == 0
        bins = np.clip(np.ceil(probability * BINS).astype(int) - 1, 0, BINS - 1)
        np.add.at(self.bins, bins, np.stack([np.ones(len(bins)), probability, right], axis=1))
        np.add.at(self.classes, labels, np.stack([np.ones(len(labels), np.int64), right], axis=1))
        if self.confusion is not None:
            np.add.at(self.confusion, (labels, predicted), 1)
        wrong = np.flatnonzero(~right)
        for place in wrong[np.argsort(-loss[wrong], kind="stable")[: self.worst]]:
            entry = loss[place], -(self.examples + place), labels[place], predicted[place], probability[place]
            (heapq.heappush if len(self.mistakes) < self.worst else heapq.heappushpop)(self.mistakes, entry)
        if self.sets is not None:
            self._add_sets(scores)
        self.examples += len(scores)
        self.right += int(right.sum())
        self.in_five += int(np.sum(others < 5))
        self.nll += float(loss.sum())

    def miss(self, label):
        """Counts the next example, of that label, which could not be read, as wrong."""
        if self.sets is not None and self._set(self.examples, len(self.classes)):
            self.set_examples += 1
        self.classes[label, 0] += 1
        self.examples += 1
        self.unreadable += 1

    def record(self):
        """All sums, as JSON keeps them to the last bit; `restore` reads it."""
        found = {name: getattr(self, name) for name in self._COUNTS}
        rows = () if self.confusion is None else np.argwhere(self.confusion)
        return found | dict(
            nll=self.nll, bins=self.bins.tolist(), classes=self.classes.tolist(),
            confusion=[[int(i), int(j), int(self.confusion[i, j])] for i, j in rows],
            mistakes=[[*map(float, (loss, share)), *map(int, whole)] for loss, *whole, share in self.mistakes],
        )  # fmt: skip

    def restore(self, record):
        """Goes on from what `record` gave.

        Raises:
            KeyError, TypeError, ValueError, IndexError: it is no such record, or one of another number of classes.
        """
        for name in self._COUNTS:
            setattr(self, name, int(record[name]))
        self.nll = float(record["nll"])
        self.bins[:], self.classes[:] = record["bins"], record["classes"]
        for i, j, count in record["confusion"]:
            self.confusion[i, j] = count
        self.mistakes = [(loss, *whole, share) for loss, share, *whole in record["mistakes"]]

    def _likelihood(self, scores, labels, predicted):
        """The loss of each label in nats, and the probability of each prediction."""
        rows = np.arange(len(scores))
        if self.from_logits and self.multi_label:
            on, off = -np.logaddexp(0, -scores), -np.logaddexp(0, scores)
        elif self.from_logits:
            on = scores - scores.max(axis=1, keepdims=True)
            on = on - np.log(np.exp(on).sum(axis=1, keepdims=True))
        else:
            strange = (scores < 0) | (scores > 1 + 1e-3)
            if strange.any() or not self.multi_label and not np.allclose(scores.sum(axis=1), 1, rtol=0, atol=1e-2):
                raise errors.ArgumentError(
                    "evaluate: expected probabilities from 0 to 1"
                    + ("" if self.multi_label else " that add up to 1")
                    + f", got scores from {scores.min():.4g} to {scores.max():.4g}; pass from_logits=True for a model that ends "
                    "in logits, multi_label=True for one that ends in a sigmoid."
                )
            on, off = np.log(np.maximum(scores, TINY)), np.log(np.maximum(1 - scores, TINY))
        loss = -on[rows, labels]
        if self.multi_label:
            loss = loss - off.sum(axis=1) + off[rows, labels]
        return loss, np.exp(on[rows, predicted])

    def _add_sets(self, scores):
        for number, row in enumerate(scores, self.examples):
            right = self._set(number, len(row))
            if right:
                among = np.zeros(len(row), bool)
                among[right] = True
                self.set_examples += 1
                self.set_right += bool(row[among].max() > row[~among].max(initial=-np.inf))

    def _set(self, number, classes):
        if number >= len(self.sets):
            raise errors.DataError(f"evaluate: there are more examples than the {len(self.sets)} sets of labels.")
        right = list(self.sets[number])
        if right and not 0 <= min(right) <= max(right) < classes:
            raise errors.ArgumentError(f"evaluate: the set of example {number} is {right}, expected 0 to {classes - 1}.")
        return right

    def evaluation(self):
        """The `Evaluation` of what was counted. Raises errors.DataError where nothing could be read, or a set is missing."""
        read = self.examples - self.unreadable
        if not read:
            what = f"none of the {self.examples} examples can be read" if self.examples else "the data set has no examples"
            raise errors.DataError(f"evaluate: {what}; check its split.")
        if self.sets is not None and len(self.sets) != self.examples:
            raise errors.DataError(
                f"evaluate: expected a set of labels for each of {self.examples} examples, got {len(self.sets)}."
            )
        examples, confidences, right = self.bins.T
        with np.errstate(invalid="ignore"):
            calibration = np.stack([examples, confidences / examples, right / examples], axis=1)
            class_accuracy = self.classes[:, 1] / self.classes[:, 0]
        worst = sorted(self.mistakes, reverse=True)
        return Evaluation(
            examples=self.examples,
            accuracy=self.right / self.examples,
            interval=wilson_interval(self.right, self.examples),
            top5=self.in_five / self.examples if len(self.classes) > 5 else None,
            nll=self.nll / read,
            ece=float(np.abs(confidences - right).sum() / read),
            calibration=calibration,
            class_examples=self.classes[:, 0],
            class_accuracy=class_accuracy,
            confusion=self.confusion,
            worst=[(int(-place), int(label), int(best), float(share)) for _, place, label, best, share in worst],
            real=None if self.sets is None else self._real(),
            unreadable=self.unreadable,
        )

    def _real(self):
        if not self.set_examples:
            raise errors.DataError("evaluate: none of the sets of labels has a label; check the file of the labels.")
        interval = wilson_interval(self.set_right, self.set_examples)
        return Real(self.set_examples, self.set_right / self.set_examples, interval)
