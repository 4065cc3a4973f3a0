"""How well a tokenizer compresses every language. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megapoly.data.readers import BadRecords, read_texts
from megapoly.data.tokenizer import Tokenizer
from megapoly.errors import DataError


@dataclass(frozen=True)
class Compression:
    """How a tokenizer does on one language."""

    language: str
    documents: int
    bytes: int
    tokens: int
    byte_tokens: int

    @property
    def bytes_per_token(self) -> float:
        return self.bytes / self.tokens

    @property
    def byte_share(self) -> float:
        """Share of the tokens that are single bytes of characters outside the vocabulary, or newlines."""
        return self.byte_tokens / self.tokens


def report(
    tokenizer: Tokenizer,
    files: Mapping[str, Sequence[Path]],
    *,
    text_field: str = "text",
    progress: Callable[[str], None] = lambda language: None,
) -> list[Compression]:
    """Bytes per token in every language, over whole files. ``progress`` hears of each language before it is read."""
    is_byte = np.array([tokenizer.is_byte(i) for i in range(tokenizer.vocabulary)])
    rows = []
    for language, paths in files.items():
        progress(language)
        documents = size = tokens = byte_tokens = 0
        for batch in _batches(paths, text_field):
            encoded = tokenizer.encode_batch(batch)
            documents += len(batch)
            size += sum(len(text.encode()) for text in batch)
            tokens += sum(map(len, encoded))
            byte_tokens += sum(int(is_byte[ids].sum()) for ids in encoded)
        if not documents:
            raise DataError(f"language {language!r}: no document in {[str(path) for path in paths]}")
        rows.append(Compression(language, documents, size, tokens, byte_tokens))
    return rows


def _batches(paths: Sequence[Path], field: str, characters: int = 1 << 20) -> Iterator[list[str]]:
    batch: list[str] = []
    held = 0
    for text in read_texts(paths, field, BadRecords()):
        batch.append(text)
        held += len(batch[-1])
        if held >= characters:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch
