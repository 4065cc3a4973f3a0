"""Small runs for the tests of plan, samples and loader: a config, and indexed datasets in memory and on disk."""

from __future__ import annotations

import os
import struct
import tempfile
from pathlib import Path

import numpy as np

from megapoly import config as configuration
from megapoly.data import _index


class FakeDataset:
    """Documents in memory and in Megatron's files, with the attributes of ``IndexedDataset`` that batches need."""

    def __init__(self, documents, held_out=0, identity="fake", pack=0):
        self.texts, self.identity, self.pack = documents, identity, pack
        self.documents, self.tokens = len(documents), sum(map(len, documents))
        self.train_documents = len(documents) - held_out
        self.train_tokens = sum(map(len, documents[: self.train_documents]))
        self.prefix = "fake"
        with tempfile.TemporaryDirectory() as folder:
            self.reader = self.open(Path(folder) / "d")

    def open(self, prefix):
        """What reads batches; the files may go, it holds them."""
        write_megatron(prefix, self.texts)
        names = [str(prefix) + suffix for suffix in (".bin", ".idx")]
        bin_file, idx_file = (os.open(name, os.O_RDONLY) for name in names)
        try:
            return _index.Dataset(
                names[0], bin_file, 8, self.tokens, names[1], idx_file, self.documents, self.documents
            )
        finally:
            os.close(bin_file)
            os.close(idx_file)


def expected_row(documents, start, end, length, separate):
    """Tokens, labels, positions and documents of the window at ``start``, of a stream that ends at ``end``."""
    stream = [
        (token, document, offset) for document, text in enumerate(documents) for offset, token in enumerate(text)
    ][:end]
    tokens, labels, positions, numbers = [], [], [], []
    for i in range(start, start + length):
        here = stream[i] if i < end else None
        after = stream[i + 1] if i + 1 < end else None
        tokens.append(here[0] if here else 0)
        counted = after and not (separate and after[1] != here[1])
        labels.append(after[0] if counted else -1)
        begins = i > start and here is not None and here[2] == 0
        if not separate or i == start:
            positions.append(i - start)
            numbers.append(0)
        else:
            positions.append(0 if begins else positions[-1] + 1)
            numbers.append(numbers[-1] + begins)
    return tokens, labels, positions, numbers


CODES = {"u1": 1, "i1": 2, "<i2": 3, "<i4": 4, "<i8": 5, "<u2": 8}


def write_megatron(prefix, documents, dtype="<u2"):
    """PREFIX.bin and .idx in Megatron's format, as megatron.core.datasets.indexed_dataset lays it out."""
    lengths = [len(document) for document in documents]
    ends = np.cumsum(lengths)
    prefix.with_name(prefix.name + ".bin").write_bytes(b"".join(np.array(d, dtype).tobytes() for d in documents))
    prefix.with_name(prefix.name + ".idx").write_bytes(
        struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, CODES[dtype], len(documents), len(documents) + 1)
        + np.array(lengths, "<i4").tobytes()
        + np.array([0, *(np.dtype(dtype).itemsize * ends[:-1])], "<i8").tobytes()
        + np.arange(len(documents) + 1, dtype="<i8").tobytes()
    )


def make_config(*, sequence=8, global_batch=4, separate=False, **layout):
    """Two sources, ``en`` and ``fr``, in two stages of 10 and 5 global batches."""
    tree = {
        "model": {"layers": 4, "hidden": 8, "heads": 2, "ffn": 8, "vocabulary": 100, "positions": 64},
        "layout": {"dp": 1, **layout},
        "data": {
            "tokenizer": "t.model",
            "sources": {"fr": {"path": "fr", "language": "fr"}, "en": {"path": "en", "language": "en"}},
            "stages": [
                {"name": "one", "tokens": sequence * global_batch * 10, "weights": {"en": 0.75, "fr": 0.25}},
                {"name": "two", "tokens": sequence * global_batch * 5, "weights": {"en": 0.25, "fr": 0.75}},
            ],
            "separate_documents": separate,
        },
        "train": {"directory": "run", "sequence": sequence, "global_batch": global_batch},
        "optimizer": {"learning_rate": 0.01},
    }
    return configuration.parse(tree)
