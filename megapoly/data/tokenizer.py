"""What tokenizers of all kinds are to data, and the check that one is that of a dataset. No torch."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megapoly.data.indexed import IndexedDataset
from megapoly.data.sidecar import TokenizerMark
from megapoly.errors import DataError

Ids = npt.NDArray[np.int32]
Lengths = npt.NDArray[np.int64]

_BREAK = "\n"


class Tokenizer(ABC):
    """Text to ids and back.

    Attributes:
        path: the file.
        sha256: hex digest of its bytes.
        vocabulary: number of ids.
        eod: id that ends a document; -1 where there is none.
        bos: id of the token that begins one in models such as LLaMA's; None where there is none.
        begin: ids that the tokenizer puts before every text: that of ``bos``, or none.
        encoder: what encodes: "megapoly" where that is our own byte-pair encoder, several times as fast as the
            libraries, else a library's name, with the reason.
    """

    vocabulary: int
    eod: int
    bos: int | None
    begin: tuple[int, ...] = ()
    encoder: str

    def __init__(self, path: Path, content: bytes) -> None:
        self.path = path
        self.sha256 = hashlib.sha256(content).hexdigest()

    @abstractmethod
    def encode_flat(self, texts: Sequence[str], threads: int = 0, special: bool = False) -> tuple[Ids, Lengths]:
        """Ids of n texts on ``threads`` threads (0: one for each core). No begin or end is added.

        Args:
            special: the words of a special token, such as ``<|im_start|>``, stand for it; else they are text as any.

        Returns:
            The ids of all texts one after another, and [n] how many each text has.

        Raises:
            DataError: a text holds half a surrogate pair, or what the tokenizer refuses for want of a token.
        """

    def encode_prompts(self, prompts: Sequence[str], firsts: Sequence[bool], threads: int = 0) -> tuple[Ids, Lengths]:
        """As :meth:`encode_flat`, of prompts as a tuned model is asked with them; special tokens by their words.

        Args:
            firsts: which prompts begin a text, and have ``begin`` before them; the others stand behind an answer's end.
        """
        return self.encode_flat(prompts, threads, special=True)

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text], threads=1)[0]

    def encode_batch(self, texts: Sequence[str], threads: int = 0) -> list[list[int]]:
        """Ids of several texts, as lists; the arguments of :meth:`encode_flat`."""
        ids, lengths = self.encode_flat(texts, threads)
        return [part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1])] if len(texts) else []

    def encode_after(self, texts: Sequence[str], threads: int = 0) -> tuple[Ids, Lengths]:
        """As :meth:`encode_flat`, of texts that go on from a line break.

        A tokenizer that puts a space before a text puts none there.
        """
        guard = self._guard
        if not (len(guard) and len(texts)):
            return self.encode_flat(texts, threads)
        ids, lengths = self.encode_flat([_BREAK + text for text in texts], threads)
        parts = np.split(ids, np.cumsum(lengths)[:-1])
        for i, part in enumerate(parts):
            begins = np.array_equal(part[: len(guard)], guard)
            parts[i] = part[len(guard) :] if begins else self.encode_flat([texts[i]], threads)[0]
        return np.concatenate(parts), np.array([len(part) for part in parts])

    @cached_property
    def _guard(self) -> Ids:
        """Of a line break, where a text has other ids behind one than by itself; else none."""
        ids, lengths = self.encode_flat([_BREAK, _BREAK + "a", "a"], 1)
        alone, behind, bare = np.split(ids, np.cumsum(lengths)[:-1])
        return alone[:0] if np.array_equal(behind, [*alone, *bare]) else alone

    @property
    def mark(self) -> TokenizerMark:
        """What a dataset keeps of it."""
        return TokenizerMark(sha256=self.sha256, vocabulary=self.vocabulary, begin=self.begin, eod=self.eod)

    @property
    def loses(self) -> bool:
        """Whether characters that it has no token for vanish from a text."""
        return False

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; special tokens have none."""

    @abstractmethod
    def piece(self, i: int) -> str:
        """The token with id ``i`` as its file writes it, special ones too."""

    @abstractmethod
    def byte_lengths(self) -> npt.NDArray[np.int32]:
        """[vocabulary]: the bytes of UTF-8 text that every id stands for; 0 for control and special tokens.

        For tokenizers that megapoly trains, and for byte-level ones, the lengths of an encoded text sum to its length
        in bytes. One that normalises text, adds a space or has no bytes among its tokens comes close to that only.
        """


def read_file(path: Path, expected: str) -> bytes:
    """The content of a tokenizer's file.

    Raises:
        DataError: it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); give {expected}") from error


def check_matches(tokenizer: Tokenizer, dataset: IndexedDataset) -> None:
    """Refuse a dataset that another tokenizer wrote. A foreign dataset, without a sidecar, is not known to differ.

    Raises:
        DataError: the hashes or the vocabularies differ.
    """
    if dataset.sidecar is None:
        return
    made, given = dataset.sidecar.tokenizer, tokenizer.mark
    if (made.sha256, made.vocabulary) != (given.sha256, given.vocabulary):
        raise DataError(
            f"{dataset.prefix}: was built with a tokenizer of {made.vocabulary} ids, SHA-256 {made.sha256[:16]}..., but"
            f" {tokenizer.path} has {tokenizer.vocabulary}, SHA-256 {tokenizer.sha256[:16]}...; give the tokenizer that"
            " built the dataset, or build the dataset again"
        )
    if made.eod is not None and made != given:
        raise DataError(
            f"{dataset.prefix}: its documents begin with ids {list(made.begin)} and end with {made.eod}, those of"
            f" {tokenizer.path} with {list(given.begin)} and {given.eod}; look at the files beside that, which say so,"
            " or build the dataset again"
        )
