"""Checkpoint files of any known format: strict readers chosen by content, atomic writers chosen by name."""

import contextlib
import os
import pathlib
import struct
import tempfile
import zipfile

from keras_vit import errors
from keras_vit.checkpoints import npz
from keras_vit.checkpoints.npz import Npz
from keras_vit.checkpoints.reader import FLOATS, Reader, narrowed, widened
from keras_vit.checkpoints.safefile import SafetensorsFile
from keras_vit.checkpoints.torchfile import TorchFile, is_legacy

__all__ = [
    "FLOATS", "Npz", "Reader", "SafetensorsFile", "TorchFile", "narrowed", "open_file", "replacing", "widened", "write",
]  # fmt: skip


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
    """Writes {name: array} as an uncompressed .npz, complete under its name or not at all.

    Args:
        path: the file; its folder must exist. An existing file is replaced in one step.
        arrays: numpy arrays under the names they get in the file, in this order.
        metadata: a JSON-able dict kept in the archive's comment, where other readers do not see it.
    """
    path = pathlib.Path(path)
    if not path.parent.is_dir():
        raise errors.ArgumentError(f"{path}: its folder does not exist; create it first. Nothing was written.")
    with replacing(path) as temporary:
        npz.write(temporary, arrays, metadata)


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
