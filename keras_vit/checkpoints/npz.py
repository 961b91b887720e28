""".npz files: numpy's arrays in a zip archive."""

import math
import zipfile

import numpy as np

from keras_vit.checkpoints import reader

MAX_HEADER = 8_192  # bytes; numpy's own files need 128 for these arrays


class Npz(reader.Zipped):
    """An .npz file. Nothing is unpickled, and the checksum covers whole members."""

    kind = ".npz"

    def _parse(self):
        super()._parse()
        self._members = {}
        for info in self._archive.infolist():
            self._add(info)

    def _add(self, info):
        name = info.filename.removesuffix(".npy")
        if not info.filename.endswith(".npy") or not reader.is_name(name):
            raise self._malformed(f"member {info.filename[:80]!r} is not an array by its name")
        if name in self.entries:
            raise self._malformed(f"member {name!r} stands there twice")
        self._check_member(info)
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

    def _pieces(self, name, chunk):
        info, _, start = self._members[name]
        return self._stretch(name, info, start, self._bytes(name), chunk)

    def _layer(self, name, layer):
        info, fortran, start = self._members[name]
        if fortran or info.compress_type != zipfile.ZIP_STORED:
            return None
        size = self._bytes(name) // self.entries[name][0][0]
        with self._guarded():
            begin = self._begin(info)
        return self._at(name, begin + start + layer * size, size)

    def _order(self, name):
        return "F" if self._members[name][1] else "C"


def _read_header(file):
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"unknown .npy version {version}")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(file, max_header_size=MAX_HEADER)


def write(path, arrays, metadata):
    """Writes {name: array} uncompressed, and metadata into the archive's comment, where other readers do not see it."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, np.ascontiguousarray(array).reshape(np.shape(array)), allow_pickle=False)
        archive.comment = reader.comment(metadata)
