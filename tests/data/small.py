"""Small runs for the tests of plan, samples and loader: a config, and indexed datasets in memory and on disk."""

from __future__ import annotations

import struct

import numpy as np

from megapoly import config as configuration


class FakeDataset:
    """The interface of ``IndexedDataset`` over lists of documents."""

    def __init__(self, documents, held_out=0, identity="fake"):
        self.texts = documents
        self.stream = np.array([token for document in documents for token in document], dtype=np.int64)
        self.identity = identity
        self.documents, self.tokens = len(documents), self.stream.size
        self.train_documents = len(documents) - held_out
        self.train_tokens = sum(map(len, documents[: self.train_documents]))

    def gather(self, starts, length, vocabulary):
        assert len(starts)
        assert 0 <= starts.min() <= starts.max() <= self.tokens - length
        return np.stack([self.stream[start : start + length] for start in starts])

    def fill(self, rows, starts, limit, vocabulary, columns):
        """One token after another: the oracle of the C++."""
        tokens, labels, positions, documents = columns
        length = positions.shape[1]
        for row, start in zip(rows.tolist(), starts.tolist(), strict=True):
            assert 0 <= start < limit <= self.tokens
            begins = set(self.boundaries(start, start + length + 1).tolist()) if documents is not None else set()
            position = document = 0
            for i in range(length):
                at = start + i
                if at in begins:
                    position, document = 0, document + 1
                positions[row, i] = position
                position += 1
                if documents is not None:
                    documents[row, i] = document
                if tokens is not None:
                    tokens[row, i] = self.stream[at] if at < limit else 0
                    labels[row, i] = self.stream[at + 1] if at + 1 < limit and at + 1 not in begins else -1

    def boundaries(self, start, stop):
        offsets = np.unique(np.cumsum([0, *map(len, self.texts)])[:-1])
        return offsets[(offsets > start) & (offsets < stop)]


def write_megatron(prefix, documents):
    """PREFIX.bin and .idx in Megatron's format, as megatron.core.datasets.indexed_dataset lays it out, with uint16."""
    lengths = [len(document) for document in documents]
    ends = np.cumsum(lengths)
    prefix.with_name(prefix.name + ".bin").write_bytes(b"".join(np.array(d, "<u2").tobytes() for d in documents))
    prefix.with_name(prefix.name + ".idx").write_bytes(
        struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 8, len(documents), len(documents) + 1)
        + np.array(lengths, "<i4").tobytes()
        + np.array([0, *(2 * ends[:-1])], "<i8").tobytes()
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
