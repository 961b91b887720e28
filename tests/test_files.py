"""Strict reading: a well-formed file is read exactly, anything else is one exception that says what it looks like."""

import io
import os
import pathlib
import pickle
import struct
import tarfile
import tempfile
import tracemalloc
import zipfile

import numpy as np
import pytest
from conftest import GOLDENS

from keras_vit import errors
from keras_vit.checkpoints import files, reader

CASE = GOLDENS / "vit" / "token_p16_rep" / "checkpoint.npz"


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


SENTINEL = pathlib.Path(tempfile.gettempdir(), f"keras_vit_was_unpickled_{os.getpid()}")


class Bomb:
    def __reduce__(self):
        return (open, (str(SENTINEL), "w"))


def crafted(change, count=2):
    """A .npz whose directory was changed: `change` gets the bytes and where each entry of the directory begins."""
    data = bytearray(npz([(f"{name}.npy", GOOD) for name in "abcdef"[:count]]))
    starts, at = [], data.index(b"PK\1\2")
    while at >= 0:
        starts.append(at)
        at = data.find(b"PK\1\2", at + 4)
    change(data, starts)
    return bytes(data)


def encrypt(data, starts):
    data[starts[0] + 8] |= 1


def overlap(data, starts):
    """Both entries of the directory claim the first member's bytes."""
    data[starts[1] + 42 : starts[1] + 46] = struct.pack("<I", 1)


def tar(name, data):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


GOOD = npy(np.ones(4, "float32"))
TAR = tar("a.npy", GOOD)
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
    "without npy": (npz([("a.npy", GOOD), ("a", GOOD)]), "member 'a' is not an array by its name"),
    "encrypted": (crafted(encrypt), "encrypted"),
    "overlapping": (crafted(overlap), "overlap"),
    "line break in name": (npz([("a\nb.npy", GOOD)]), "not an array by its name"),
    "long name": (npz([("a" * 600 + ".npy", GOOD)]), "not an array by its name"),
    "many members": (npz([(f"{i}.npy", GOOD) for i in range(20_001)]), "at most 20000 arrays"),
    "tar": (TAR, "a tar archive"),
    "safetensors": (struct.pack("<Q", 60) + b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', "safetensors"),
    "twice": (npz([("a.npy", GOOD), ("a.npy", GOOD)]), "twice"),
    "strings": (npz([("a.npy", npy(np.array(["x"])))]), "dtype <U1"),
    "structured": (npz([("a.npy", npy(np.zeros(2, [("x", "<f4")])))]), "expected plain numbers"),
    "void": (npz([("a.npy", npy(np.zeros(2, "V4")))]), r"expected plain numbers, got dtype \|V4"),
    "dates": (npz([("a.npy", npy(np.zeros(2, "M8[s]")))]), "expected plain numbers"),
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


def refused(path, match):
    with pytest.raises(errors.CheckpointFormatError, match=match) as raised:
        read(path)
    return str(raised.value)


def read(path):
    archive = files.Npz(path)
    return {name: archive.read(name) for name in archive.entries}


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("kind", MALFORMED)
def test_a_malformed_file_is_one_exception_that_says_what_it_looks_like(kind, tmp_path):
    data, match = MALFORMED[kind]
    (tmp_path / "x.npz").write_bytes(data)
    text = refused(tmp_path / "x.npz", match)
    assert "allow_pickle" not in text
    assert str(tmp_path / "x.npz") in text
    assert not SENTINEL.exists()


def test_the_sentinel_appears_when_the_pickled_member_is_loaded():
    np.load(io.BytesIO(npy(np.array([Bomb()], dtype=object))), allow_pickle=True)
    assert SENTINEL.exists()
    SENTINEL.unlink()


def test_a_name_that_climbs_is_only_a_name(tmp_path):
    (tmp_path / "x.npz").write_bytes(npz([("../../evil.npy", GOOD), ("/etc/evil.npy", GOOD)]))
    archive = files.Npz(tmp_path / "x.npz")
    assert set(archive.entries) == {"../../evil", "/etc/evil"}
    assert all(archive.read(name).tolist() == [1, 1, 1, 1] for name in archive.entries)
    assert [path.name for path in tmp_path.iterdir()] == ["x.npz"]


@pytest.mark.parametrize("kind", ["integers", "complex", "bool"])
def test_an_array_that_nobody_reads_may_be_of_another_type(kind, tmp_path):
    """A training job stores its step beside the weights, so a file is refused only when such an array is asked for."""
    array = np.ones(3, {"integers": "int64", "complex": "complex64", "bool": "bool"}[kind])
    (tmp_path / "x.npz").write_bytes(npz([("a.npy", GOOD), ("step.npy", npy(array))]))
    archive = files.Npz(tmp_path / "x.npz")
    assert archive.read("a").tolist() == [1, 1, 1, 1]
    with pytest.raises(errors.CheckpointFormatError, match="'step': expected floating-point numbers"):
        archive.read("step")


def test_every_bfloat16_is_read_as_the_same_number_and_written_back_as_the_same_bits(tmp_path):
    """`|V2` counts as bfloat16 in any file, not only where a registry says so: numpy stores nothing else under this type."""
    import ml_dtypes

    bits = np.arange(2**16, dtype="uint16")
    (tmp_path / "x.npz").write_bytes(npz([("a.npy", npy(bits.view("V2")))]))
    got = read(tmp_path / "x.npz")["a"]
    np.testing.assert_array_equal(got, bits.view(ml_dtypes.bfloat16).astype("float32"))
    assert files.narrowed(got, np.dtype("V2")).tobytes() == bits.tobytes()
    assert files.narrowed(np.float32([1 / 3]), np.dtype("V2")).dtype == "float32"


@pytest.mark.parametrize("dtype", ["<f2", ">f2", ">f4", "<f8", ">f8"])
def test_other_floats_are_widened_or_narrowed_exactly(dtype, tmp_path):
    array = np.array([0, -0.0, 1.5, -65504, 2**-24, np.inf], dtype)
    (tmp_path / "x.npz").write_bytes(npz([("a.npy", npy(array))]))
    got = read(tmp_path / "x.npz")["a"]
    assert got.dtype == "float32"
    assert got.tobytes() == array.astype("<f4").tobytes()


@pytest.mark.parametrize("value", [1 / 3, 1e300, 1e-50])
def test_a_float64_that_float32_cannot_hold_is_refused(value, tmp_path):
    (tmp_path / "x.npz").write_bytes(npz([("a.npy", npy(np.array([1.0, value])))]))
    assert "'a': its float64 values are not exact" in refused(tmp_path / "x.npz", "not exact in float32")


def test_fortran_order_is_read_as_what_it_means(tmp_path):
    array = np.asfortranarray(np.arange(6, dtype="float32").reshape(2, 3))
    (tmp_path / "x.npz").write_bytes(npz([("a.npy", npy(array))]))
    np.testing.assert_array_equal(read(tmp_path / "x.npz")["a"], array)


def test_a_scan_counts_what_is_not_finite_and_finds_the_largest_magnitude(tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "_CHUNK", 64)
    array = np.linspace(-3, 2, 100).astype("float32")
    array[[5, 50, 99]] = np.nan, np.inf, -np.inf
    (tmp_path / "x.npz").write_bytes(npz([("a.npy", npy(array)), ("none.npy", npy(np.zeros((0, 4), "float32")))]))
    archive = files.Npz(tmp_path / "x.npz")
    assert archive.scan("a") == (3, 3.0)
    assert archive.scan("none") == (0, 0.0)
    assert archive.read("none").shape == (0, 4)


def test_a_bomb_is_refused_without_being_inflated(tmp_path):
    (tmp_path / "x.npz").write_bytes(MALFORMED["bomb"][0])
    tracemalloc.start()
    refused(tmp_path / "x.npz", "50000016 bytes")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**21


def test_a_scan_holds_a_few_pieces_and_never_the_array(tmp_path):
    (tmp_path / "x.npz").write_bytes(npz([("a.npy", npy(np.zeros(2**23, "float32")))], zipfile.ZIP_DEFLATED))
    archive = files.Npz(tmp_path / "x.npz")
    tracemalloc.start()
    archive.scan("a")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**25  # of 32 MiB


def test_a_file_cut_anywhere_is_refused(tmp_path):
    whole = CASE.read_bytes()
    for end in range(0, len(whole), 4096):
        (tmp_path / "x.npz").write_bytes(whole[:end])
        refused(tmp_path / "x.npz", "expected an intact .npz checkpoint")


def test_a_flipped_bit_is_refused_or_changes_nothing(tmp_path):
    whole, rng = CASE.read_bytes(), np.random.default_rng(0)
    with np.load(CASE) as file:
        original = dict(file)
    for at in rng.integers(0, len(whole), 400):
        mutant = bytearray(whole)
        mutant[at] ^= 1 << rng.integers(8)
        (tmp_path / "x.npz").write_bytes(mutant)
        try:
            got = read(tmp_path / "x.npz")
        except errors.CheckpointFormatError:
            continue
        for name in set(got) & set(original):
            assert got[name].tobytes() == original[name].tobytes()


def test_a_missing_file_says_so():
    with pytest.raises(errors.ArgumentError, match="check the path"):
        files.Npz("/no/such/file.npz")
