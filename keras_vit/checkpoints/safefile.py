""".safetensors files: a header in JSON, then numbers.

The format has no checksum: damage among the numbers shows in the file's sha256 alone.
"""

import json
import math

import numpy as np
import safetensors

from keras_vit import errors
from keras_vit.checkpoints import reader

MAX_HEADER = 2**24  # bytes
_TYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "|V2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "|i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "|u1", "BOOL": "|b1", "C64": "<c8",
}  # fmt: skip
_RECORD = "keras_vit"  # the key of our metadata among theirs
_FOREIGN = "safetensors"  # the key of theirs among ours


class SafetensorsFile(reader.Reader):
    """A .safetensors file, its header checked here and by the safetensors package, which need to agree."""

    kind = ".safetensors"

    def _parse(self):
        length = int.from_bytes(self._file.read(8), "little")
        if not 2 <= length <= min(MAX_HEADER, self._size - 8):
            raise self._malformed(f"expected a header of 2 to {min(MAX_HEADER, self._size - 8):,} bytes, got {length:,}")
        header = json.loads(self._file.read(length).decode(), object_pairs_hook=_once)
        if not isinstance(header, dict):
            raise self._malformed("its header is no JSON object")
        self._read_metadata(header.pop("__metadata__", {}))
        if len(header) > reader.MAX_MEMBERS:
            raise self._malformed(f"expected at most {reader.MAX_MEMBERS} arrays, got {len(header)}")
        self._begins = {}
        for name, record in header.items():
            self._add(name, record, 8 + length)
        end = 8 + length
        for name, begin in sorted(self._begins.items(), key=lambda item: (item[1], self._bytes(item[0]))):
            if begin != end:
                raise self._malformed(f"{name!r}: its bytes {'overlap others' if begin < end else 'leave a gap before them'}")
            end += self._bytes(name)
        if end != self._size:
            raise self._malformed(f"its header accounts for {end:,} bytes")
        with safetensors.safe_open(self.path, "numpy") as other:
            if set(other.keys()) != set(self.entries):
                raise self._malformed("the safetensors package finds other arrays in it")

    def _read_metadata(self, found):
        if not isinstance(found, dict) or not all(isinstance(text, str) for text in found.values()):
            raise self._malformed("its __metadata__ is no object of texts")
        foreign = {key: text for key, text in found.items() if key != _RECORD}
        self.metadata = json.loads(found.get(_RECORD, "{}"))
        if not isinstance(self.metadata, dict):
            raise self._malformed("its record of ours is no object")
        if foreign:
            self.metadata[_FOREIGN] = foreign

    def _add(self, name, record, begin):
        if not reader.is_name(name):
            raise self._malformed(f"{name[:80]!r} is no name of an array")
        if not isinstance(record, dict) or set(record) != {"dtype", "shape", "data_offsets"}:
            raise self._malformed(f"{name!r}: expected dtype, shape and data_offsets, got others")
        kind, shape, offsets = record["dtype"], record["shape"], record["data_offsets"]
        if not isinstance(kind, str) or kind not in _TYPES:
            raise self._malformed(f"{name!r}: expected one of the types {', '.join(_TYPES)}, got {str(kind)[:20]!r}")
        if not _wholes(shape) or len(shape) > 32 or not _wholes(offsets) or len(offsets) != 2:
            raise self._malformed(f"{name!r}: expected whole numbers as shape and as two offsets, got others")
        dtype = np.dtype(_TYPES[kind])
        if math.prod(shape) * dtype.itemsize != offsets[1] - offsets[0]:
            raise self._malformed(f"{name!r}: its shape {tuple(shape)} of {kind} is not the size of its offsets {offsets}")
        if begin + offsets[1] > self._size:
            raise self._malformed(f"{name!r}: its offsets {offsets} lie outside the file")
        self.entries[name] = (tuple(shape), dtype)
        self._begins[name] = begin + offsets[0]

    def _pieces(self, name, chunk):
        left, at = self._bytes(name), self._begins[name]
        while True:
            size = left if chunk is None else min(left, chunk)
            yield self._at(name, at, size)
            left, at = left - size, at + size
            if not left:
                break

    def _layer(self, name, layer):
        size = self._bytes(name) // self.entries[name][0][0]
        return self._at(name, self._begins[name] + layer * size, size)


def _once(pairs):
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)[:80]!r} stands there twice")
    return found


def _wholes(numbers):
    return isinstance(numbers, list) and all(type(number) is int and 0 <= number < 2**63 for number in numbers)


def write(path, arrays, metadata):
    """Writes {name: array}; arrays that are made when asked for are asked for twice, first for their shapes and types."""
    metadata = dict(metadata or {})
    foreign = metadata.pop(_FOREIGN, {"format": "pt"})  # without this key some loaders refuse a file
    if metadata:
        foreign = foreign | {_RECORD: json.dumps(metadata)}
    header, sizes = {"__metadata__": foreign}, {}
    codes = {dtype: kind for kind, dtype in _TYPES.items()}
    for name, array in arrays.items():
        array = reader.stored(array)
        if array.dtype.str not in codes or name in header or not reader.is_name(name):
            raise errors.ArgumentError(
                f"{name[:80]!r} of {array.dtype}: expected one of the types {', '.join(_TYPES)}, and no name "
                "__metadata__; write .npz. Nothing was written."
            )
        header[name] = {"dtype": codes[array.dtype.str], "shape": array.shape}
        sizes[name] = (array.itemsize, array.nbytes)
    order, at = sorted(sizes, key=lambda name: -sizes[name][0]), 0  # so that every array begins at a multiple of its item's size
    for name in order:
        header[name]["data_offsets"] = [at, at := at + sizes[name][1]]
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            file.write(reader.stored(arrays[name]).reshape(-1).view(np.uint8).data)
