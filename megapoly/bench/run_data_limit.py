"""``python -m``: what this machine allows: windows copied from the page cache, bytes brought to the disk. No torch."""

from __future__ import annotations

import os

import numpy as np

from megapoly.bench.data_job import Measured, repeated, serve, watch

_ROWS = 256


def copy(prefix: str, sequence: int, item: int, seconds: float) -> Measured:
    """Random windows of the .bin as two arrays of int64, tokens and labels, by one memcpy-like loop each."""
    stream = np.memmap(f"{prefix}.bin", np.dtype(f"u{item}"), "r")
    tokens, labels = np.empty((2, _ROWS, sequence), np.int64)
    rng = np.random.default_rng(6)

    def batch(number: int) -> int:
        for row, start in enumerate(rng.integers(0, len(stream) - sequence, _ROWS).tolist()):
            tokens[row] = stream[start : start + sequence]
            labels[row] = stream[start + 1 : start + sequence + 1]
        return _ROWS

    return repeated(batch, seconds)


def disk(path: str, size: int, item: int) -> Measured:
    """``size`` bytes of random content in blocks of 1 MiB, until they are on the disk; the work is counted in items."""
    block = os.urandom(1 << 20)
    rounds = max(1, size >> 20)
    with watch((rounds << 20) / item) as result, open(path, "wb", buffering=0) as file:
        for _ in range(rounds):
            file.write(block)
        os.fsync(file.fileno())
    return result


if __name__ == "__main__":
    serve({"copy": copy, "disk": disk})
