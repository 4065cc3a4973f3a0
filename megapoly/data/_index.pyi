"""Types of the C++ part of the data engine; the source is csrc/index."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

BLOCK_BYTES: int

class BpeEncoder:
    def __init__(self, model: bytes) -> None: ...
    @property
    def refusal(self) -> str: ...
    def encode(
        self, texts: Sequence[str | bytes], threads: int
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]: ...

class Documents: ...

class Writer(Documents):
    def __init__(self, bin_path: str, idx_path: str, code: int, vocabulary: int) -> None: ...
    def append(self, ids: npt.NDArray[np.int32 | np.int64], lengths: npt.NDArray[np.int64]) -> None: ...
    def finish(self) -> tuple[int, int, list[int], list[int]]: ...

class Part:
    def __init__(self, path: str, descriptor: int, size: int, code: int, crcs: Sequence[int]) -> None: ...
    def hand_on(
        self, first: int, lengths: npt.NDArray[np.int64], keep: npt.NDArray[np.uint8] | None, to: Documents
    ) -> None: ...

def scan(
    path: str, descriptor: int, code: int, vocabulary: int, first: int, blocks: int
) -> tuple[list[int], list[int], list[int]]: ...
def crc32(data: bytes, by_tables: bool = False) -> int: ...
def gather(
    path: str,
    descriptor: int,
    code: int,
    count: int,
    vocabulary: int,
    starts: npt.NDArray[np.int64],
    length: int,
) -> npt.NDArray[np.int64]: ...

class Dataset:
    def __init__(
        self, bin_path: str, bin: int, code: int, tokens: int, idx_path: str, idx: int, sequences: int, documents: int
    ) -> None: ...
    def boundaries(self, start: int, last: int) -> npt.NDArray[np.int64]: ...

class Progress:
    @property
    def source(self) -> int: ...
    @property
    def bytes(self) -> int: ...

Whole = npt.NDArray[np.int32] | npt.NDArray[np.int64]

def fill(
    sources: Sequence[Dataset],
    source: npt.NDArray[np.int32],
    starts: npt.NDArray[np.int64],
    limits: npt.NDArray[np.int64],
    vocabulary: int,
    separate: bool,
    tokens: Whole | None,
    labels: Whole | None,
    positions: Whole,
    progress: Progress,
) -> npt.NDArray[np.int32] | None: ...
