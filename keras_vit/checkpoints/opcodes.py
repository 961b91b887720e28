"""What a torch file's pickle says, told without unpickling: a machine of the few opcodes and globals that `torch.save` writes.
And such a pickle, written without pickling.

`pickletools` only splits the bytes into opcodes. A global is never looked up, it is a text in a list here; calling one of the six
that may be called makes a record of ours. All else is `Forbidden`, by name.
"""

import dataclasses
import math
import pickletools

import numpy as np

MAX_BYTES = 2**24  # of a pickle; the largest checkpoints with their optimizer's state need 2 MiB
MAX_OPCODES = 1_000_000
MAX_KEY = 512  # characters
MAX_VALUES = 1_000_000  # in containers, counted as often as they are reached
MAX_DEPTH = 32  # containers in containers
MAX_RANK = 32  # axes of a tensor, as many as any numpy takes
MAX_SHARED = 2**20  # elements of a tensor that repeats those of its storage

_TYPES = {
    "Float": "<f4", "Double": "<f8", "Half": "<f2", "BFloat16": "|V2", "Long": "<i8", "Int": "<i4", "Short": "<i2", "Char": "|i1",
    "Byte": "|u1", "Bool": "|b1", "ComplexFloat": "<c8", "ComplexDouble": "<c16",
}  # fmt: skip
STORAGES = {f"torch {name}Storage": np.dtype(code) for name, code in _TYPES.items()}
_ORDERED, _TENSOR = "collections OrderedDict", "torch._utils _rebuild_tensor_v2"
_PARAMETER, _SIZE, _DEVICE = "torch._utils _rebuild_parameter", "torch Size", "torch device"
_FACTS = (
    "float16", "float32", "float64", "half", "float", "double", "bfloat16", "uint8", "int8", "int16", "int32", "int64", "short",
    "int", "long", "bool", "complex64", "complex128", "strided", "contiguous_format", "channels_last", "preserve_format",
)  # fmt: skip
GLOBALS = {*STORAGES, _ORDERED, _TENSOR, _PARAMETER, _SIZE, _DEVICE, *(f"torch {fact}" for fact in _FACTS)}


class Forbidden(ValueError):
    """An opcode, a global or a use of one that no file of tensors in plain containers has."""


@dataclasses.dataclass(frozen=True)
class Global:
    """A name in a pickle; nothing stands behind it."""

    name: str


@dataclasses.dataclass(frozen=True)
class Storage:
    """Where numbers of one type lie: in a member called `key`, `count` of them."""

    key: str
    dtype: np.dtype
    count: int


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A view of a storage; offset and strides count elements."""

    storage: Storage
    offset: int
    shape: tuple
    strides: tuple

    @property
    def count(self):
        return math.prod(self.shape)

    @property
    def end(self):
        """Behind the last element that it reaches in its storage."""
        return self.offset + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides)) + 1 if self.count else 0

    @property
    def plain(self):
        """Whether its elements lie in their order, without gaps."""
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.strides)):
            if size != 1 and stride != expected:
                return self.count == 0
            expected *= size
        return True


class _Ordered(dict):
    """What stands for a `collections.OrderedDict`, which alone may be given a state."""


class _Mark:
    pass


def read(data):
    """What a pickle of protocol 2 holds: dict, list, tuple, str, int, float, bool, None, `Global`, `Storage` and `Tensor`.

    Containers may hold themselves; `tensors` goes no deeper than `MAX_DEPTH`.

    Raises:
        Forbidden, and what `pickletools` raises on broken bytes.
    """
    if len(data) > MAX_BYTES:
        raise Forbidden(f"expected at most {MAX_BYTES:,} bytes of pickle, got {len(data):,}")
    machine = _Machine()
    for count, (opcode, argument, at) in enumerate(pickletools.genops(data)):
        run = _OPCODES.get(opcode.name)
        if run is None:
            raise Forbidden(f"opcode {opcode.name}{'' if argument is None else f' of {str(argument)[:80]!r}'} at byte {at}")
        if count >= MAX_OPCODES:
            raise Forbidden(f"more than {MAX_OPCODES:,} opcodes")
        try:
            run(machine, argument)
        except Forbidden as error:
            raise Forbidden(f"{error} at byte {at}") from None
        except (IndexError, KeyError) as error:
            raise Forbidden(f"opcode {opcode.name} at byte {at} finds nothing to work on") from error
    if at + 1 != len(data):
        raise Forbidden(f"{len(data) - at - 1} bytes behind the pickle's end")
    (value,) = machine.stack
    return value


def tensors(value):
    """[(path of names, Tensor)] of all tensors in nested containers, in their order.

    Raises:
        Forbidden: too many values, or too deep.
    """
    found, count = [], 0

    def visit(value, path):
        nonlocal count
        count += 1
        if count > MAX_VALUES:
            raise Forbidden(f"more than {MAX_VALUES:,} values")
        if len(path) > MAX_DEPTH:
            raise Forbidden(f"containers in containers, more than {MAX_DEPTH} deep, below {'/'.join(path[:3])}")
        if isinstance(value, Tensor):
            found.append((path, value))
        elif isinstance(value, (dict, list, tuple)):
            for key, each in value.items() if isinstance(value, dict) else enumerate(value):
                visit(each, (*path, str(key)))

    visit(value, ())
    return found


class _Machine:
    """The stack and the memo of a pickle that is read."""

    def __init__(self):
        self.stack, self.memo = [], {}

    def pop(self, kind=object):
        value = self.stack.pop()
        if isinstance(value, _Mark) or not isinstance(value, kind):
            raise Forbidden(f"{_said(value)} where pickles of torch have another")
        return value

    def pop_to_mark(self):
        """What lies above the topmost mark, which goes too."""
        taken = []
        while not isinstance(self.stack[-1], _Mark):
            taken.append(self.stack.pop())
        self.stack.pop()
        return taken[::-1]

    def top(self, kind):
        if not isinstance(self.stack[-1], kind):
            raise Forbidden(f"{_said(self.stack[-1])} where a {kind.__name__} belongs")
        return self.stack[-1]

    def push(self, value):
        self.stack.append(value)

    def put(self, index):
        if isinstance(self.stack[-1], _Mark):
            raise Forbidden("a mark to be remembered")
        self.memo[index] = self.stack[-1]

    def get(self, index):
        self.stack.append(self.memo[index])

    def tuple(self, count):
        items = [self.pop() for _ in range(count)]
        self.push(tuple(reversed(items)))

    def append(self, values):
        self.top(list).extend(values)

    def set(self, flat):
        target = self.top(dict)
        if len(flat) % 2:
            raise Forbidden("a key without a value")
        for key, value in zip(flat[::2], flat[1::2]):
            if type(key) not in (str, int):
                raise Forbidden(f"{_said(key)} as the key of a dict")
            if isinstance(key, str) and len(key) > MAX_KEY:
                raise Forbidden(f"a key of {len(key):,} characters")
            if key in target:
                raise Forbidden(f"key {str(key)[:80]!r}, which stands there twice,")
            target[key] = value

    def name(self, name):
        if name not in GLOBALS:
            raise Forbidden(f"global {name[:160].replace(' ', '.', 1)!r}")
        self.push(Global(name))

    def reduce(self):
        arguments, function = self.pop(tuple), self.pop(Global)
        call = _CALLS.get(function.name)
        if call is None:
            raise Forbidden(f"a call of {function.name.replace(' ', '.', 1)!r}")
        self.push(call(arguments))

    def build(self):
        state = self.pop(dict)
        self.top(_Ordered)
        if set(state) - {"_metadata"}:
            raise Forbidden(f"a state with {sorted(map(str, state))[:3]} for an OrderedDict")

    def persistent(self):
        match self.pop(tuple):
            case ("storage", Global(name), str(key), str(), count) if name in STORAGES and _whole(count):
                self.push(Storage(key, STORAGES[name], count))
            case other:
                raise Forbidden(f"a persistent id {_said(other)} that is no storage")


def _said(value):
    """A value in a message, never as long as it may be."""
    if isinstance(value, _Mark):
        return "a mark"
    if isinstance(value, Global):
        return repr(value.name.replace(" ", ".", 1))
    if isinstance(value, (str, bool, int, float)) or value is None:
        return repr(str(value)[:80] if isinstance(value, str) else value)
    return f"a {type(value).__name__.strip('_').lower()}"


def _whole(number):
    return type(number) is int and 0 <= number < 2**63


def _sizes(value):
    return type(value) is tuple and len(value) <= MAX_RANK and all(map(_whole, value))


def _ordered(arguments):
    if arguments != ():
        raise Forbidden("an OrderedDict that is called with arguments")
    return _Ordered()


def _tensor(arguments):
    match arguments:
        case (Storage() as storage, offset, shape, strides, bool(), _Ordered() | None as hooks, *more):
            metadata = more[0] if more else None
        case _:
            raise Forbidden("a tensor made of other things than torch writes")
    if hooks or len(more) > 1 or not (metadata is None or metadata == {}):
        raise Forbidden("a tensor with hooks, or one that is to be conjugated or negated,")
    if not (_whole(offset) and _sizes(shape) and _sizes(strides) and len(shape) == len(strides)):
        raise Forbidden("a tensor whose offset, sizes or strides are no whole numbers from 0 on")
    tensor = Tensor(storage, offset, shape, strides)
    if tensor.end > storage.count or offset > storage.count:
        raise Forbidden(f"a tensor of shape {shape}, strides {strides}, offset {offset} that leaves its {storage.count} elements")
    if tensor.count > max(storage.count, MAX_SHARED):
        raise Forbidden(f"a tensor of shape {shape} that repeats a storage of {storage.count} elements")
    return tensor


def _parameter(arguments):
    match arguments:
        case (Tensor() as tensor, bool(), _Ordered() | None as hooks) if not hooks:
            return tensor
    raise Forbidden("a parameter made of other things than torch writes")


def _size(arguments):
    match arguments:
        case (tuple() as sizes,) if _sizes(sizes):
            return sizes
    raise Forbidden("a size made of other things than whole numbers")


def _device(arguments):
    match arguments:
        case (str(kind), *index) if all(map(_whole, index)) and len(index) < 2:
            return ":".join(map(str, (kind, *index)))
    raise Forbidden("a device made of other things than its name")


_CALLS = {_ORDERED: _ordered, _TENSOR: _tensor, _PARAMETER: _parameter, _SIZE: _size, _DEVICE: _device}


def _protocol(machine, version):
    if version != 2:
        raise Forbidden(f"pickle protocol {version}, expected 2")


# What each opcode does to the machine, with its argument
_OPCODES = {
    "PROTO": _protocol,
    "STOP": lambda machine, _: None,
    "MARK": lambda machine, _: machine.push(_Mark()),
    "EMPTY_DICT": lambda machine, _: machine.push({}),
    "EMPTY_LIST": lambda machine, _: machine.push([]),
    "EMPTY_TUPLE": lambda machine, _: machine.push(()),
    "TUPLE": lambda machine, _: machine.push(tuple(machine.pop_to_mark())),
    "TUPLE1": lambda machine, _: machine.tuple(1),
    "TUPLE2": lambda machine, _: machine.tuple(2),
    "TUPLE3": lambda machine, _: machine.tuple(3),
    "NONE": lambda machine, _: machine.push(None),
    "NEWTRUE": lambda machine, _: machine.push(True),
    "NEWFALSE": lambda machine, _: machine.push(False),
    "BININT": _Machine.push,
    "BININT1": _Machine.push,
    "BININT2": _Machine.push,
    "LONG1": _Machine.push,
    "BINFLOAT": _Machine.push,
    "BINUNICODE": _Machine.push,
    "BINPUT": _Machine.put,
    "LONG_BINPUT": _Machine.put,
    "BINGET": _Machine.get,
    "LONG_BINGET": _Machine.get,
    "APPEND": lambda machine, _: machine.append([machine.pop()]),
    "APPENDS": lambda machine, _: machine.append(machine.pop_to_mark()),
    "SETITEM": lambda machine, _: machine.set([machine.pop(), machine.pop()][::-1]),
    "SETITEMS": lambda machine, _: machine.set(machine.pop_to_mark()),
    "GLOBAL": _Machine.name,
    "REDUCE": lambda machine, _: machine.reduce(),
    "BUILD": lambda machine, _: machine.build(),
    "BINPERSID": lambda machine, _: machine.persistent(),
}


def write(tree):
    """The pickle of nested dicts of `Tensor`, as `torch.save` would write it; `torch.load(..., weights_only=True)` reads it."""
    return b"\x80\2" + _written(tree) + b"."


def _written(value):
    """The opcodes that push a value."""
    match value:
        case str():
            text = value.encode()
            return b"X" + len(text).to_bytes(4, "little") + text
        case bool():
            return b"\x88" if value else b"\x89"
        case int() if value < 2**31:
            return b"J" + value.to_bytes(4, "little")
        case int():
            return b"\x8a\x08" + value.to_bytes(8, "little")
        case tuple():
            return b"(" + b"".join(map(_written, value)) + b"t"
        case dict():
            return b"}(" + b"".join(_written(key) + _written(each) for key, each in value.items()) + b"u"
        case Global():
            return f"c{value.name.replace(' ', chr(10))}\n".encode()
        case Storage():
            kind = next(name for name, dtype in STORAGES.items() if dtype == value.dtype)
            return _written(("storage", Global(kind), value.key, "cpu", value.count)) + b"Q"
        case Tensor():
            hooks = _written(Global(_ORDERED)) + b")R"
            parts = (value.storage, value.offset, value.shape, value.strides, False)
            return _written(Global(_TENSOR)) + b"(" + b"".join(map(_written, parts)) + hooks + b"tR"
