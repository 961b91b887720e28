import keras
import numpy as np
import pytest
from conftest import GOLDENS, randomise

import keras_vit
from keras_vit import errors, zoo
from keras_vit.checkpoints import adapt, files, load
from keras_vit.checkpoints.dialects import torch
from keras_vit.checkpoints.names import Names, Piece, Template, constant, rule
from keras_vit.checkpoints.transforms import Part, Turned, Wrapped
from keras_vit.models import vit

CASE = GOLDENS / "vit" / "token_p16_rep"


def arrays():
    with np.load(CASE / "checkpoint.npz", allow_pickle=False) as file:
        return dict(file)


def model(**kwargs):
    """A random model that fits CASE."""
    options = dict(
        input_shape=(48, 48, 3), patch_size=16, width=48, depth=2, heads=3, mlp=96, classes=10, representation_size=40,
        weights=None,
    )  # fmt: skip
    return randomise(keras_vit.ViT(**{**options, **kwargs}), seed=5)


def values(model):
    return [np.array(weight) for weight in model.weights]


def assert_refused_untouched(path, match, error=errors.CheckpointFormatError, **kwargs):
    m = kwargs.pop("model", None) or model()
    before = values(m)
    with pytest.raises(error, match=match) as raised:
        keras_vit.load_weights(m, path, **kwargs)
    for old, new in zip(before, values(m)):
        np.testing.assert_array_equal(old, new)
    return str(raised.value)


# --- names


def test_a_template_matches_and_formats_the_same_names():
    template = Template("Transformer/encoderblock_{i}/LayerNorm_0")
    assert template.match("Transformer/encoderblock_11/LayerNorm_0") == {"i": 11}
    assert template.format({"i": 11}) == "Transformer/encoderblock_11/LayerNorm_0"
    for other in ("Transformer/encoderblock_011/LayerNorm_0", "Transformer/encoderblock_/LayerNorm_0", "x"):
        assert template.match(other) is None


def test_dots_in_a_template_are_dots():
    assert Template("blocks.{i}.norm").match("blocks_1.norm") is None


def test_a_rule_whose_sides_have_other_fields_is_refused():
    with pytest.raises(ValueError, match="same fields"):
        rule("block_{i}/x", "x")
    with pytest.raises(ValueError, match="once"):
        Template("{i}/{i}")


def test_parts_are_placed_and_taken_at_the_same_slot():
    weight, array = np.zeros((4, 3, 2)), np.arange(8.0).reshape(4, 2)
    part = Part(1, 3, 1)
    part.place(array, weight)
    assert part.file_shape(weight.shape) == array.shape
    np.testing.assert_array_equal(part.take(weight), array)
    assert not weight[:, [0, 2]].any()


def test_arrays_behind_axes_of_length_one_are_unwrapped_and_wrapped_again():
    weight, wrapped = np.zeros(4), Wrapped()
    wrapped.place(np.arange(4.0).reshape(1, 1, 1, 4), weight)
    np.testing.assert_array_equal(weight, np.arange(4))
    assert wrapped.take(weight).shape == wrapped.file_shape((4,)) == (1, 1, 1, 4)


@pytest.mark.parametrize(
    ("turned", "shape", "file_shape"),
    [
        (torch.MATRIX, (6, 4), (4, 6)),
        (torch.FILTER, (3, 2, 5, 7), (7, 5, 3, 2)),
        (Turned((1, 2, 3, 0), (3, 1)), (6, 3, 2, 4), (24, 6)),
        (Turned((2, 0, 1), (1, 2)), (2, 4, 6), (6, 8)),
        (Turned((1, 2, 0), (2, 1), Part(1, 3, 1)), (6, 3, 2, 4), (8, 6)),
    ],
)
def test_turned_arrays_are_placed_and_taken_at_the_same_place(turned, shape, file_shape):
    assert turned.file_shape(shape) == file_shape
    array = np.arange(np.prod(file_shape), dtype="float32").reshape(file_shape)
    weight = np.zeros(shape, "float32")
    turned.place(array, weight)
    np.testing.assert_array_equal(turned.take(weight), array)


def test_a_matrix_of_pytorch_acts_as_ours_on_queries_and_outputs():
    x, rng = np.ones((1, 6)), np.random.default_rng(0)
    fused, out = rng.standard_normal((24, 6)), rng.standard_normal((6, 8))
    ours, back = np.zeros((6, 3, 2, 4)), np.zeros((2, 4, 6))
    torch.qkv("a", "b")[0].transform.place(fused, ours)
    torch.attention_out("a", "b")[0].transform.place(out, back)
    values = (x @ fused.T).reshape(1, 3, 2, 4)
    np.testing.assert_allclose(np.einsum("bd,dphk->bphk", x, ours), values)
    np.testing.assert_allclose(np.einsum("bhk,hkd->bd", values[:, 0], back), values[:, 0].reshape(1, 8) @ out.T)


COUNTED = Names(torch.batch_norm("bn", "bn"), constant("index", "bn/gamma", lambda shape, grid: np.arange(shape[0])))


def counted(**changes):
    """Weights of a batch norm, and the arrays of its file with `changes`."""
    layer = keras.layers.BatchNormalization(name="bn")
    layer.build((None, 3))
    weights = {f"bn/{weight.name}": weight for weight in layer.weights}
    one = np.arange(1, 4, dtype="float32")
    arrays = {f"bn.{name}": one * i for i, name in enumerate(("weight", "bias", "running_mean", "running_var"), 1)}
    arrays |= {"bn.num_batches_tracked": np.int64(100), "index": np.arange(3), **changes}
    return weights, {name: array for name, array in arrays.items() if array is not None}


@pytest.mark.parametrize("left_out", [None, "index"])
def test_arrays_that_are_no_weights_are_written_back_as_they_were(tmp_path, left_out):
    weights, arrays = counted(**({left_out: None} if left_out else {}))
    files.write(tmp_path / "file.npz", arrays)
    done = load.load(weights, files.Npz(tmp_path / "file.npz"), {"own": COUNTED})
    np.testing.assert_array_equal(load.to_numpy(weights["bn/moving_variance"]), [4, 8, 12])
    load.save(weights, tmp_path / "again.npz", COUNTED, stored=done["stored"], constants=done["constants"])
    again = files.Npz(tmp_path / "again.npz")
    assert set(again.entries) == set(arrays)
    for name, array in arrays.items():
        assert again.exact(name).dtype == array.dtype
        np.testing.assert_array_equal(again.exact(name), array)


def test_a_model_from_no_file_writes_the_arrays_that_are_no_weights_too(tmp_path):
    load.save(counted()[0], tmp_path / "new.npz", COUNTED)
    new = files.Npz(tmp_path / "new.npz")
    assert new.exact("bn.num_batches_tracked") == 0
    np.testing.assert_array_equal(new.exact("index"), np.arange(3))


@pytest.mark.parametrize(
    ("changes", "match"),
    [({"index": np.arange(3)[::-1]}, "index: expected int64"), ({"bn.num_batches_tracked": np.arange(2)}, "one whole number")],
)
def test_arrays_that_are_no_weights_and_are_wrong_are_refused_by_name(tmp_path, changes, match):
    weights, arrays = counted(**changes)
    files.write(tmp_path / "file.npz", arrays)
    with pytest.raises(errors.CheckpointMismatchError, match=match):
        load.load(weights, files.Npz(tmp_path / "file.npz"), {"own": COUNTED})
    assert not load.to_numpy(weights["bn/beta"]).any()


def test_a_rule_that_stacks_leads_from_one_array_to_every_block_and_back():
    names = Names(rule("enc/block_{i}/scale", "block_{i}/gamma"), rule("head", "head")).stacked("enc/block_{i}/", "enc/block/")
    assert [ours for ours, *_ in names.to_ours("enc/block/scale", 3)] == ["block_0/gamma", "block_1/gamma", "block_2/gamma"]
    assert names.to_original("block_2/gamma") == [Piece("enc/block/scale", rule("a", "a").transform, 2)]
    assert names.to_original("head") == [Piece("head", rule("a", "a").transform, None)]


# --- resampling


@pytest.mark.parametrize("old", [1, 2, 7, 8, 14, 16, 24, 28, 32])
def test_positions_are_resampled_as_scipy_zooms_at_every_size(old):
    from scipy.ndimage import zoom

    grid = np.random.default_rng(0).uniform(1, 2, (old, 5, 3)).astype("float32")
    for new in range(1, 60):
        expected = zoom(grid, (new / old, 7 / 5, 1), order=1)
        np.testing.assert_allclose(adapt.resample_grid(grid, (new, 7)), expected, atol=1e-6, err_msg=f"{old} -> {new}")
        assert adapt.loses_edge(old, new) == (not expected[-1].any())


def test_a_table_of_absurd_length_is_refused_from_its_shape():
    with pytest.raises(errors.CheckpointMismatchError, match="at most 65536 positions"):
        adapt.Positions((14, 14), class_token=False).source((1, 10_000**2, 4))
    with pytest.raises(errors.CheckpointMismatchError, match="at most 256"):
        adapt.PatchKernel((16, 16)).plan({"patches/kernel": (10_000, 16, 3, 8)})


def test_an_edge_lost_by_the_originals_resampling_is_reported():
    def does(side):
        return adapt.Positions((side, side), class_token=False).plan({"tokens/positions": (1, 576, 4)})[1]

    assert "becomes 0" in does(22)
    assert "becomes 0" not in does(14)


def test_resampling_to_the_same_grid_is_exact():
    grid = np.random.default_rng(0).standard_normal((5, 7, 3)).astype("float32")
    np.testing.assert_array_equal(adapt.resample_grid(grid, (5, 7)), grid)


def test_whether_a_table_has_a_row_for_the_class_token_follows_from_model_and_grid():
    # 196 rows are 14 x 14 without such a row, with or without a class token, and never "195 and a token"; 197 are 14 x 14 and one
    with_token, without = adapt.Positions((7, 7), class_token=True), adapt.Positions((7, 7), class_token=False)
    assert with_token.source((1, 196, 4)) == without.source((1, 196, 4)) == ((14, 14), 0)
    assert with_token.source((1, 197, 4)) == ((14, 14), 1)
    for rows in (195, 197):
        with pytest.raises(errors.CheckpointMismatchError, match=f"{rows} positions"):
            without.source((1, rows, 4))
    with pytest.raises(errors.CheckpointMismatchError, match="195 positions"):
        with_token.source((1, 195, 4))


def test_the_class_tokens_row_moves_into_it_or_is_zero_whichever_the_model_has_not():
    rng = np.random.default_rng(0)
    cls, table = rng.standard_normal((1, 1, 4)).astype("float32"), rng.standard_normal((1, 10, 4)).astype("float32")
    folded = adapt.Positions((3, 3), class_token=True, class_position=False)({"tokens/cls": cls, "tokens/positions": table})
    np.testing.assert_array_equal(folded["tokens/cls"], cls + table[:, :1])
    np.testing.assert_array_equal(folded["tokens/positions"], table[:, 1:])
    kept = adapt.Positions((3, 3), class_token=True)({"tokens/cls": cls, "tokens/positions": table[:, 1:]})
    np.testing.assert_array_equal(kept["tokens/positions"][:, :1], np.zeros((1, 1, 4)))
    np.testing.assert_array_equal(kept["tokens/cls"], cls)


def test_a_resampled_patch_kernel_sees_in_a_resized_patch_what_the_old_one_saw():
    rng = np.random.default_rng(0)
    patch, kernel = rng.standard_normal((8, 6, 3)), rng.standard_normal((8, 6, 3, 5))
    larger = np.einsum("yh,xw,hwc->yxc", adapt.bilinear(8, 16), adapt.bilinear(6, 9), patch)
    new = adapt.resample_patches(kernel, (16, 9))
    np.testing.assert_allclose(np.einsum("hwc,hwcd", larger, new), np.einsum("hwc,hwcd", patch, kernel), atol=1e-4)
    np.testing.assert_allclose(adapt.resample_patches(kernel, (8, 6)), kernel, atol=1e-6)


# --- loading


def test_loading_reports_every_list_in_one_error_and_leaves_the_model_alone(tmp_path):
    broken = arrays()
    broken["surplus/kernel"] = np.zeros(3, "float32")
    del broken["Transformer/encoder_norm/scale"]
    broken["Transformer/encoderblock_0/LayerNorm_9/scale"] = broken.pop("Transformer/encoderblock_0/LayerNorm_0/scale")
    broken["embedding/bias"] = np.zeros(7, "float32")
    broken["Transformer/encoderblock_7/LayerNorm_0/scale"] = np.ones(48, "float32")
    np.savez(tmp_path / "x.npz", **broken)
    text = assert_refused_untouched(tmp_path / "x.npz", "does not fit", errors.CheckpointMismatchError)
    for part in (
        "that no rule claims (2)", "surplus/kernel", "LayerNorm_9", "does not have (1)", "encoderblock_7", "does not fill (2)",
        "encoder_norm/gamma", "another shape (1)", "expected (48,), got (7,)", "pre-linen",
    ):  # fmt: skip
        assert part in text, (part, text)


@pytest.mark.parametrize("layout", vit.FAMILY.layouts)
def test_every_layout_is_recognised_and_writes_back_the_same_bits(tmp_path, layout):
    kind = dict(classifier="map") if "map" in layout else {}
    first = model(depth=3, **kind)
    keras_vit.save_npz(first, tmp_path / "a.npz", layout=layout)
    root = next(root for root in sorted(vit.ROOTS, key=len, reverse=True) if layout.startswith(root))
    assert f"{root}head/kernel" in files.Npz(tmp_path / "a.npz").entries
    second = model(depth=3, **kind)
    keras_vit.load_weights(second, tmp_path / "a.npz")
    assert second.weights_info["layout"] == layout
    for old, new in zip(values(first), values(second)):
        np.testing.assert_array_equal(old, new)
    keras_vit.save_npz(second, tmp_path / "b.npz")
    with np.load(tmp_path / "a.npz") as a, np.load(tmp_path / "b.npz") as b:
        assert set(a) == set(b)
        assert all(a[key].tobytes() == b[key].tobytes() for key in a)


def test_a_stack_of_blocks_is_one_array_in_the_file(tmp_path):
    m = model(depth=3)
    keras_vit.save_npz(m, tmp_path / "x.npz", layout="scan")
    stack = files.Npz(tmp_path / "x.npz").read("Transformer/encoderblock/MultiHeadDotProductAttention_0/value/kernel")
    assert stack.shape == (3, 48, 3, 16)
    for i in range(3):
        np.testing.assert_array_equal(np.array(m.get_layer(f"block_{i}").attention.qkv_kernel)[:, 2], stack[i])
    assert_refused_untouched(tmp_path / "x.npz", r"expected \(2, 48\), got \(3, 48\)", errors.CheckpointMismatchError)


def test_what_lies_beside_the_weights_of_a_training_job_is_left_out_and_reported(tmp_path):
    m = model()
    keras_vit.save_npz(m, tmp_path / "x.npz", layout="opt/target/linen")
    with np.load(tmp_path / "x.npz") as file:
        stored = dict(file)
    np.savez(tmp_path / "job.npz", **stored, **{"opt/state/step": np.array(7), "opt/state/param_states/cls/grad_ema": np.ones(3)})
    keras_vit.load_weights(m, tmp_path / "job.npz")
    assert set(m.weights_info["ignored"]) == {"opt/state/step", "opt/state/param_states/cls/grad_ema"}


def test_the_image_tower_of_a_two_tower_file_loads_alone(tmp_path):
    options = dict(classifier="map", style="big_vision", include_top=False, pooling="map", representation_size=None, classes=None)
    m = model(**options)
    keras_vit.save_npz(m, tmp_path / "x.npz", layout="params/img/linen-posemb-on-top")
    with np.load(tmp_path / "x.npz") as file:
        stored = dict(file)
    text = {"params/txt/Embed_0/embedding": np.ones((4, 4), "float32"), "params/t": np.ones(1, "float32")}
    np.savez(tmp_path / "pair.npz", **stored, **text)
    again = model(**options)
    keras_vit.load_weights(again, tmp_path / "pair.npz")
    for old, new in zip(values(m), values(again)):
        np.testing.assert_array_equal(old, new)
    assert set(again.weights_info["ignored"]) == set(text)


def test_a_file_that_fits_no_layout_is_refused_with_what_it_resembles(tmp_path):
    np.savez(tmp_path / "x.npz", **{f"module.{key}": array for key, array in arrays().items()})
    assert_refused_untouched(tmp_path / "x.npz", "resembles no file of a family known here", errors.CheckpointMismatchError)
    other = GOLDENS / "vit" / "gap_p8" / "checkpoint.npz"
    assert_refused_untouched(other, r"family ViT, layout 'pre-linen', with patch_size=8, width=", errors.CheckpointMismatchError)


def test_the_variant_that_a_file_was_made_for_is_named(tmp_path):
    path = tmp_path / "x.npz"
    keras_vit.save_npz(keras_vit.ViT_mu_bv(weights=None), path)
    reading = zoo.identify(files.Npz(path))
    assert (reading.family, reading.layout, reading.variants) == ("ViT", "linen-posemb-on-top", ("ViT_mu_bv",))
    assert (reading.classes, reading.arguments["depth"], reading.unknown) == (1000, 1, ())
    assert_refused_untouched(path, "Variants of this size: ViT_mu_bv", errors.CheckpointMismatchError)


@pytest.mark.parametrize("classifier", ["token", "gap"])
def test_files_of_both_repositories_fit_models_of_both_with_the_same_outputs(tmp_path, classifier):
    options = dict(classifier=classifier, representation_size=None)
    theirs, ours = (model(style=style, **options) for style in ("big_vision", "vision_transformer"))
    images = np.random.default_rng(0).uniform(-1, 1, (2, 48, 48, 3)).astype("float32")
    for first, second in ((theirs, ours), (ours, theirs)):
        randomise(first, seed=3)
        keras_vit.save_npz(first, tmp_path / "x.npz", layout=first.weights_info["layout"] or zoo.FAMILIES["ViT"].written(first))
        keras_vit.load_weights(second, tmp_path / "x.npz")
        assert bool(second.weights_info["adapted"]) == (classifier == "token")
        np.testing.assert_allclose(second.predict_on_batch(images), first.predict_on_batch(images), atol=1e-5)


def test_another_patch_size_is_resampled_only_when_asked(tmp_path):
    first = model(style="big_vision")
    keras_vit.save_npz(first, tmp_path / "x.npz")
    second = model(style="big_vision", patch_size=8, input_shape=(24, 24, 3))
    assert_refused_untouched(tmp_path / "x.npz", "embedding/kernel: expected", errors.CheckpointMismatchError, model=second)
    keras_vit.load_weights(second, tmp_path / "x.npz", resize_patches=True)
    assert second.weights_info["adapted"] == ["patches/kernel: patches of 16 x 16 resampled to 8 x 8"]


def test_a_wrong_head_count_is_refused():
    four = model(heads=4)
    assert_refused_untouched(CASE / "checkpoint.npz", r"expected \(48, 4, 12\)", errors.CheckpointMismatchError, model=four)


def test_the_file_of_another_model_is_refused():
    other = GOLDENS / "vit" / "token_p14_28x42" / "checkpoint.npz"
    assert_refused_untouched(other, "another shape", errors.CheckpointMismatchError)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused_by_name_and_count(tmp_path, value):
    """Without a way around it: a model with such a weight computes nothing."""
    broken = arrays()
    broken["embedding/kernel"][0, 0, 0, :2] = value
    np.savez(tmp_path / "x.npz", **broken)
    assert_refused_untouched(tmp_path / "x.npz", "embedding/kernel: 2 of 36864 values are not finite")


def test_damage_in_the_last_array_is_found_before_the_first_is_assigned(tmp_path):
    np.savez(tmp_path / "x.npz", **arrays())
    data = bytearray((tmp_path / "x.npz").read_bytes())
    data[files_end(data) - 40] ^= 1
    (tmp_path / "x.npz").write_bytes(data)
    assert_refused_untouched(tmp_path / "x.npz", "CRC")


def files_end(data):
    """Where the arrays of a zip archive end and its directory begins."""
    return data.index(b"PK\1\2")


@pytest.mark.parametrize("dtype, match", [("int32", "got dtype int32"), ("complex64", "got dtype complex64"), ("bool", "bool")])
def test_an_array_of_another_kind_of_number_is_refused_by_name(tmp_path, dtype, match):
    np.savez(tmp_path / "x.npz", **{**arrays(), "head/bias": np.zeros(10, dtype)})
    text = assert_refused_untouched(tmp_path / "x.npz", match)
    assert "'head/bias'" in text


def test_a_value_that_overflows_a_float16_model_is_refused(tmp_path):
    np.savez(tmp_path / "x.npz", **{**arrays(), "embedding/bias": np.full(48, 1e6, "float32")})
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("float16")
    try:
        half = model()
    finally:
        keras.config.set_dtype_policy(before)
    assert_refused_untouched(tmp_path / "x.npz", r"embedding/bias: its largest value, 1e\+06, overflows", model=half)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64", ">f4"])
def test_other_types_are_widened_exactly_and_written_back_as_they_were_until_training_changes_them(tmp_path, dtype):
    import ml_dtypes

    narrow = {"float64": "float32", ">f4": "float32"}.get(dtype, dtype)
    stored = {key: array.astype(ml_dtypes.bfloat16 if narrow == "bfloat16" else narrow) for key, array in arrays().items()}
    expected = {key: array.astype("float32") for key, array in stored.items()}
    stored = {key: array.view("V2") if narrow == "bfloat16" else array.astype(dtype) for key, array in stored.items()}
    np.savez(tmp_path / "x.npz", **stored)
    m = model()
    keras_vit.load_weights(m, tmp_path / "x.npz")
    np.testing.assert_array_equal(np.array(m.get_layer("head").kernel), expected["head/kernel"])
    keras_vit.save_npz(m, tmp_path / "again.npz")
    with np.load(tmp_path / "again.npz") as again:
        assert {key: (again[key].dtype, again[key].tobytes()) for key in again} == {
            key: (array.dtype, array.tobytes()) for key, array in stored.items()
        }
    m.get_layer("head").kernel.assign(np.full((40, 10), 1 / 3))
    keras_vit.save_npz(m, tmp_path / "trained.npz")
    np.testing.assert_array_equal(files.Npz(tmp_path / "trained.npz").read("head/kernel"), np.float32(1 / 3))


def test_a_float64_that_float32_cannot_hold_is_refused_by_name(tmp_path):
    np.savez(tmp_path / "x.npz", **{**arrays(), "head/bias": np.full(10, 1 / 3)})
    assert_refused_untouched(tmp_path / "x.npz", "'head/bias': its float64 values are not exact in float32")


def test_ignore_is_the_only_way_to_drop_an_array():
    plain = model(representation_size=None, classes=None, include_top=False, pooling="token")
    text = assert_refused_untouched(CASE / "checkpoint.npz", "pre_logits", errors.CheckpointMismatchError, model=plain)
    assert "head/kernel" in text
    keras_vit.load_weights(plain, CASE / "checkpoint.npz", ignore=("pre_logits/*", "head/*"))
    assert set(plain.weights_info["ignored"]) == {"pre_logits/kernel", "pre_logits/bias", "head/kernel", "head/bias"}


def test_a_reset_head_is_zero_and_the_rest_loaded():
    m = model(classes=3)
    keras_vit.load_weights(m, CASE / "checkpoint.npz", reset_head=True)
    assert not np.array(m.get_layer("head").kernel).any()
    np.testing.assert_array_equal(np.array(m.get_layer("patches").kernel), arrays()["embedding/kernel"])


def test_a_rectangular_grid_is_recorded_and_resampled_from_the_record(tmp_path):
    wide = model(input_shape=(32, 128, 3))
    keras_vit.save_npz(wide, tmp_path / "wide.npz")
    assert files.Npz(tmp_path / "wide.npz").metadata == {"grid": [2, 8]}
    square = model(input_shape=(64, 64, 3))  # as many positions, on another grid
    keras_vit.load_weights(square, tmp_path / "wide.npz")
    table = np.array(wide.get_layer("tokens").positions)
    expected = adapt.resample_grid(table[0, 1:].reshape(2, 8, -1), (4, 4)).reshape(1, 16, -1)
    np.testing.assert_array_equal(np.array(square.get_layer("tokens").positions)[:, 1:], expected)
    assert square.weights_info["adapted"] == ["tokens/positions: grid 2 x 8 resampled to 4 x 4"]


def test_a_grid_that_cannot_be_known_is_asked_for(tmp_path):
    np.savez(tmp_path / "x.npz", **{**arrays(), "Transformer/posembed_input/pos_embedding": np.ones((1, 7, 48), "float32")})
    assert_refused_untouched(tmp_path / "x.npz", r"pass grid=\(h, w\)", errors.CheckpointMismatchError)
    m = model()
    keras_vit.load_weights(m, tmp_path / "x.npz", grid=(2, 3))
    assert m.weights_info["adapted"] == ["tokens/positions: grid 2 x 3 resampled to 3 x 3"]


def test_a_model_of_somebody_else_is_refused(tmp_path):
    plain = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    with pytest.raises(errors.ArgumentError, match="built by keras_vit"):
        keras_vit.save_npz(plain, tmp_path / "x.npz")
    assert not list(tmp_path.iterdir())


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x.npz"
    keras_vit.save_npz(model(), path)
    before = path.read_bytes()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np.lib.format, "write_array", full)
    with pytest.raises(OSError, match="No space"):
        keras_vit.save_npz(model(), path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["x.npz"]
