"""Compact Transformers: what differs from ViT."""

import keras
import numpy as np
import pytest
from conftest import GOLDENS, randomise

import keras_vit
from keras_vit import errors, zoo
from keras_vit.checkpoints.files import Npz
from keras_vit.checkpoints.load import named_weights, to_numpy
from keras_vit.models.cct import PIXELS, CompactTokens, SequencePool, sine

TOY = dict(width=16, depth=1, heads=2, mlp=24)
SINE = GOLDENS / "cct/cct_7x2_64_sine/state_dict.npz"


def toy(**options):
    return keras_vit.CCT(**{"input_shape": (16, 16, 3), "classes": 3, "kernel_size": 3, "conv_layers": 1, **TOY, **options})


def table(model):
    return to_numpy(named_weights(model)["tokens/positions"])


def of_sine(side):
    """The golden's model for images of that side, loaded from its file."""
    options = dict(width=32, depth=2, heads=2, mlp=96, kernel_size=7, conv_layers=2, positions="sine")
    return keras_vit.CCT(weights=SINE, input_shape=(side, side, 3), **options)


def test_fixed_positions_are_a_weight_that_thawing_does_not_train():
    model = toy(positions="sine")
    np.testing.assert_array_equal(table(model), sine(64, 16).astype("float32"))
    model.trainable = False
    model.trainable = True
    assert "tokens/positions" in named_weights(model)
    assert all("positions" not in weight.path for weight in model.trainable_variables)
    assert any("positions" in weight.path for weight in toy().trainable_variables)


def test_fixed_positions_of_a_file_are_kept_on_its_grid_and_made_anew_on_another():
    with np.load(SINE) as file:
        np.testing.assert_array_equal(table(of_sine(64)), file["classifier.positional_emb"])
    other = of_sine(96)
    np.testing.assert_array_equal(table(other), sine(36, 32).astype("float32"))
    assert other.weights_info["adapted"] == ["tokens/positions: sines of 36 positions instead of the file's 16"]


@pytest.mark.parametrize("positions, class_token", [("learned", True), ("sine", True), ("learned", False)])
def test_the_layer_resamples_positions_as_loading_does(positions, class_token):
    layer = CompactTokens(class_token, positions)
    layer.build((None, 4, 6, 8))
    layer.positions.assign(
        layer.positions + 0.0 if positions == "sine" else np.random.default_rng(0).random(layer.positions.shape)
    )
    if positions == "sine":
        wanted = sine(35 + class_token, 8)
    else:
        resample = keras_vit.models.cct.Positions(
            (5, 7), class_token, file_grid=(4, 6), resample=keras_vit.models.cct.resample_bilinear
        )
        arrays = {resample.TABLE: to_numpy(layer.positions), resample.TOKEN: np.zeros((1, 1, 8))}
        wanted = resample(arrays)[resample.TABLE]
    np.testing.assert_allclose(to_numpy(layer.positions_at((5, 7))), wanted, atol=1e-6)


def test_the_pooled_sequence_is_the_mean_of_the_tokens_weighted_by_its_scores():
    layer, x = SequencePool(), np.random.default_rng(0).random((2, 5, 4), np.float32)
    pooled, scores, importance = layer(x), layer(x, tap="scores"), layer(x, tap="importance")
    scores = keras.ops.convert_to_numpy(scores)
    exp = np.exp(keras.ops.convert_to_numpy(importance))
    np.testing.assert_allclose(scores, exp / exp.sum(axis=1, keepdims=True), atol=1e-6)
    np.testing.assert_allclose(keras.ops.convert_to_numpy(pooled), (scores * x).sum(axis=1), atol=1e-6)


@pytest.mark.parametrize(
    "options, shape",
    [
        (dict(), (8, 8, 16)), (dict(pooling="sequence"), (16,)), (dict(pooling="avg"), (16,)),
        (dict(classifier="token"), (8, 8, 16)), (dict(classifier="token", pooling="token"), (16,)),
        (dict(classifier="token", pooling="avg"), (16,)),
    ],
)  # fmt: skip
def test_features_without_a_head_load_from_a_file_with_one(options, shape, tmp_path):
    whole = randomise(toy(**{key: value for key, value in options.items() if key != "pooling"}))
    keras_vit.save_npz(whole, tmp_path / "whole.npz")
    model = toy(include_top=False, weights=tmp_path / "whole.npz", classes=None, **options)
    assert model.output_shape[1:] == shape
    assert np.isfinite(model(np.zeros((1, 16, 16, 3), "float32"))).all()


@pytest.mark.parametrize("name", ["CCT_mu", "CCT_6_3x1", "CVT_6_4", "ViTLite_7_4"])
def test_a_file_is_identified_by_its_shapes(name, tmp_path):
    row = zoo.VARIANTS[name]
    keras_vit.save_npz(row.build(weights=None), tmp_path / "file.npz")
    reading = zoo.identify(Npz(tmp_path / "file.npz"))
    assert (reading.family, reading.variants, reading.classes) == ("CCT", (name,), 1000)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(kernel_size=None), r"expected kernel_size and conv_layers \(CCT\), or patch_size"),
        (dict(pooling="token", include_top=False), "classifier='sequence' has not"),
        (dict(positions="sincos2d"), r"positions in \('learned', 'sine'\)"),
        (dict(patch_size=5), r"16 x 16 cannot be cut into patches of 5 x 5; the nearest size is input_shape=\(15, 15, 3\)"),
    ],
)
def test_arguments_that_cannot_be_used_are_refused_by_name(options, message):
    with pytest.raises(errors.ArgumentError, match=message):
        toy(**options)


def test_the_preprocessing_is_that_of_the_data_a_file_was_trained_on():
    pixels = zoo.VARIANTS["CCT_7_3x1"].weights["cifar100"].pixels
    assert pixels == PIXELS["cifar100"]
    np.testing.assert_allclose(pixels.normalize(np.full((1, 1, 3), 255.0))[0, 0], (1 - np.array([0.5071, 0.4867, 0.4408])) / [
        0.2675, 0.2565, 0.2761], rtol=1e-6)  # fmt: skip
    assert zoo.VARIANTS["CCT_14_7x2"].weights["imagenet1k-384"].pixels.crop_fraction == 0.9
