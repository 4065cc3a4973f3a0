"""A pickle read without trust: nothing that it names is imported or called.

A pickle is a program for a stack machine. The standard library splits it into its instructions (:mod:`pickletools`),
and the machine here carries them out; what it makes of a name or a call is in :mod:`megapoly.checkpoint.pickled`.
"""

from __future__ import annotations

import mmap
import pickletools
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import IO, Any

from megapoly.checkpoint.pickled import Global, Record, Storage, StoredTensor, as_key, call, named, storage_of


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
            target.update(as_key(each) for each in values)
        elif isinstance(target, Record):
            target.items.extend(values)
        else:
            raise ValueError(f"something is added to a {type(target).__name__}")

    def set_items(self, flat: list[Any]) -> None:
        target, pairs = self.top(), _pairs(flat)
        if isinstance(target, dict):
            target.update((as_key(key), value) for key, value in pairs)
        elif isinstance(target, Record):
            target.items.extend(pairs)
        else:
            raise ValueError(f"keys are set in a {type(target).__name__}")

    def call(self, function: Any, args: Any) -> None:
        self.push(call(function, args))

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
        self.push(named(f"{module} {name}"))

    def persistent(self, value: Any) -> None:
        storage = storage_of(value)
        if isinstance(storage, Storage) and self.storages.setdefault(storage.key, storage) != storage:
            raise ValueError(f"two storages under the key {storage.key!r}")
        self.push(storage)


def _pairs(flat: list[Any]) -> list[tuple[Any, Any]]:
    if len(flat) % 2:
        raise ValueError("a key without a value")
    return list(zip(flat[::2], flat[1::2]))


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
    "DICT": lambda machine, arg: machine.push({as_key(key): value for key, value in _pairs(machine.since_mark())}),
    "FROZENSET": lambda machine, arg: machine.push(frozenset(map(as_key, machine.since_mark()))),
    "APPEND": lambda machine, arg: machine.add([machine.pop()]),
    "APPENDS": lambda machine, arg: machine.add(machine.since_mark()),
    "ADDITEMS": lambda machine, arg: machine.add(machine.since_mark()),
    "SETITEM": lambda machine, arg: machine.set_items([machine.pop(), machine.pop()][::-1]),
    "SETITEMS": lambda machine, arg: machine.set_items(machine.since_mark()),
    "GLOBAL": lambda machine, arg: machine.push(named(arg)),
    "STACK_GLOBAL": _Machine.stack_global,
    "INST": lambda machine, arg: machine.call(named(arg), tuple(machine.since_mark())),
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
