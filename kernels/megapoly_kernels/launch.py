"""What kernel files share: an import of Triton that may fail, settings by architecture, what is to be compiled.

Triton is there where a GPU is, as a rule. Without it a kernel stays an undecorated function that nothing calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None

ARCHITECTURES = (80, 90)  # compute capabilities that launch tables are made for: A100, H100


@dataclass(frozen=True)
class Launch:
    """How a kernel is started: values of its constexprs, and what Triton compiles it with."""

    constants: Mapping[str, int] = field(default_factory=dict)
    warps: int = 4
    stages: int = 1

    @property
    def options(self) -> dict[str, int]:
        """Keyword arguments of a start."""
        return {**self.constants, "num_warps": self.warps, "num_stages": self.stages}


# (architecture, bytes of an element, largest size) -> settings; what the size is of, a table says.
Table: TypeAlias = Mapping[tuple[int, int, int], Launch]


@dataclass(frozen=True)
class Variant:
    """A kernel as a launch table starts it, to be compiled ahead of time.

    Attributes:
        name: of the kernel and the case, for tables.
        types: of its run-time arguments as Triton writes them, ``*bf16`` or ``i64``, by name. Pointers and whole
            numbers are compiled as divisible by 16, as Triton finds real ones, but for those named in ``odd``.
        constants: of all other arguments.
        wgmma: whether the tensor cores of sm_90 have to be used.
        wide: whether loads of 16 bytes have to be there.
    """

    name: str
    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    launch: Launch
    wgmma: bool = False
    wide: bool = True
    odd: frozenset[str] = frozenset()


def jit(function: Callable[..., Any]) -> Any:
    """``triton.jit``, where Triton is."""
    return function if triton is None else triton.jit(function)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def wide_dtype(x: Tensor) -> torch.dtype:
    """promote(dtype of ``x``, fp32), in which arithmetic is."""
    return torch.promote_types(x.dtype, torch.float32)


def two_leads(x: Tensor, leads: int) -> Tensor:
    """``x`` with two dimensions in place of the first ``leads``; a view where strides allow."""
    return x[(None,) * (2 - leads)] if leads < 2 else x.flatten(0, leads - 2)


def settings(table: Table, arch: int, itemsize: int, size: int) -> Launch:
    """Of the newest architecture of the table up to ``arch``, for the smallest listed size from ``size`` on.

    Raises:
        ValueError: no row is large enough.
    """
    archs = [row[0] for row in table]
    nearest = max((each for each in archs if each <= arch), default=min(archs))
    rows = [row for row in table if row[0] == nearest and row[1] == itemsize and row[2] >= size]
    if not rows:
        most = max((row[2] for row in table if row[:2] == (nearest, itemsize)), default=0)
        raise ValueError(f"size {size} is above the largest, {most}, that this kernel is made for")
    return table[min(rows, key=lambda row: row[2])]


def architecture(device: torch.device) -> int:
    """Compute capability of a GPU, 90 for 9.0. Of a CPU, where kernels are interpreted, the newest that tables have."""
    if device.type != "cuda":
        return ARCHITECTURES[-1]
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


_INTERPRETED: ContextVar[bool] = ContextVar("interpreted", default=False)


def runs_triton(x: Tensor) -> bool:
    """Whether the Triton kernels work on a tensor: on a GPU, or inside of :func:`interpreted`.

    Raises:
        RuntimeError: the tensor is on a GPU, and Triton is not installed.
    """
    if x.is_cuda and triton is None:
        raise RuntimeError("megapoly_kernels: tensors on a GPU need Triton, which is not installed: pip install triton")
    return x.is_cuda or _INTERPRETED.get()


def known_backend(op: str, backend: str, known: Sequence[str]) -> None:
    """Refuse the name of a back end that an op does not have.

    Raises:
        ValueError: it is not one of ``known``.
    """
    if backend not in known:
        raise ValueError(f"{op}: backend is {backend!r}, expected one of {', '.join(known)}")


def on_device(x: Tensor) -> AbstractContextManager[Any]:
    """Have kernels start on the GPU of a tensor, which need not be the current one."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def uncompiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, which a compiler is not to trace. Its own mark would import all of the compiler, seconds long."""
    return torch.compiler.disable(function) if torch.compiler.is_compiling() else function


@contextmanager
def interpreted() -> Iterator[None]:
    """For tests: have Triton's interpreter run the kernels on a CPU, in place of the references.

    The environment has to have TRITON_INTERPRET=1 before the kernels are imported.
    """
    token = _INTERPRETED.set(True)
    try:
        yield
    finally:
        _INTERPRETED.reset(token)


@jit
def widen(x):
    """``x`` in promote(its dtype, fp32), inside of kernels."""
    if x.dtype == tl.float64:
        return x
    return x.to(tl.float32)
