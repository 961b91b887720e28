"""Strict reading and atomic writing of .npz files. Everything malformed is one exception: CheckpointFormatError."""

import concurrent.futures
import contextlib
import functools
import hashlib
import json
import math
import os
import pathlib
import struct
import tempfile
import zipfile
import zlib

import numpy as np

from keras_vit import errors

MAX_MEMBERS = 20_000
MAX_NAME = 512  # characters
MAX_HEADER = 8_192  # bytes; numpy's own files need 128 for these arrays
FLOATS = ("<f4", "<f2", "<f8", ">f4", ">f2", ">f8", "|V2")  # |V2 is how numpy stores bfloat16, which it does not know
_CHUNK = 2**22  # bytes of an array that `scan` holds at once

_LOOKS = (
    (b"<", "an HTML or XML page"),
    (b"\x1f\x8b", "a gzip file"),
    (b"\x89HDF", "an HDF5 file"),
    (b"\x80", "a Python pickle, which is never opened here"),
    (b"\x93NUMPY", "a single .npy array"),
    (b"version https://git-lfs", "a Git LFS pointer; the file itself was not fetched"),
)


def widened(array, dtype):
    """An array of one of `FLOATS` as float32, exactly; None if float32 cannot hold every value (some float64)."""
    if dtype.str == "|V2":  # bfloat16 is the upper half of a float32
        return (array.view("<u2").astype("<u4") << 16).view("<f4")
    if dtype.itemsize < 8:
        return array.astype("<f4", copy=False)
    with np.errstate(over="ignore"):
        narrow = array.astype("<f4")
    return narrow if np.array_equal(narrow, array, equal_nan=True) else None


def narrowed(array, dtype):
    """A float32 array as one of `FLOATS`, or unchanged where that would lose bits: the inverse of `widened`."""
    if dtype.str == "|V2":
        bits = np.ascontiguousarray(array, "<f4").view("<u4")
        return array if np.any(bits & 0xFFFF) else (bits >> 16).astype("<u2").view("V2")
    with np.errstate(over="ignore"):
        narrow = array.astype(dtype)
    return narrow if np.array_equal(narrow, array, equal_nan=True) else array


class Npz:
    """A checked .npz file: `entries` {name: (shape, dtype)} from the headers alone, `read(name)` for one array.

    Nothing is unpickled and nothing inflated beyond the size that header and archive agree on; the checksum covers whole members.

    Args:
        path: a local file.

    Attributes:
        entries: {name: (shape, dtype)}.
        sha256: of the whole file.
        metadata: what `write` recorded beside the arrays, {} for other files.

    Raises:
        errors.ArgumentError: there is no such file.
        errors.CheckpointFormatError: the file is not a well-formed .npz of plain numbers.
    """

    def __init__(self, path):
        self.path = pathlib.Path(path)
        if not self.path.is_file():
            raise errors.ArgumentError(f"{path}: expected a checkpoint file, found nothing; check the path.")
        self.entries, self._members, self._intact = {}, {}, set()
        self._file = open(self.path, "rb")  # noqa: SIM115 - one file for all that is read, whatever happens to its name
        with self._guarded():
            self._archive = zipfile.ZipFile(self._file)
            self._check_archive(self._archive)
            for info in self._archive.infolist():
                self._add(info)
        if not self.entries:
            raise self._malformed("it holds no arrays")

    @functools.cached_property
    def sha256(self):
        """Hex digest of the file."""
        return self._hash()

    def hash_meanwhile(self):
        """Has another thread compute `sha256`, which then waits for it."""
        executor = concurrent.futures.ThreadPoolExecutor(1)
        self._hash = executor.submit(self._hash).result
        executor.shutdown(wait=False)

    def _hash(self):
        digest, at = hashlib.sha256(), 0
        while data := os.pread(self._file.fileno(), _CHUNK, at):  # reads there leave the file's own position alone
            digest.update(data)
            at += len(data)
        return digest.hexdigest()

    def _check_archive(self, archive):
        infos, size = archive.infolist(), os.fstat(self._file.fileno()).st_size
        if len(infos) > MAX_MEMBERS:
            raise self._malformed(f"expected at most {MAX_MEMBERS} arrays, got {len(infos)}")
        infos = sorted(infos, key=lambda info: info.header_offset)
        if infos and infos[0].header_offset != 0:
            raise self._malformed("bytes stand before the archive's first member")
        for info, after in zip(infos, infos[1:]):
            if info.header_offset + 30 + len(info.filename.encode()) + info.compress_size > after.header_offset:
                raise self._malformed(f"members {info.filename[:80]!r} and {after.filename[:80]!r} overlap")
        self._file.seek(size - 22 - len(archive.comment))
        if self._file.read(4) != b"PK\5\6":
            raise self._malformed("bytes stand behind the archive's end")
        comment = archive.comment
        self.metadata = json.loads(comment) if comment.startswith(b"{") else {}
        if not isinstance(self.metadata, dict):
            raise self._malformed("its comment is not a record of ours")

    def _add(self, info):
        name = info.filename.removesuffix(".npy")
        if not info.filename.endswith(".npy") or not 0 < len(name) <= MAX_NAME or not name.isprintable():
            raise self._malformed(f"member {info.filename[:80]!r} is not an array by its name")
        if name in self.entries:
            raise self._malformed(f"member {name!r} stands there twice")
        if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise self._malformed(f"member {name!r} is encrypted or compressed in an unknown way")
        with self._archive.open(info) as file:
            shape, fortran, dtype = _read_header(file)
            start = file.tell()
        payload = info.file_size - start
        if dtype.hasobject:
            raise self._malformed(f"member {name!r} holds pickled Python objects, which are never opened here")
        if dtype.kind not in "biufcV" or dtype.names or dtype.subdtype or (dtype.kind == "V" and dtype.str != "|V2"):
            raise self._malformed(f"member {name!r}: expected plain numbers, got dtype {dtype}")
        if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != payload:
            raise self._malformed(f"member {name!r}: its header says shape {shape} of {dtype}, but it holds {payload} bytes")
        self.entries[name] = (shape, dtype)
        self._members[name] = (info, fortran, start)

    def read(self, name, layer=None):
        """The array called `name` as float32; its checksum is verified, once, and widening is exact.

        Args:
            layer: gives only this index of the first axis. Of an uncompressed array only these bytes are read, so that their
                checksum, which covers the whole, is left to `scan`.

        Raises:
            errors.CheckpointFormatError: it is damaged, no float, or a float64 that float32 cannot hold.
        """
        (shape, dtype), (info, fortran, start) = self.entries[name], self._members[name]
        if layer is not None and info.compress_type == zipfile.ZIP_STORED and not fortran:
            size = math.prod(shape[1:]) * dtype.itemsize
            with self._guarded():
                self._file.seek(self._begin(info) + start + layer * size)
                return self._widened(name, self._file.read(size), size).reshape(shape[1:])
        (whole,) = self._pieces(name, None)
        whole = whole.reshape(shape, order="F" if fortran else "C")
        return whole if layer is None else whole[layer]

    def exact(self, name):
        """The array called `name` in its own type, integers among them; its checksum is verified."""
        (shape, dtype), (info, fortran, start) = self.entries[name], self._members[name]
        with self._guarded(), self._payload(info, start, name in self._intact) as file:
            data = file.read(info.file_size - start)
        return np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")

    def scan(self, name):
        """(values that are not finite, largest magnitude of the others) of the array called `name`, never held as a whole.

        Raises as `read`: after a scan, `read` of an unchanged file succeeds.
        """
        bad, largest = 0, 0.0
        for piece in self._pieces(name, _CHUNK):
            low, high = (float(piece.min()), float(piece.max())) if piece.size else (0.0, 0.0)
            if not math.isfinite(low) or not math.isfinite(high):  # NaN comes out of both
                finite = piece[np.isfinite(piece)]
                bad += piece.size - finite.size
                low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
            largest = max(largest, high, -low)
        self._intact.add(name)
        return bad, largest

    def _pieces(self, name, chunk):
        """The flat array as float32 in pieces of `chunk` bytes (None: in one), each valid until the next, checked to its end."""
        (shape, dtype), (info, _, start) = self.entries[name], self._members[name]
        left = math.prod(shape) * dtype.itemsize
        with self._guarded(), self._payload(info, start, name in self._intact) as file:
            buffer = np.empty(left if chunk is None else min(left, chunk), np.uint8)
            while True:
                data = buffer[: min(left, buffer.size)]
                left -= data.size
                yield self._widened(name, data[: file.readinto(data)], data.size)
                if not left:
                    break
            if file.read(1):
                raise self._malformed(f"member {name!r} is longer than its header says")

    @contextlib.contextmanager
    def _payload(self, info, start, intact):
        """A file of a member's bytes behind its header, which raises at their end if the member's checksum is another."""
        if info.compress_type != zipfile.ZIP_STORED:
            with self._archive.open(info) as file:
                file.read(start)
                yield file
            return
        self._file.seek(self._begin(info))
        file = _Stored(self._file, info.compress_size, None if intact else info.CRC)
        file.readinto(bytearray(start))
        yield file

    def _begin(self, info):
        """Where a member's bytes begin in the file."""
        self._file.seek(info.header_offset + 26)
        name_size, extra_size = struct.unpack("<HH", self._file.read(4))
        return info.header_offset + 30 + name_size + extra_size

    def _widened(self, name, data, size):
        dtype = self.entries[name][1]
        if dtype.str not in FLOATS:
            raise self._malformed(f"member {name!r}: expected floating-point numbers, got dtype {dtype}")
        if len(data) != size:
            raise self._malformed(f"member {name!r} is shorter than its header says")
        array = widened(np.frombuffer(data, dtype), dtype)
        if array is None:
            raise self._malformed(f"member {name!r}: its float64 values are not exact in float32")
        return array

    @contextlib.contextmanager
    def _guarded(self):
        try:
            yield
        except errors.CheckpointFormatError:
            raise
        except Exception as error:  # zipfile and numpy raise a dozen classes on broken bytes
            raise self._malformed(f"{type(error).__name__}: {str(error)[:200]}") from error

    def _malformed(self, reason):
        self._file.seek(0)
        start = self._file.read(512)
        looks = next((what for magic, what in _LOOKS if start.lstrip().startswith(magic)), None)
        if start[257:262] == b"ustar":
            looks = "a tar archive"
        elif start[8:9] == b"{" and b'"' in start[9:16]:
            looks = "a safetensors file"
        elif not start:
            looks = "an empty file"
        elif start[:4] == b"PK\3\4":
            looks = "a zip archive that is damaged, cut short or not of this kind"
        size = os.fstat(self._file.fileno()).st_size
        return errors.CheckpointFormatError(
            f"{self.path} ({size:,} bytes): expected an intact .npz checkpoint, got {looks or 'something else'} ({reason}). "
            "Nothing was loaded; fetch the file again or choose another."
        )


class _Stored:
    """The bytes of an uncompressed member, straight from the file into a caller's buffer, unlike those of `zipfile`.

    Args:
        file: stands where they begin. size: how many there are. checksum: their CRC-32; None does not look.
    """

    def __init__(self, file, size, checksum):
        self.file, self.left, self.checksum, self.sum = file, size, checksum, 0

    def readinto(self, buffer):
        count = self.file.readinto(memoryview(buffer)[: self.left])
        self.left -= count
        if self.checksum is not None:
            self.sum = zlib.crc32(memoryview(buffer)[:count], self.sum)
            if not self.left and self.sum != self.checksum:
                raise zipfile.BadZipFile(f"bad CRC-32: expected {self.checksum:08x}, got {self.sum:08x}")
        return count

    def read(self, size):
        buffer = bytearray(size)
        return buffer[: self.readinto(buffer)]


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
