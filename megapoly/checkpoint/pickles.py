"""Files of ``torch.save``, read without trust: nothing that a file names is imported or called.

A pickle is a program for a stack machine. The standard library splits it into its instructions (:mod:`pickletools`),
and the machine here carries them out with one difference to Python's: a name stays a name, :class:`Global`, and what
calls or fills it makes a :class:`Record`, inert data. Built are plain containers, numbers, dtypes, and tensors that are
not read: :class:`StoredTensor`.
"""

from __future__ import annotations

import math
import mmap
import pickletools
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import IO, Any

import numpy as np
import torch

from megapoly.spec import Index

_PLAIN = (str, bytes, int, float, bool, type(None))
_STORAGES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
}  # fmt: skip
_DTYPES = {
    f"torch.{name}": getattr(torch, name)
    for name in ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
}
_SCALARS = {"f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "b1"}
_MOST = 1 << 62  # no size or stride of a tensor is above it


@dataclass(frozen=True)
class Global:
    """A name that a pickle asks for, such as ``argparse.Namespace``; never looked up."""

    name: str


@dataclass(eq=False)
class Record:
    """What a pickle makes of a class or function that is not known here.

    Attributes:
        name: of the class or function.
        args: what it was to be called with.
        state: what was to be its state.
        items: what was to be added to it.
    """

    name: str
    args: tuple[Any, ...] = ()
    state: Any = None
    items: list[Any] = field(default_factory=list)

    @property
    def fields(self) -> dict[str, Any]:
        """Its attributes, such as the arguments in an ``argparse.Namespace``."""
        return self.state if isinstance(self.state, dict) else {}


@dataclass(frozen=True)
class Storage:
    """``count`` values of ``dtype`` that stand in a file under ``key``."""

    key: str
    dtype: torch.dtype
    count: int


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that was not read: a strided view of a storage. Offset and strides count elements."""

    storage: Storage
    dtype: torch.dtype
    offset: int
    shape: Index
    stride: Index

    @property
    def last(self) -> int:
        """The highest element of the storage that it reaches; -1 where it is empty."""
        if 0 in self.shape:
            return -1
        return self.offset + sum((n - 1) * step for n, step in zip(self.shape, self.stride))


class _Mark:
    pass


_MARK = _Mark()


def load(stream: IO[bytes] | mmap.mmap) -> tuple[Any, dict[str, Storage]]:
    """The value of one pickle, which ``stream`` is then after, and the storages that it names, by key.

    Raises:
        ValueError: it is cut short or damaged, or does what no file of tensors does.
    """
    machine = _Machine()
    program = pickletools.genops(stream)  # type: ignore[arg-type]  # it reads and reads lines: a map will do
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of text in it that is escaped in no way that Python knows
            return machine.run(program), machine.storages
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise ValueError(f"its pickle is damaged: {error}") from error


class _Machine:
    """Carries out one pickle."""

    def __init__(self) -> None:
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self.storages: dict[str, Storage] = {}

    def run(self, program: Iterator[tuple[pickletools.OpcodeInfo, Any, int | None]]) -> Any:
        for opcode, arg, _ in program:
            name = opcode.name
            if name == "STOP":
                value = self.pop()
                if self._stack:
                    raise ValueError("it leaves more than one value")
                return value
            if name in _CONSTANTS:
                self._stack.append(arg)
            elif name in _OPERATIONS:
                _OPERATIONS[name](self, arg)
            else:
                raise ValueError(f"instruction {name}")
        raise ValueError("it has no end")

    def push(self, value: Any) -> None:
        self._stack.append(value)

    def pop(self) -> Any:
        value = self._stack.pop()
        if value is _MARK:
            raise ValueError("a mark in the place of a value")
        return value

    def top(self) -> Any:
        value = self.pop()
        self._stack.append(value)
        return value

    def since_mark(self) -> list[Any]:
        at = len(self._stack) - 1
        while self._stack[at] is not _MARK:
            if not at:
                raise ValueError("no mark")
            at -= 1
        values = self._stack[at + 1 :]
        del self._stack[at:]
        return values

    def discard(self, _: Any) -> None:
        self._stack.pop()

    def discard_all(self, _: Any) -> None:
        self.since_mark()

    def put(self, at: int) -> None:
        self._memo[at] = self.top()

    def memoize(self, _: Any) -> None:
        self._memo[len(self._memo)] = self.top()

    def get(self, at: int) -> None:
        self._stack.append(self._memo[at])

    def add(self, values: Iterable[Any]) -> None:
        target, values = self.top(), list(values)
        if isinstance(target, list):
            target.extend(values)
        elif isinstance(target, set):
            target.update(_key(each) for each in values)
        elif isinstance(target, Record):
            target.items.extend(values)
        else:
            raise ValueError(f"something is added to a {type(target).__name__}")

    def set_items(self, flat: list[Any]) -> None:
        target, pairs = self.top(), _pairs(flat)
        if isinstance(target, dict):
            target.update((_key(key), value) for key, value in pairs)
        elif isinstance(target, Record):
            target.items.extend(pairs)
        else:
            raise ValueError(f"keys are set in a {type(target).__name__}")

    def call(self, function: Any, args: Any) -> None:
        self.push(_call(function, args))

    def new(self, arity: int) -> None:
        last = [self.pop() for _ in range(arity)][::-1]  # class and args, and keyword arguments where there are three
        if arity == 3 and last[2]:
            if not isinstance(last[1], tuple):
                raise ValueError("arguments that are no tuple")
            last[1] = (*last[1], last[2])
        self.call(last[0], last[1])

    def make(self, _: Any) -> None:
        target, *args = self.since_mark()
        self.call(target, tuple(args))

    def build(self, _: Any) -> None:
        state, target = self.pop(), self.top()
        if isinstance(target, Record):
            target.state = state
        elif not isinstance(target, (dict, StoredTensor)):  # the attributes of these two are nothing that we read
            raise ValueError(f"a {type(target).__name__} is given a state")

    def stack_global(self, _: Any) -> None:
        name, module = self.pop(), self.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise ValueError("a name that is no text")
        self.push(_global(f"{module} {name}"))

    def persistent(self, value: Any) -> None:
        storage = _storage(value)
        if isinstance(storage, Storage) and self.storages.setdefault(storage.key, storage) != storage:
            raise ValueError(f"two storages under the key {storage.key!r}")
        self.push(storage)


def _call(function: Any, args: Any) -> Any:
    if not isinstance(args, tuple):
        raise ValueError("arguments that are no tuple")
    if not isinstance(function, Global):
        return Record(type(function).__name__, (function, *args))
    builder = _BUILDERS.get(function.name)
    return Record(function.name, args) if builder is None else builder(*args)


def _pairs(flat: list[Any]) -> list[tuple[Any, Any]]:
    if len(flat) % 2:
        raise ValueError("a key without a value")
    return list(zip(flat[::2], flat[1::2]))


def _key(value: Any) -> Any:
    """``value`` where it may be a key: the hash of what is deeply nested would overrun Python's own stack."""
    values = value if isinstance(value, tuple) else (value,)
    if not all(isinstance(each, (*_PLAIN, Global, Record, torch.dtype)) for each in values):
        raise ValueError(f"a {type(value).__name__} as a key")
    return value


def _global(text: str) -> Any:
    name = text.replace(" ", ".", 1)
    return _DTYPES.get(name, Global(name))


def _storage(found: Any) -> Storage | Record:
    """What torch stores under a persistent id: ``("storage", class, key, device, count)``; old files add a view."""
    if (
        not isinstance(found, tuple)
        or len(found) not in (5, 6)
        or found[0] != "storage"
        or found[5:] not in ((), (None,))
    ):
        raise ValueError("a persistent id that is no storage of torch")
    _, kind, key, _, count = found[:5]
    if not isinstance(kind, Global) or not isinstance(key, str) or not _is_count(count):
        raise ValueError("a persistent id that is no storage of torch")
    module, _, name = kind.name.rpartition(".")
    if not module.startswith("torch") or name not in _STORAGES:
        return Record(kind.name, (key, count))
    return Storage(key, _STORAGES[name], count)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < _MOST


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, *rest: Any) -> Any:
    """``torch._utils._rebuild_tensor`` and ``_rebuild_tensor_v2``."""
    return _view(storage, offset, shape, stride, None, rest)


def _tensor_v3(
    storage: Any, offset: Any, shape: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, *rest: Any
) -> Any:
    return _view(storage, offset, shape, stride, dtype, rest)


def _view(storage: Any, offset: Any, shape: Any, stride: Any, dtype: Any, rest: tuple[Any, ...]) -> Any:
    if isinstance(storage, Record) or (dtype is not None and not isinstance(dtype, torch.dtype)):
        return Record("torch.Tensor", (storage, offset, shape, stride, dtype, *rest))
    if not isinstance(storage, Storage) or not isinstance(shape, tuple) or not isinstance(stride, tuple):
        raise ValueError("a tensor of something else than a storage, a shape and strides")
    if not all(map(_is_count, (offset, *shape, *stride))) or len(shape) != len(stride):
        raise ValueError("a tensor whose offset, shape or strides are no counts")
    if math.prod(shape) >= _MOST:
        raise ValueError(f"a tensor of shape {shape}")
    tensor = StoredTensor(storage, dtype or storage.dtype, offset, shape, stride)
    count = storage.count * storage.dtype.itemsize // tensor.dtype.itemsize
    if tensor.last >= count:
        raise ValueError(f"a tensor that reaches element {tensor.last} of a storage of {count}")
    return tensor


def _parameter(data: Any, *_: Any) -> Any:
    return data


def _of_type(function: Any, _kind: Any, args: Any, state: Any) -> Any:
    """``torch._tensor._rebuild_from_type_v2``: a tensor with attributes, which we do not read."""
    return _call(function, args)


def _ordered(pairs: Any = ()) -> Any:
    if not isinstance(pairs, (list, tuple)) or not all(isinstance(x, (list, tuple)) and len(x) == 2 for x in pairs):
        raise ValueError("an OrderedDict of something else than pairs")
    return OrderedDict((_key(key), value) for key, value in pairs)


def _size(values: Any) -> Any:
    if not isinstance(values, tuple):
        raise ValueError("a size that is no tuple")
    return values


def _encode(text: Any, encoding: Any) -> bytes:
    """How protocol 2 writes bytes."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise ValueError("bytes that are not written as latin1")
    return text.encode("latin-1")


def _set(values: Any = ()) -> Any:
    if not isinstance(values, (list, tuple)):
        raise ValueError("a set of something else than a list")
    return {_key(each) for each in values}


def _frozenset(values: Any = ()) -> Any:
    return frozenset(_set(values))


def _numpy_scalar(dtype: Any, raw: Any = None) -> Any:
    """``numpy.core.multiarray.scalar``: a number where it is one of the usual kinds."""
    code = dtype.args[0] if isinstance(dtype, Record) and dtype.name == "numpy.dtype" and dtype.args else None
    if not isinstance(code, str) or code not in _SCALARS or not isinstance(raw, bytes) or len(raw) != int(code[1]):
        return Record("numpy.scalar", (dtype, raw))
    state = dtype.state
    order = state[1] if isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">") else "<"
    return np.frombuffer(raw, order + code)[0].item()


_BUILDERS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _ordered,
    "torch.Size": _size,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._tensor._rebuild_from_type_v2": _of_type,
    "_codecs.encode": _encode,
    "builtins.set": _set,
    "__builtin__.set": _set,
    "builtins.frozenset": _frozenset,
    "__builtin__.frozenset": _frozenset,
    "numpy.core.multiarray.scalar": _numpy_scalar,
    "numpy._core.multiarray.scalar": _numpy_scalar,
}
_CONSTANTS = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "STRING", "BINSTRING", "SHORT_BINSTRING",
    "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE",
    "BINUNICODE8", "FLOAT", "BINFLOAT",
}  # fmt: skip
_OPERATIONS: dict[str, Callable[[_Machine, Any], None]] = {
    "PROTO": lambda machine, arg: None,
    "FRAME": lambda machine, arg: None,
    "NONE": lambda machine, arg: machine.push(None),
    "NEWTRUE": lambda machine, arg: machine.push(True),
    "NEWFALSE": lambda machine, arg: machine.push(False),
    "MARK": lambda machine, arg: machine.push(_MARK),
    "POP": _Machine.discard,
    "POP_MARK": _Machine.discard_all,
    "DUP": lambda machine, arg: machine.push(machine.top()),
    "PUT": _Machine.put,
    "BINPUT": _Machine.put,
    "LONG_BINPUT": _Machine.put,
    "MEMOIZE": _Machine.memoize,
    "GET": _Machine.get,
    "BINGET": _Machine.get,
    "LONG_BINGET": _Machine.get,
    "EMPTY_LIST": lambda machine, arg: machine.push([]),
    "EMPTY_TUPLE": lambda machine, arg: machine.push(()),
    "EMPTY_DICT": lambda machine, arg: machine.push({}),
    "EMPTY_SET": lambda machine, arg: machine.push(set()),
    "LIST": lambda machine, arg: machine.push(machine.since_mark()),
    "TUPLE": lambda machine, arg: machine.push(tuple(machine.since_mark())),
    "TUPLE1": lambda machine, arg: machine.push((machine.pop(),)),
    "TUPLE2": lambda machine, arg: machine.push((machine.pop(), machine.pop())[::-1]),
    "TUPLE3": lambda machine, arg: machine.push((machine.pop(), machine.pop(), machine.pop())[::-1]),
    "DICT": lambda machine, arg: machine.push({_key(key): value for key, value in _pairs(machine.since_mark())}),
    "FROZENSET": lambda machine, arg: machine.push(frozenset(map(_key, machine.since_mark()))),
    "APPEND": lambda machine, arg: machine.add([machine.pop()]),
    "APPENDS": lambda machine, arg: machine.add(machine.since_mark()),
    "ADDITEMS": lambda machine, arg: machine.add(machine.since_mark()),
    "SETITEM": lambda machine, arg: machine.set_items([machine.pop(), machine.pop()][::-1]),
    "SETITEMS": lambda machine, arg: machine.set_items(machine.since_mark()),
    "GLOBAL": lambda machine, arg: machine.push(_global(arg)),
    "STACK_GLOBAL": _Machine.stack_global,
    "INST": lambda machine, arg: machine.call(_global(arg), tuple(machine.since_mark())),
    "OBJ": _Machine.make,
    "REDUCE": lambda machine, arg: machine.new(2),
    "NEWOBJ": lambda machine, arg: machine.new(2),
    "NEWOBJ_EX": lambda machine, arg: machine.new(3),
    "BUILD": _Machine.build,
    "PERSID": _Machine.persistent,
    "BINPERSID": lambda machine, arg: machine.persistent(machine.pop()),
    "EXT1": lambda machine, arg: machine.push(Global(f"copyreg.extension.{arg}")),
    "EXT2": lambda machine, arg: machine.push(Global(f"copyreg.extension.{arg}")),
    "EXT4": lambda machine, arg: machine.push(Global(f"copyreg.extension.{arg}")),
}
