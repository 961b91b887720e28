"""Few-shot linear evaluation: how much a classifier learns from a few examples of each class on a model's frozen features.

It is that of google-research/big_vision (`evaluators/fewshot_lsr.py`, defaults of `configs/common_fewshot.py`): least squares in
closed form, so that no learning rate or stopping time is in the figure.
"""

import dataclasses
import numbers
import warnings

import keras
import numpy as np

from keras_vit import errors, zoo

SHOTS = (1, 5, 10, 25)
L2 = 2.0**10
SEEDS = (0, 1, 2)
BIAS = 100.0  # the constant feature; large, so that the regularisation hardly touches its weights
_ROWS = 8192  # test examples scored at once


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        shots: examples of each class.
        l2: the regularisation.
        accuracy: on the test examples, mean over the seeds.
        accuracies: for each seed.
        examples: how many were learned from; fewer than shots x classes where a class has not as many.
    """

    shots: int
    l2: float
    accuracy: float
    accuracies: tuple
    examples: int


class LeastSquares:
    """Linear classifiers of minimal squared error, for every strength of regularisation at the cost of one.

    Features are standardised by their own mean and deviation (plus 1e-5), and get a constant one; the targets are 1 for the class
    and -1 for the others. What is minimal is the sum of squared errors plus `l2` times the sum of squared weights. The
    original computes in float32, which agrees with this float64 at its own l2 and loses digits at l2 = 1.

    Args:
        features: (n, d).
        labels: (n,) whole numbers from 0 to classes - 1.
        classes: how many.
    """

    def __init__(self, features, labels, classes):
        features = np.asarray(features, np.float64)
        self._mean, self._deviation = features.mean(axis=0), features.std(axis=0) + 1e-5
        x, targets = self.inputs(features), 2.0 * np.eye(classes)[labels] - 1.0
        # (x'x + l2)^-1 x'y = x' (xx' + l2)^-1 y, whichever matrix is the smaller
        if len(x) >= x.shape[1]:
            self._spectrum, self._left = np.linalg.eigh(x.T @ x)
            self._right = self._left.T @ (x.T @ targets)
        else:
            self._spectrum, vectors = np.linalg.eigh(x @ x.T)
            self._left, self._right = x.T @ vectors, vectors.T @ targets

    def inputs(self, features):
        """(n, d) -> (n, d + 1): what the weights are multiplied with."""
        return np.pad((np.asarray(features, np.float64) - self._mean) / self._deviation, ((0, 0), (0, 1)), constant_values=BIAS)

    def weights(self, l2):
        """(d + 1, classes), the last row for the constant."""
        return (self._left / (self._spectrum + l2)) @ self._right

    def predict(self, features, l2):
        """(n, d) -> (n,) classes."""
        weights, blocks = self.weights(l2), range(0, len(features), _ROWS)
        return np.concatenate([np.argmax(self.inputs(features[i : i + _ROWS]) @ weights, axis=1) for i in blocks])


def fewshot(features, labels, test_features, test_labels, *, shots=SHOTS, l2=L2, seeds=SEEDS, classes=None):
    """Learns from a few examples of each class and tests on all others.

    Which examples is a function of the seed and the order of the labels alone; the first 5 of a class are among its first 10.

    Args:
        features, labels: (n, d) and (n,) whole numbers, to draw the examples from.
        test_features, test_labels: (m, d) and (m,), to test on.
        shots: numbers of examples of each class.
        l2: the regularisation, or several to try.
        seeds: for each, the examples are drawn anew.
        classes: how many; by default as many as the labels show.

    Returns:
        A list of `Row`, for each of `shots` one for each of `l2`.

    Raises:
        errors.ArgumentError: shapes, shots, l2 or seeds that make no sense.
        errors.DataError: features that are not finite, a label outside of the classes, no examples.
    """
    features, labels = _checked("features", features, labels, classes)
    test_features, test_labels = _checked("test_features", test_features, test_labels, classes)
    if features.shape[1] != test_features.shape[1]:
        raise errors.ArgumentError(
            f"fewshot: expected features and test_features of one width, got {features.shape[1]} and {test_features.shape[1]}; "
            "take both from the same model."
        )
    grid = [float(each) for each in np.ravel(l2)]
    if not grid or not all(0 < each < np.inf for each in grid):
        raise errors.ArgumentError(f"fewshot: expected l2 above 0, got {l2!r}.")
    if not len(shots) or not all(isinstance(each, numbers.Integral) and each > 0 for each in shots) or not len(seeds):
        raise errors.ArgumentError(f"fewshot: expected shots above 0 and at least one seed, got shots={shots}, seeds={seeds}.")
    classes = classes or int(max(labels.max(), test_labels.max())) + 1
    have = np.bincount(labels, minlength=classes)
    if have.min() < max(shots):
        warnings.warn(
            f"fewshot: {int(np.sum(have < max(shots)))} of {classes} classes have fewer than {max(shots)} examples, at least "
            f"{have.min()}; all of theirs are taken.",
            stacklevel=2,
        )
    shares = {(count, strength): [] for count in shots for strength in grid}
    for seed in seeds:
        random = np.random.default_rng(seed)
        orders = [random.permutation(np.flatnonzero(labels == each)) for each in range(classes)]
        for count in shots:
            chosen = np.concatenate([order[:count] for order in orders])
            solution = LeastSquares(features[chosen], labels[chosen], classes)
            for strength in grid:
                right = solution.predict(test_features, strength) == test_labels
                shares[count, strength].append(float(np.mean(right)))
    return [
        Row(count, strength, float(np.mean(each)), tuple(each), int(np.minimum(have, count).sum()))
        for (count, strength), each in shares.items()
    ]


def best(rows):
    """{shots: the `Row` of highest accuracy}, of the smaller l2 in a tie. The choice of l2 is made on the test examples."""
    found = {}
    for row in sorted(rows, key=lambda row: (row.shots, -row.accuracy, row.l2)):
        found.setdefault(row.shots, row)
    return found


def representation(model):
    """The model up to what its layer `head` reads: (b, H, W, 3) -> (b, d); the model itself where it has none.

    That is the class token, mean or pooled vector, or `pre_logits` after its tanh where the model has that layer.

    Raises:
        errors.ArgumentError: that is not one vector for each image.
    """
    tapped = model
    if any(layer.name == "head" for layer in model.layers):
        tapped = keras.Model(model.inputs, zoo.tap_input(model, "head"), name=f"{model.name}_features")
    if isinstance(tapped.output, list) or len(tapped.output.shape) != 2:
        shapes = [tuple(output.shape) for output in tapped.outputs]
        raise errors.ArgumentError(
            f"fewshot: {model.name!r} gives {shapes} for images, expected one vector for each; build it with pooling=, or with "
            "another classifier=."
        )
    return tapped


def features(model, batches):
    """Runs a model up to its head over a data set once.

    Args:
        model: see `representation`.
        batches: finite iterable of (images, labels), one-hot or whole numbers.

    Returns:
        float32 (n, d) features and int64 (n,) labels.

    Raises:
        errors.ArgumentError: see `representation`. errors.DataError: there are no examples.
    """
    model, rows, numbers = representation(model), [], []
    for images, labels in batches:
        rows.append(np.asarray(keras.ops.convert_to_numpy(model.predict_on_batch(np.asarray(images))), np.float32))
        labels = np.asarray(labels)
        numbers.append(labels.argmax(axis=-1) if labels.ndim == 2 else labels)
    if not rows:
        raise errors.DataError("fewshot: the data set has no examples; check its split.")
    return np.concatenate(rows), np.concatenate(numbers).astype(np.int64)


class FewShot(keras.callbacks.Callback):
    """Few-shot accuracy of the model in training, every so many steps.

    Args:
        train_batches, test_batches: finite iterables of (images, labels), which can be gone through again and again.
        every: steps, counted from 1 over all epochs; 0 for never.
        report: called as `report(step, **scalars)` with `fewshot_5shot=0.75` for 5 shots, mean over the seeds.
        start: steps made before, by a run that resumes.
        stride: steps between two calls of `on_train_batch_end` (`steps_on_device` of a learner, `steps_per_execution`).
        **options: of `fewshot`, one `l2` among them.
    """

    def __init__(self, train_batches, test_batches, every, report, *, start=0, stride=1, **options):
        super().__init__()
        if np.size(options.get("l2", L2)) != 1:
            raise errors.ArgumentError(f"FewShot: expected one l2, got {options['l2']!r}; a grid is for fewshot itself.")
        self.batches, self.every, self.report = (train_batches, test_batches), every, report
        self.step, self.stride, self.options = start, stride, options
        self._tapped = None

    def on_train_batch_end(self, batch, logs=None):
        before = self.step
        self.step += self.stride
        if self.every and self.step // self.every > before // self.every:
            self.evaluate()

    def evaluate(self):
        """Evaluates and reports now. Returns what `fewshot` does."""
        model = self.model  # on JAX, asking for the model brings its weights up to date
        if self._tapped is None or self._tapped[0] is not model:
            self._tapped = model, representation(model)
        found = [each for batches in self.batches for each in features(self._tapped[1], batches)]
        rows = fewshot(*found, **self.options)
        self.report(self.step, **{f"fewshot_{row.shots}shot": row.accuracy for row in rows})
        return rows


def _checked(name, values, labels, classes):
    """(n, d) features and (n,) int64 labels."""
    values, labels = np.asarray(values), np.asarray(labels)
    if values.ndim != 2 or labels.shape != values.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
        raise errors.ArgumentError(
            f"fewshot: expected {name} (n, d) and whole labels (n,), got {values.shape} and {labels.dtype} {labels.shape}."
        )
    if not len(values):
        raise errors.DataError(f"fewshot: {name} has no examples; check the split.")
    if not np.isfinite(values).all():
        raise errors.DataError(f"fewshot: {name} has values that are not finite; check the model's weights.")
    if labels.min() < 0 or classes and labels.max() >= classes:
        raise errors.DataError(
            f"fewshot: the labels of {name} go from {labels.min()} to {labels.max()}, expected 0 "
            f"{f'to {classes - 1}' if classes else 'or more'}; does the split have labels?"
        )
    return values, labels.astype(np.int64)
