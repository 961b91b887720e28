"""Pyramids of features by rewiring, and what stands on them: a segmenter, and keras_hub's detector."""

import subprocess
import sys

import keras
import numpy as np
import pytest
from conftest import randomise

import keras_vit
from benchmarks import detection as squares
from keras_vit import errors, zoo
from keras_vit.checkpoints.load import to_numpy
from keras_vit.dense import pyramid, semantic_fpn

JIT = keras.config.backend() == "jax"


def small(**kwargs):
    return keras_vit.PoolFormer_mu(**{"weights": None, "input_shape": (50, 70, 3), "classes": 5, "layer_scale": 0.1, **kwargs})


def images(model, count=2):
    return np.random.default_rng(0).normal(size=(count, *model.input_shape[1:])).astype("float32")


def test_a_pyramid_gives_every_stage_of_the_model_that_it_shares_its_weights_with():
    model = randomise(small())
    plain, x = pyramid(model, norms=False), images(model)
    got = plain.predict_on_batch(x)
    assert {level: value.shape[1:] for level, value in got.items()} == {
        "P2": (12, 17, 16), "P3": (6, 9, 24), "P4": (3, 5, 32), "P5": (2, 3, 48),
    }  # fmt: skip
    stages = keras.Model(model.input, [zoo.tap(model, f"stage_{s}_block_{[0, 0, 1, 0][s]}") for s in range(4)])
    for level, stage in zip(got.values(), stages.predict_on_batch(x)):
        np.testing.assert_allclose(level, stage, atol=1e-6)
    shared = {id(weight) for weight in model.weights}
    assert all(id(weight) in shared for weight in plain.weights)


def test_new_norms_are_those_of_the_authors_pyramid(tmp_path):
    model = randomise(small())
    normed, forked = pyramid(model), small(include_top=False, classes=None, pyramid=True)
    for weight in forked.weights:
        parts = weight.path.split("/")
        stage = parts[0].removeprefix("stage_").partition("_")
        source = normed.get_layer(f"P{int(stage[0]) + 2}_norm" if stage[2] == "norm" else parts[0])
        weight.assign(to_numpy(next(w for w in source.weights if w.path.split("/")[1:] == parts[1:])))
    x = images(model)
    expected = forked.predict_on_batch(x)
    for level, value in normed.predict_on_batch(x).items():
        np.testing.assert_allclose(value, expected[level], atol=1e-5)
    again = pyramid(forked)  # which has its own norms
    assert len(again.weights) == len(forked.weights)


def test_hybrids_have_a_pyramid_of_their_resnets_stages():
    model = keras_vit.Hybrid_mu(weights=None, input_shape=(64, 64, 3))
    assert {level: value.shape[1:3] for level, value in pyramid(model).output.items()} == {"P2": (16, 16), "P3": (8, 8)}


def test_models_of_one_scale_other_models_and_levels_that_are_not_there_are_refused():
    with pytest.raises(errors.ArgumentError, match=r"several scales \(families .*PoolFormer.*'ViT_mu' of family ViT"):
        pyramid(keras_vit.ViT_mu(weights=None))
    with pytest.raises(errors.ArgumentError, match="several scales"):
        pyramid(keras.Sequential([keras.Input((8, 8, 3))], name="other"))
    with pytest.raises(errors.ArgumentError, match=r"has the levels \[2, 3, 4, 5\], not \[6\]"):
        pyramid(small(), levels=(5, 6))
    with pytest.raises(errors.ArgumentError, match="width must be a multiple of 32 above 0, got 48"):
        semantic_fpn(small(), 3, width=48)


def test_a_segmenter_gives_scores_of_the_images_own_odd_size_and_is_reloaded(tmp_path):
    model = semantic_fpn(small(), 3, channels=16, width=32)
    x = images(model, 1)
    scores = model.predict_on_batch(x)
    assert scores.shape == (1, 50, 70, 3)
    assert zoo.tap(model, "segmentation_head").shape == (None, 12, 17, 3)
    model.save(tmp_path / "m.keras")
    again = keras.saving.load_model(tmp_path / "m.keras")
    np.testing.assert_allclose(again.predict_on_batch(x), scores, atol=1e-6)


def test_a_training_step_of_a_segmenter_reaches_every_weight():
    model = semantic_fpn(small(), 3, channels=16, width=32, dropout_rate=0.0)
    before = [to_numpy(weight) for weight in model.trainable_weights]
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(1.0), loss, jit_compile=JIT)
    model.train_on_batch(images(model), np.random.default_rng(1).integers(0, 3, (2, 50, 70)))
    for weight, old in zip(model.trainable_weights, before):
        if not weight.path.endswith("mixer_norm/beta"):  # which a place and its neighbours share: pooling does not see it
            assert np.abs(to_numpy(weight) - old).max() > 0, weight.path


def test_without_keras_hub_the_detector_says_what_to_install():
    child = """
import sys
sys.modules["keras_hub"] = None
import keras_vit.dense
try:
    import keras_vit.dense.detection
except ImportError as error:
    assert "pip install 'keras_vit[detect]'" in str(error), error
else:
    raise SystemExit("imported")
"""
    done = subprocess.run([sys.executable, "-c", child], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_squares_of_the_benchmark_lie_where_their_boxes_and_maps_say():
    _, boxes, labels, maps = squares.squares(20, 64, 0)
    for n in range(20):
        expected = np.zeros((64, 64), int)
        for (x0, y0, x1, y1), label in zip(boxes[n].astype(int), labels[n]):
            expected[y0:y1, x0:x1] = 1 + label if label != squares.NONE else 0
        np.testing.assert_array_equal(maps[n], expected)
    assert set(np.unique(labels)) == {-1, 0, 1, 2}


def test_average_precision_counts_each_box_once_and_is_one_for_the_truth():
    _, boxes, labels, maps = squares.squares(20, 64, 0)
    truth = {"boxes": boxes, "labels": labels, "confidence": np.ones(labels.shape)}
    assert squares.average_precision(truth, boxes, labels) == pytest.approx(1)
    twice = {key: np.concatenate([value, value], axis=1) for key, value in truth.items()}
    twice["confidence"] = np.concatenate([np.ones(labels.shape), 2 * np.ones(labels.shape)], axis=1)
    assert squares.average_precision(twice, boxes, labels) == pytest.approx(1)  # second ones come last, and are misses
    half = {**truth, "boxes": np.concatenate([boxes[:10], boxes[:10] + 40])}
    assert squares.average_precision(half, boxes, labels) < 0.8
    assert squares.mean_overlap(maps, maps) == 1


def detector(levels=(3, 5), **kwargs):
    pytest.importorskip("keras_hub")
    from keras_vit.dense.detection import retinanet

    return retinanet(small(input_shape=(64, 64, 3)), 3, levels, pre_logits_num_conv_layers=1, **kwargs)


def test_keras_hub_takes_a_model_as_the_backbone_of_its_retinanet_and_trains_it(tmp_path):
    made = detector()
    backbone = made.backbone.image_encoder
    assert sorted(backbone.pyramid_outputs) == ["P3", "P4", "P5"]
    assert to_numpy(made.classification_head.prediction_layer.bias) == pytest.approx(-np.log(99), rel=1e-6)
    assert not to_numpy(made.box_head.prediction_layer.bias).any()
    before = {weight.path: to_numpy(weight) for weight in backbone.trainable_weights}
    x, boxes, labels, _ = squares.squares(4, 64, 0)
    made.compile(keras.optimizers.SGD(0.1))
    losses = made.fit(x, {"boxes": boxes, "labels": labels}, verbose=0).history["loss"]
    assert np.isfinite(losses).all()
    for weight in backbone.trainable_weights:
        if not weight.path.endswith("mixer_norm/beta"):
            assert np.abs(to_numpy(weight) - before[weight.path]).max() > 0, weight.path
    found = made.predict(x, verbose=0)
    assert found["boxes"].shape == (4, 100, 4)
    made.save(tmp_path / "m.keras")
    again = keras.saving.load_model(tmp_path / "m.keras")
    for name, value in made(x).items():
        np.testing.assert_allclose(to_numpy(again(x)[name]), to_numpy(value), atol=1e-5)


def test_levels_above_a_models_own_are_made_from_its_last_and_others_are_refused():
    assert sorted(detector((4, 6)).backbone.pyramid_outputs) == ["P4", "P5", "P6"]
    with pytest.raises(errors.ArgumentError, match=r"levels \[2, 3, 4, 5\].*got \(6, 7\)"):
        detector((6, 7))


@pytest.mark.slow
@pytest.mark.parametrize("name, steps", [("semantic_fpn", 60), ("retinanet", 250)])
def test_what_stands_on_a_pyramid_learns_squares_far_above_chance(name, steps):
    if name == "retinanet":
        pytest.importorskip("keras_hub")
    keras.utils.set_random_seed(0)
    score, chance = squares.RUNS[name][0]("PoolFormer_mu", 64, steps)
    assert score > max(0.3, 3 * chance)
