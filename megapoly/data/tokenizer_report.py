"""How well tokenizers compress every language, side by side. No torch.

Bytes per token are those of the UTF-8 text. Tokens per sentence are the tokens of a text over its sentences: it is what
a sentence costs, but only over translations of the same text do the costs of two languages compare. A sentence ends at
a line's end, after an ideographic full stop, question or exclamation mark, and after such a mark of other scripts where
white space follows. It counts where it holds a letter or digit. So an abbreviation ends one, and a line of Thai, which
marks no sentences, is one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import fsum
from pathlib import Path

from megapoly.data.load_tokenizer import load_tokenizer
from megapoly.data.readers import BadRecords, Document, read_texts
from megapoly.data.tokenizer import Tokenizer
from megapoly.errors import DataError

_END = re.compile(r"[。！？｡]+|[.!?…؟۔।॥።။៕]+[\"'”’»)\]]*(?=\s)|\n")
_WORD = re.compile(r"\w")


def open_tokenizer(path: Path) -> Tokenizer:
    """Any tokenizer, also one that could not end a document."""
    return load_tokenizer(path, ends=False)


def names_of(paths: Sequence[Path]) -> list[str]:
    """A short name for every tokenizer file: its own, or its folder's where that says more; or its whole path."""
    short = [path.parent.name if path.stem == "tokenizer" and path.parent.name else path.stem for path in paths]
    return [name if short.count(name) == 1 else str(path) for name, path in zip(short, paths)]


@dataclass(frozen=True)
class Row:
    """What one language holds, and its tokens under every tokenizer, in their order."""

    language: str
    documents: int
    sentences: int
    bytes: int
    tokens: tuple[int, ...]

    @property
    def bytes_per_token(self) -> tuple[float, ...]:
        return tuple(self.bytes / tokens for tokens in self.tokens)

    @property
    def tokens_per_sentence(self) -> tuple[float, ...]:
        return tuple(tokens / self.sentences for tokens in self.tokens)


@dataclass(frozen=True)
class Report:
    """Tokenizers by name, with the sizes of their vocabularies, and a row for every language."""

    tokenizers: tuple[str, ...]
    vocabularies: tuple[int, ...]
    rows: tuple[Row, ...]

    def mean_bytes_per_token(self) -> tuple[float, ...]:
        """Over the languages, each counted alike."""
        return _means([row.bytes_per_token for row in self.rows])

    def mean_tokens_per_sentence(self) -> tuple[float, ...]:
        return _means([row.tokens_per_sentence for row in self.rows])


def report(
    tokenizers: Mapping[str, Tokenizer],
    files: Mapping[str, Sequence[Path]],
    *,
    text_field: str = "text",
    document: Document = "file",
    bad: BadRecords | None = None,
    progress: Callable[[str], None] = lambda language: None,
) -> Report:
    """Count the tokens of whole files under every tokenizer.

    Args:
        tokenizers: by the names to show.
        files: of every language, as :func:`megapoly.data.readers.expand` takes them.
        text_field, document, bad: as :func:`megapoly.data.readers.read_texts` has them.
        progress: hears of each language before it is read.

    Raises:
        DataError: bad input, or a language without a sentence.
    """
    rows = []
    for language, paths in files.items():
        progress(language)
        documents = sentences = size = 0
        tokens = [0] * len(tokenizers)
        for batch in batches(read_texts(paths, text_field, bad or BadRecords(), document)):
            documents += len(batch)
            sentences += sum(map(count_sentences, batch))
            size += sum(len(text.encode()) for text in batch)
            for i, tokenizer in enumerate(tokenizers.values()):
                tokens[i] += len(tokenizer.encode_flat(batch)[0])
        if not sentences:
            raise DataError(f"language {language!r}: no document with words in {[str(path) for path in paths]}")
        rows.append(Row(language, documents, sentences, size, tuple(tokens)))
    return Report(tuple(tokenizers), tuple(each.vocabulary for each in tokenizers.values()), tuple(rows))


def count_sentences(text: str) -> int:
    """Sentences of a text by the rule at the head of this file."""
    return sum(1 for part in _END.split(text) if _WORD.search(part))


def batches(texts: Iterator[str], characters: int = 1 << 20) -> Iterator[list[str]]:
    """Lists of texts of about so many characters."""
    batch: list[str] = []
    held = 0
    for text in texts:
        batch.append(text)
        held += len(text)
        if held >= characters:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


def _means(rows: Sequence[tuple[float, ...]]) -> tuple[float, ...]:
    return tuple(fsum(column) / len(rows) for column in zip(*rows))
