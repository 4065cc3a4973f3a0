"""What the pickles of ``torch.save`` are read as: plain containers, numbers and dtypes, and inert data.

A name stays a name, :class:`Global`, and what calls or fills it makes a :class:`Record`. Tensors are not read, they
become :class:`StoredTensor`.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

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


def call(function: Any, args: Any) -> Any:
    """What a call in a pickle makes: what is known here, else a :class:`Record` of it."""
    if not isinstance(args, tuple):
        raise ValueError("arguments that are no tuple")
    if not isinstance(function, Global):
        return Record(type(function).__name__, (function, *args))
    builder = _BUILDERS.get(function.name)
    return Record(function.name, args) if builder is None else builder(*args)


def as_key(value: Any) -> Any:
    """``value`` where it may be a key: the hash of what is deeply nested would overrun Python's own stack."""
    values = value if isinstance(value, tuple) else (value,)
    if not all(isinstance(each, (*_PLAIN, Global, Record, torch.dtype)) for each in values):
        raise ValueError(f"a {type(value).__name__} as a key")
    return value


def named(text: str) -> Any:
    """What a name, ``"MODULE NAME"``, stands for: a dtype, else a :class:`Global`."""
    name = text.replace(" ", ".", 1)
    return _DTYPES.get(name, Global(name))


def storage_of(found: Any) -> Storage | Record:
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
    return call(function, args)


def _ordered(pairs: Any = ()) -> Any:
    if not isinstance(pairs, (list, tuple)) or not all(isinstance(x, (list, tuple)) and len(x) == 2 for x in pairs):
        raise ValueError("an OrderedDict of something else than pairs")
    return OrderedDict((as_key(key), value) for key, value in pairs)


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
    return {as_key(each) for each in values}


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
