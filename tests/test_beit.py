"""BEiT: relative positions, their resampling, the arrays beside them in files."""

import keras
import numpy as np
import pytest
from conftest import randomise
from scipy.interpolate import RectBivariateSpline

import keras_vit
from keras_vit import zoo
from keras_vit.checkpoints import adapt, files
from keras_vit.checkpoints.load import named_weights
from keras_vit.errors import ArgumentError, CheckpointMismatchError
from keras_vit.layers import AdaptivePooling
from keras_vit.models import beit

TINY = dict(patch_size=4, width=16, depth=2, heads=2, mlp=24, classes=5, weights=None)


def tiny(side=16, **options):
    return randomise(keras_vit.BEiT(input_shape=(side, side, 3), **{**TINY, **options}))


def images(side=16, count=2):
    return np.random.default_rng(1).uniform(-1, 1, (count, side, side, 3)).astype("float32")


def arrays(path):
    archive = files.Npz(path)
    return {name: archive.exact(name) for name in archive.entries}


@pytest.mark.parametrize("grid", [(1, 1), (4, 4), (3, 5)])
def test_the_bias_of_two_tokens_is_the_row_of_their_distance(grid):
    layer = beit.RelativePositions(2, grid)
    layer.build((None, 1 + grid[0] * grid[1], 8))
    table = np.random.default_rng(0).normal(size=layer.table.shape).astype("float32")
    layer.table.assign(table)
    bias = keras.ops.convert_to_numpy(layer(np.zeros((1, 1 + grid[0] * grid[1], 8), "float32")))
    np.testing.assert_array_equal(bias.transpose(1, 2, 0), table[beit.relative_index(grid)])
    h, w = grid
    middle, row, column = (len(table) - 3) // 2, 2 * w - 1, 1
    patches = bias[:, 1:, 1:].reshape(2, h, w, h, w)
    for down, right in {(0, 0), (h - 1, 0), (0, w - 1), (h - 1, w - 1)}:
        np.testing.assert_array_equal(patches[:, down, right, 0, 0], table[middle + down * row + right * column])
    np.testing.assert_array_equal([bias[:, 0, 1], bias[:, 1, 0], bias[:, 0, 0]], table[-3:])


@pytest.mark.parametrize("old, new", [(14, 24), (14, 32), (24, 14), (4, 6), (3, 9), (6, 5)])
def test_tables_are_resampled_by_the_splines_of_scipy_between_the_originals_coordinates(old, new):
    """`interp2d` of kind "cubic", which the original calls, was `RectBivariateSpline` (its documentation's transition guide)."""
    table = np.random.default_rng(old).normal(size=(adapt.relative_distances((old, old)), 2)).astype("float32")
    at, steps = np.arange(1 - new, new), adapt.relative_coordinates(old, new)
    rows = table[:-3].reshape(2 * old - 1, 2 * old - 1, 2)
    expected = np.stack([RectBivariateSpline(steps, steps, rows[..., i])(at, at) for i in range(2)], axis=-1)
    got = adapt.resample_relative(table, (old, old), (new, new))
    np.testing.assert_allclose(got[:-3], expected.reshape(-1, 2), atol=1e-5)
    np.testing.assert_array_equal(got[-3:], table[-3:])


def test_near_distances_keep_their_meaning_and_the_farthest_becomes_the_farthest():
    steps = adapt.relative_coordinates(14, 24)
    np.testing.assert_allclose(steps[[0, 12, 13, 14, 26]], [-23, -1, 0, 1, 23], atol=1e-3)
    assert (np.diff(steps[13:], 2) > -1e-12).all()
    table = np.random.default_rng(0).normal(size=(adapt.relative_distances((14, 6)), 1)).astype("float32")
    np.testing.assert_array_equal(adapt.resample_relative(table, (14, 6), (14, 6)), table)


@pytest.mark.parametrize("relative, absolute", [("block", False), ("shared", True)])
def test_positions_of_another_size_are_resampled_as_fine_tuning_does_and_reported(tmp_path, relative, absolute):
    small = tiny(relative_positions=relative, absolute_positions=absolute)
    keras_vit.save_npz(small, tmp_path / "small.npz")
    large = keras_vit.BEiT(input_shape=(24, 16, 3), **{**TINY, "weights": tmp_path / "small.npz"},
                           relative_positions=relative, absolute_positions=absolute)  # fmt: skip
    adapted = large.weights_info["adapted"]
    assert len(adapted) == (2 if relative == "block" else 1) + absolute
    assert all("grid 4 x 4 resampled to 6 x 4" in line for line in adapted)
    first, second = named_weights(small), named_weights(large)
    for name in first:
        was, is_now = np.array(first[name]), np.array(second[name])
        if name.endswith("relative_positions/table"):
            was = adapt.resample_relative(was, (4, 4), (6, 4))
        if name == "tokens/positions":
            rows = adapt.resample_bicubic(was[0, 1:].reshape(4, 4, -1), (6, 4)).reshape(1, 24, -1)
            was = np.concatenate([was[:, :1], rows], axis=1)
        np.testing.assert_array_equal(is_now, was, name)
    keras_vit.save_npz(large, tmp_path / "large.npz")  # not square: the grid is recorded
    again = tiny(relative_positions=relative, absolute_positions=absolute)
    keras_vit.load_weights(again, tmp_path / "large.npz")
    assert "grid 6 x 4 resampled to 4 x 4" in again.weights_info["adapted"][0]


def test_a_table_of_no_square_grid_is_refused_with_what_to_do(tmp_path):
    keras_vit.save_npz(tiny(), tmp_path / "a.npz")
    held = arrays(tmp_path / "a.npz")
    held = {name: array[:-1] if "bias_table" in name else array for name, array in held.items() if "index" not in name}
    np.savez(tmp_path / "b.npz", **held)
    with pytest.raises(CheckpointMismatchError, match=r"the file has 51 rows; no square grid has so many.*pass grid=\(h, w\)"):
        keras_vit.load_weights(tiny(), tmp_path / "b.npz")


@pytest.mark.parametrize("layout", ["beit", "model/beit", "hugging-face"])
def test_indices_beside_the_tables_are_written_checked_and_kept(tmp_path, layout):
    model = tiny()
    keras_vit.save_npz(model, tmp_path / "a.npz", layout=layout)
    held = arrays(tmp_path / "a.npz")
    indices = [name for name in held if name.endswith("relative_position_index")]
    assert len(indices) == 2
    for name in indices:
        np.testing.assert_array_equal(held[name], beit.relative_index((4, 4)))
    again = keras_vit.BEiT(input_shape=(16, 16, 3), **{**TINY, "weights": tmp_path / "a.npz"})
    assert again.weights_info["layout"] == layout
    np.testing.assert_array_equal(again.predict_on_batch(images()), model.predict_on_batch(images()))
    keras_vit.save_npz(again, tmp_path / "b.npz")
    written = arrays(tmp_path / "b.npz")
    assert {k: (v.dtype, v.tobytes()) for k, v in written.items()} == {k: (v.dtype, v.tobytes()) for k, v in held.items()}
    np.savez(tmp_path / "c.npz", **{**held, indices[0]: held[indices[0]][::-1]})
    with pytest.raises(CheckpointMismatchError, match="relative_position_index"):
        keras_vit.load_weights(again, tmp_path / "c.npz")


def test_what_a_file_is_follows_from_its_shapes(tmp_path):
    for relative in ("block", "shared"):
        keras_vit.save_npz(tiny(relative_positions=relative), tmp_path / "a.npz")
        reading = zoo.identify(files.Npz(tmp_path / "a.npz"))
        assert (reading.family, reading.classes, reading.unknown) == ("BEiT", 5, ())
        sizes = {key: value for key, value in TINY.items() if key not in ("classes", "weights")}
        assert reading.arguments == {**sizes, "relative_positions": relative, "absolute_positions": False, "classifier": "avg"}


@pytest.mark.parametrize("classifier", ["avg", "token"])
def test_features_are_what_the_classifier_reads(classifier):
    whole = tiny(classifier=classifier, classifier_activation=None)
    x, pooled = images(), "fc_norm" if classifier == "avg" else "class_token"
    features = tiny(include_top=False, pooling=classifier, classifier=classifier, classes=None)
    for name, weight in named_weights(features).items():
        weight.assign(named_weights(whole)[name])
    expected = keras.Model(whole.input, zoo.tap(whole, pooled)).predict_on_batch(x)
    np.testing.assert_array_equal(features.predict_on_batch(x), expected)


def test_arguments_that_make_no_model_are_refused():
    with pytest.raises(ArgumentError, match="relative_positions in"):
        tiny(relative_positions="both")
    with pytest.raises(ArgumentError, match="pooling='token' needs classifier='token'"):
        tiny(include_top=False, pooling="token")
    with pytest.raises(ArgumentError, match=r"input_shape=\(16, 16, 3\)"):
        tiny(side=15)
    with pytest.raises(ValueError, match="no relative positions to tap"):
        zoo.tap(tiny(relative_positions=None), "block_0/bias")


# ---------------------------------------------------------------- masked patches


def masked(side=16, **options):
    return randomise(keras_vit.BEiTMasked(input_shape=(side, side, 3), **{**TINY, "classes": 7, **options}))


def segmenter(side=16, **options):
    options = {**TINY, "depth": 4, "width": 8, "auxiliary": 4, "pool_scales": (1, 2), **options}
    return randomise(keras_vit.BEiTSegmenter(input_shape=(side, side, 3), **options))


def test_what_a_masked_patch_shows_changes_nothing_and_every_patch_gets_logits():
    model, x = masked(), images()
    mask = np.zeros((2, 4, 4), bool)
    mask[:, 1, 2] = True
    logits = model.predict_on_batch([x, mask])
    assert logits.shape == (2, 16, 7)
    other = x.copy()
    other[:, 4:8, 8:12] += 1
    np.testing.assert_array_equal(model.predict_on_batch([other, mask]), logits)
    assert np.abs(model.predict_on_batch([other, ~mask]) - model.predict_on_batch([x, ~mask])).max() > 1e-4


@pytest.mark.parametrize("layout", ["beit", "hugging-face"])
@pytest.mark.parametrize("make", [masked, segmenter])
def test_models_of_other_tasks_are_written_read_and_recognised(tmp_path, make, layout):
    model = make()
    layout = {"beit": "state_dict/mmseg"}.get(layout, layout) if make is segmenter else layout
    keras_vit.save_npz(model, tmp_path / "a.npz", layout=layout)
    reading = zoo.identify(files.Npz(tmp_path / "a.npz"))
    assert (reading.family, reading.layout, reading.unknown) == (model.family, layout, ())
    again = make()
    for weight in again.weights:
        weight.assign(np.zeros(weight.shape))
    keras_vit.load_weights(again, tmp_path / "a.npz")
    for name, weight in named_weights(model).items():
        np.testing.assert_array_equal(np.array(named_weights(again)[name]), np.array(weight), name)
    keras_vit.save_npz(again, tmp_path / "b.npz")
    first, second = arrays(tmp_path / "a.npz"), arrays(tmp_path / "b.npz")
    assert {k: (v.dtype, v.tobytes()) for k, v in first.items()} == {k: (v.dtype, v.tobytes()) for k, v in second.items()}


def test_a_classifier_starts_from_masked_pre_training_with_the_shared_table_in_every_block():
    model, other = tiny(), masked(side=24)
    before = {name: np.array(weight) for name, weight in named_weights(model).items()}
    kept = beit.start_from(model, other)
    assert kept == [name for name in before if name.startswith(("fc_norm", "head"))]
    theirs = {name: np.array(weight) for name, weight in named_weights(other).items()}
    table = adapt.resample_relative(theirs["relative_positions/table"], (6, 6), (4, 4))
    for name, weight in named_weights(model).items():
        expected = table if name.endswith("table") else before[name] if name in kept else theirs[name]
        np.testing.assert_array_equal(np.array(weight), expected, name)
    wide = masked(width=32)
    with pytest.raises(
        ArgumentError, match=r"patches/kernel: \(4, 4, 3, 16\), of the other \(4, 4, 3, 32\).*Nothing was changed"
    ):
        beit.start_from(model, wide)


# ---------------------------------------------------------------- segmentation


def test_the_pyramid_has_four_two_one_and_half_times_the_patches_and_labels_have_the_images_size():
    model = segmenter()
    sizes = [zoo.tap(model, f"pyramid_{i}").shape[1:] for i in range(4)]
    assert sizes == [(16, 16, 8), (8, 8, 8), (4, 4, 8), (2, 2, 8)]
    out = model.predict_on_batch(images())
    assert {key: value.shape for key, value in out.items()} == {"logits": (2, 16, 16, 5), "auxiliary": (2, 4, 4, 5)}
    whole = beit.label_maps(out, (30, 20))
    assert (whole.shape, whole.dtype) == ((2, 30, 20), "int32")
    first, second = beit.label_maps(out["logits"], [(16, 16), (30, 20)])
    np.testing.assert_array_equal(first, out["logits"][0].argmax(-1))
    np.testing.assert_array_equal(second, whole[1])
    with pytest.raises(ArgumentError, match=r"one \(H, W\) for each of 2 images, got 1"):
        beit.label_maps(out, [(16, 16)])


def test_blocks_behind_the_last_map_belong_to_the_model_and_change_nothing():
    model = segmenter(features=(0, 1, 2, 2), auxiliary=None)
    assert [name for name in named_weights(model) if name.startswith("block_3/")]
    before = model.predict_on_batch(images())
    for weight in model.get_layer("block_3").weights:
        weight.assign(weight + 1)
    np.testing.assert_array_equal(model.predict_on_batch(images()), before)
    with pytest.raises(ArgumentError, match="features must be four whole numbers from 0 to depth=4"):
        segmenter(features=(1, 2, 3, 5))


def test_another_number_of_classes_starts_both_heads_from_zeros(tmp_path):
    keras_vit.save_npz(segmenter(), tmp_path / "a.npz")
    options = {**TINY, "depth": 4, "width": 8, "auxiliary": 4, "pool_scales": (1, 2), "weights": tmp_path / "a.npz", "classes": 3}
    model = keras_vit.BEiTSegmenter(input_shape=(16, 16, 3), **options)
    for head in ("head", "auxiliary_head"):
        assert model.get_layer(head).kernel.shape[-1] == 3
        assert not np.any(model.get_layer(head).kernel)
    assert np.any(model.get_layer("levels_conv").conv.kernel)
    small = keras_vit.BEiTSegmenter(input_shape=(16, 16, 3), **{**options, "classes": None, "auxiliary": None})
    assert sorted(small.weights_info["ignored"])[0].startswith("state_dict/auxiliary_head.")


@pytest.mark.parametrize("old, new", [(5, 3), (4, 4), (2, 3), (1, 6), (10, 6)])
def test_adaptive_pooling_averages_areas_that_cover_the_image(old, new):
    image = np.random.default_rng(0).normal(size=(1, old, old + 1, 2)).astype("float32")
    got = keras.ops.convert_to_numpy(AdaptivePooling(new)(image))
    for i in range(new):
        for j in range(new):
            rows = slice(i * old // new, -(-(i + 1) * old // new))
            columns = slice(j * (old + 1) // new, -(-(j + 1) * (old + 1) // new))
            np.testing.assert_allclose(got[0, i, j], image[0, rows, columns].mean((0, 1)), atol=1e-6)


@pytest.mark.parametrize("make", [masked, segmenter])
def test_a_training_step_of_other_tasks_reaches_every_weight_and_the_model_reloads(tmp_path, make):
    model = make()
    mask = np.arange(32).reshape(2, 4, 4) % 2 == 0
    x = [images(), mask] if make is masked else images()
    losses = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(1.0), losses if make is masked else {"logits": losses, "auxiliary": losses})
    shapes = {"logits": (2, 16, 16), "auxiliary": (2, 4, 4)}
    labels = np.random.default_rng(0).integers(5, size=(2, 16, 16))
    y = labels[:, 0] if make is masked else {name: labels[:, :h, :w] for name, (_, h, w) in shapes.items()}
    before = {name: np.array(weight) for name, weight in named_weights(model).items()}
    model.train_on_batch(x, y)
    for name, weight in named_weights(model).items():
        if not (name.startswith("pyramid_") and name.endswith("/bias")):  # the batch norm behind takes them out again
            assert np.abs(np.array(weight) - before[name]).max() > 1e-8, name
    model.save(tmp_path / "a.keras")
    again = keras.saving.load_model(tmp_path / "a.keras")
    first, second = (keras.tree.flatten(each.predict_on_batch(x)) for each in (model, again))
    for a, b in zip(first, second):
        np.testing.assert_allclose(a, b, atol=1e-6)
