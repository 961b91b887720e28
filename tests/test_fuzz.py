"""Mutated checkpoint files, seeded: a well-formed file is read as it is, anything else is one exception."""

import io
import resource
import zipfile

import numpy as np
import pytest

from keras_vit import errors
from keras_vit.checkpoints import files

ARRAYS = {
    "embedding/kernel": np.arange(24, dtype="float32").reshape(2, 3, 4),
    "Transformer/encoderblock_0/LayerNorm_0/scale": np.ones(4, "float32"),
    "head/kernel": np.linspace(-1, 1, 12, dtype="float32").reshape(4, 3),
    "half": np.arange(3, dtype="float16"),
    "brain": np.arange(2**14, 2**14 + 5, dtype="uint16").view("V2"),
    "double": np.arange(4, dtype="float64"),
}
READ = {name: files.widened(array, array.dtype) for name, array in ARRAYS.items()}


def whole(compression):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, array in ARRAYS.items():
            with archive.open(f"{name}.npy", "w") as file:
                np.lib.format.write_array(file, array)
    return buffer.getvalue()


def flip(data, rng):
    data = bytearray(data)
    for at in rng.integers(0, len(data), rng.integers(1, 4)):
        data[at] ^= 1 << rng.integers(8)
    return bytes(data)


def cut(data, rng):
    start, end = sorted(rng.integers(0, len(data) + 1, 2))
    return data[:start] + data[end:]


def splice(data, rng):
    start, length, to = rng.integers(0, len(data)), rng.integers(1, 64), rng.integers(0, len(data))
    return data[:to] + data[start : start + length] + data[to:]


def resigned(data, rng):
    """Members changed inside and their checksums made right again, so that what is behind the checksum is tested."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as new:
        for info in old.infolist():
            member = bytearray(old.read(info))
            for at in rng.integers(0, min(len(member), 140), rng.integers(0, 3)):  # mostly the header
                member[at] = rng.choice([rng.integers(256), ord("9"), ord("-"), ord("("), 0])
            name = info.filename if rng.random() < 0.95 else rng.choice(["../x.npy", "x", "", "\n.npy", "embedding/kernel.npy"])
            new.writestr(zipfile.ZipInfo(str(name)), bytes(member))
    return buffer.getvalue()


MUTATIONS = (flip, cut, splice, resigned)


def run(count, path, seed):
    """Reads `count` mutants; returns how many were refused."""
    rng, refused = np.random.default_rng(seed), 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    bases = [whole(zipfile.ZIP_STORED), whole(zipfile.ZIP_DEFLATED)]
    for i in range(count):
        mutate = MUTATIONS[i % len(MUTATIONS)]
        mutant = mutate(bases[i // len(MUTATIONS) % 2], rng)
        path.write_bytes(mutant)
        try:
            archive = files.Npz(path)
            read = {name: archive.read(name) for name in archive.entries if archive.scan(name)}
        except errors.CheckpointFormatError:
            refused += 1
            continue
        if mutate is not resigned:
            for name, array in read.items():
                if name in READ:
                    assert array.tobytes() == READ[name].tobytes(), (i, name)
    declared = sum(array.nbytes for array in ARRAYS.values())
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before <= 1.1 * declared + 64 * 2**20
    return refused


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_mutants_are_refused_or_read_unchanged(tmp_path):
    assert run(20_000, tmp_path / "x.npz", seed=0) > 15_000


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_many_more_mutants_are_refused_or_read_unchanged(tmp_path):
    assert run(200_000, tmp_path / "x.npz", seed=1) > 150_000


def test_the_checksum_covers_the_header_of_a_member(tmp_path):
    data = whole(zipfile.ZIP_STORED)
    at = data.index(b"(2, 3, 4)")
    swapped = data[:at] + b"(4, 3, 2)" + data[at + 9 :]
    (tmp_path / "x.npz").write_bytes(swapped)
    with pytest.raises(errors.CheckpointFormatError, match="CRC"):
        files.Npz(tmp_path / "x.npz").read("embedding/kernel")
