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
    @property
    def documents(self) -> int: ...
    @property
    def tokens(self) -> int: ...
    def finish(self) -> tuple[int, int, list[int], list[int]]: ...

class Part:
    def __init__(self, path: str, descriptor: int, size: int, code: int, crcs: Sequence[int]) -> None: ...
    def hand_on(
        self, first: int, lengths: npt.NDArray[np.int64], keep: npt.NDArray[np.uint8] | None, to: Documents
    ) -> None: ...

def polynomial_hash(pieces: Sequence[bytes]) -> int: ...

class Duplicates(Documents):
    def __init__(self, path: str) -> None: ...
    @property
    def documents(self) -> int: ...
    def find(self, memory: int) -> int: ...
    def kept(self, first: int, count: int) -> npt.NDArray[np.uint8]: ...
    def count_kept(self, first: int, count: int) -> int: ...

class Reorder(Documents):
    def __init__(self, path: str, documents: int, bytes: int, item: int, memory: int) -> None: ...
    @property
    def buckets(self) -> int: ...
    def expect(self, places: npt.NDArray[np.int64]) -> None: ...
    def drain(self, bucket: int, to: Documents) -> int: ...

def best_fit(lengths: npt.NDArray[np.int32], pack: int) -> npt.NDArray[np.int32]: ...

class Packer(Documents):
    def __init__(self, to: Writer, pack: int, end: int) -> None: ...
    @property
    def cut(self) -> int: ...
    @property
    def padded(self) -> int: ...
    @property
    def padding_tokens(self) -> int: ...
    def flush(self) -> None: ...

def scan(
    path: str, descriptor: int, code: int, vocabulary: int, first: int, blocks: int
) -> tuple[list[int], list[int], list[int]]: ...
def crc32(data: bytes | memoryview, before: int = 0, by_tables: bool = False) -> int: ...
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
        self,
        bin_path: str,
        bin: int,
        code: int,
        tokens: int,
        idx_path: str,
        idx: int,
        sequences: int,
        documents: int,
        padding: int = -1,
        marked: int = 0,
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
    all: bool = False,
) -> npt.NDArray[np.int32] | None: ...

class Plan:
    def __init__(
        self,
        samples: int,
        first: Sequence[int],
        block: Sequence[int],
        quotas: Sequence[int],
        starts: Sequence[int],
        windows: Sequence[int],
        block_text: str,
        epoch_texts: Sequence[str],
    ) -> None: ...
    def locate(
        self, samples: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]: ...

def permute(key: int, index: npt.NDArray[np.int64], size: int, inverse: bool = False) -> npt.NDArray[np.int64]: ...
def counts_in_block(key: int, quotas: Sequence[int], block: int, slot: int) -> npt.NDArray[np.int64]: ...
def key_of(text: str) -> int: ...
