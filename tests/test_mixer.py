"""MLP-Mixer: what it mixes, the sizes its weights fit, its files."""

import keras
import numpy as np
import pytest
from conftest import GOLDENS, randomise

import keras_vit
from keras_vit import errors, zoo
from keras_vit.checkpoints import files
from keras_vit.checkpoints.load import named_weights, to_numpy
from keras_vit.checkpoints.weights import Weights

CASE = GOLDENS / "mixer" / "p16_32x48" / "checkpoint.npz"  # 2 x 3 patches
OF_CASE = dict(patch_size=16, width=40, depth=3, tokens_mlp=12, channels_mlp=72)


def mu(**kwargs):
    model = keras_vit.Mixer_mu(**{"weights": None, **kwargs})
    return model if "weights" in kwargs else randomise(model)


def images(height=32, width=32):
    return np.random.default_rng(0).uniform(-1, 1, (2, height, width, 3)).astype("float32")


def values(model):
    return {name: to_numpy(weight) for name, weight in named_weights(model).items()}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A Mixer_mu with 7 classes for 32 x 32 pixels, which are 4 x 4 patches."""
    path = tmp_path_factory.mktemp("files") / "mu.npz"
    keras_vit.save_npz(mu(classes=7), path)
    return path


# --- what it mixes


def block_and_tokens():
    return mu().get_layer("block_1"), np.random.default_rng(0).standard_normal((2, 16, 64)).astype("float32")


def test_without_token_mixing_a_token_depends_on_itself_alone():
    (block, x), order = block_and_tokens(), np.random.default_rng(1).permutation(16)
    other = x.copy()
    other[:, 3] *= np.arange(64)
    assert np.abs(np.delete(to_numpy(block(other)) - to_numpy(block(x)), 3, axis=1)).max() > 0.01
    for weight in block.token_mixing.fc2.weights:
        weight.assign(np.zeros(weight.shape))
    got, moved = to_numpy(block(x)), to_numpy(block(other)) - to_numpy(block(x))
    np.testing.assert_allclose(to_numpy(block(x[:, order])), got[:, order], atol=1e-5)
    assert np.abs(moved[:, 3]).max() > 0.01 and np.abs(np.delete(moved, 3, axis=1)).max() < 1e-5


def test_token_mixing_is_the_same_mlp_over_the_tokens_of_every_channel():
    block, x = block_and_tokens()
    normed, mixed = (to_numpy(block(x, tap=tap)) for tap in ("token_norm", "token_mixing"))
    assert mixed.shape == (2, 64, 16)
    (k1, b1), (k2, b2) = (map(to_numpy, layer.weights) for layer in (block.token_mixing.fc1, block.token_mixing.fc2))
    for channel in range(64):
        hidden = normed[:, :, channel] @ k1 + b1
        hidden = hidden / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (hidden + 0.044715 * hidden**3)))
        np.testing.assert_allclose(mixed[:, channel], hidden @ k2 + b2, atol=1e-5)


def test_residual_branches_are_dropped_with_a_rate_that_grows_linearly():
    model = mu(depth=5, stochastic_depth_rate=0.4, dropout_rate=0.2)
    blocks = [model.get_layer(f"block_{i}") for i in range(5)]
    np.testing.assert_allclose([block.drop_path.rate for block in blocks], [0, 0.1, 0.2, 0.3, 0.4])
    assert all(mlp.dropout.rate == 0.2 for block in blocks for mlp in (block.token_mixing, block.channel_mixing))


def test_a_tap_that_a_block_has_not_is_refused():
    with pytest.raises(ValueError, match="token_norm.*got 'scores'"):
        zoo.tap(mu(), "block_0/scores")


def test_features_are_a_grid_or_its_mean():
    grid, vector = (mu(include_top=False, pooling=pooling) for pooling in (None, "avg"))
    assert grid.output_shape == (None, 4, 4, 64) and vector.output_shape == (None, 64)
    expected = grid.predict_on_batch(images()).mean(axis=(1, 2))
    np.testing.assert_allclose(vector.predict_on_batch(images()), expected, atol=1e-6)
    with pytest.raises(errors.ArgumentError, match="pooling in .None, 'avg'., got 'token'"):
        mu(include_top=False, pooling="token")


# --- sizes


@pytest.mark.parametrize(
    "size, patch, grid", [((32, 48), 16, (2, 3)), ((17, 47), 16, (2, 3)), ((31, 22), (16, 8), (2, 3)), ((3, 41), (4, 7), (1, 6))]
)
def test_sides_that_are_no_multiple_of_the_patch_are_padded_as_by_a_same_convolution(size, patch, grid):
    model = mu(input_shape=(*size, 3), patch_size=patch)
    same = keras.layers.Conv2D(64, patch, patch, padding="same", data_format="channels_last")
    same.build((None, *size, 3))
    same.set_weights(model.get_layer("patches").get_weights())
    got = keras.Model(model.input, model.get_layer("patches").output).predict_on_batch(images(*size))
    assert got.shape == (2, *grid, 64)
    np.testing.assert_allclose(got, to_numpy(same(images(*size))), atol=1e-5)
    assert model.predict_on_batch(images(*size)).shape == (2, 1000)


def test_weights_for_another_grid_are_refused_with_the_size_that_fits_and_the_model_untouched(checkpoint):
    model = mu(classes=7, input_shape=(40, 32, 3))
    before = values(model)
    with pytest.raises(errors.CheckpointMismatchError, match=r"16 \(4 x 4, input_shape=\(32, 32, 3\)\), but the model has 5 x 4"):
        keras_vit.load_weights(model, checkpoint)
    assert all(np.array_equal(before[name], value) for name, value in values(model).items())
    for weights in (checkpoint, Weights(str(checkpoint), resolution=32)):
        with pytest.raises(errors.ArgumentError, match=r"mu.npz: .*input_shape=\(32, 32, 3\).* 6 x 6 of 8 x 8 pixels"):
            mu(weights=weights, input_shape=(48, 48, 3))
    with pytest.raises(errors.ArgumentError, match="2 x 8"):  # as many patches, but published files are square
        mu(weights=Weights(str(checkpoint), resolution=32), input_shape=(16, 64, 3))
    assert mu(weights=checkpoint, input_shape=(16, 64, 3)).input_shape == (None, 16, 64, 3)


def test_a_file_brings_its_own_size(tmp_path):
    for size in ((48, 48, 3), (24, 40, 3)):
        keras_vit.save_npz(mu(input_shape=size), tmp_path / "mu.npz")
        assert mu(weights=tmp_path / "mu.npz").input_shape == (None, *size)


def test_the_size_must_be_said_where_a_file_tells_neither_grid_nor_square():
    with pytest.raises(errors.ArgumentError, match="for 6 .not of a square., but the model has 14 x 14 of 16 x 16 pixels"):
        keras_vit.Mixer(weights=CASE, **OF_CASE)
    assert keras_vit.Mixer(weights=CASE, input_shape=(30, 48, 3), **OF_CASE).output_shape == (None, 6)
    model = keras_vit.Mixer(weights=None, input_shape=(32, 48, 3), classes=6, **OF_CASE)
    with pytest.raises(errors.CheckpointMismatchError, match="not of a square"):
        keras_vit.load_weights(model, CASE, grid="square")


def test_a_file_whose_mixing_kernel_is_absurd_is_refused_from_its_shape(tmp_path):
    for shape in ((10**15, 0), (0, 4), ()):
        np.savez(tmp_path / "absurd.npz", **{"MixerBlock_0/token_mixing/Dense_0/kernel": np.zeros(shape, "float32")})
        with pytest.raises(errors.CheckpointMismatchError, match="MixerBlock_0/token_mixing/Dense_0/kernel"):
            mu(weights=tmp_path / "absurd.npz", classes=3)


def test_another_patch_size_fits_by_resampling_while_the_grid_stays(checkpoint):
    model = mu(classes=7, patch_size=16, input_shape=(64, 64, 3))
    keras_vit.load_weights(model, checkpoint, resize_patches=True)
    assert model.weights_info["adapted"] == ["patches/kernel: patches of 8 x 8 resampled to 16 x 16"]


# --- files


@pytest.mark.parametrize("layout", zoo.FAMILIES["Mixer"].layouts)
def test_every_layout_is_read_and_written_bit_by_bit(layout, checkpoint, tmp_path):
    model = mu(weights=checkpoint)
    keras_vit.save_npz(model, tmp_path / "first.npz", layout=layout)
    again = mu(classes=7)
    keras_vit.load_weights(again, tmp_path / "first.npz")
    assert again.weights_info["layout"] == layout
    keras_vit.save_npz(again, tmp_path / "second.npz")
    first, second = files.Npz(tmp_path / "first.npz"), files.Npz(tmp_path / "second.npz")
    assert first.entries == second.entries
    assert all(first.read(key).tobytes() == second.read(key).tobytes() for key in first.entries)
    assert f"{layout.removesuffix('linen')}MixerBlock_1/token_mixing/Dense_1/bias" in first.entries


def test_a_training_jobs_optimizer_state_is_left_out_and_said_so(checkpoint, tmp_path):
    with np.load(checkpoint) as arrays:
        stored = {f"opt/target/{key}": array for key, array in arrays.items()} | {"opt/state/step": np.float32(1)}
    np.savez(tmp_path / "job.npz", **stored)
    assert mu(weights=tmp_path / "job.npz").weights_info["ignored"] == ["opt/state/step"]


def test_the_released_names_and_shapes_of_mixer_l16():
    with keras.StatelessScope(initialize_variables=False):
        weights = named_weights(keras_vit.Mixer_L16(weights=None, classes=21_843))
    keras.utils.clear_session()
    names = zoo.FAMILIES["Mixer"].layouts["linen"]
    shapes = {piece.original: weight.shape for ours, weight in weights.items() for piece in names.to_original(ours)}
    expected = {"stem/kernel": (16, 16, 3, 1024), "stem/bias": (1024,), "head/kernel": (1024, 21_843), "head/bias": (21_843,)}
    expected |= dict.fromkeys(("pre_head_layer_norm/scale", "pre_head_layer_norm/bias"), (1024,))
    for i in range(24):
        block = f"MixerBlock_{i}"
        expected |= {f"{block}/LayerNorm_{j}/{leaf}": (1024,) for j in (0, 1) for leaf in ("scale", "bias")}
        for mlp, width, hidden in (("token_mixing", 196, 512), ("channel_mixing", 1024, 4096)):
            expected |= {f"{block}/{mlp}/Dense_0/kernel": (width, hidden), f"{block}/{mlp}/Dense_0/bias": (hidden,)}
            expected |= {f"{block}/{mlp}/Dense_1/kernel": (hidden, width), f"{block}/{mlp}/Dense_1/bias": (width,)}
    assert shapes == expected


def test_a_file_is_known_by_its_names_and_shapes():
    reading = zoo.identify(files.Npz(CASE))
    assert (reading.family, reading.layout, reading.classes) == ("Mixer", "linen", 6)
    assert reading.arguments == OF_CASE


def test_heads_are_read_as_they_were_trained(checkpoint):
    kinds = {row.name: {tag: record.activation for tag, record in row.weights.items()} for row in zoo.VARIANTS.values()}
    assert kinds["Mixer_L16"] == {"imagenet1k": "sigmoid", "imagenet21k": "sigmoid"}
    assert kinds["Mixer_B32"] == {"sam": "softmax", "gsam": "sigmoid"}
    model = mu(weights=Weights(str(checkpoint), resolution=32, activation="sigmoid"))
    logits = keras.Model(model.input, zoo.tap(model, "head")).predict_on_batch(images())
    np.testing.assert_allclose(model.predict_on_batch(images()), 1 / (1 + np.exp(-logits)), atol=1e-6)
    assert (
        mu(weights=Weights(str(checkpoint), resolution=32, activation="sigmoid"), classes=3).layers[-1].activation.__name__
        == "softmax"
    )


def test_imagenet_is_the_published_classifier_or_refused_with_what_there_is():
    assert keras_vit.list_weights("Mixer_B16") == ["imagenet", "imagenet1k", "imagenet21k", "sam", "gsam"]
    with pytest.raises(errors.ArgumentError, match="a tag it has .'gsam'."):
        keras_vit.Mixer_S16()
