"""Types of the C++ part of the data engine; the source is csrc/index."""

import numpy as np
import numpy.typing as npt

BLOCK_BYTES: int

class Writer:
    def __init__(self, bin_path: str, idx_path: str, code: int, vocabulary: int) -> None: ...
    def append(self, ids: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]) -> None: ...
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
