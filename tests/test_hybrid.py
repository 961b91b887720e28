"""Hybrids: the arithmetic of their ResNet, its sizes, and its files."""

import keras
import numpy as np
import pytest
from conftest import randomise

import keras_vit
from keras_vit import errors, zoo
from keras_vit.checkpoints.files import Npz
from keras_vit.checkpoints.load import named_weights, to_numpy
from keras_vit.layers import GroupNorm, StdConv
from keras_vit.layers.conv import standardised
from keras_vit.models import hybrid

SIZE = dict(width=16, depth=1, heads=2, mlp=24)


def tiny(**kwargs):
    options = dict(weights=None, input_shape=(33, 47, 3), classes=5, patch_size=1, stages=(1, 2), width_factor=0.5)
    return randomise(keras_vit.Hybrid(**{**options, **SIZE, **kwargs}))


def images(model, count=2):
    return np.random.default_rng(1).uniform(-1, 1, (count, *model.input_shape[1:])).astype("float32")


def normal(*shape):
    return np.random.default_rng(0).normal(size=shape).astype("float32")


def test_a_standardised_kernel_has_zero_mean_and_unit_deviation_for_each_output():
    kernel = keras.ops.convert_to_numpy(standardised(keras.ops.convert_to_tensor(3 + 5 * normal(3, 3, 8, 6))))
    np.testing.assert_allclose(kernel.mean(axis=(0, 1, 2)), 0, atol=1e-6)
    np.testing.assert_allclose(kernel.std(axis=(0, 1, 2)), 1, atol=1e-5)


def test_epsilon_is_added_to_the_deviation_and_not_to_the_variance():
    kernel = 1e-5 * normal(3, 3, 8, 6)
    deviation = kernel.std(axis=(0, 1, 2))
    got = keras.ops.convert_to_numpy(standardised(keras.ops.convert_to_tensor(kernel)))
    np.testing.assert_allclose(got.std(axis=(0, 1, 2)), deviation / (deviation + 1e-5), rtol=1e-4)


def xla_same(x, kernel, stride):
    """Convolution with XLA's "SAME": zeros so that sides are rounded up, where their number is odd one more at the end."""
    k, (b, h, w, _) = kernel.shape[0], x.shape
    rows, columns = -(-h // stride), -(-w // stride)
    zeros = [max((out - 1) * stride + k - side, 0) for out, side in ((rows, h), (columns, w))]
    x = np.pad(x, [(0, 0), *((n // 2, n - n // 2) for n in zeros), (0, 0)])
    result = np.zeros((b, rows, columns, kernel.shape[3]))
    for y in range(rows):
        for z in range(columns):
            window = x[:, y * stride : y * stride + k, z * stride : z * stride + k]
            result[:, y, z] = np.einsum("bhwc,hwcd->bd", window, kernel)
    return result


@pytest.mark.parametrize("size", [(7, 8), (9, 6), (1, 4)])
@pytest.mark.parametrize("kernel_size, stride", [(7, 2), (3, 2), (3, 1), (1, 2)])
def test_convolutions_pad_as_xla_does_at_even_and_odd_sizes(size, kernel_size, stride):
    x, layer = normal(2, *size, 4), StdConv(5, kernel_size, stride)
    got = keras.ops.convert_to_numpy(layer(x))
    kernel = keras.ops.convert_to_numpy(standardised(keras.ops.convert_to_tensor(layer.kernel)))
    np.testing.assert_allclose(got, xla_same(x, kernel, stride), atol=1e-5)
    assert layer.compute_output_shape(x.shape) == got.shape


def test_kernels_are_standardised_in_float32_whatever_the_compute_type():
    x, kernel = normal(2, 5, 5, 4), 1000 + normal(3, 3, 4, 6)  # where bfloat16 goes in steps of 4
    outputs = []
    for dtype in ("float32", "mixed_bfloat16"):
        layer = StdConv(6, 3, dtype=dtype)
        layer.build(x.shape)
        layer.kernel.assign(kernel)
        outputs.append(keras.ops.convert_to_numpy(keras.ops.cast(layer(x), "float32")))
    np.testing.assert_allclose(outputs[1], outputs[0], atol=0.03 * np.abs(outputs[0]).max())


def test_a_group_is_normalised_over_its_channels_and_the_whole_image():
    x, layer = 100 + normal(2, 3, 5, 12), GroupNorm(4)
    got = keras.ops.convert_to_numpy(randomise(keras.Sequential([keras.Input(x.shape[1:]), layer]))(x))
    groups = x.astype("float64").reshape(2, 15, 4, 3)
    groups = (groups - groups.mean((1, 3), keepdims=True)) / np.sqrt(groups.var((1, 3), keepdims=True) + 1e-6)
    np.testing.assert_allclose(got, groups.reshape(x.shape) * to_numpy(layer.gamma) + to_numpy(layer.beta), atol=1e-4)
    with pytest.raises(ValueError, match="not divisible by groups=5"):
        GroupNorm(5).build(x.shape)


def test_a_fresh_unit_passes_its_input_on():
    x = np.abs(normal(2, 4, 4, 128))
    np.testing.assert_allclose(keras.ops.convert_to_numpy(hybrid.ResNetUnit(32)(x)), x, atol=1e-6)


def test_each_halving_rounds_up_and_pixels_that_fill_no_patch_are_left_out():
    model = tiny(patch_size=(1, 2))
    shapes = {name: zoo.tap(model, name).shape[1:] for name in ("conv_root", "stage_1_unit_1", "stage_2_unit_2", "patches")}
    assert shapes == {
        "conv_root": (17, 24, 32), "stage_1_unit_1": (9, 12, 128), "stage_2_unit_2": (5, 6, 256), "patches": (5, 3, 16),
    }  # fmt: skip
    assert tiny(stages=(), patch_size=8, input_shape=(29, 63, 3)).get_layer("tokens").grid == (1, 2)


def test_only_a_size_without_a_patch_is_refused_and_the_smallest_is_named():
    with pytest.raises(errors.ArgumentError, match=r"28 x 64 .* smallest is input_shape=\(29, 29, 3\)"):
        tiny(stages=(), patch_size=8, input_shape=(28, 64, 3))
    assert tiny(input_shape=(1, 1, 3)).output_shape == (None, 5)


@pytest.mark.parametrize(
    "kwargs, match",
    [
        (dict(width_factor=0.75), "48 channels"), (dict(width_factor=0), "0 channels"), (dict(width_factor="1"), "factor='1'"),
        (dict(stages=(3, 0)), r"stages .* got \(3, 0\)"), (dict(stages=3), "got 3"), (dict(classifier="map"), "classifier in"),
        (dict(include_top=False, pooling="token", classifier="gap"), "has none"), (dict(pooling="map"), "pooling in"),
    ],
)  # fmt: skip
def test_arguments_that_make_no_hybrid_are_refused_by_name(kwargs, match):
    with pytest.raises(errors.ArgumentError, match=match):
        tiny(**kwargs)


def test_without_top_the_outputs_are_the_grid_or_a_vector(tmp_path):
    whole = tiny(representation_size=12, input_shape=(32, 32, 3))
    keras_vit.save_npz(whole, tmp_path / "tiny.npz")

    def features(**kwargs):
        model = keras_vit.Hybrid(
            False, tmp_path / "tiny.npz", **{**SIZE, "patch_size": 1, "stages": (1, 2), "width_factor": 0.5, **kwargs}
        )
        return model.predict_on_batch(images(whole))

    taps = [zoo.tap(whole, name) for name in ("encoder_norm", "pre_logits_tanh")]
    tokens, vector = keras.Model(whole.input, taps).predict_on_batch(images(whole))
    np.testing.assert_allclose(features(), tokens[:, 1:].reshape(2, 4, 4, 16), atol=1e-5)
    np.testing.assert_allclose(features(classifier="token_unpooled"), tokens, atol=1e-5)
    np.testing.assert_allclose(features(pooling="token"), vector, atol=1e-5)
    assert features(pooling="avg").shape == (2, 12)


def test_every_layout_is_recognised_and_written_back_bit_for_bit(tmp_path):
    model, again, first, second = tiny(), tiny(), tmp_path / "first.npz", tmp_path / "second.npz"
    assert len(hybrid.FAMILY.layouts) == 12
    for layout in hybrid.FAMILY.layouts:
        keras_vit.save_npz(model, first, layout)
        keras_vit.load_weights(randomise(again, seed=1), first)
        assert again.weights_info["layout"] == layout
        keras_vit.save_npz(again, second)
        files = Npz(first), Npz(second)
        assert files[0].entries == files[1].entries
        assert all(files[0].read(name).tobytes() == files[1].read(name).tobytes() for name in files[0].entries)
        norms = {len(shape) for name, (shape, _) in files[0].entries.items() if "/gn" in f"/{name}"}
        assert norms == {4 if layout.endswith(("pre-linen", "-wrapped-norms")) else 1}


def test_a_file_tells_its_stages_its_width_and_the_size_of_its_images(tmp_path):
    model = tiny(stages=(2, 1, 1), input_shape=(64, 96, 3), patch_size=(1, 2))
    keras_vit.save_npz(model, tmp_path / "tiny.npz")
    told = zoo.identify(Npz(tmp_path / "tiny.npz"))
    assert (told.family, told.classes, told.unknown) == ("Hybrid", 5, ())
    assert told.arguments == {
        **SIZE, "patch_size": (1, 2), "stages": (2, 1, 1), "width_factor": 0.5, "classifier": "token",
    }  # fmt: skip
    again = keras_vit.Hybrid(weights=tmp_path / "tiny.npz", **{**told.arguments, "stages": [2, 1, 1]})
    assert again.input_shape == model.input_shape
    np.testing.assert_array_equal(again.predict_on_batch(images(model)), model.predict_on_batch(images(model)))
    keras_vit.save_npz(randomise(keras_vit.Hybrid_mu(weights=None, input_shape=(40, 40, 3))), tmp_path / "mu.npz")
    assert keras_vit.Hybrid_mu(weights=tmp_path / "mu.npz").input_shape == (None, 40, 40, 3)
    assert zoo.identify(Npz(tmp_path / "mu.npz")).variants == ("Hybrid_mu",)


def test_a_file_of_other_stages_changes_nothing_and_says_what_it_is(tmp_path):
    keras_vit.save_npz(tiny(), tmp_path / "tiny.npz")
    model = tiny(stages=(1, 1))
    before = to_numpy(model.get_layer("conv_root").kernel)
    with pytest.raises(errors.CheckpointMismatchError, match=r"block2/unit2(.|\n)*stages=\(1, 2\)"):
        keras_vit.load_weights(model, tmp_path / "tiny.npz")
    np.testing.assert_array_equal(to_numpy(model.get_layer("conv_root").kernel), before)


@pytest.mark.parametrize("options", [dict(stages=(2, 1)), dict(stages=(), patch_size=(4, 8))], ids=["stages", "root alone"])
def test_a_keras_file_gives_the_same_numbers_again(tmp_path, options):
    model = tiny(**options, stochastic_depth_rate=0.1, dropout_rate=0.1, name="hybrid")
    model.save(tmp_path / "hybrid.keras")
    again = keras.saving.load_model(tmp_path / "hybrid.keras")
    np.testing.assert_array_equal(again.predict_on_batch(images(model)), model.predict_on_batch(images(model)))
    assert set(named_weights(again)) == set(named_weights(model))


def released(stages, width, depth, heads, mlp, grid):
    """{name: shape} of a released file with patches of 1, after the original's models_resnet.py and models_vit.py."""
    shapes = {"conv_root/kernel": (7, 7, 3, 64), "gn_root": 64}
    c = 64
    for s, units in enumerate(stages, 1):
        for u in range(1, units + 1):
            unit, n = f"block{s}/unit{u}", 64 * 2 ** (s - 1)
            shapes |= {f"{unit}/conv1/kernel": (1, 1, c, n), f"{unit}/conv2/kernel": (3, 3, n, n)}
            shapes |= {f"{unit}/conv3/kernel": (1, 1, n, 4 * n), f"{unit}/gn1": n, f"{unit}/gn2": n, f"{unit}/gn3": 4 * n}
            if u == 1:
                shapes |= {f"{unit}/conv_proj/kernel": (1, 1, c, 4 * n), f"{unit}/gn_proj": 4 * n}
            c = 4 * n
    norms = {name: channels for name, channels in shapes.items() if isinstance(channels, int)}
    shapes = {name: shape for name, shape in shapes.items() if name not in norms}
    shapes |= {f"{name}/{leaf}": (1, 1, 1, channels) for name, channels in norms.items() for leaf in ("scale", "bias")}
    shapes |= {"embedding/kernel": (1, 1, c, width), "embedding/bias": (width,), "cls": (1, 1, width)}
    shapes["Transformer/posembed_input/pos_embedding"] = (1, 1 + grid**2, width)
    for i in range(depth):
        block, split = f"Transformer/encoderblock_{i}", (heads, width // heads)
        for part in ("query", "key", "value"):
            attention = f"{block}/MultiHeadDotProductAttention_1/{part}"
            shapes |= {f"{attention}/kernel": (width, *split), f"{attention}/bias": split}
        out = f"{block}/MultiHeadDotProductAttention_1/out"
        shapes |= {f"{out}/kernel": (*split, width), f"{out}/bias": (width,)}
        shapes |= {f"{block}/MlpBlock_3/Dense_0/kernel": (width, mlp), f"{block}/MlpBlock_3/Dense_0/bias": (mlp,)}
        shapes |= {f"{block}/MlpBlock_3/Dense_1/kernel": (mlp, width), f"{block}/MlpBlock_3/Dense_1/bias": (width,)}
        shapes |= {f"{block}/LayerNorm_{n}/{leaf}": (width,) for n in (0, 2) for leaf in ("scale", "bias")}
    shapes |= {f"Transformer/encoder_norm/{leaf}": (width,) for leaf in ("scale", "bias")}
    return shapes | {"head/kernel": (width, 1000), "head/bias": (1000,)}


@pytest.mark.parametrize(
    "row, facts, params",
    [
        ("R50_ViT_B16", dict(stages=(3, 4, 9), width=768, depth=12, heads=12, mlp=3072, grid=14), 98_659_112),
        ("R26_ViT_S32", dict(stages=(2, 2, 2, 2), width=384, depth=12, heads=6, mlp=1536, grid=7), 36_431_912),
    ],
)
def test_the_full_size_has_exactly_the_arrays_of_the_released_file(row, facts, params):
    with keras.StatelessScope(initialize_variables=False):
        model = zoo.VARIANTS[row].build(weights=None)
    keras.utils.clear_session()
    names = hybrid.FAMILY.layouts["pre-linen"]
    ours = {
        piece.original: piece.transform.file_shape(weight.shape)
        for name, weight in named_weights(model).items() for piece in names.to_original(name)
    }  # fmt: skip
    expected = released(**facts)
    assert ours == expected
    assert sum(map(np.prod, expected.values())) == params


def test_a_training_step_reaches_every_convolution_and_norm():
    model = tiny(classifier_activation=None)
    before = {name: to_numpy(weight) for name, weight in named_weights(model).items()}
    model.compile(keras.optimizers.SGD(1.0), keras.losses.SparseCategoricalCrossentropy(from_logits=True), jit_compile=False)
    model.train_on_batch(images(model), np.array([1, 3]))
    resnet = [name for name in before if name.startswith(("conv_root", "gn_root", "stage"))]
    assert len(resnet) == 3 + 2 * (4 + 8) + 3 + 6
    for name in resnet:
        assert np.abs(to_numpy(named_weights(model)[name]) - before[name]).max() > 1e-7, name
