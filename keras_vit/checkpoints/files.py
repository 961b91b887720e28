"""Checkpoint files of any known format: strict readers chosen by content, atomic writers chosen by name."""

import collections.abc
import contextlib
import os
import pathlib
import struct
import tempfile
import zipfile

from keras_vit import errors
from keras_vit.checkpoints import npz, safefile, torchfile
from keras_vit.checkpoints.npz import Npz
from keras_vit.checkpoints.reader import FLOATS, Reader, narrowed, widened
from keras_vit.checkpoints.safefile import SafetensorsFile
from keras_vit.checkpoints.torchfile import TorchFile, is_legacy

__all__ = [
    "ENDINGS", "FLOATS", "FORMATS", "Npz", "Reader", "SafetensorsFile", "TorchFile",
    "copy", "ending", "narrowed", "open_file", "replacing", "widened", "write",
]  # fmt: skip

FORMATS = {".npz": Npz, ".safetensors": SafetensorsFile, **dict.fromkeys(torchfile.ENDINGS, TorchFile)}  # ending -> its reader
ENDINGS = tuple(FORMATS)
_WRITERS = {Npz: npz.write, SafetensorsFile: safefile.write, TorchFile: torchfile.write}


def ending(path):
    """Which of `ENDINGS` a file's name has, the longest; None without one."""
    return max((each for each in ENDINGS if str(path).endswith(each)), key=len, default=None)


def open_file(path):
    """The `Reader` of a checkpoint file, by what is in it, whatever its name.

    Raises:
        errors.ArgumentError: there is no such file.
        errors.CheckpointFormatError: it is of no known format, not well-formed, or holds other things than plain numbers.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        return Reader(path)  # says so
    with open(path, "rb") as file:
        start = file.read(512)
    if start[:2] == b"PK":
        names = _members(path, start)
        torch = any(name.endswith(".pkl") or "/data/" in name for name in names) and not any(n.endswith(".npy") for n in names)
        return TorchFile(path) if torch else Npz(path)
    if is_legacy(start):
        return TorchFile(path)
    return (SafetensorsFile if start[8:9] == b"{" else Reader)(path)


def _members(path, start):
    """Names of a zip archive's members, of a damaged one that of the first."""
    with contextlib.suppress(Exception), zipfile.ZipFile(path) as archive:  # the reader will say what is wrong
        return archive.namelist()
    size = struct.unpack("<H", start[26:28].ljust(2, b"\0"))[0]
    return [start[30 : 30 + size].decode(errors="replace")]


def write(path, arrays, metadata=None):
    """Writes {name: array} in the format of the path's ending, one of `ENDINGS`, complete under its name or not at all.

    Args:
        path: the file; its folder must exist. An existing file is replaced in one step.
        arrays: numpy arrays under the names they get in the file, in this order; a mapping may make each when asked for it.
        metadata: a JSON-able dict that is kept where other readers do not mind it.
    """
    path = pathlib.Path(path)
    if ending(path) is None:
        raise errors.ArgumentError(
            f"{path}: expected a name that ends in {', '.join(ENDINGS)}, the formats that are written. Nothing was written."
        )
    if not path.parent.is_dir():
        raise errors.ArgumentError(f"{path}: its folder does not exist; create it first. Nothing was written.")
    with replacing(path) as temporary:
        _WRITERS[FORMATS[ending(path)]](temporary, arrays, metadata)


class _Exact(collections.abc.Mapping):
    """A reader's arrays as they are stored, each read when it is asked for."""

    def __init__(self, archive):
        self.archive = archive

    def __getitem__(self, name):
        return self.archive.exact(name)

    def __iter__(self):
        return iter(self.archive.entries)

    def __len__(self):
        return len(self.archive.entries)


def copy(archive, path):
    """Writes all arrays of a `Reader` in the format of the path's ending, under their names, bit for bit."""
    write(path, _Exact(archive), archive.metadata)


@contextlib.contextmanager
def replacing(path):
    """Yields a temporary path beside `path` with the same ending, moved into place if the body succeeds, else removed."""
    path = pathlib.Path(path)
    suffix = ending(path) or path.suffix
    handle, temporary = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=suffix, dir=path.parent)
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
