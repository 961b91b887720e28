"""Image-text retrieval: the published definition, ties against the model, bounded memory, and what does not fit together."""

import numpy as np
import pytest

from keras_vit import errors
from keras_vit.evaluation import classify
from keras_vit.evaluation import retrieval as module
from keras_vit.evaluation.retrieval import retrieval


def unit(rng, *shape):
    rows = rng.normal(size=shape).astype("float32")
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def sorted_recall(scores, image_of, k):
    """(image to text, text to image) as defined: a right answer among the first k of all, sorted by score; scores (n, m)."""
    texts = [any(image_of[j] == i for j in np.argsort(-row)[:k]) for i, row in enumerate(scores) if i in image_of]
    images = [image_of[j] in np.argsort(-column)[:k] for j, column in enumerate(scores.T)]
    return np.mean(texts), np.mean(images)


@pytest.mark.parametrize("scores_at_once", [module.SCORES, 50])
def test_recall_is_that_of_sorting_all_scores(monkeypatch, scores_at_once):
    monkeypatch.setattr(module, "SCORES", scores_at_once)
    rng = np.random.default_rng(0)
    images = unit(rng, 23, 8)
    image_of = np.concatenate([np.arange(20), rng.integers(0, 20, 41)])  # images 20 to 22 have no caption
    texts = images[image_of] + 0.8 * unit(rng, 61, 8)
    found = retrieval(images, texts, image_of, at=(1, 3, 10, 100))
    for k in (1, 3, 10):
        expected = sorted_recall(images @ texts.T, image_of.tolist(), k)
        assert (found.image_to_text.at[k], found.text_to_image.at[k]) == pytest.approx(expected)
    assert found.image_to_text.at[100] == found.text_to_image.at[100] == 1
    assert 0 < found.text_to_image.at[1] < found.text_to_image.at[3] < 1
    assert (found.image_to_text.queries, found.image_to_text.candidates) == (20, 61)
    assert (found.text_to_image.queries, found.text_to_image.candidates) == (61, 23)
    assert (found.images_without, found.unreadable, found.text_to_image.tied) == (3, 0, 0)
    assert found.text_to_image.intervals[1] == classify.wilson_interval(round(found.text_to_image.at[1] * 61), 61)


def test_one_caption_under_two_images_is_a_tie_that_counts_against_the_model():
    rng = np.random.default_rng(1)
    images = unit(rng, 40, 16)
    texts = images.copy()
    texts[7] = texts[31]  # the same words for images 7 and 31
    found = retrieval(images, texts, np.arange(40))
    assert found.image_to_text.at[1] == 38 / 40
    assert found.image_to_text.tied == 2  # both images see it twice
    assert found.text_to_image.at[1] == 39 / 40 and found.text_to_image.tied == 0
    two = retrieval(images, texts, [*range(7), 31, *range(8, 40)])  # are captions of one image
    assert two.image_to_text.at[1] == two.text_to_image.at[1] == 1 and two.images_without == 1


def test_a_model_that_prefers_nothing_finds_nothing():
    found = retrieval(np.ones((30, 4), "float32"), np.ones((30, 4), "float32"), np.arange(30))
    assert set(found.image_to_text.at.values()) == set(found.text_to_image.at.values()) == {0}
    assert found.image_to_text.tied == 30 and found.image_to_text.median_rank == 30


def test_what_could_not_be_read_was_not_found():
    images = np.eye(4, dtype="float32")
    images[2] = np.nan
    found = retrieval(images, np.eye(4, dtype="float32"), range(4), missing=[2])
    assert found.unreadable == 1 and found.text_to_image.candidates == 3
    assert found.image_to_text.at[10] == found.text_to_image.at[10] == 3 / 4
    most = retrieval(images, np.eye(4, dtype="float32"), range(4), missing=[0, 1, 2])
    assert most.image_to_text.at[1] == 1 / 4 and most.image_to_text.median_rank is None
    with pytest.raises(errors.NonFiniteError, match="an image is NaN"):
        retrieval(images, np.eye(4, dtype="float32"), range(4))
    with pytest.raises(errors.DataError, match="none of the 4 images"):
        retrieval(images, np.eye(4, dtype="float32"), range(4), missing=range(4))


@pytest.mark.parametrize(
    "images, texts, image_of, at, match",
    [
        ((3, 4), (3, 5), (0, 1, 2), (1,), r"got \(3, 4\), \(3, 5\)"),
        ((3, 4), (2, 4), (0, 1, 2), (1,), r"and \(3,\)"),
        ((3, 4), (3, 4), (0, 1, 3), (1,), "0 to 2, got int64 of shape .3,., 0 to 3"),
        ((3, 4), (3, 4), (0.0, 1.0, 2.0), (1,), "got float64"),
        ((3, 4), (3, 4), (0, 1, 2), (0,), "above 0"),
        ((3, 4), (3, 4), (0, 1, 2), (), "above 0"),
        ((0, 4), (3, 4), (0, 1, 2), (1,), "at least one"),
        ((3,), (3, 4), (0, 1, 2), (1,), "at least one"),
    ],
)
def test_what_does_not_fit_together_is_refused(images, texts, image_of, at, match):
    with pytest.raises(errors.ArgumentError, match=match):
        retrieval(np.ones(images, "float32"), np.ones(texts, "float32"), image_of, at)
