"""Tokenizers of SentencePiece. No torch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import numpy.typing as npt
import sentencepiece

from megapoly.data import _index
from megapoly.data.tokenizer import Ids, Lengths, Tokenizer, read_file
from megapoly.errors import DataError

SPACE = "\u2581"  # how SentencePiece writes a space inside a piece


class SentencePieceTokenizer(Tokenizer):
    """A loaded SentencePiece model, whose documents end with ``</s>``.

    Args:
        ends: refuse a model that has no ``</s>``.

    Raises:
        DataError: the file is missing, or is not such a model, or has no ``</s>`` and ``ends`` is set.
    """

    def __init__(self, path: str | Path, ends: bool = True) -> None:
        path = Path(path)
        model = read_file(path, "a SentencePiece .model file")
        super().__init__(path, model)
        self._model = sentencepiece.SentencePieceProcessor()
        try:
            fast = _index.BpeEncoder(model)  # first: it looks where the library trusts
            self._model.LoadFromSerializedProto(model)
            first = self._model.encode(b"a")[:1]
            adds_space = bool(first) and str(self._model.id_to_piece(first[0])).startswith(SPACE)
        except (RuntimeError, UnicodeDecodeError, DataError) as error:
            raise DataError(
                f"{path}: is not a SentencePiece model ({error}); give one that SentencePiece has trained, or a"
                " tokenizer.json"
            ) from error
        self._fast = None if fast.refusal else fast
        self.encoder = f"sentencepiece ({fast.refusal})" if fast.refusal else "megapoly"
        self.vocabulary = int(self._model.vocab_size())
        self.eod = int(self._model.piece_to_id("</s>"))
        self.bos: int | None = bos if (bos := int(self._model.bos_id())) >= 0 else None
        if ends and not self._model.is_control(self.eod):
            raise DataError(f"{path}: has no control piece </s>, which ends documents; train it with one")
        # Text may hold the very character that stands for a space. Its bytes keep the two apart, where there are byte
        # pieces and splitting the text adds no space.
        mark = self._model.piece_to_id([f"<0x{byte:02X}>" for byte in SPACE.encode()])
        self._mark: list[int] = [] if adds_space or not all(map(self._model.is_byte, mark)) else mark

    def encode_flat(
        self, texts: Sequence[str], threads: int = 0, special: bool = False, by_library: bool = False
    ) -> tuple[Ids, Lengths]:
        """As of :class:`Tokenizer`; no words stand for a control piece, ``special`` or not.

        Args:
            by_library: SentencePiece's own encoder does the work, to check ours.
        """
        if not self._mark or not any(SPACE in text for text in texts):
            return self._encode(texts, threads, by_library)
        parts = [text.split(SPACE) for text in texts]
        ids, lengths = self._encode([part for text in parts for part in text], threads, by_library)
        encoded = iter(np.split(ids, np.cumsum(lengths)[:-1]))
        joined: list[Ids] = []
        ends = np.zeros(len(texts), np.int64)
        mark = np.array(self._mark, np.int32)
        for i, text in enumerate(parts):
            pieces = [next(encoded)]
            for _ in text[1:]:
                pieces += [mark, next(encoded)]
            ends[i] = sum(map(len, pieces))
            joined += pieces
        return np.concatenate(joined), ends

    def _encode(self, texts: Sequence[str], threads: int, by_library: bool) -> tuple[Ids, Lengths]:
        if self._fast is not None and not by_library:
            return self._fast.encode(texts, threads or os.cpu_count() or 1)
        try:
            encoded = self._model.encode([text.encode() for text in texts], num_threads=threads or -1)
        except UnicodeEncodeError as error:
            raise DataError(f"a text holds half a surrogate pair, which is not text: {error}") from error
        lengths = np.array([len(ids) for ids in encoded], np.int64)
        return np.fromiter(chain.from_iterable(encoded), np.int32, int(lengths.sum())), lengths

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._model.decode(list(ids)))

    def piece(self, i: int) -> str:
        """The piece with id ``i``, where :data:`SPACE` stands for a space."""
        return str(self._model.id_to_piece(i))

    def is_special(self, i: int) -> bool:
        """Whether id ``i`` stands for no text: a control piece, or the unknown one."""
        return bool(self._model.is_control(i) or self._model.is_unknown(i))

    def is_byte(self, i: int) -> bool:
        """Whether id ``i`` is a byte piece."""
        return bool(self._model.is_byte(i))

    def byte_lengths(self) -> npt.NDArray[np.int32]:
        model = self._model
        lengths = np.zeros(self.vocabulary, np.int32)
        for i in range(self.vocabulary):
            if model.is_byte(i):
                lengths[i] = 1
            elif not (model.is_control(i) or model.is_unknown(i) or model.is_unused(i)):
                lengths[i] = len(model.id_to_piece(i).replace(SPACE, " ").encode())
        return lengths
