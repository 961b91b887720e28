"""What DeiT has that ViT has not: two heads, a second learned token, other blocks and another stem."""

import keras
import numpy as np
import pytest
from conftest import GOLDENS, randomise

import keras_vit
from export.common import logits_model
from keras_vit import errors, zoo
from keras_vit.checkpoints import adapt
from keras_vit.checkpoints.load import named_weights

DISTILLED, PLAIN = GOLDENS / "deit/distilled_p8_32", GOLDENS / "deit/plain_p8_32"
SMALL = dict(patch_size=8, width=48, depth=3, heads=3, mlp=192)


def images(side=32):
    return np.random.default_rng(0).uniform(-1, 1, (2, side, side, 3)).astype("float32")


def test_the_logits_of_a_distilled_model_are_the_mean_of_both_heads():
    model = randomise(keras_vit.DeiT_mu(weights=None, classes=5))
    both = [zoo.tap(model, head) for head in zoo.HEADS]
    *heads, logits = keras.Model(model.input, [*both, zoo.logits(model)]).predict_on_batch(images())
    np.testing.assert_allclose(logits, (heads[0] + heads[1]) / 2, atol=1e-6)
    assert np.abs(heads[0] - heads[1]).max() > 1e-2
    np.testing.assert_array_equal(logits_model(model).predict_on_batch(images()), logits)
    np.testing.assert_allclose(model.predict_on_batch(images()), keras.ops.softmax(logits), atol=1e-6)
    plain = keras_vit.DeiT(**SMALL, input_shape=(32, 32, 3))
    assert zoo.logits(plain) is zoo.tap(plain, "head") and zoo.logits(keras_vit.DeiT(False, **SMALL)) is None


def test_another_number_of_classes_resets_both_heads_and_loads_the_rest():
    model = keras_vit.DeiT(weights=DISTILLED / "checkpoint.pth", classes=7, distilled=True, **SMALL)
    reset = {f"{head}/{weight}" for head in zoo.HEADS for weight in ("kernel", "bias")}
    assert set(model.weights_info["reset"]) == reset and model.input_shape == (None, 32, 32, 3)
    zeros = {name for name, weight in named_weights(model).items() if not np.any(np.array(weight))}
    assert zeros == reset
    assert keras_vit.DeiT(weights=DISTILLED / "checkpoint.pth", distilled=True, **SMALL).output_shape == (None, 10)
    assert model.weights_info["preprocessing"] == zoo.FAMILIES["DeiT"].pixels.asdict()


def test_features_leave_out_both_heads_and_both_learned_tokens():
    grid = keras_vit.DeiT(False, DISTILLED / "checkpoint.pth", distilled=True, **SMALL)
    assert grid.output_shape == (None, 4, 4, 48)
    norm = keras.Model(grid.input, zoo.tap(grid, "encoder_norm")).predict_on_batch(images())
    np.testing.assert_array_equal(grid.predict_on_batch(images()).reshape(2, 16, 48), norm[:, 2:])
    token = keras_vit.DeiT(False, DISTILLED / "checkpoint.pth", pooling="token", distilled=True, **SMALL)
    np.testing.assert_allclose(token.predict_on_batch(images()), norm[:, 0], atol=1e-6)


@pytest.mark.parametrize("file, distilled", [(PLAIN / "state_dict.npz", True), (DISTILLED / "checkpoint.pth", False)])
def test_a_file_with_another_number_of_tokens_is_refused(file, distilled):
    with pytest.raises(errors.CheckpointMismatchError, match="tokens/dist|dist_token"):
        keras_vit.DeiT(weights=file, distilled=distilled, **SMALL)


@pytest.mark.parametrize("name, arguments", [("distilled_p8_32", dict(distilled=True)), ("deit3_p8_32", dict(style="deit3"))])
def test_a_graph_resamples_positions_as_loading_does(name, arguments):
    if "deit3" in name:
        arguments = {**arguments, "layer_scale": 1e-4}
    file = GOLDENS / "deit" / name / "state_dict.npz"
    loaded = keras_vit.DeiT(weights=file, input_shape=(56, 24, 3), **arguments, **SMALL)
    assert "grid 4 x 4 resampled to 7 x 3" in loaded.weights_info["adapted"][0]
    own = keras_vit.DeiT(weights=file, **arguments, **SMALL).get_layer("tokens")
    got = keras.ops.convert_to_numpy(own.positions_at((7, 3)))
    np.testing.assert_allclose(got, np.array(loaded.get_layer("tokens").positions), atol=1e-6)


def test_bicubic_resampling_keeps_constants_and_a_line_of_its_own_length():
    for old, new in ((4, 9), (14, 24), (24, 14), (1, 3)):
        np.testing.assert_allclose(adapt.bicubic(old, new).sum(axis=1), 1, atol=1e-12)
    np.testing.assert_allclose(adapt.bicubic(5, 5), np.eye(5), atol=1e-12)


def test_parallel_blocks_and_the_stem_train_reload_and_compute_in_bfloat16(tmp_path):
    options = dict(style="deit3", layer_scale=1e-4, parallel=True, stem="hmlp", patch_size=16, width=16, depth=1, heads=2, mlp=24)

    def build():
        return randomise(keras_vit.DeiT(classes=5, input_shape=(32, 32, 3), classifier_activation=None, **options))

    model = build()
    before = {name: np.array(weight) for name, weight in named_weights(model).items()}
    model.save(tmp_path / "a.keras")
    again = keras.saving.load_model(tmp_path / "a.keras")
    np.testing.assert_allclose(again.predict_on_batch(images()), model.predict_on_batch(images()), atol=1e-6)
    model.compile(keras.optimizers.SGD(0.1), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.train_on_batch(images(), np.array([1, 3]))
    still = {name for name, weight in named_weights(model).items() if not np.any(np.array(weight) != before[name])}
    assert still <= {f"patches/conv_{i}/bias" for i in range(3)}  # which the batch norms behind them take off again
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        mixed = build()
    finally:
        keras.config.set_dtype_policy("float32")
    expected = again.predict_on_batch(images())
    np.testing.assert_allclose(mixed.predict_on_batch(images()), expected, atol=0.05 * np.abs(expected).max())


def test_stochastic_depth_grows_in_deit_and_is_the_same_everywhere_in_deit3():
    for style, rates in (("deit", [0, 0.1, 0.2]), ("deit3", [0.2] * 3)):
        model = keras_vit.DeiT(False, style=style, stochastic_depth_rate=0.2, input_shape=(16, 16, 3), **SMALL)
        assert [model.get_layer(f"block_{i}").drop_path.rate for i in range(3)] == pytest.approx(rates)


def test_an_upstream_name_means_its_file_and_its_resolution():
    row = zoo.VARIANTS["DeiT_B16"]
    assert row.weights[row.upstream["deit_base_patch16_384"]].source.endswith("deit_base_patch16_384-8de9b5d1.pth")
    third = zoo.VARIANTS["DeiT3_B16"].upstream
    assert (third["deit3_base_patch16_384"], third["deit3_base_patch16_384.fb_in22k_ft_in1k"]) == (
        "imagenet1k-384", "imagenet21k+imagenet1k-384",
    )  # fmt: skip
    with keras.StatelessScope(initialize_variables=False):
        model = keras_vit.create_model("deit_base_patch16_384", weights=None)
    assert model.input_shape == (None, 384, 384, 3)
    keras.utils.clear_session()


@pytest.mark.parametrize(
    "wrong, match",
    [
        (dict(style="vit"), "expected style in"),
        (dict(stem="conv"), "expected stem in"),
        (dict(pooling="map", include_top=False), "expected pooling in"),
        (dict(stem="hmlp"), "patches of 16 x 16, got patch_size=8"),
        (dict(input_shape=(30, 32, 3)), "nearest size is input_shape=.32, 32, 3"),
    ],
)
def test_an_option_that_cannot_be_is_refused_by_name(wrong, match):
    with pytest.raises(errors.ArgumentError, match=match):
        keras_vit.DeiT(**{**SMALL, **wrong})
