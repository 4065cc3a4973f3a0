"""Whether our encoder gives SentencePiece's own ids on a user's text, and how fast both are. No torch."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megapoly.data.readers import BadRecords, Document, read_texts
from megapoly.data.sentencepiece_tokenizer import SentencePieceTokenizer
from megapoly.data.tokenizer_report import batches
from megapoly.errors import DataError


@dataclass(frozen=True)
class Check:
    """One language: what was encoded twice on one thread, and the seconds that it took ours and the library.

    Attributes:
        different: how many documents have other ids.
        first: the first of them, its number among the language's documents and where its ids part; empty: none.
    """

    language: str
    documents: int
    bytes: int
    tokens: int
    seconds: float
    library_seconds: float
    different: int
    first: str

    @property
    def speed(self) -> float:
        """MB of text a second."""
        return self.bytes / 1e6 / self.seconds

    @property
    def library_speed(self) -> float:
        return self.bytes / 1e6 / self.library_seconds


def check(
    tokenizer: SentencePieceTokenizer,
    files: Mapping[str, Sequence[Path]],
    *,
    text_field: str = "text",
    document: Document = "file",
    bad: BadRecords | None = None,
    progress: Callable[[str], None] = lambda language: None,
) -> list[Check]:
    """Encode whole files by both encoders and compare every id; arguments as of :func:`tokenizer_report.report`.

    Raises:
        DataError: bad input, a language without text, or a model that only the library encodes.
    """
    if tokenizer.encoder != "megapoly":
        raise DataError(
            f"{tokenizer.path}: is encoded by {tokenizer.encoder}, with which there is nothing to compare; its datasets"
            " are right, and are built at the library's speed"
        )
    rows = []
    for language, paths in files.items():
        progress(language)
        documents = size = tokens = different = 0
        seconds = library_seconds = 0.0
        first = ""
        for batch in batches(read_texts(paths, text_field, bad or BadRecords(), document)):
            begun = time.perf_counter()
            ids, lengths = tokenizer.encode_flat(batch, 1)
            between = time.perf_counter()
            wanted, wanted_lengths = tokenizer.encode_flat(batch, 1, by_library=True)
            library_seconds += time.perf_counter() - between
            seconds += between - begun
            if not (np.array_equal(ids, wanted) and np.array_equal(lengths, wanted_lengths)):
                places = _differences(np.split(ids, np.cumsum(lengths)), np.split(wanted, np.cumsum(wanted_lengths)))
                number, where = places[0]
                first = first or f"document {documents + number} of {language!r}, {where}"
                different += len(places)
            documents += len(batch)
            size += sum(len(text.encode()) for text in batch)
            tokens += len(wanted)
        if not documents:
            raise DataError(f"language {language!r}: no document in {[str(path) for path in paths]}")
        rows.append(Check(language, documents, size, tokens, seconds, library_seconds, different, first))
    return rows


def _differences(found: Sequence[np.ndarray], wanted: Sequence[np.ndarray]) -> list[tuple[int, str]]:
    """The documents whose ids differ, with the place where they part."""
    places = []
    for number, (ours, theirs) in enumerate(zip(found, wanted)):
        if np.array_equal(ours, theirs):
            continue
        both = min(len(ours), len(theirs))
        parts = np.flatnonzero(ours[:both] != theirs[:both])
        at = int(parts[0]) if len(parts) else both
        places.append((number, f"token {at}: {ours[at : at + 5].tolist()}, expected {theirs[at : at + 5].tolist()}"))
    return places
