import io
import pickle
import struct
import zipfile

import keras
import numpy as np
import pytest
from conftest import GOLDENS, randomise

import keras_vit
from keras_vit import errors
from keras_vit.checkpoints import adapt, files
from keras_vit.checkpoints.names import Template, rule
from keras_vit.checkpoints.transforms import Part

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
        adapt.Positions("p", (14, 14), class_token=False).source_grid((1, 10_000**2, 4), 4)


def test_an_edge_lost_by_the_originals_resampling_is_reported():
    assert "becomes 0" in adapt.Positions("p", (22, 22), False).describe((1, 576, 4), 4)
    assert "becomes 0" not in adapt.Positions("p", (14, 14), False).describe((1, 576, 4), 4)


def test_resampling_to_the_same_grid_is_exact():
    grid = np.random.default_rng(0).standard_normal((5, 7, 3)).astype("float32")
    np.testing.assert_array_equal(adapt.resample_grid(grid, (5, 7)), grid)


def test_the_class_token_is_decided_by_the_model_not_by_squares():
    # 196 rows are 14 x 14 without a class token; with one they are no square, and never "195 and a token"
    table = np.zeros((1, 196, 4), "float32")
    assert adapt.Positions("p", (14, 14), class_token=False)(table).shape == (1, 196, 4)
    with pytest.raises(errors.CheckpointMismatchError, match="196 positions"):
        adapt.Positions("p", (7, 7), class_token=True).source_grid(table.shape, 4)


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


@pytest.mark.parametrize("layout", ["pre-linen", "linen", "params/linen", "opt/target/pre-linen"])
def test_every_layout_is_recognised_and_writes_back_the_same_bits(tmp_path, layout):
    first = model()
    keras_vit.save_npz(first, tmp_path / "a.npz", layout=layout)
    assert ("params/" in layout) == ("params/head/kernel" in files.Npz(tmp_path / "a.npz").entries)
    second = model()
    keras_vit.load_weights(second, tmp_path / "a.npz")
    assert second.weights_info["layout"] == layout
    keras_vit.save_npz(second, tmp_path / "b.npz")
    with np.load(tmp_path / "a.npz") as a, np.load(tmp_path / "b.npz") as b:
        assert set(a) == set(b)
        assert all(a[key].tobytes() == b[key].tobytes() for key in a)


def test_a_wrong_head_count_is_refused():
    four = model(heads=4)
    assert_refused_untouched(CASE / "checkpoint.npz", r"expected \(48, 4, 12\)", errors.CheckpointMismatchError, model=four)


def test_the_file_of_another_model_is_refused():
    other = GOLDENS / "vit" / "token_p14_28x42" / "checkpoint.npz"
    assert_refused_untouched(other, "another shape", errors.CheckpointMismatchError)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused_by_name(tmp_path, value):
    broken = arrays()
    broken["embedding/kernel"][0, 0, 0, :2] = value
    np.savez(tmp_path / "x.npz", **broken)
    assert_refused_untouched(tmp_path / "x.npz", "embedding/kernel: 2 of", errors.CheckpointMismatchError)


def test_float16_files_are_widened_exactly(tmp_path):
    half = {key: array.astype("float16") for key, array in arrays().items()}
    np.savez(tmp_path / "x.npz", **half)
    m = model()
    keras_vit.load_weights(m, tmp_path / "x.npz")
    np.testing.assert_array_equal(np.array(m.get_layer("head").kernel), half["head/kernel"].astype("float32"))


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


# --- strict reading


def npz(members, compress=zipfile.ZIP_STORED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compress) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return buffer.getvalue()


def npy(array):
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def header(text, payload=b""):
    """A .npy header of this text; a bare shape stands for that of a float32 array."""
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {text}}}" if text.endswith(",)") else text
    text = text.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text + payload


class Bomb:
    def __reduce__(self):
        return (open, ("/tmp/keras_vit_was_unpickled", "w"))


GOOD = npy(np.ones(4, "float32"))
MALFORMED = {
    "empty": (b"", "an empty file"),
    "html": (b"<!DOCTYPE html><html>not found</html>", "HTML"),
    "gzip": (b"\x1f\x8b" + bytes(40), "gzip"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(40), "HDF5"),
    "pickle": (pickle.dumps({"a": 1}), "pickle, which is never opened"),
    "npy": (GOOD, "single .npy"),
    "zeros": (bytes(1000), "something else"),
    "no arrays": (npz([]), "no arrays"),
    "pickled member": (npz([("a.npy", npy(np.array([Bomb()], dtype=object)))]), "pickled Python objects"),
    "not an array": (npz([("readme.txt", b"hello")]), "not an array by its name"),
    "text member": (npz([("a.npy", b"hello")]), "ValueError"),
    "twice": (npz([("a.npy", GOOD), ("a.npy", GOOD)]), "twice"),
    "strings": (npz([("a.npy", npy(np.array(["x"])))]), "dtype <U1"),
    "integers": (npz([("a.npy", npy(np.arange(3)))]), "expected float32"),
    "big endian": (npz([("a.npy", npy(np.ones(3, ">f4")))]), "dtype >f4"),
    "claims more": (npz([("a.npy", header("(2000000000,)", bytes(16)))]), "holds 16 bytes"),
    "claims absurd": (npz([("a.npy", header("(4611686018427387904,)"))]), "holds 0 bytes"),
    "negative": (npz([("a.npy", header("(-1,)", bytes(4)))]), "holds 4 bytes"),
    "trailing": (npz([("a.npy", GOOD + b"more")]), "holds 20 bytes"),
    "code in header": (npz([("a.npy", header("__import__('os').system('true')"))]), "ValueError"),
    "deep header": (npz([("a.npy", header("(" * 100))]), "Error"),
    "prepended": (b"#!/bin/sh\n" + npz([("a.npy", GOOD)]), "before the archive"),
    "appended": (npz([("a.npy", GOOD)]) + b"trailing", "behind the archive"),
    "bomb": (npz([("a.npy", npy(np.zeros(4, "float32")) + bytes(50_000_000))], zipfile.ZIP_DEFLATED), "50000016 bytes"),
}  # fmt: skip


@pytest.mark.parametrize("kind", MALFORMED)
def test_a_malformed_file_is_one_exception_that_says_what_it_looks_like(kind, tmp_path):
    data, match = MALFORMED[kind]
    (tmp_path / "x.npz").write_bytes(data)
    text = assert_refused_untouched(tmp_path / "x.npz", match)
    assert "allow_pickle" not in text
    assert str(tmp_path / "x.npz") in text
    assert not (tmp_path.parent / "keras_vit_was_unpickled").exists()


def test_a_file_cut_anywhere_is_refused(tmp_path):
    whole = (CASE / "checkpoint.npz").read_bytes()
    m = model()
    for end in range(0, len(whole), 4096):
        (tmp_path / "x.npz").write_bytes(whole[:end])
        with pytest.raises(errors.CheckpointFormatError):
            keras_vit.load_weights(m, tmp_path / "x.npz")


def test_a_flipped_bit_is_refused_or_changes_nothing(tmp_path):
    whole = (CASE / "checkpoint.npz").read_bytes()
    original, rng = arrays(), np.random.default_rng(0)
    for at in rng.integers(0, len(whole), 400):
        mutant = bytearray(whole)
        mutant[at] ^= 1 << rng.integers(8)
        (tmp_path / "x.npz").write_bytes(mutant)
        try:
            archive = files.Npz(tmp_path / "x.npz")
            read = {name: archive.read(name) for name in archive.entries}
        except errors.CheckpointFormatError:
            continue
        for name in set(read) & set(original):
            assert read[name].tobytes() == original[name].tobytes()


def test_a_missing_file_says_so():
    with pytest.raises(errors.ArgumentError, match="check the path"):
        keras_vit.load_weights(model(), "/no/such/file.npz")
