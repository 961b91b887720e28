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
