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

class Writer:
    def __init__(self, bin_path: str, idx_path: str, code: int, vocabulary: int) -> None: ...
    def append(self, ids: npt.NDArray[np.int32 | np.int64], lengths: npt.NDArray[np.int64]) -> None: ...
    def finish(self) -> tuple[int, int, list[int], list[int]]: ...

def gather(
    path: str,
    descriptor: int,
    code: int,
    count: int,
    vocabulary: int,
    starts: npt.NDArray[np.int64],
    length: int,
) -> npt.NDArray[np.int64]: ...
def fill(
    file: tuple[str, int, int, int, int],
    index: tuple[str, npt.NDArray[np.int64], npt.NDArray[np.int64], int] | None,
    starts: npt.NDArray[np.int64],
    rows: npt.NDArray[np.int64],
    limit: int,
    tokens: npt.NDArray[np.int64] | None,
    labels: npt.NDArray[np.int64] | None,
    positions: npt.NDArray[np.int64],
    documents: npt.NDArray[np.int32] | None,
) -> None: ...
