"""What a model is worth: classification, ImageNet-ReaL, few-shot learning on features, and the part of the training images."""

import importlib.util
import json
import math
import os
import pathlib
import subprocess
import sys

import keras
import numpy as np
import pytest
from conftest import randomise

import keras_vit
from keras_vit import errors
from keras_vit.data import pipeline
from keras_vit.evaluation import classify, fewshot, real
from keras_vit.evaluation.classify import accuracy, evaluate, evaluate_scores
from keras_vit.evaluation.sample import training_sample
from keras_vit.models import flexivit


def softmax(logits):
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    return shares / shares.sum(axis=1, keepdims=True)


def random_scores(examples=200, classes=7, seed=0):
    """(logits, labels) of a classifier that is right more often than not."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, examples)
    return (rng.normal(size=(examples, classes)) + 1.5 * np.eye(classes)[labels]).astype("float32"), labels


def batched(*arrays, size=32):
    return [tuple(array[i : i + size] for array in arrays) for i in range(0, len(arrays[0]), size)]


def images(count, model=None, seed=0):
    shape = model.input_shape[1:] if model is not None else (8, 8, 3)
    return np.random.default_rng(seed).uniform(-1, 1, (count, *shape)).astype("float32")


# --- classification


def test_every_figure_is_that_of_its_definition():
    metrics = pytest.importorskip("sklearn.metrics")
    logits, labels = random_scores()
    shares = softmax(logits.astype(np.float64))
    found = evaluate_scores(batched(shares, labels))
    best = shares.argmax(axis=1)
    assert found.examples == 200
    assert found.accuracy == metrics.accuracy_score(labels, best)
    assert found.top5 == pytest.approx(metrics.top_k_accuracy_score(labels, shares, k=5))
    assert found.nll == pytest.approx(metrics.log_loss(labels, shares))
    np.testing.assert_array_equal(found.confusion, metrics.confusion_matrix(labels, best))
    np.testing.assert_allclose(found.class_accuracy, metrics.recall_score(labels, best, average=None))
    np.testing.assert_array_equal(found.class_examples, np.bincount(labels))
    confidence, error = shares.max(axis=1), 0.0
    for low in range(15):
        inside = (confidence > low / 15) & (confidence <= (low + 1) / 15)
        if inside.any():
            error += inside.mean() * abs((best == labels)[inside].mean() - confidence[inside].mean())
    assert found.ece == pytest.approx(error, rel=1e-12)
    assert np.nansum(found.calibration[:, 0]) == 200 and found.real is None


def test_logits_and_their_probabilities_one_hot_and_whole_labels_and_any_batches_give_the_same():
    logits, labels = random_scores()
    expected = evaluate_scores([(softmax(logits), labels)])
    for found in (
        evaluate_scores(batched(logits + 50, labels, size=7), from_logits=True),
        evaluate_scores(batched(softmax(logits), np.eye(7)[labels], size=199)),
    ):
        assert (found.accuracy, found.top5, found.interval) == (expected.accuracy, expected.top5, expected.interval)
        np.testing.assert_array_equal(found.confusion, expected.confusion)
        assert found.nll == pytest.approx(expected.nll, rel=1e-5) and found.ece == pytest.approx(expected.ece, rel=1e-5)
        assert [each[:3] for each in found.worst] == [each[:3] for each in expected.worst]


def test_the_worst_mistakes_are_those_of_highest_loss_in_that_order():
    logits, labels = random_scores(seed=3)
    loss = -np.log(softmax(logits))[np.arange(200), labels]
    wrong = np.flatnonzero(logits.argmax(axis=1) != labels)
    order = wrong[np.argsort(-loss[wrong], kind="stable")]
    for count in (0, 5, 1000):
        worst = evaluate_scores(batched(logits, labels, size=9), from_logits=True, worst=count).worst
        assert [index for index, *_ in worst] == order[:count].tolist()
        for index, label, predicted, probability in worst:
            assert (label, predicted) == (labels[index], logits[index].argmax())
            assert probability == pytest.approx(softmax(logits)[index].max(), rel=1e-5)


def test_a_tie_counts_against_the_model():
    even = evaluate_scores([(np.full((4, 10), 0.1), np.arange(4))])
    assert (even.accuracy, even.top5) == (0, 0) and np.trace(even.confusion) == 0
    scores = np.array([[3.0, 3, 1, 0, 0, 0, 0], [1, 2, 2, 2, 2, 2, 0], [9, 8, 7, 6, 6, 6, 0]])
    labels = np.array([0, 1, 5])
    found = evaluate_scores([(scores, labels)], from_logits=True)
    assert (found.accuracy, found.top5) == (0, pytest.approx(2 / 3))  # the second ties with four others, the third is sixth
    assert found.confusion[0, 1] == 1 and np.trace(found.confusion) == 0
    assert accuracy(Fixed(scores), [(images(3), labels)]) == 0


class Fixed:
    """A model whose scores are given."""

    layers, name = (), "fixed"

    def __init__(self, *scores):
        self.scores = list(scores)

    def predict_on_batch(self, _):
        return self.scores.pop(0)


def test_the_accuracy_alone_is_that_of_the_evaluation():
    logits, labels = random_scores()
    parts = batched(logits, labels)
    model = Fixed(*(scores for scores, _ in parts))
    assert accuracy(model, [(images(1), labels) for _, labels in parts]) == evaluate_scores(parts, from_logits=True).accuracy


def test_sigmoid_scores_are_ranked_and_their_likelihood_is_that_of_each_class_on_its_own():
    logits, labels = random_scores()
    shares, targets = 1 / (1 + np.exp(-logits.astype(np.float64))), np.eye(7)[labels]
    expected = -np.mean(np.sum(targets * np.log(shares) + (1 - targets) * np.log(1 - shares), axis=1))
    for found in (
        evaluate_scores(batched(shares, labels), multi_label=True),
        evaluate_scores(batched(logits, labels), multi_label=True, from_logits=True),
    ):
        assert found.nll == pytest.approx(expected) and found.accuracy == np.mean(logits.argmax(axis=1) == labels)
        assert found.ece == pytest.approx(evaluate_scores(batched(shares, labels), multi_label=True).ece)


def test_a_calibrated_model_has_no_calibration_error_and_a_certain_one_that_of_its_mistakes():
    labels = np.repeat([0, 0, 0, 1], 50)
    assert evaluate_scores([(np.tile([0.75, 0.25], (200, 1)), labels)]).ece == pytest.approx(0, abs=1e-12)
    certain = evaluate_scores([(np.tile([1.0, 0.0], (200, 1)), labels)])
    assert certain.ece == pytest.approx(0.25) and np.isfinite(certain.nll) and certain.top5 is None


@pytest.mark.parametrize("right, examples, low, high", [(0, 10, 0, 0.2775), (81, 263, 0.2553, 0.3662), (5, 5, 0.5655, 1)])
def test_the_interval_is_wilsons(right, examples, low, high):
    assert classify.wilson_interval(right, examples) == pytest.approx((low, high), abs=5e-5)


def test_classes_without_examples_and_classes_ruled_out_are_no_trouble():
    scores = np.array([[2.0, 1, -np.inf], [0, 3, -np.inf]])
    found = evaluate_scores([(scores, np.array([0, 0]))], from_logits=True)
    np.testing.assert_array_equal(found.class_accuracy, [0.5, np.nan, np.nan])
    assert found.nll == pytest.approx((math.log(1 + math.exp(-1)) + math.log(1 + math.exp(3))) / 2)


def test_no_confusion_matrix_is_kept_of_very_many_classes(monkeypatch):
    monkeypatch.setattr(classify, "CONFUSION", 6)
    found = evaluate_scores(batched(*random_scores()), from_logits=True)
    assert found.confusion is None and found.accuracy > 0 and len(found.class_accuracy) == 7


@pytest.mark.parametrize(
    "scores, labels, error, match",
    [
        (np.ones((2, 3, 4)), [0, 0], errors.ArgumentError, "one score"),
        (np.full((2, 4), 0.25), np.eye(5)[:2], errors.ArgumentError, "same classes"),
        (np.full((2, 4), 0.25), [0.0, 1.0], errors.ArgumentError, "whole numbers"),
        (np.full((2, 4), 0.25), [0, 4], errors.DataError, "example 1 has the label 4"),
        (np.full((2, 4), 0.25), [0, -1], errors.DataError, "does the split have labels"),
        (np.array([[0.5, 0.5], [np.nan, 0.5]]), [0, 0], errors.DataError, "example 1 are NaN"),
        (np.array([[0.5, 0.5], [0.6, 0.6]]), [0, 0], errors.ArgumentError, "from_logits=True"),
        (np.array([[-3.0, 4.0]]), [0], errors.ArgumentError, "from -3 to 4"),
        (np.ones((0, 4)), np.zeros(0, int), errors.DataError, "no examples"),
    ],
)
def test_scores_and_labels_that_do_not_fit_are_refused(scores, labels, error, match):
    with pytest.raises(error, match=match):
        evaluate_scores([(scores, np.asarray(labels))])


def test_no_batches_are_refused():
    for run in (evaluate_scores, lambda batches: accuracy(Fixed(), batches)):
        with pytest.raises(errors.DataError, match="no examples"):
            run([])


def test_a_model_is_run_over_the_batches_once():
    model = randomise(keras_vit.ViT_mu(weights=None, classes=7, input_shape=(16, 16, 3)))
    x, labels = images(10, model), np.arange(10) % 7
    found = evaluate(model, iter(batched(x, labels, size=4)))
    expected = evaluate_scores([(model.predict_on_batch(x), labels)])
    np.testing.assert_array_equal(found.confusion, expected.confusion)
    assert found.nll == pytest.approx(expected.nll, rel=1e-4) and found.examples == 10


def test_a_zeroed_head_is_refused():
    model = keras_vit.ViT_mu(weights=None, classes=7, input_shape=(16, 16, 3))
    model.remember(weights_info={**model.weights_info, "zero_head": True})
    with pytest.raises(errors.ArgumentError, match="all zeros"):
        evaluate(model, [(images(2, model), np.arange(2))])


# --- ImageNet-ReaL


def test_a_prediction_in_the_set_is_right_and_images_without_a_label_do_not_count():
    scores = np.eye(10)[[3, 4, 5, 6]]
    scores[3, 7] = 1  # ties
    found = evaluate_scores(batched(scores, np.zeros(4, int), size=3), from_logits=True, sets=[(1, 3), (1,), (), (6, 2)])
    assert (found.real.examples, found.real.accuracy) == (3, pytest.approx(1 / 3)) and found.accuracy == 0
    assert found.real.interval == classify.wilson_interval(1, 3)
    both = evaluate_scores([(scores, np.zeros(4, int))], from_logits=True, sets=[(3,), (1, 3), (5,), (6, 7)])
    assert both.real.accuracy == pytest.approx(3 / 4)  # where both of those that tie are in the set, either is right
    one_each = evaluate_scores(batched(*random_scores()), from_logits=True, sets=[(label,) for label in random_scores()[1]])
    assert one_each.real == classify.Real(200, one_each.accuracy, one_each.interval)


@pytest.mark.parametrize("sets, match", [([(0,)] * 3, "more examples"), ([(0,)] * 5, "of|for 4"), ([()] * 4, "none of")])
def test_sets_that_are_not_one_for_each_example_are_refused(sets, match):
    with pytest.raises(errors.DataError, match=match):
        evaluate_scores([(np.eye(4), np.arange(4))], from_logits=True, sets=sets)


def real_file(path, change=lambda lists: lists):
    path.write_text(json.dumps(change([[i % 1000] for i in range(50_000)])))
    return path


def test_the_lists_go_to_the_images_of_their_numbers(tmp_path):
    def change(lists):
        return [[], [970, 795], *lists[2:]]

    labels = real.real_labels(real_file(tmp_path / "real.json", change))
    names = ["val/n01440764/ILSVRC2012_val_00000002.JPEG", "ILSVRC2012_val_00050000.JPEG", "ILSVRC2012_val_00000001.JPEG"]
    assert real.sets(labels, names) == [(970, 795), (999,), ()]
    for name in ("ILSVRC2012_val_00000000.JPEG", "ILSVRC2012_val_00050001.JPEG", "ILSVRC2012_test_00000001.JPEG", "cat.JPEG"):
        with pytest.raises(errors.DataError, match="ILSVRC2012_val_00000001 to 00050000"):
            real.sets(labels, [name])


@pytest.mark.parametrize(
    "change, match",
    [
        (lambda lists: lists[:-1], "got 49,999 entries"),
        (lambda lists: dict(enumerate(lists)), "got a dict"),
        (lambda lists: [*lists[:7], 5, *lists[8:]], "entry 7 .* got 5"),
        (lambda lists: [*lists[:7], [1000], *lists[8:]], "entry 7"),
        (lambda lists: [*lists[:7], [True], *lists[8:]], "entry 7"),
        (lambda lists: [*lists[:7], [1.0], *lists[8:]], "entry 7"),
    ],
)
def test_another_file_than_that_of_the_reassessed_labels_is_refused(change, match, tmp_path):
    with pytest.raises(errors.DataError, match=match):
        real.real_labels(real_file(tmp_path / "real.json", change))


def test_what_is_no_json_is_refused(tmp_path):
    (tmp_path / "real.json").write_text("[[1], [2")
    for path in (tmp_path / "real.json", tmp_path / "none.json"):
        with pytest.raises(errors.DataError, match="cannot be read as JSON"):
            real.real_labels(path)


def test_tfds_gives_file_names_in_the_order_of_its_images(tmp_path):
    tfds = pytest.importorskip("tensorflow_datasets")

    class KerasVitNamed(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {"image": tfds.features.Image(shape=(8, 8, 3)), "label": tfds.features.ClassLabel(num_classes=2)}
            features = tfds.features.FeaturesDict({**features, "file_name": tfds.features.Text()})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            return {"validation": self._generate_examples()}

        def _generate_examples(self):
            for i in range(1, 30):
                name = f"ILSVRC2012_val_{i:08}.JPEG"
                yield name, {"image": np.full((8, 8, 3), i, np.uint8), "label": i % 2, "file_name": name}

    for split in ("validation", "validation[20%:70%]"):
        source = pipeline.open_source("keras_vit_named", split, data_dir=str(tmp_path))
        batches = pipeline.eval_batches(source, size=8, batch=4, pixels=pipeline.Pixels(mean=(0,) * 3, std=(1,) * 3))
        shown = [int(image[0, 0, 0]) for part, _ in batches.as_numpy_iterator() for image in part]
        names = real.file_names(source, data_dir=str(tmp_path))
        assert names == [f"ILSVRC2012_val_{i:08}.JPEG" for i in shown] and shown != sorted(shown)


def test_a_folder_gives_its_file_names_and_data_without_names_are_refused(tmp_path):
    for path in ("val/ant/ILSVRC2012_val_00000007.png", "val/bee/ILSVRC2012_val_00000003.png"):
        file = tmp_path / path
        file.parent.mkdir(parents=True)
        keras.utils.save_img(file, np.zeros((4, 4, 3)), scale=False)
    names = real.file_names(pipeline.open_source(tmp_path, "val"))
    assert names == ["ILSVRC2012_val_00000007.png", "ILSVRC2012_val_00000003.png"]
    with pytest.raises(errors.DataError, match="'digits' does not name its files"):
        real.file_names(pipeline.open_source("digits", "test"))


# --- few-shot: the closed form


@pytest.fixture(scope="module")
def digits():
    """(features, labels, test features, test labels): the pixels of scikit-learn's digits."""
    datasets = pytest.importorskip("sklearn.datasets")
    x, y = datasets.load_digits(return_X_y=True)
    return x[:1300], y[:1300], x[1300:], y[1300:]


@pytest.mark.parametrize("examples", [40, 64, 65, 300])  # fewer, as many and more than there are features
@pytest.mark.parametrize("l2", [0.5, 1024.0])
def test_the_closed_form_is_ridge_regression(digits, examples, l2):
    linear_model = pytest.importorskip("sklearn.linear_model")
    x, y, *_ = digits
    x, y = x[:examples], y[:examples]
    solution = fewshot.LeastSquares(x, y, 10)
    ridge = linear_model.Ridge(alpha=l2, fit_intercept=False, solver="cholesky")
    ridge.fit(solution.inputs(x), 2 * np.eye(10)[y] - 1)
    np.testing.assert_allclose(solution.weights(l2), ridge.coef_.T, rtol=0, atol=1e-6)


def test_inputs_are_standardised_by_the_examples_with_a_constant_100():
    rng = np.random.default_rng(0)
    x = np.column_stack([rng.normal(3, 5, 50), np.full(50, 7.0)])
    inputs = fewshot.LeastSquares(x, np.arange(50) % 2, 2).inputs(x)
    np.testing.assert_allclose(inputs.mean(axis=0), [0, 0, 100], atol=1e-12)
    np.testing.assert_allclose(inputs.std(axis=0), [1, 0, 0], atol=1e-4)


def test_shift_scale_and_order_of_features_and_names_of_classes_do_not_matter(digits):
    x, y, test, truth = digits
    expected = fewshot.fewshot(*digits, shots=(5,), seeds=(0,))[0]
    order = np.random.default_rng(0).permutation(64)
    moved = fewshot.fewshot(1000 * x[:, order] + 3, y, 1000 * test[:, order] + 3, truth, shots=(5,), seeds=(0,))[0]
    assert moved.accuracy == pytest.approx(expected.accuracy, abs=0.005)  # 1e-5 beside the deviation is not scaled
    solution = fewshot.LeastSquares(x[:100], y[:100], 10)
    renamed = fewshot.LeastSquares(x[:100], 9 - y[:100], 10)
    np.testing.assert_allclose(renamed.weights(1.0), solution.weights(1.0)[:, ::-1], atol=1e-9)
    shuffled = np.random.default_rng(1).permutation(100)
    other = fewshot.LeastSquares(x[:100][shuffled], y[:100][shuffled], 10)
    np.testing.assert_allclose(other.weights(1.0), solution.weights(1.0), atol=1e-9)


def test_digits_are_learned_from_a_few_better_from_more_and_the_same_every_time(digits):
    rows = fewshot.fewshot(*digits)
    assert [row.shots for row in rows] == [1, 5, 10, 25] and [row.examples for row in rows] == [10, 50, 100, 250]
    shares = [row.accuracy for row in rows]
    assert shares == sorted(shares) and 0.4 < shares[0] < 0.7 and shares[-1] > 0.8
    assert all(row.l2 == 1024 and len(row.accuracies) == 3 and len(set(row.accuracies)) > 1 for row in rows)
    assert fewshot.fewshot(*digits) == rows


def test_the_best_of_several_l2_is_found_for_each_number_of_shots(digits):
    grid = (1.0, 1024.0, 1e9)
    rows = fewshot.fewshot(*digits, shots=(1, 10), l2=grid, seeds=(0,))
    assert [(row.shots, row.l2) for row in rows] == [(shots, l2) for shots in (1, 10) for l2 in grid]
    one = fewshot.fewshot(*digits, shots=(1, 10), l2=1024.0, seeds=(0,))
    assert [row for row in rows if row.l2 == 1024] == one
    best = fewshot.best(rows)
    assert list(best) == [1, 10]
    assert all(best[row.shots].accuracy >= row.accuracy for row in rows)


def test_classes_with_fewer_examples_give_all_they_have_with_a_warning(digits):
    x, y, *tests = digits
    few = np.flatnonzero((y != 4) | (np.cumsum(y == 4) <= 3))
    with pytest.warns(UserWarning, match="1 of 10 classes have fewer than 10 examples, at least 3"):
        (row,) = fewshot.fewshot(x[few], y[few], *tests, shots=(10,), seeds=(0,))
    assert row.examples == 93


@pytest.mark.parametrize(
    "change, error, match",
    [
        (dict(features=np.ones((4, 2, 3))), errors.ArgumentError, "expected features"),
        (dict(labels=np.arange(3)), errors.ArgumentError, "whole labels"),
        (dict(test_features=np.ones((4, 3))), errors.ArgumentError, "one width, got 2 and 3"),
        (dict(features=np.full((4, 2), np.inf)), errors.DataError, "not finite"),
        (dict(labels=np.array([0, 1, 2, 9])), errors.DataError, "from 0 to 9, expected 0 to 3"),
        (dict(test_labels=np.array([-1, 1, 2, 3]), classes=None), errors.DataError, "from -1 to 3, expected 0 or more"),
        (dict(test_features=np.ones((0, 2)), test_labels=np.arange(0)), errors.DataError, "no examples"),
        (dict(l2=0), errors.ArgumentError, "l2 above 0"),
        (dict(shots=(0,)), errors.ArgumentError, "shots above 0"),
    ],
)
def test_what_cannot_be_learned_from_is_refused(change, error, match):
    x, y = np.random.default_rng(0).normal(size=(4, 2)), np.arange(4)
    options = dict(features=x, labels=y, test_features=x, test_labels=y, shots=(1,), classes=4) | change
    with pytest.raises(error, match=match):
        fewshot.fewshot(**options)


# --- few-shot: features of models


VIT = dict(input_shape=(16, 16, 3), patch_size=8, width=16, depth=1, heads=2, mlp=24, classes=5)


@pytest.mark.parametrize(
    "options", [dict(), dict(classifier="gap"), dict(classifier="map"), dict(representation_size=12)], ids=str
)
def test_features_are_what_the_head_reads(options):
    model = randomise(keras_vit.ViT(**VIT, **options, classifier_activation=None))
    x, labels = images(5, model), np.arange(5)
    found, numbers = fewshot.features(model, batched(x, np.eye(5)[labels], size=2))
    head = model.get_layer("head")
    kernel, bias = (keras.ops.convert_to_numpy(weight) for weight in (head.kernel, head.bias))
    np.testing.assert_allclose(found @ kernel + bias, model.predict_on_batch(x), atol=1e-5)
    assert found.shape == (5, options.get("representation_size", 16)) and found.dtype == np.float32
    np.testing.assert_array_equal(numbers, labels)


def test_features_of_a_model_that_shares_its_layers_are_its_own():
    model = randomise(keras_vit.FlexiViT_mu(weights=None, classes=5))
    x = images(3, model)
    small, large = (flexivit.at_patch_size(model, size) for size in (4, 16))
    found = [fewshot.features(each, [(x, np.arange(3))])[0] for each in (model, small, large)]
    kernel, bias = (
        keras.ops.convert_to_numpy(weight) for weight in (model.get_layer("head").kernel, model.get_layer("head").bias)
    )
    for each, values in zip((model, small, large), found):
        np.testing.assert_allclose(softmax(values @ kernel + bias), each.predict_on_batch(x), atol=1e-5)
    assert np.abs(found[1] - found[2]).max() > 1e-3


def test_a_model_without_a_head_is_its_own_representation_if_it_gives_one_vector():
    model = randomise(keras_vit.ViT_mu(weights=None, include_top=False, pooling="token", input_shape=(16, 16, 3)))
    x = images(3, model)
    assert fewshot.representation(model) is model
    np.testing.assert_array_equal(fewshot.features(model, [(x, np.arange(3))])[0], model.predict_on_batch(x))
    grid = keras_vit.ViT_mu(weights=None, include_top=False, input_shape=(16, 16, 3))
    for each in (grid, keras_vit.ViT(**VIT, classifier="unpooled")):
        with pytest.raises(errors.ArgumentError, match="one vector"):
            fewshot.representation(each)


def test_the_callback_reports_what_an_evaluation_at_that_step_gives():
    keras.utils.set_random_seed(1)
    model = randomise(keras_vit.ViT(**VIT))
    x, labels = images(40, model), np.arange(40) % 5
    batches, tests = batched(x[:20], np.eye(5)[labels[:20]], size=8), batched(x[20:], labels[20:], size=8)
    reported, weights = {}, {}

    def report(step, **scalars):
        reported[step] = scalars
        weights[step] = [keras.ops.convert_to_numpy(weight) for weight in model.weights]

    options = dict(shots=(1, 3), seeds=(0, 1), l2=10.0)
    callback = fewshot.FewShot(batches, tests, 2, report, **options)
    model.compile(keras.optimizers.SGD(0.5), "categorical_crossentropy")
    model.fit(x, np.eye(5)[labels], batch_size=8, epochs=1, shuffle=False, verbose=0, callbacks=[callback])
    assert list(reported) == [2, 4]
    assert any(np.abs(a - b).max() > 0 for a, b in zip(weights[2], weights[4]))
    for step, scalars in reported.items():
        model.set_weights(weights[step])
        rows = fewshot.fewshot(*fewshot.features(model, batches), *fewshot.features(model, tests), **options)
        assert scalars == {f"fewshot_{row.shots}shot": row.accuracy for row in rows}
    assert [row.accuracy for row in callback.evaluate()] == list(reported[5 - 1].values())


def test_the_callback_counts_steps_from_where_a_run_resumes_and_several_at_once():
    steps = []
    callback = fewshot.FewShot([], [], 10, None, start=15, stride=4)
    callback.evaluate = lambda: steps.append(callback.step)
    for batch in range(8):
        callback.on_train_batch_end(batch)
    assert steps == [23, 31, 43]
    with pytest.raises(errors.ArgumentError, match="one l2"):
        fewshot.FewShot([], [], 10, None, l2=(1, 2))


# --- the part of the training images


def test_a_sample_of_the_training_images_is_the_same_every_time_and_drawn_from_all_of_them():
    source = pipeline.open_source("digits", "train")

    def read(count, seed=0):
        sample = training_sample(source, count, seed)
        data = list(pipeline.eval_batches(sample, size=8, batch=64).as_numpy_iterator())
        return sample, np.concatenate([x for x, _ in data]), np.concatenate([y for _, y in data])

    sample, x, y = read(200)
    assert sample.num_examples == len(x) == 200 and (sample.num_classes, y.shape) == (10, (200, 10))
    again, other, fewer = read(200)[1], read(200, seed=1)[1], read(50)[1]
    np.testing.assert_array_equal(x, again)
    np.testing.assert_array_equal(x[:50], fewer)
    assert len(np.unique(np.concatenate([x, other]).reshape(400, -1), axis=0)) > 300
    everything = next(pipeline.eval_batches(source, size=8, batch=2000).as_numpy_iterator())[0].reshape(-1, 192)
    rows = {row.tobytes(): place for place, row in enumerate(everything)}
    places = [rows[row.tobytes()] for row in x.reshape(200, -1)]
    assert len(set(places)) == 200 and min(places) < 100 and max(places) > 1300
    assert read(5000)[0].num_examples == len(read(5000)[1]) == 1437
    with pytest.raises(errors.ArgumentError, match="above 0"):
        training_sample(source, 0)


def test_a_sample_of_a_stream_of_unknown_length_is_finite():
    tfds = pytest.importorskip("tensorflow_datasets")
    with tfds.testing.mock_data(num_examples=30):
        source = pipeline.open_source("cifar10", "train")
        labels = [
            np.concatenate([y for _, y in pipeline.eval_batches(training_sample(source, 8), size=8, batch=5).as_numpy_iterator()])
            for _ in range(2)
        ]
    assert labels[0].shape == (8, 10)
    np.testing.assert_array_equal(*labels)


# --- other backends


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_models_are_evaluated_in_and_after_training_as_on_tensorflow(backend):
    if importlib.util.find_spec(backend) is None:
        pytest.skip(f"{backend} is not installed")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "callback_reports or run_over"]
    environment = {**os.environ, "KERAS_BACKEND": backend}
    folder = pathlib.Path(__file__).parents[1]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder, check=False)
    assert done.returncode == 0 and "2 passed" in done.stdout, done.stdout[-4000:]
