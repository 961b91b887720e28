"""PyTorch's files, `.pth` and the like: numbers in a zip archive, and a pickle that says where, which is never unpickled.

The names of tensors in nested containers are joined by "/": {"model": {"norm.weight": tensor}} holds "model/norm.weight".
"""

import itertools
import struct
import zipfile

import numpy as np

from keras_vit import errors
from keras_vit.checkpoints import opcodes, reader

ENDINGS = (".pth", ".pt", ".pth.tar", ".pyth")
LEGACY = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"  # how the files of torch before 1.6 begin
_LEGACY_TAR = (b"storages\0", b"tensors\0", b"pickle\0", b"sys_info\0")
_ALIGNMENT = 64  # bytes, as torch lays its storages
_BESIDE = {"data.pkl", "byteorder", "version"}  # and whatever begins with a dot, which newer versions of torch add
_SAVE_AGAIN = "open it where you trust it and keep its tensors alone: torch.save(model.state_dict(), path)"


def is_legacy(start):
    """Whether a file that begins so was written by a torch before 1.6, as a bare pickle or a tar archive."""
    return start.startswith(LEGACY) or (start[257:262] == b"ustar" and start.startswith(_LEGACY_TAR))


class TorchFile(reader.Zipped):
    """A file of `torch.save`, read without torch; what is no tensor in it (epochs, settings) is left out."""

    kind = ".pth"

    def _parse(self):
        self._file.seek(0)
        if is_legacy(self._file.read(512)):
            raise self._malformed(
                "torch before 1.6 wrote such",
                "a torch file of the legacy format",
                "load it with a recent torch where you trust it, and torch.save its state dict again",
            )
        super()._parse()
        self._storages = self._members()
        data = self._small("data.pkl", opcodes.MAX_BYTES)
        if "byteorder" in self._storages and self._small("byteorder", 16) != b"little":
            raise self._malformed("its byteorder is not little", "a torch file of another machine", _SAVE_AGAIN)
        try:
            found = opcodes.tensors(opcodes.read(data))
        except opcodes.Forbidden as error:
            got = "a pickle with more than tensors in plain containers"
            raise self._malformed(f"{error}; nothing of it was executed", got, _SAVE_AGAIN) from error
        if len(found) > reader.MAX_MEMBERS:
            raise self._malformed(f"expected at most {reader.MAX_MEMBERS} arrays, got {len(found)}")
        self._tensors = {}
        for path, tensor in found:
            self._add("/".join(path), tensor)

    def _members(self):
        """{name in the archive's one folder: ZipInfo}, of known names only."""
        infos, tops = {}, set()
        for info in self._archive.infolist():
            top, _, name = info.filename.partition("/")
            tops.add(top)
            if name in infos:
                raise self._malformed(f"member {info.filename[:80]!r} stands there twice")
            self._check_member(info)
            infos[name] = info
        if "constants.pkl" in infos or any(name.startswith("code/") for name in infos):
            raise self._malformed("it carries code", "a TorchScript archive", _SAVE_AGAIN)
        if len(tops) != 1 or "data.pkl" not in infos:
            raise self._malformed(f"expected one folder with data.pkl in it, got {sorted(tops)[:3]}")
        for name in infos:
            if not (name in _BESIDE or name.startswith((".", "data/"))) or not reader.is_name(name):
                raise self._malformed(f"member {name[:80]!r} is none that torch writes")
        return infos

    def _small(self, name, limit):
        """All bytes of a member of limited size."""
        info = self._storages[name]
        if info.file_size > limit:
            raise self._malformed(f"{name}: expected at most {limit:,} bytes, got {info.file_size:,}")
        (data,) = self._stretch(name, info, 0, info.file_size, None)
        return data.tobytes()

    def _add(self, name, tensor):
        storage = tensor.storage
        info = self._storages.get(f"data/{storage.key}")
        size = storage.count * storage.dtype.itemsize
        if not reader.is_name(name):
            raise self._malformed(f"{name[:80]!r} is no name of a tensor; expected a dict of tensors")
        if name in self.entries:
            raise self._malformed(f"{name!r} stands there twice")
        if info is None or info.file_size != size:
            got = "no such member" if info is None else f"{info.file_size:,} bytes"
            raise self._malformed(f"{name!r}: expected {size:,} bytes in data/{storage.key[:40]}, got {got}")
        self.entries[name] = (tensor.shape, storage.dtype)
        self._tensors[name] = (tensor, info)

    def _pieces(self, name, chunk):
        tensor, info = self._tensors[name]
        each = tensor.storage.dtype.itemsize
        if tensor.plain:
            yield from self._stretch(name, info, tensor.offset * each, self._bytes(name), chunk)
            return
        (data,) = self._stretch(name, info, tensor.offset * each, (tensor.end - tensor.offset) * each, None)
        strides = [stride * each for stride in tensor.strides]
        array = np.lib.stride_tricks.as_strided(data.view(tensor.storage.dtype), tensor.shape, strides)
        whole = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        step = chunk or whole.size
        for begin in range(0, whole.size, step):
            yield whole[begin : begin + step]

    def _layer(self, name, layer):
        tensor, info = self._tensors[name]
        if not tensor.plain or info.compress_type != zipfile.ZIP_STORED:
            return None
        size = self._bytes(name) // tensor.shape[0]
        with self._guarded():
            begin = self._begin(info)
        return self._at(name, begin + tensor.offset * tensor.storage.dtype.itemsize + layer * size, size)


def write(path, arrays, metadata):
    """Writes {name: array} as `torch.save` does, a name with "/" as a tensor in nested dicts; metadata goes into the comment."""
    tree, types = _tree(arrays), set(opcodes.STORAGES.values())
    with open(path, "wb") as file, zipfile.ZipFile(file, "w") as archive:
        for key, (name, array) in enumerate(arrays.items()):
            array = reader.stored(array)
            if array.dtype not in types:
                raise errors.ArgumentError(
                    f"{name}: expected one of the types that torch has storages of, got {array.dtype}; write .npz. Nothing was "
                    "written."
                )
            storage = opcodes.Storage(str(key), array.dtype, array.size)
            strides = [1, *itertools.accumulate(array.shape[:0:-1], int.__mul__)][::-1] if array.ndim else ()
            _set(tree, name, opcodes.Tensor(storage, 0, array.shape, tuple(strides)))
            _add(archive, file, f"data/{key}", array.reshape(-1).view(np.uint8).data)
        _add(archive, file, "data.pkl", opcodes.write(tree))
        _add(archive, file, "byteorder", b"little")
        _add(archive, file, "version", b"3\n")
        archive.comment = reader.comment(metadata)


def _tree(names):
    """Nested dicts with a None for each name, in order."""
    tree = {}
    for name in names:
        *above, _ = parts = name.split("/")
        here = tree
        for part in above:
            here = here.setdefault(part, {}) if here is not None else None
        if here is None or parts[-1] in here or len(parts) > opcodes.MAX_DEPTH or not reader.is_name(name):
            raise errors.ArgumentError(
                f"{name[:80]!r}: expected a name that can stand in nested dicts, got one that begins another, or has more than "
                f"{opcodes.MAX_DEPTH} parts; write .npz or .safetensors. Nothing was written."
            )
        here[parts[-1]] = None
    return tree


def _set(tree, name, tensor):
    *above, last = name.split("/")
    for part in above:
        tree = tree[part]
    tree[last] = tensor


def _add(archive, file, name, data):
    """Writes a member whose bytes begin at a multiple of `_ALIGNMENT`, which a field of padding in its header brings about."""
    info = zipfile.ZipInfo(f"archive/{name}")  # of one date, so that equal weights make equal files
    info.file_size = len(data)
    large = 20 if len(data) * 1.05 > zipfile.ZIP64_LIMIT else 0  # bytes of the field for sizes above 4 GiB
    padding = -(file.tell() + 30 + len(info.filename) + large + 4) % _ALIGNMENT
    info.extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding
    with archive.open(info, "w") as member:
        member.write(data)
