"""PyTorch's files without torch: read exactly, written as torch reads them, and never executed."""

import io
import pathlib
import pickle
import subprocess
import sys
import tarfile
import zipfile

import numpy as np
import pytest
from conftest import GOLDENS

from keras_vit import errors
from keras_vit.checkpoints import files, opcodes, reader
from keras_vit.checkpoints.opcodes import Storage, Tensor

FOUND = sorted(path for path in GOLDENS.rglob("*") if files.ending(path) not in (None, ".npz"))
PREFIXES = ("model/module.", "model/", "model_state/", "")
RNG = np.random.default_rng(0)
ARRAYS = {
    "model/blocks.0.weight": RNG.normal(size=(3, 4)).astype("<f4"),
    "model/blocks.0.steps": np.array(2**40, "<i8"),
    "model/half": RNG.normal(size=5).astype("<f2"),
    "model/brain": np.arange(2**14, 2**14 + 6, dtype="<u2").view("V2").reshape(2, 3),
    "model/deep/double": np.arange(4, dtype="<f8"),
    "model/deep/complex": np.arange(3).astype("<c8"),
    "mask": np.array([[True, False], [True, True]]),
    "none": np.zeros((0, 3), "<f4"),
    "bytes": np.arange(200, 205, dtype="u1"),
    "shorts": np.arange(-3, 3, dtype="<i2"),
}
F4 = np.dtype("<f4")


def text(string):
    return b"X" + len(string).to_bytes(4, "little") + string.encode()


def torch_zip(data, members=None, top="archive", compress=zipfile.ZIP_STORED, **others):
    """A file whose data.pkl is `data`; `members` are its storages by default one of 12 numbers."""
    members = {"data/0": np.arange(12, dtype=F4).tobytes()} if members is None else members
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compress) as archive:
        for name, content in {"data.pkl": data, "byteorder": b"little", **members, "version": b"3\n", **others}.items():
            archive.writestr(f"{top}/{name}", content)
    return buffer.getvalue()


def tensor(shape=(3, 4), strides=(4, 1), offset=0, count=12, key="0", dtype=F4):
    return Tensor(Storage(key, dtype, count), offset, shape, strides)


def one(**changes):
    return torch_zip(opcodes.write({"a": tensor(**changes)}))


def read(path):
    archive = files.open_file(path)
    return {name: archive.exact(name) for name in archive.entries}


def refused(path, match):
    with pytest.raises(errors.CheckpointFormatError, match=match) as raised:
        read(path)
    assert str(path) in str(raised.value) and "Nothing was loaded" in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize("path", FOUND, ids=lambda path: str(path.relative_to(GOLDENS)))
def test_released_files_hold_exactly_the_models_arrays(path):
    archive = files.open_file(path)
    with np.load(path.parent / "state_dict.npz") as file:
        expected = dict(file)
    prefix = next(each for each in PREFIXES if all(name.startswith(each) for name in archive.entries))
    assert {name.removeprefix(prefix) for name in archive.entries} == set(expected)
    for name in archive.entries:
        got, wanted = archive.exact(name), expected[name.removeprefix(prefix)]
        assert (got.dtype, got.shape, got.tobytes()) == (wanted.dtype, wanted.shape, wanted.tobytes())
        assert archive.entries[name] == (wanted.shape, wanted.dtype)


def test_there_are_released_files_of_every_kind():
    assert {files.ending(path) for path in FOUND} >= {".pth", ".pth.tar", ".pyth", ".safetensors"}


@pytest.mark.parametrize("ending", files.ENDINGS)
def test_what_is_written_is_read_again_bit_for_bit_whatever_the_format_and_its_name(ending, tmp_path):
    for name in ("x", "y"):
        files.write(tmp_path / f"{name}{ending}", ARRAYS, {"grid": [2, 3]})
    (tmp_path / "x.bin").write_bytes((tmp_path / f"x{ending}").read_bytes())
    archive = files.open_file(tmp_path / "x.bin")
    assert isinstance(archive, files.FORMATS[ending])
    assert set(archive.entries) == set(ARRAYS) and archive.metadata["grid"] == [2, 3]
    for name, array in ARRAYS.items():
        got = archive.exact(name)
        assert (got.dtype, got.shape, got.tobytes()) == (array.dtype, array.shape, array.tobytes())
    assert archive.read("model/blocks.0.weight", 2).tobytes() == ARRAYS["model/blocks.0.weight"][2].tobytes()
    assert ending == ".npz" or (tmp_path / f"x{ending}").read_bytes() == (tmp_path / f"y{ending}").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {f"x{ending}", f"y{ending}", "x.bin"}


def test_torch_reads_what_is_written_here_and_is_read_here(tmp_path):
    torch = pytest.importorskip("torch")
    files.write(tmp_path / "x.pth", ARRAYS, {"grid": [2, 3]})
    for options in ({}, {"mmap": True}):
        found = torch.load(tmp_path / "x.pth", weights_only=True, **options)
        assert found["model"]["blocks.0.steps"].item() == 2**40
        assert found["model"]["brain"].view(torch.int16).numpy().tobytes() == ARRAYS["model/brain"].tobytes()
        assert found["model"]["blocks.0.weight"].numpy().tobytes() == ARRAYS["model/blocks.0.weight"].tobytes()
        assert found["none"].shape == (0, 3) and found["mask"].tolist() == [[True, False], [True, True]]
    base = torch.arange(24.0).reshape(4, 6)
    saved = {
        "turned": base.t(), "part": base[1:3, 2:5], "again": base, "parameter": torch.nn.Parameter(torch.ones(3)),
        "list": [torch.ones(2).bfloat16(), (torch.tensor(3),)], "wide": torch.ones(1).expand(5), "epoch": 3, "rate": 0.1,
        "name": "text", "nothing": None, "type": torch.float32, "place": torch.device("cuda:1"), "size": torch.Size([1, 2]),
        "large": 2**40, "below": -5, "state": torch.nn.BatchNorm1d(3).state_dict(),
    }  # fmt: skip
    torch.save(saved, tmp_path / "y.pth")
    got = read(tmp_path / "y.pth")
    assert list(got)[:4] == ["turned", "part", "again", "parameter"]
    np.testing.assert_array_equal(got["turned"], saved["turned"].numpy())
    np.testing.assert_array_equal(got["part"], saved["part"].numpy())
    assert got["list/0"].dtype == "V2" and got["list/1/0"] == 3 and got["wide"].tolist() == [1] * 5
    assert got["state/num_batches_tracked"].dtype == "int64" and len(got) == 12
    torch.save(saved["state"], tmp_path / "z.pth", _use_new_zipfile_serialization=False)
    refused(tmp_path / "z.pth", "legacy format.*torch.save its state dict again")
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "z.pth")
    refused(tmp_path / "z.pth", "TorchScript archive")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "z.pth")
    refused(tmp_path / "z.pth", "global 'torch.nn.modules.linear.Linear'")


def test_tensors_in_dicts_lists_and_tuples_get_the_path_as_their_name_and_all_else_is_left_out(tmp_path):
    a, b = opcodes._written(tensor()), opcodes._written(tensor((2,), (1,)))
    epoch = text("epoch") + b"K\5" + text("rate") + b"G?\xb9\x99\x99\x99\x99\x99\x9a" + text("state")
    data = b"\x80\2}(" + epoch + b"}(" + text("z") + a + text("y.weight") + b + b"uK\7](" + b + b"N(" + a + b"\x88teu."
    (tmp_path / "x.pt").write_bytes(torch_zip(data))
    assert list(read(tmp_path / "x.pt")) == ["state/z", "state/y.weight", "7/0", "7/2/0"]


@pytest.mark.parametrize(
    "changes, expected",
    [
        (dict(shape=(4, 3), strides=(1, 4)), np.arange(12).reshape(3, 4).T),
        (dict(shape=(2, 2), strides=(4, 2), offset=5), [[5, 7], [9, 11]]),
        (dict(shape=(), strides=(), offset=11), 11),
        (dict(shape=(3,), strides=(0,), offset=2), [2, 2, 2]),
        (dict(shape=(0, 5), strides=(9, 9), offset=12), np.zeros((0, 5))),
        (dict(shape=(2, 1, 3), strides=(3, 77, 1), offset=6), np.arange(6, 12).reshape(2, 1, 3)),
    ],
)
def test_a_view_is_read_as_what_it_means(changes, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "_CHUNK", 8)
    (tmp_path / "x.pth").write_bytes(one(**changes))
    archive = files.open_file(tmp_path / "x.pth")
    np.testing.assert_array_equal(archive.read("a"), expected)
    assert archive.read("a").shape == changes["shape"]
    assert archive.scan("a") == (0, np.max(expected, initial=0))
    for layer in range(len(expected) if np.ndim(expected) else 0):
        np.testing.assert_array_equal(archive.read("a", layer), expected[layer])


def test_two_tensors_may_share_a_storage_and_members_may_be_compressed(tmp_path):
    data = opcodes.write({"a": tensor(), "b": tensor((4,), (3,)), "c": tensor((5,), (1,), 7)})
    (tmp_path / "x.pth").write_bytes(torch_zip(data, compress=zipfile.ZIP_DEFLATED))
    got = read(tmp_path / "x.pth")
    assert got["a"].tolist() == np.arange(12).reshape(3, 4).tolist()
    assert (got["b"].tolist(), got["c"].tolist()) == ([0, 3, 6, 9], [7, 8, 9, 10, 11])


NEGATIVE = opcodes.write({"a": tensor((3,), (1,))}).replace(b"(J\3\0\0\0t", b"(J\xff\xff\xff\xfft", 1)
MALFORMED = {
    "leaves its storage": (one(shape=(3, 5)), "leaves its 12 elements"),
    "strides beyond": (one(strides=(5, 1)), "leaves its 12 elements"),
    "offset beyond": (one(offset=1), "leaves its 12 elements"),
    "empty beyond": (one(shape=(0,), strides=(1,), offset=13), "leaves its 12 elements"),
    "repeats": (one(shape=(2**30, 2**30), strides=(0, 0)), "repeats a storage"),
    "negative": (torch_zip(NEGATIVE), "no whole numbers"),
    "other rank": (one(strides=(1,)), "no whole numbers"),
    "many axes": (one(shape=(1,) * 40, strides=(1,) * 40), "no whole numbers"),
    "no storage": (one(key="1"), "no such member"),
    "climbing storage": (one(key="../data.pkl"), "no such member"),
    "short storage": (one(count=13, shape=(13,), strides=(1,)), "expected 52 bytes in data/0, got 48"),
    "other type": (one(dtype=np.dtype("<f8")), "expected 96 bytes"),
    "bare tensor": (torch_zip(b"\x80\2" + opcodes._written(tensor()) + b"."), "expected a dict of tensors"),
    "no tensors": (torch_zip(b"\x80\2}."), "it holds no arrays"),
    "two names": (torch_zip(opcodes.write({"a": {"b": tensor()}, "a/b": tensor()})), "'a/b' stands there twice"),
    "key twice": (torch_zip(b"\x80\2}(" + 2 * (text("a") + opcodes._written(tensor())) + b"u."), "'a', which stands there twice"),
    "line break in name": (torch_zip(opcodes.write({"a\nb": tensor()})), "no name of a tensor"),
    "long key": (torch_zip(opcodes.write({"a" * 513: tensor()})), "a key of 513 characters"),
    "big": (torch_zip(opcodes.write({"a": tensor()}), byteorder=b"big"), "byteorder is not little"),
    "code": (torch_zip(opcodes.write({"a": tensor()}), **{"code/a.py": b"", "constants.pkl": b""}), "TorchScript"),
    "foreign member": (torch_zip(opcodes.write({"a": tensor()}), **{"readme": b""}), "'readme' is none that torch writes"),
    "no pickle": (torch_zip(b"").replace(b"data.pkl", b"data.pk_"), "one folder with data.pkl in it"),
    "text": (torch_zip(b"hello"), "opcode"),
    "cut": (torch_zip(opcodes.write({"a": tensor()})[:-1]), "exhausted"),
    "more": (torch_zip(opcodes.write({"a": tensor()}) + b"."), "1 bytes behind the pickle's end"),
    "two values": (torch_zip(b"\x80\2}}."), "ValueError"),
    "prepended": (b"#!/bin/sh\n" + one(), "something else"),
    "appended": (one() + b"trailing", "behind the archive"),
    "large pickle": (torch_zip(b"\x80\2" + b"N" * 2**24 + b"."), "expected at most 16,777,216 bytes"),
    "legacy": (pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2), "legacy format"),
}  # fmt: skip


@pytest.mark.parametrize("kind", MALFORMED)
def test_a_malformed_file_is_one_exception_that_says_why(kind, tmp_path):
    data, match = MALFORMED[kind]
    (tmp_path / "x.pth").write_bytes(data)
    refused(tmp_path / "x.pth", match)


def zipped(*members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members:
            archive.writestr(name, content)
    return buffer.getvalue()


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_an_archive_has_one_folder_and_no_member_twice(tmp_path):
    good, numbers = opcodes.write({"a": tensor()}), np.arange(12, dtype=F4).tobytes()
    (tmp_path / "x.pth").write_bytes(zipped(("a/data.pkl", good), ("b/data/0", numbers)))
    refused(tmp_path / "x.pth", r"one folder with data.pkl in it, got \['a', 'b'\]")
    (tmp_path / "x.pth").write_bytes(zipped(("a/data.pkl", good), ("a/data/0", numbers), ("a/data/0", numbers)))
    refused(tmp_path / "x.pth", "'a/data/0' stands there twice")
    (tmp_path / "x.pth").write_bytes(zipped(("data.pkl", good), ("data/0", numbers)))
    refused(tmp_path / "x.pth", "folder")


def test_the_tar_archives_of_the_oldest_torch_are_refused_by_name(tmp_path):
    with tarfile.open(tmp_path / "x.pth.tar", "w") as archive:
        for name in ("storages", "tensors", "pickle"):
            archive.addfile(tarfile.TarInfo(name), io.BytesIO())
    refused(tmp_path / "x.pth.tar", "legacy format.*load it with a recent torch")


TOUCH = text("touch SENTINEL")
HOSTILE = {
    "reduce": (b"cposix\nsystem\n(" + TOUCH + b"tR", "global 'posix.system'"),
    "inst": (b"(" + TOUCH + b"iposix\nsystem\n", "opcode INST of 'posix system'"),
    "obj": (b"(cposix\nsystem\n" + TOUCH + b"o", "global 'posix.system'"),
    "obj of ours": (b"(ccollections\nOrderedDict\no", "opcode OBJ"),
    "newobj": (b"ccollections\nOrderedDict\n)\x81", "opcode NEWOBJ"),
    "stack global": (text("posix") + text("system") + b"\x93(" + TOUCH + b"tR", "opcode STACK_GLOBAL"),
    "extension": (b"\x82\1", "opcode EXT1"),
    "eval": (b"c__builtin__\neval\n(" + text("open('SENTINEL', 'w')") + b"tR", "global '__builtin__.eval'"),
    "getattr": (b"cbuiltins\ngetattr\n", "global 'builtins.getattr'"),
    "dotted": (b"ctorch\nFloatStorage.__init__\n", "global 'torch.FloatStorage.__init__'"),
    "namespace": (b"cargparse\nNamespace\n)R}(" + text("epoch") + b"K\1ub", "global 'argparse.Namespace'"),
    "numpy scalar": (b"cnumpy.core.multiarray\nscalar\n", "global 'numpy.core.multiarray.scalar'"),
    "call of a fact": (b"ctorch\nfloat32\n)R", "a call of 'torch.float32'"),
    "call of a storage": (b"ctorch\nFloatStorage\n(K\1tR", "a call of 'torch.FloatStorage'"),
    "call of a text": (text("print") + b")R", "'print' where"),
    "call without a tuple": (b"ccollections\nOrderedDict\n]R", "a list where"),
    "ordered dict of items": (b"ccollections\nOrderedDict\n(]tR", "called with arguments"),
    "text persistent id": (b"Pposix\n", "opcode PERSID"),
    "persistent id of code": (b"(" + text("storage") + b"cposix\nsystem\n", "global 'posix.system'"),
    "persistent id of a fact": (
        b"(" + text("storage") + b"ctorch\nfloat32\n" + text("0") + text("cpu") + b"K\1tQ",
        "persistent id a tuple that is no storage",
    ),
    "persistent id of views": (
        b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + b"K\1NtQ",
        "persistent id a tuple that is no storage",
    ),
    "persistent id in one": (b"((ttQ", "persistent id a tuple"),
    "state of a dict": (b"}}b", "a dict where"),
    "state by setstate": (
        b"ccollections\nOrderedDict\n)R}" + text("__setstate__") + b"cposix\nsystem\nsb",
        "global 'posix.system'",
    ),
    "state with more": (b"ccollections\nOrderedDict\n)R}" + text("__class__") + b"Nsb", r"a state with \['__class__'\]"),
    "hooks": (
        b"ctorch._utils\n_rebuild_parameter\n(" + opcodes._written(tensor()) + b"\x89"
        b"ccollections\nOrderedDict\n)R" + text("hook") + b"NstR",
        "a parameter made of other things",
    ),
    "tensor of a list": (b"ctorch._utils\n_rebuild_tensor_v2\n(]K\0))\x89NtR", "a tensor made of other things"),
    "other rebuild": (b"ctorch._utils\n_rebuild_qtensor\n", "global 'torch._utils._rebuild_qtensor'"),
    "older protocol": (b"I1\n", "opcode INT"),
    "protocol 4": (b"\x80\4", "pickle protocol 4"),
    "frame": (b"\x95" + bytes(8), "opcode FRAME"),
    "memoize": (b"}\x94", "opcode MEMOIZE"),
    "bytes": (b"C\1a", "opcode SHORT_BINBYTES"),
    "large number": (b"\x8b\1\0\0\0\1", "opcode LONG4"),
    "pop of nothing": (b"0", "opcode POP"),
    "mark alone": (b"}(s", "a mark where"),
    "no mark": (b"t", "opcode TUPLE at byte 2 finds nothing"),
    "nothing remembered": (b"h\1", "opcode BINGET at byte 2 finds nothing"),
    "key that is a list": (b"}]Ns", "a list as the key"),
    "key that is a fact": (b"}ctorch\nfloat32\nNs", "as the key of a dict"),
    "key without a value": (b"}(" + text("a") + b"u", "a key without a value"),
    "item of a dict": (b"}Na", "a dict where a list belongs"),
    "list in itself": (b"]q\1h\1a", "more than 32 deep"),
    "lists in themselves": (b"]q\1(" + b"h\1" * 1000 + b"e", "more than 32 deep"),
    "deep": (b")" + b"\x85" * 200_000, "more than 32 deep"),
    "deep lists": (b"]" * 50_000 + b"a" * 49_999, "more than 32 deep"),
    "laughs": (
        b"(](" + b"N" * 10 + b"e" + b"".join(b"q%c](" % level + b"h%c" % level * 10 + b"e" for level in range(1, 20)) + b"t",
        "more than 1,000,000 values",
    ),
    "many opcodes": (b"N" * 1_000_001, "more than 1,000,000 opcodes"),
    "huge memo": (b"N" + b"r\xff\xff\xff\xff" * 1_000_001, "more than 1,000,000 opcodes"),
}


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """(folder of hostile .pth files, the path that they would write)."""
    folder = tmp_path_factory.mktemp("hostile")
    sentinel = folder / "it_ran"
    for name, (body, _) in HOSTILE.items():
        longer = str(sentinel).encode()
        for command in (b"touch SENTINEL", b"open('SENTINEL', 'w')"):
            real = command.replace(b"SENTINEL", longer)
            old, new = (b"X" + len(each).to_bytes(4, "little") + each for each in (command, real))
            body = body.replace(old, new)
        (folder / f"{name}.pth").write_bytes(torch_zip(b"\x80\2" + body + b"."))
    return folder, sentinel


@pytest.mark.parametrize("kind", HOSTILE)
def test_what_torch_does_not_write_is_refused_by_name(kind, hostile):  # [S1]
    folder, sentinel = hostile
    told = refused(folder / f"{kind}.pth", HOSTILE[kind][1])
    assert "nothing of it was executed" in told and len(told) < 1000
    assert not sentinel.exists()


def test_what_the_files_try_does_run_where_it_is_let(hostile):
    """So that the tests beside would see it."""
    folder, sentinel = hostile
    for name in ("reduce", "inst", "stack global", "eval"):
        with zipfile.ZipFile(folder / f"{name}.pth") as archive:
            pickle.loads(archive.read("archive/data.pkl"))  # noqa: S301 - what must never happen elsewhere
        assert sentinel.exists()
        sentinel.unlink()


WATCHED = """
import sys, types
package = types.ModuleType("keras_vit")  # without its __init__, which imports Keras
package.__path__ = [sys.argv[1]]
sys.modules["keras_vit"] = package
from keras_vit import errors
from keras_vit.checkpoints import files

seen, watching = [], False

def hook(event, arguments):
    if watching and not (event == "open" and str(arguments[0]) in allowed) and event not in QUIET:
        seen.append((event, str(arguments)[:120]))

QUIET = {"object.__getattr__", "os.listdir", "cpython.run_stdin"}
allowed = set(sys.argv[2:])
good, *hostile = sys.argv[2:]

def doors():
    archive = files.open_file(good)
    assert all(archive.exact(name).size for name in archive.entries)
    for path in hostile:
        try:
            files.open_file(path)
        except errors.CheckpointFormatError:
            continue
        raise SystemExit(f"{path} was opened")

doors()  # which imports what is imported late
sys.addaudithook(hook)
watching = True
eval("1")
assert [event for event, _ in seen] == ["compile", "exec"], seen
seen.clear()
doors()
assert not seen, seen
"""


def test_reading_runs_imports_and_opens_nothing_but_the_file_itself(hostile, tmp_path):  # [S1]
    folder, sentinel = hostile
    (tmp_path / "good.pth").write_bytes(one())
    package = pathlib.Path(files.__file__).parents[1]
    paths = [path for path in sorted(folder.glob("*.pth")) if path.stem not in ("many opcodes", "huge memo", "laughs")]
    command = [sys.executable, "-c", WATCHED, package, tmp_path / "good.pth", *paths]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert not sentinel.exists()


def test_names_that_do_not_fit_into_nested_dicts_and_foreign_types_are_refused_and_nothing_written(tmp_path):
    array = np.ones(2, "f4")
    (tmp_path / "x.pth").write_bytes(b"as it was")
    for names in (["a", "a/b"], ["a/b", "a"], ["a/b", "a/b/c"], ["/".join("a" * 40)], ["a\nb"]):
        with pytest.raises(errors.ArgumentError, match="nested dicts"):
            files.write(tmp_path / "x.pth", dict.fromkeys(names, array))
    with pytest.raises(errors.ArgumentError, match="a: expected one of the types that torch has storages of, got uint16"):
        files.write(tmp_path / "x.pth", {"a": np.ones(2, "u2")})
    with pytest.raises(errors.ArgumentError, match="a zip archive can note"):
        files.write(tmp_path / "x.pth", {"a": array}, {"long": "x" * 70_000})
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("x.pth", b"as it was")]


def written(tmp_path):
    files.write(tmp_path / "good.pth", ARRAYS, {"grid": [2, 3]})
    return (tmp_path / "good.pth").read_bytes()


def test_a_flipped_bit_is_refused_or_changes_no_array(tmp_path):
    whole, rng = written(tmp_path), np.random.default_rng(0)
    refusals = 0
    for at in rng.integers(0, len(whole), 800):
        mutant = bytearray(whole)
        mutant[at] ^= 1 << rng.integers(8)
        (tmp_path / "x.pth").write_bytes(mutant)
        try:
            got = read(tmp_path / "x.pth")
        except errors.CheckpointFormatError:
            refusals += 1
            continue
        assert {name: array.tobytes() for name, array in got.items()} == {name: a.tobytes() for name, a in ARRAYS.items()}
    assert refusals > 300


def test_a_file_cut_anywhere_is_refused(tmp_path):
    whole = written(tmp_path)
    for end in range(0, len(whole), 37):
        (tmp_path / "x.pth").write_bytes(whole[:end])
        refused(tmp_path / "x.pth", "expected an intact")


def test_a_pickle_changed_anywhere_under_a_right_checksum_is_refused_or_read_within_its_storages(tmp_path):
    rng, storages = np.random.default_rng(0), {"data/0": bytes(48), "data/1": bytes(24)}
    good = opcodes.write({"a": tensor(), "b": {"c": tensor((2, 3), (3, 1), count=6, key="1"), "d": tensor((2,), (5,))}})
    refusals = 0
    for _ in range(700):
        mutant = bytearray(good)
        for at in rng.integers(0, len(good), rng.integers(1, 4)):
            mutant[at] = rng.choice([rng.integers(256), mutant[at] ^ 1 << rng.integers(8), ord("R"), ord("c")])
        (tmp_path / "x.pth").write_bytes(torch_zip(bytes(mutant), storages))
        try:
            got = read(tmp_path / "x.pth")
        except errors.CheckpointFormatError:
            refusals += 1
            continue
        assert not any(array.any() for array in got.values())
    assert refusals > 300
