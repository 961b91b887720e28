"""Safetensors files: a header that lies is refused, and what is written here is what the package reads."""

import json
import random

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from test_torchfile import ARRAYS, refused

from keras_vit import errors
from keras_vit.checkpoints import files, reader

NUMBERS = np.arange(6, dtype="<f4")
DATA = NUMBERS.tobytes()


def saved(header, data=DATA, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def array(shape=(2, 3), offsets=(0, 24), dtype="F32", **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets), **more}


GOOD = {"a": array()}
LIES = {
    "shape": (saved({"a": array((2, 4))}), "its shape .* is not the size of its offsets"),
    "absurd shape": (saved({"a": array((2**62, 2**62))}), "is not the size"),
    "negative shape": (saved({"a": array((-2, -3))}), "whole numbers as shape"),
    "fraction": (saved({"a": array((2.0, 3))}), "whole numbers as shape"),
    "truth": (saved({"a": array((True, 6))}), "whole numbers as shape"),
    "many axes": (saved({"a": array((6,) + (1,) * 40)}), "whole numbers as shape"),
    "no shape": (saved({"a": {"dtype": "F32", "data_offsets": [0, 24]}}), "expected dtype, shape and data_offsets"),
    "more keys": (saved({"a": array(code="x")}), "expected dtype, shape and data_offsets"),
    "one offset": (saved({"a": array(offsets=(24,))}), "two offsets"),
    "turned offsets": (saved({"a": array(offsets=(24, 0))}), "is not the size"),
    "outside": (saved({"a": array(offsets=(4, 28))}), "outside the file"),
    "overlap": (saved({"a": array((5,), (0, 20)), "b": array((2,), (16, 24))}), "'b': its bytes overlap"),
    "the same": (saved({"a": array(), "b": array()}), "'b': its bytes overlap"),
    "gap": (saved({"a": array((2,), (0, 8)), "b": array((3,), (12, 24))}), "'b': its bytes leave a gap"),
    "gap at the start": (saved({"a": array((5,), (4, 24))}), "'a': its bytes leave a gap"),
    "bytes behind": (saved(GOOD, DATA + b"more"), "its header accounts for"),
    "type": (saved({"a": array(dtype="F33")}), "one of the types F64.* got 'F33'"),
    "type that is none": (saved({"a": array(dtype=[])}), "one of the types"),
    "twice": (saved(b'{"a":%s,"a":%s}' % ((json.dumps(array()).encode(),) * 2)), "key 'a' stands there twice"),
    "record twice": (saved(b'{"a":{"dtype":"F32","dtype":"F32","shape":[6],"data_offsets":[0,24]}}'), "'dtype' stands there"),
    "long header": (saved(GOOD, length=2**62), "expected a header of 2 to"),
    "header to the end": (saved(GOOD, length=len(json.dumps(GOOD)) + 1), "JSONDecodeError|UnicodeDecodeError"),
    "header of nothing": (saved(GOOD, length=0), "expected a header of 2 to"),
    "no object": (saved(b'["x"]'.ljust(16)), "something else|no JSON object"),
    "deep": (saved(b'{"a":' + b"[" * 100_000), "RecursionError"),
    "no numbers": (saved(b'{"a":' + b"9" * 5000 + b"}"), "ValueError"),
    "empty": (saved({}, b""), "it holds no arrays"),
    "metadata of numbers": (saved({**GOOD, "__metadata__": {"a": 1}}), "no object of texts"),
    "metadata of ours": (saved({**GOOD, "__metadata__": {"keras_vit": "[]"}}), "record of ours is no object"),
    "line break in name": (saved({"a\nb": array()}), "is no name of an array"),
    "empty name": (saved({"": array()}), "is no name of an array"),
    "many": (saved({str(i): array((0,), (0, 0)) for i in range(20_001)}, b""), "at most 20000 arrays"),
}  # fmt: skip


@pytest.mark.parametrize("kind", LIES)
def test_a_header_that_lies_is_one_exception_that_says_why(kind, tmp_path):
    data, match = LIES[kind]
    (tmp_path / "x.safetensors").write_bytes(data)
    refused(tmp_path / "x.safetensors", match)


def test_the_package_reads_what_is_written_here_with_its_types_and_metadata(tmp_path):
    arrays = {name: array for name, array in ARRAYS.items() if array.dtype.str not in ("|V2", "<c8")}
    files.write(tmp_path / "x.safetensors", arrays, {"grid": [2, 3]})
    got = safetensors.numpy.load_file(tmp_path / "x.safetensors")
    assert {n: (a.dtype, a.shape, a.tobytes()) for n, a in got.items()} == {
        n: (a.dtype, a.shape, a.tobytes()) for n, a in arrays.items()
    }
    with safetensors.safe_open(tmp_path / "x.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt", "keras_vit": '{"grid": [2, 3]}'}


def test_metadata_of_others_survives_a_change_of_format(tmp_path):
    safetensors.numpy.save_file({"a": NUMBERS}, tmp_path / "x.safetensors", {"format": "np", "licence": "MIT"})
    path = tmp_path / "x.safetensors"
    for name in ("y.npz", "y.pth", "y.safetensors"):
        files.copy(files.open_file(path), tmp_path / name)
        path = tmp_path / name
    with safetensors.safe_open(path, "numpy") as file:
        assert file.metadata() == {"format": "np", "licence": "MIT"}


def test_arrays_begin_where_their_type_needs_it_and_keep_the_order_of_their_names(tmp_path):
    files.write(tmp_path / "x.safetensors", ARRAYS)
    archive = files.open_file(tmp_path / "x.safetensors")
    assert list(archive.entries) == list(ARRAYS)
    for name, (_, dtype) in archive.entries.items():
        assert archive._begins[name] % dtype.itemsize == 0


def test_arrays_are_made_one_after_the_other_and_never_kept(tmp_path):
    class Made(dict):
        def __getitem__(self, name):
            made.append(name)
            return np.full(3, made.count(name), "f4")

        def items(self):
            return ((name, self[name]) for name in self)

    made = []
    files.write(tmp_path / "x.safetensors", Made(a=0, b=0))
    assert made == ["a", "b", "a", "b"]
    assert files.open_file(tmp_path / "x.safetensors").read("b").tolist() == [2, 2, 2]


def test_a_name_of_the_formats_own_and_a_foreign_type_are_refused(tmp_path):
    for name, array in (("__metadata__", NUMBERS), ("a", np.ones(2, "c16")), ("a\nb", NUMBERS)):
        with pytest.raises(errors.ArgumentError, match="expected one of the types F64.*write .npz. Nothing was written"):
            files.write(tmp_path / "x.safetensors", {name: array})
    assert not list(tmp_path.iterdir())


def test_truth_values_are_0_and_1(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(saved({"a": array((3,), (0, 3), "BOOL")}, b"\0\1\2"))
    with pytest.raises(errors.CheckpointFormatError, match="'a': expected truth values"):
        files.open_file(tmp_path / "x.safetensors").exact("a")


def test_a_file_that_is_cut_while_it_is_open_is_refused(tmp_path):
    files.write(tmp_path / "x.safetensors", {"a": np.zeros(100_000, "f4")})
    archive = files.open_file(tmp_path / "x.safetensors")
    with open(tmp_path / "x.safetensors", "r+b") as file:
        file.truncate((tmp_path / "x.safetensors").stat().st_size - 1)
    for read in (archive.read, archive.exact, archive.scan):
        with pytest.raises(errors.CheckpointFormatError, match="'a' is shorter than its header says"):
            read("a")


def test_a_scan_goes_through_an_array_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "_CHUNK", 8)
    values = np.float32([1, np.nan, -3, np.inf, 2, 0.5, -np.inf])
    files.write(tmp_path / "x.safetensors", {"a": values, "none": values[:0]})
    archive = files.open_file(tmp_path / "x.safetensors")
    assert archive.scan("a") == (3, 3.0) and archive.scan("none") == (0, 0.0)


def test_a_header_with_any_bit_flipped_is_refused_or_leaves_every_array_as_it_was(tmp_path):
    """The format has no checksum of its numbers: those are what the lock file's sha256 is for."""
    files.write(tmp_path / "good.safetensors", ARRAYS, {"grid": [2, 3]})
    whole = (tmp_path / "good.safetensors").read_bytes()
    header, draw, refusals = 8 + int.from_bytes(whole[:8], "little"), random.Random(0), 0
    flips = [(at, bit) for at in range(header) for bit in range(8)]
    flips = draw.sample(flips, 1000)
    for at, bit in flips:
        mutant = bytearray(whole)
        mutant[at] ^= 1 << bit
        (tmp_path / "x.safetensors").write_bytes(mutant)
        try:
            archive = files.open_file(tmp_path / "x.safetensors")
            got = {name: archive.exact(name) for name in archive.entries}
        except errors.CheckpointFormatError:
            refusals += 1
            continue
        assert len(got) == len(ARRAYS)
        for name in set(got) & set(ARRAYS):
            assert got[name].tobytes() == ARRAYS[name].tobytes()
    assert refusals > 500


def test_a_file_cut_anywhere_is_refused(tmp_path):
    files.write(tmp_path / "good.safetensors", ARRAYS)
    whole = (tmp_path / "good.safetensors").read_bytes()
    for end in range(0, len(whole), 13):
        (tmp_path / "x.safetensors").write_bytes(whole[:end])
        refused(tmp_path / "x.safetensors", "expected an intact")
