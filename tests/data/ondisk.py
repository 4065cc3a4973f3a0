"""Indexed datasets of random tokens, and bytes of them to change."""

from __future__ import annotations

import numpy as np

from megapoly.data import _index
from megapoly.data.indexed import dtype_code
from megapoly.data.sidecar import Checksums, Sidecar, TokenizerMark, Validation

VOCABULARY = 1000


def random_documents(count=50, vocabulary=VOCABULARY, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocabulary, rng.integers(1, 40)) for _ in range(count)]


def write(prefix, documents, *, held_out=0, sidecar=True, vocabulary=VOCABULARY):
    """A dataset of ``documents``, the last ``held_out`` of them held out."""
    writer = _index.Writer(f"{prefix}.bin", f"{prefix}.idx", dtype_code(vocabulary), vocabulary)
    writer.append(np.concatenate(documents), np.array([len(document) for document in documents]))
    count, tokens, bin_crcs, idx_crcs = writer.finish()
    if sidecar:
        held = documents[len(documents) - held_out :]
        made = Sidecar(
            language="xx",
            tokenizer=TokenizerMark(sha256="0" * 64, vocabulary=vocabulary),
            documents=count,
            tokens=tokens,
            bytes=tokens,
            validation=Validation(
                fraction=0.1, seed=0, documents=held_out, tokens=sum(map(len, held)), bytes=sum(map(len, held))
            ),
            checksums=Checksums(block=_index.BLOCK_BYTES, bin=Checksums.join(bin_crcs), idx=Checksums.join(idx_crcs)),
            tool="test",
        )
        prefix.with_suffix(".json").write_text(made.text())
    return prefix


def patch(path, offset, data):
    content = bytearray(path.read_bytes())
    content[offset : offset + len(data)] = data
    path.write_bytes(content)
