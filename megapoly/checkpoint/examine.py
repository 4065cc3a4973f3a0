"""What the tensors of checkpoints hold, and how two checkpoints differ; a tensor is read in parts, never whole."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from megapoly.checkpoint.store import Reader
from megapoly.errors import CheckpointError
from megapoly.spec import Box, Index, Piece

_PART = 1 << 20  # elements that are looked at together


@dataclass(frozen=True)
class Content:
    """A tensor as it is stored, and what is in it.

    Attributes:
        pieces: that it is stored in.
        norm: root of the sum of squares of its finite elements.
        largest: magnitude among them.
        nonfinite: how many elements are not finite.
    """

    name: str
    shape: Index
    dtype: str
    pieces: int
    norm: float
    largest: float
    nonfinite: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Difference:
    """How a tensor of one checkpoint differs from that of the same name in another.

    Attributes:
        problem: why they could not be compared: in the first only, in the second only, or of other shapes. Else empty.
        dtypes: of both.
        different: elements that differ; two that are not numbers are alike.
        largest: difference; infinite where one of two elements is not finite.
        relative: norm of the difference by the norm of the first tensor; infinite where that one is zero.
    """

    name: str
    shape: Index
    dtypes: tuple[str, str]
    problem: str = ""
    different: int = 0
    largest: float = 0.0
    relative: float = 0.0

    @property
    def same(self) -> bool:
        """Bit for bit but for the sign of zero, and in the same dtype."""
        return not self.problem and not self.different and self.dtypes[0] == self.dtypes[1]


def choose(reader: Reader, pattern: str) -> list[str]:
    """Names that match a shell pattern.

    Raises:
        CheckpointError: none does.
    """
    names = [name for name in reader.tensors if fnmatchcase(name, pattern)]
    if not names:
        first = next(iter(reader.tensors), "")
        raise CheckpointError(f"{reader.path}: no tensor's name matches {pattern!r}; names are such as {first!r}")
    return names


def contents(
    reader: Reader, names: list[str], progress: Callable[[int], object] = lambda done: None
) -> Iterator[Content]:
    """Read these tensors; ``progress`` hears of the bytes of each part.

    Raises:
        CheckpointError: damaged bytes.
    """
    for name in names:
        shape, dtype = reader.tensors[name]
        squares, largest, nonfinite = 0.0, 0.0, 0
        for part in _parts(reader, name):
            progress(part.numel() * part.element_size())
            values = part.double()
            finite = values.isfinite()
            nonfinite += values.numel() - int(finite.sum())
            values = values.where(finite, 0.0)
            squares += float(values.square().sum())
            largest = max(largest, float(values.abs().max()))
        yield Content(name, shape, say_dtype(dtype), reader.pieces(name), math.sqrt(squares), largest, nonfinite)
        reader.release()


def compare(
    first: Reader, second: Reader, pattern: str, progress: Callable[[int], object] = lambda done: None
) -> Iterator[Difference]:
    """Compare all tensors of either checkpoint whose names match; ``progress`` hears of the bytes of each part.

    Values are compared in the wider of the two dtypes, and differences computed in float64.
    """
    names = dict.fromkeys((*first.tensors, *second.tensors))
    for name in names:
        if not fnmatchcase(name, pattern):
            continue
        (shape, dtype), (other, other_dtype) = (each.tensors.get(name, ((), None)) for each in (first, second))
        dtypes = (say_dtype(dtype), say_dtype(other_dtype))
        if dtype is None or other_dtype is None:
            problem = "in the first only" if other_dtype is None else "in the second only"
            yield Difference(name, shape or other, dtypes, problem)
        elif shape != other:
            yield Difference(name, shape, dtypes, f"shape {list(shape)} and {list(other)}")
        else:
            yield _compare(first, second, name, progress)
        for reader in (first, second):
            reader.release()


def _compare(first: Reader, second: Reader, name: str, progress: Callable[[int], object]) -> Difference:
    (shape, dtype), (_, other_dtype) = first.tensors[name], second.tensors[name]
    wide = torch.promote_types(dtype, other_dtype)
    different, largest, squares, norm = 0, 0.0, 0.0, 0.0
    for a, b in zip(_parts(first, name), _parts(second, name), strict=True):
        progress(a.numel() * a.element_size() + b.numel() * b.element_size())
        a, b = a.to(wide), b.to(wide)
        unlike = (a != b) & ~((a != a) & (b != b))
        different += int(unlike.sum())
        a, b = a.double(), b.double()
        gaps = (a - b).abs().where(unlike, 0.0).nan_to_num(nan=math.inf, posinf=math.inf)
        largest = max(largest, float(gaps.max()))
        squares += float(gaps.square().sum())
        norm += float(a.where(a.isfinite(), 0.0).square().sum())
    relative = 0.0 if not squares else math.sqrt(squares / norm) if norm else math.inf
    return Difference(name, shape, (say_dtype(dtype), say_dtype(other_dtype)), "", different, largest, relative)


def say_dtype(dtype: torch.dtype | None) -> str:
    """Its name without "torch."; empty for None."""
    return "" if dtype is None else str(dtype).removeprefix("torch.")


def _parts(reader: Reader, name: str) -> Iterator[Tensor]:
    """A tensor flat, in parts of at most ``_PART`` elements; none of an empty one."""
    shape, dtype = reader.tensors[name]
    whole = Box.whole(shape)
    for start in range(0, whole.size, _PART):
        piece = Piece(whole, start, min(whole.size, start + _PART))
        part = torch.empty(piece.size, dtype=dtype)
        reader.read(name, piece, part)
        yield part
