"""Strict reading and atomic writing of .npz files. Everything malformed is one exception: CheckpointFormatError."""

import contextlib
import json
import math
import os
import pathlib
import tempfile
import zipfile

import numpy as np

from keras_vit import errors

MAX_MEMBERS = 20_000
MAX_NAME = 512  # characters
MAX_HEADER = 8_192  # bytes; numpy's own files need 128 for these arrays
DTYPES = ("<f4", "<f2")

_LOOKS = (
    (b"<", "an HTML or XML page"),
    (b"\x1f\x8b", "a gzip file"),
    (b"\x89HDF", "an HDF5 file"),
    (b"\x80", "a Python pickle, which is never opened here"),
    (b"\x93NUMPY", "a single .npy array"),
    (b"version https://git-lfs", "a Git LFS pointer; the file itself was not fetched"),
)


class Npz:
    """A checked .npz file: `entries` {name: (shape, dtype)} from the headers alone, `read(name)` for one array.

    Nothing is unpickled and nothing inflated beyond the size that header and archive agree on; the checksum covers whole members.

    Args:
        path: a local file.

    Attributes:
        metadata: what `write` recorded beside the arrays, {} for other files.

    Raises:
        errors.ArgumentError: there is no such file.
        errors.CheckpointFormatError: the file is not a well-formed .npz of little-endian floats.
    """

    def __init__(self, path):
        self.path = pathlib.Path(path)
        if not self.path.is_file():
            raise errors.ArgumentError(f"{path}: expected a checkpoint file, found nothing; check the path.")
        self.entries, self._members = {}, {}
        with self._open() as archive:
            self._check_archive(archive)
            for info in archive.infolist():
                self._add(archive, info)
        if not self.entries:
            raise self._malformed("it holds no arrays")

    def _check_archive(self, archive):
        infos, size = archive.infolist(), self.path.stat().st_size
        if len(infos) > MAX_MEMBERS:
            raise self._malformed(f"expected at most {MAX_MEMBERS} arrays, got {len(infos)}")
        if infos and min(info.header_offset for info in infos) != 0:
            raise self._malformed("bytes stand before the archive's first member")
        with open(self.path, "rb") as file:
            file.seek(size - 22 - len(archive.comment))
            if file.read(4) != b"PK\5\6":
                raise self._malformed("bytes stand behind the archive's end")
        comment = archive.comment
        self.metadata = json.loads(comment) if comment.startswith(b"{") else {}
        if not isinstance(self.metadata, dict):
            raise self._malformed("its comment is not a record of ours")

    def _add(self, archive, info):
        name = info.filename.removesuffix(".npy")
        if not info.filename.endswith(".npy") or not 0 < len(name) <= MAX_NAME or not name.isprintable():
            raise self._malformed(f"member {info.filename[:80]!r} is not an array by its name")
        if name in self.entries:
            raise self._malformed(f"member {name!r} stands there twice")
        if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise self._malformed(f"member {name!r} is encrypted or compressed in an unknown way")
        with archive.open(info) as file:
            shape, fortran, dtype = _read_header(file)
            payload = info.file_size - file.tell()
        if dtype.hasobject:
            raise self._malformed(f"member {name!r} holds pickled Python objects, which are never opened here")
        if dtype.str not in DTYPES:
            raise self._malformed(f"member {name!r}: expected float32 or float16, got dtype {dtype.str}")
        if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != payload:
            raise self._malformed(f"member {name!r}: its header says shape {shape} of {dtype}, but it holds {payload} bytes")
        self.entries[name] = (shape, dtype)
        self._members[name] = (info, fortran)

    def read(self, name):
        """The array called `name`, as stored, read only; its checksum is verified."""
        (shape, dtype), (info, fortran) = self.entries[name], self._members[name]
        with self._open() as archive, archive.open(info) as file:
            _read_header(file)
            data = file.read(math.prod(shape) * dtype.itemsize)
            if len(data) != math.prod(shape) * dtype.itemsize or file.read(1):
                raise self._malformed(f"member {name!r} is shorter or longer than its header says")
        return np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")

    @contextlib.contextmanager
    def _open(self):
        try:
            with zipfile.ZipFile(self.path) as archive:
                yield archive
        except errors.CheckpointFormatError:
            raise
        except Exception as error:  # zipfile and numpy raise a dozen classes on broken bytes
            raise self._malformed(f"{type(error).__name__}: {str(error)[:200]}") from error

    def _malformed(self, reason):
        with open(self.path, "rb") as file:
            start = file.read(64)
        looks = next((what for magic, what in _LOOKS if start.lstrip().startswith(magic)), None)
        if not start:
            looks = "an empty file"
        elif start[:4] == b"PK\3\4":
            looks = "a zip archive that is damaged, cut short or not of this kind"
        size = self.path.stat().st_size
        return errors.CheckpointFormatError(
            f"{self.path} ({size:,} bytes): expected an intact .npz checkpoint, got {looks or 'something else'} ({reason}). "
            "Nothing was loaded; fetch the file again or choose another."
        )


def _read_header(file):
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"unknown .npy version {version}")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(file, max_header_size=MAX_HEADER)


def write(path, arrays, metadata=None):
    """Writes {name: array} as an uncompressed .npz, complete under its name or not at all.

    Args:
        path: the file; its folder must exist. An existing file is replaced in one step.
        arrays: numpy arrays under the names they get in the file, in this order.
        metadata: a JSON-able dict kept in the archive's comment, where other readers do not see it.
    """
    path = pathlib.Path(path)
    if not path.parent.is_dir():
        raise errors.ArgumentError(f"{path}: its folder does not exist; create it first. Nothing was written.")
    with replacing(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, np.ascontiguousarray(array), allow_pickle=False)
        if metadata:
            archive.comment = json.dumps(metadata).encode()


@contextlib.contextmanager
def replacing(path):
    """Yields a temporary path beside `path` with the same ending, moved into place if the body succeeds, else removed."""
    path = pathlib.Path(path)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    try:
        yield temporary
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    finally:
        pathlib.Path(temporary).unlink(missing_ok=True)


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask
