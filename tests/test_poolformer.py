"""PoolFormer and the other MetaFormers: what mixes places, sizes, the pyramid, and files."""

import keras
import numpy as np
import pytest
from conftest import randomise

import keras_vit
from keras_vit import errors, zoo
from keras_vit.checkpoints.files import open_file
from keras_vit.checkpoints.load import to_numpy
from keras_vit.layers import GroupNorm
from keras_vit.models import poolformer

SIZE = dict(width=(8, 8, 16, 16), depth=(1, 2, 1, 1), mlp=(12, 12, 16, 16))


def tiny(**kwargs):
    options = dict(weights=None, input_shape=(70, 50, 3), classes=5, head_size=8, layer_scale=0.1)
    return randomise(keras_vit.PoolFormer(**{**options, **SIZE, **kwargs}))


def normal(*shape):
    return np.random.default_rng(0).normal(size=shape).astype("float32")


def applied(layer, x):
    return keras.ops.convert_to_numpy(layer(x))


@pytest.mark.parametrize("pool_size", [3, 5])
@pytest.mark.parametrize("size", [(4, 7), (1, 2)])
def test_pooling_takes_the_mean_of_the_neighbours_that_are_there_minus_the_place(size, pool_size):
    x, reach = normal(2, *size, 3), pool_size // 2
    expected = np.empty_like(x)
    for i in range(size[0]):
        for j in range(size[1]):
            window = x[:, max(i - reach, 0) : i + reach + 1, max(j - reach, 0) : j + reach + 1]
            expected[:, i, j] = window.mean(axis=(1, 2)) - x[:, i, j]
    np.testing.assert_allclose(applied(poolformer.PoolMixer(pool_size), x), expected, atol=1e-6)


def test_attention_mixes_the_places_of_an_image_row_by_row():
    x, layer = normal(2, 2, 3, 16), poolformer.AttentionMixer(8)
    got = applied(layer, x)
    qkv, out = to_numpy(layer.attention.qkv_kernel), to_numpy(layer.attention.out_kernel)
    q, k, v = np.einsum("bnd,dphc->pbhnc", x.reshape(2, 6, 16), qkv)
    scores = np.exp(np.einsum("bhnc,bhmc->bhnm", q, k) * 8**-0.5)
    scores /= scores.sum(-1, keepdims=True)
    expected = np.einsum("bhnm,bhmc,hcd->bnd", scores, v, out).reshape(x.shape)
    np.testing.assert_allclose(got, expected, atol=1e-6)
    with pytest.raises(ValueError, match="16 channels are no multiple of head_size=6"):
        poolformer.AttentionMixer(6).build(x.shape)


def test_a_dense_mixer_is_the_originals_linear_layer_over_places(tmp_path):
    model = tiny(mixer=("pool", "pool", "pool", "dense"))
    keras_vit.save_npz(model, tmp_path / "m.npz")
    weight = open_file(tmp_path / "m.npz").read("network.6.0.token_mixer.fc.weight")  # (out, in)
    x = normal(2, 3, 2, 16)
    expected = np.einsum("bnd,mn->bmd", x.reshape(2, 6, 16), weight).reshape(x.shape)
    np.testing.assert_allclose(applied(model.get_layer("stage_3_block_0").mixer, x), expected, atol=1e-5)


def test_a_random_mixer_gives_every_place_shares_of_all_and_is_not_trained():
    model = keras_vit.PoolFormer(weights=None, input_shape=(70, 50, 3), classes=5, **SIZE, mixer="random")
    mixer = model.get_layer("stage_3_block_0").mixer
    shares = to_numpy(mixer.kernel)
    np.testing.assert_allclose(shares.sum(axis=0), 1, atol=1e-6)
    assert shares.min() > 0 and shares.std() > 0
    assert mixer.trainable_variables == []
    assert not any(weight is mixer.kernel for weight in model.trainable_variables)


@pytest.mark.parametrize("size", [(5, 4), (1, 1)])
def test_a_norm_of_one_group_is_over_all_numbers_of_an_image(size):
    x, norm = 100 + normal(2, *size, 12), GroupNorm(1, 1e-5)
    expected = x.astype("float64") - x.mean(axis=(1, 2, 3), keepdims=True, dtype="float64")
    expected /= np.sqrt((expected**2).mean(axis=(1, 2, 3), keepdims=True) + 1e-5)
    np.testing.assert_allclose(applied(norm, x), expected, atol=1e-4)


def test_stages_of_odd_sizes_round_as_the_originals_convolutions_do():
    stages = [zoo.tap(tiny(input_shape=(50, 67, 3)), f"stage_{s}_block_0").shape[1:3] for s in range(4)]
    assert stages == [(12, 17), (6, 9), (3, 5), (2, 3)]
    assert tiny(input_shape=(3, 3, 3)).output_shape == (None, 5)
    with pytest.raises(errors.ArgumentError, match=r"2 x 9 is too small; the smallest is input_shape=\(3, 3, 3\)"):
        tiny(input_shape=(2, 9, 3))


def test_a_fresh_model_is_close_to_its_stem_and_halvings():
    model = keras_vit.PoolFormer_mu(weights=None)
    x = normal(2, 32, 32, 3)
    before, after = keras.Model(model.input, [zoo.tap_input(model, "stage_0_block_0"), zoo.tap(model, "stage_0_block_0")])(x)
    assert 0 < np.abs(to_numpy(after) - to_numpy(before)).max() < 1e-3


@pytest.mark.parametrize(
    "options, layout",
    [
        (dict(), "torch"), (dict(mixer="identity", layer_scale=None), "torch"),
        (dict(mixer=("pool", "pool", "attention", "attention"), norm="channel", positions=(2,)), "torch-positions-2"),
        (dict(mixer=("pool", "pool", "dense", "attention"), norm="channel", positions=(3,)), "torch-positions-3"),
        (dict(include_top=False, classes=None, pyramid=True), "torch"),
    ],
    ids=["pool", "identity", "ppaa", "ppfa", "pyramid"],
)  # fmt: skip
def test_each_wiring_is_written_in_its_layout_recognised_and_written_back_bit_for_bit(tmp_path, options, layout):
    model, again = tiny(**options), tiny(**options)
    keras_vit.save_npz(model, tmp_path / "first.npz")
    keras_vit.load_weights(randomise(again, seed=1), tmp_path / "first.npz")
    assert again.weights_info["layout"] == layout
    keras_vit.save_npz(again, tmp_path / "second.npz")
    files = [open_file(tmp_path / f"{name}.npz") for name in ("first", "second")]
    assert files[0].entries == files[1].entries
    assert all(files[0].read(name).tobytes() == files[1].read(name).tobytes() for name in files[0].entries)
    told = zoo.identify(files[0])
    expected = {**SIZE, "mixer": "pool", "positions": (), "pyramid": False, **options, "classes": 5}
    left_out = {"include_top", "classes", "norm", "layer_scale"}  # a file does not say them, or says them elsewhere
    if options.get("mixer") == "identity":
        expected["mixer"] = "pool"  # which has no weights either
        assert told.arguments.pop("layer_scale") is None
    assert told.arguments == {key: value for key, value in expected.items() if key not in left_out}


def test_files_of_training_jobs_are_read_too(tmp_path):
    model = tiny()
    keras_vit.save_npz(model, tmp_path / "m.npz", "state_dict_ema/torch")
    assert "state_dict_ema/network.2.1.mlp.fc1.weight" in open_file(tmp_path / "m.npz").entries
    again = keras_vit.PoolFormer(weights=tmp_path / "m.npz", input_shape=(70, 50, 3), **SIZE)
    x = normal(1, 70, 50, 3)
    np.testing.assert_array_equal(again.predict_on_batch(x), model.predict_on_batch(x))


def test_without_top_the_output_is_the_grid_its_mean_or_all_stages():
    whole, x = tiny(), normal(1, 70, 50, 3)
    assert tiny(include_top=False).output_shape == (None, 3, 2, 16)
    assert tiny(include_top=False, pooling="avg").output_shape == (None, 16)
    levels = tiny(include_top=False, pyramid=True).predict_on_batch(x)
    shapes = {"P2": (1, 17, 12, 8), "P3": (1, 9, 6, 8), "P4": (1, 5, 3, 16), "P5": (1, 3, 2, 16)}
    assert {name: level.shape for name, level in levels.items()} == shapes
    grid, mean = keras.Model(whole.input, [zoo.tap(whole, name) for name in ("encoder_norm", "mean_tokens")])(x)
    np.testing.assert_allclose(to_numpy(grid).mean(axis=(1, 2)), to_numpy(mean), atol=1e-6)


def test_a_classifiers_file_is_refused_for_the_pyramid_with_the_way_to_one(tmp_path):
    keras_vit.save_npz(tiny(), tmp_path / "m.npz")
    with pytest.raises(errors.ArgumentError, match=r"needs weights with a norm for each stage.*keras_vit.dense.pyramid"):
        keras_vit.PoolFormer(False, tmp_path / "m.npz", input_shape=(70, 50, 3), pyramid=True, **SIZE)


@pytest.mark.parametrize(
    "kwargs, match",
    [
        (dict(width=(8, 8)), "width must have a value for each of the 4 stages"), (dict(mixer="conv"), "mixers in .* 'conv'"),
        (dict(norm="batch"), "expected norm in"), (dict(pooling="token"), "expected pooling in"),
        (dict(positions=(4,)), r"positions are the stages.* got \(4,\)"), (dict(pool_size=2), "odd number of places, got 2"),
        (dict(pyramid=True), "needs include_top=False"),
    ],
)  # fmt: skip
def test_arguments_that_make_no_metaformer_are_refused_by_name(kwargs, match):
    with pytest.raises(errors.ArgumentError, match=match):
        tiny(**kwargs)


def test_weights_fit_any_size_unless_positions_or_a_matrix_over_places_tie_them():
    assert poolformer.FAMILY.any_size(tiny()) == ((3, 3), (1, 1))
    assert poolformer.FAMILY.any_size(tiny(mixer="attention")) == ((3, 3), (1, 1))
    assert poolformer.FAMILY.any_size(tiny(positions=(3,))) is None
    assert poolformer.FAMILY.any_size(tiny(mixer="dense")) is None


def test_each_file_has_the_crop_that_its_original_was_evaluated_with():
    rows = [row for row in zoo.VARIANTS.values() if row.family is poolformer.FAMILY and row.weights]
    wide = {row.name for row in rows if row.weights["imagenet1k"].pixels.crop_fraction == 0.95}
    assert wide == {"PoolFormer_M36", "PoolFormer_M48", "MetaFormer_S12_pppa", "MetaFormer_S12_ppaa", "MetaFormer_S12_ppff"}
    assert {row.weights["imagenet1k"].pixels.crop_fraction for row in rows if row.name not in wide} == {0.9}
