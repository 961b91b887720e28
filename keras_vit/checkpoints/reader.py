"""What the readers of checkpoint files share: arrays by name, each read strictly and as it is stored.

Everything malformed is one exception, CheckpointFormatError.
"""

import concurrent.futures
import contextlib
import functools
import hashlib
import json
import math
import os
import pathlib
import struct
import zipfile
import zlib

import numpy as np

from keras_vit import errors

MAX_MEMBERS = 20_000
MAX_NAME = 512  # characters
FLOATS = ("<f4", "<f2", "<f8", ">f4", ">f2", ">f8", "|V2")  # |V2 is how numpy stores bfloat16, which it does not know
_CHUNK = 2**22  # bytes of an array that `scan` holds at once
_AGAIN = "fetch the file again or choose another"

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


def stored(array):
    """An array as it is written: its values in their order, the lower byte first."""
    array = np.asarray(array)
    flat = np.ascontiguousarray(array).reshape(array.shape)  # the former gives a scalar an axis
    return flat.astype(flat.dtype.newbyteorder("<"), copy=False)


def comment(metadata):
    """Metadata as the comment of a zip archive, which `Zipped` reads."""
    text = json.dumps(metadata).encode() if metadata else b""
    most = zipfile.ZIP_MAX_COMMENT
    if len(text) > most:
        raise errors.ArgumentError(
            f"metadata: expected at most {most:,} bytes, as a zip archive can note, got {len(text):,}; write a .safetensors "
            "file. Nothing was written."
        )
    return text


def is_name(name):
    """Whether a text may be the name of an array."""
    return isinstance(name, str) and 0 < len(name) <= MAX_NAME and name.isprintable()


class Reader:
    """A checked checkpoint file: `entries` {name: (shape, dtype)} from its headers alone, `read(name)` for one array.

    One open file serves all that is read, whatever happens to its name meanwhile.

    Args:
        path: a local file.

    Attributes:
        kind: what messages call the format.
        entries: {name: (shape, dtype)}; bfloat16 is dtype `|V2`.
        sha256: of the whole file.
        metadata: what `files.write` recorded beside the arrays, {} for other files.

    Raises:
        errors.ArgumentError: there is no such file.
        errors.CheckpointFormatError: the file is not well-formed, or holds other things than plain numbers.
    """

    kind = ".npz, .pth or .safetensors"

    def __init__(self, path):
        self.path = pathlib.Path(path)
        if not self.path.is_file():
            raise errors.ArgumentError(f"{path}: expected a checkpoint file, found nothing; check the path.")
        self.entries, self.metadata = {}, {}
        self._file = open(self.path, "rb")  # noqa: SIM115 - for as long as there is a reader
        self._size = os.fstat(self._file.fileno()).st_size
        with self._guarded():
            self._parse()
        if not self.entries:
            raise self._malformed("it holds no arrays")

    def _parse(self):
        """Fills `entries` and `metadata`."""
        raise self._malformed("it begins as none of these formats does")

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

    def read(self, name, layer=None):
        """The array called `name` as float32; its checksum, where the format has one, is verified, once, and widening is exact.

        Args:
            layer: gives only this index of the first axis. Where these bytes lie alone, only they are read, so that the checksum,
                which covers the whole, is left to `scan`.

        Raises:
            errors.CheckpointFormatError: it is damaged, no float, or a float64 that float32 cannot hold.
        """
        shape, _ = self.entries[name]
        alone = None if layer is None else self._layer(name, layer)
        if alone is not None:
            return self._widened(name, alone).reshape(shape[1:])
        (whole,) = self._pieces(name, None)
        whole = self._widened(name, whole).reshape(shape, order=self._order(name))
        return whole if layer is None else whole[layer]

    def exact(self, name):
        """The array called `name` in the type it is stored in, as integers and truth values need it.

        Raises:
            errors.CheckpointFormatError: it is damaged.
        """
        shape, dtype = self.entries[name]
        (whole,) = self._pieces(name, None)
        if dtype.kind == "b" and np.any(whole > 1):
            raise self._malformed(f"{name!r}: expected truth values, got bytes other than 0 and 1")
        return whole.view(dtype).reshape(shape, order=self._order(name))

    def scan(self, name):
        """(values that are not finite, largest magnitude of the others) of the array called `name`, never held as a whole.

        Raises as `read`: after a scan, `read` of an unchanged file succeeds.
        """
        bad, largest = 0, 0.0
        for piece in self._pieces(name, _CHUNK):
            piece = self._widened(name, piece)
            low, high = (float(piece.min()), float(piece.max())) if piece.size else (0.0, 0.0)
            if not math.isfinite(low) or not math.isfinite(high):  # NaN comes out of both
                finite = piece[np.isfinite(piece)]
                bad += piece.size - finite.size
                low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
            largest = max(largest, high, -low)
        return bad, largest

    def _pieces(self, name, chunk):
        """The array's bytes in pieces of `chunk` (None: in one), each valid until the next, checked to its end."""
        raise NotImplementedError

    def _layer(self, name, layer):
        """The bytes of one index of the first axis, or None where they do not lie alone."""
        raise NotImplementedError

    def _order(self, name):
        """In which order the values lie: "C" or "F"."""
        return "C"

    def _bytes(self, name):
        shape, dtype = self.entries[name]
        return math.prod(shape) * dtype.itemsize

    def _at(self, name, begin, size):
        """So many bytes from there in the file."""
        with self._guarded():
            self._file.seek(begin)
            return self._full(name, self._file.read(size), size)

    def _full(self, name, data, size):
        if len(data) != size:
            raise self._malformed(f"{name!r} is shorter than its header says")
        return np.frombuffer(data, np.uint8)

    def _widened(self, name, data):
        dtype = self.entries[name][1]
        if dtype.str not in FLOATS:
            raise self._malformed(f"{name!r}: expected floating-point numbers, got dtype {dtype}")
        array = widened(data.view(dtype), dtype)
        if array is None:
            raise self._malformed(f"{name!r}: its float64 values are not exact in float32")
        return array

    @contextlib.contextmanager
    def _guarded(self):
        try:
            yield
        except errors.CheckpointFormatError:
            raise
        except Exception as error:  # zipfile, json and numpy raise a dozen classes on broken bytes
            raise self._malformed(f"{type(error).__name__}: {str(error)[:200]}") from error

    def _malformed(self, reason, got=None, advice=_AGAIN):
        return errors.CheckpointFormatError(
            f"{self.path} ({self._size:,} bytes): expected an intact {self.kind} checkpoint, got {got or self._looks()} "
            f"({reason}). Nothing was loaded; {advice}."
        )

    def _looks(self):
        """What a file seems to be that is not what it should be."""
        self._file.seek(0)
        start = self._file.read(512)
        if start[257:262] == b"ustar":
            return "a tar archive"
        if start[8:9] == b"{" and b'"' in start[9:16]:
            return "a safetensors file" if "safetensors" not in self.kind else "a safetensors file that is damaged or cut short"
        if not start:
            return "an empty file"
        if start[:4] == b"PK\3\4":
            return "a zip archive that is damaged, cut short or not of this kind"
        return next((what for magic, what in _LOOKS if start.lstrip().startswith(magic)), "something else")


class Zipped(Reader):
    """A `Reader` of a zip archive: members that neither overlap nor hide, inflated only to the size that the archive states."""

    def _parse(self):
        self._intact = set()  # names of members whose checksum was verified
        archive = self._archive = zipfile.ZipFile(self._file)
        infos = sorted(archive.infolist(), key=lambda info: info.header_offset)
        if len(infos) > MAX_MEMBERS:
            raise self._malformed(f"expected at most {MAX_MEMBERS} arrays, got {len(infos)}")
        if infos and infos[0].header_offset != 0:
            raise self._malformed("bytes stand before the archive's first member")
        for info, after in zip(infos, infos[1:]):
            if info.header_offset + 30 + len(info.filename.encode()) + info.compress_size > after.header_offset:
                raise self._malformed(f"members {info.filename[:80]!r} and {after.filename[:80]!r} overlap")
        self._file.seek(self._size - 22 - len(archive.comment))
        if self._file.read(4) != b"PK\5\6":
            raise self._malformed("bytes stand behind the archive's end")
        comment = archive.comment
        self.metadata = json.loads(comment) if comment.startswith(b"{") else {}
        if not isinstance(self.metadata, dict):
            raise self._malformed("its comment is not a record of ours")

    def _check_member(self, info):
        if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise self._malformed(f"member {info.filename[:80]!r} is encrypted or compressed in an unknown way")
        if info.compress_type == zipfile.ZIP_STORED and info.compress_size != info.file_size:
            raise self._malformed(f"member {info.filename[:80]!r} is stored in {info.compress_size} of {info.file_size} bytes")
        if "\0" in info.orig_filename:
            raise self._malformed(f"member {info.filename[:80]!r} has a name with a null byte")

    def _stretch(self, name, info, start, size, chunk):
        """`size` bytes of a member from `start` on, in pieces of `chunk` (None: in one), its checksum verified at its end.

        Args:
            name: of the array, for messages.
        """
        intact, left = info.filename in self._intact, size
        with self._guarded(), self._member(info, start, intact) as file:
            buffer = np.empty(left if chunk is None else min(left, chunk), np.uint8)
            while True:
                data = buffer[: min(left, buffer.size)]
                left -= data.size
                count = file.readinto(data)
                if not left and not intact:
                    self._finish(name, info, file, info.file_size - start - size)
                yield self._full(name, data[:count], data.size)
                if not left:
                    break

    def _finish(self, name, info, file, rest):
        """Reads what is left of a member, in which its checksum is verified."""
        _skip(file, rest)
        if file.read(1):
            raise self._malformed(f"{name!r} is longer than its header says")
        self._intact.add(info.filename)

    @contextlib.contextmanager
    def _member(self, info, start, intact):
        """A file of a member's bytes from `start` on, which raises at their end if the member's checksum is another."""
        if info.compress_type != zipfile.ZIP_STORED:
            with self._archive.open(info) as file:
                _skip(file, start)
                yield file
            return
        begin = self._begin(info)
        if intact:
            self._file.seek(begin + start)
            yield _Stored(self._file, info.compress_size - start, None)
            return
        self._file.seek(begin)
        file = _Stored(self._file, info.compress_size, info.CRC)
        _skip(file, start)
        yield file

    def _begin(self, info):
        """Where a member's bytes begin in the file; its own header must give it the same name as the directory."""
        self._file.seek(info.header_offset)
        magic, name_size, extra_size = struct.unpack("<4s22xHH", self._file.read(30))
        name = self._file.read(name_size)
        if magic != b"PK\3\4" or name != info.orig_filename.encode("utf-8" if info.flag_bits & 0x800 else "cp437"):
            raise self._malformed(f"member {info.filename[:80]!r} has another name in its own header")
        return info.header_offset + 30 + name_size + extra_size


def _skip(file, count):
    while count > 0:
        done = len(file.read(min(count, _CHUNK)))
        if not done:
            break
        count -= done


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
