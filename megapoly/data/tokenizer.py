"""A loaded SentencePiece tokenizer, and the check that it is the one of a dataset. No torch."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import numpy.typing as npt
import sentencepiece

from megapoly.data import _index
from megapoly.data.indexed import IndexedDataset
from megapoly.errors import DataError

SPACE = "\u2581"  # how SentencePiece writes a space inside a piece


class Tokenizer:
    """A loaded SentencePiece model.

    Args:
        ends: refuse a model that has no ``</s>`` to end documents with.

    Attributes:
        path: the model file.
        sha256: hex digest of the file's bytes.
        vocabulary: number of ids.
        eod: id of ``</s>``, which ends a document.
        bos: id of the piece that begins one in models such as LLaMA's; None where there is none.
        encoder: "megapoly" where our byte-pair encoder works, which returns what the library would, several times as
            fast; else "sentencepiece", with the reason.
    """

    def __init__(self, path: Path, model: bytes, ends: bool = True) -> None:
        self.path = Path(path)
        self.sha256 = hashlib.sha256(model).hexdigest()
        self._model = sentencepiece.SentencePieceProcessor()
        try:
            fast = _index.BpeEncoder(model)  # first: it looks where the library trusts
            self._model.LoadFromSerializedProto(model)
            first = self._model.encode(b"a")[:1]
            adds_space = bool(first) and str(self._model.id_to_piece(first[0])).startswith(SPACE)
        except (RuntimeError, UnicodeDecodeError, DataError) as error:
            foreign = path.suffix == ".json"  # generation and evaluation take one, data do not
            what = "; data are built with SentencePiece models alone" if foreign else ""
            raise DataError(
                f"{path}: is not a SentencePiece model ({error}){what}; give one that SentencePiece has trained"
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

    @classmethod
    def load(cls, path: str | Path, ends: bool = True) -> Tokenizer:
        """Load a SentencePiece model file.

        Raises:
            DataError: the file is missing, or is not such a model, or has no ``</s>`` and ``ends`` is set.
        """
        try:
            model = Path(path).read_bytes()
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}); give a SentencePiece .model file") from error
        return cls(Path(path), model, ends)

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text], threads=1)[0]

    def encode_batch(self, texts: Sequence[str], threads: int = 0) -> list[list[int]]:
        """Ids of several texts, as lists; the arguments of :meth:`encode_flat`."""
        ids, lengths = self.encode_flat(texts, threads)
        return [part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1])] if len(texts) else []

    def encode_flat(
        self, texts: Sequence[str], threads: int = 0, by_library: bool = False
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        """Ids of n texts on ``threads`` threads (0: one for each core). No begin or end piece is added.

        Args:
            by_library: SentencePiece's own encoder does the work, to check ours.

        Returns:
            The ids of all texts one after another, and [n] how many each text has.

        Raises:
            DataError: a text holds half a surrogate pair.
        """
        if not self._mark or not any(SPACE in text for text in texts):
            return self._encode(texts, threads, by_library)
        parts = [text.split(SPACE) for text in texts]
        ids, lengths = self._encode([part for text in parts for part in text], threads, by_library)
        encoded = iter(np.split(ids, np.cumsum(lengths)[:-1]))
        joined: list[npt.NDArray[np.int32]] = []
        ends = np.zeros(len(texts), np.int64)
        mark = np.array(self._mark, np.int32)
        for i, text in enumerate(parts):
            pieces = [next(encoded)]
            for _ in text[1:]:
                pieces += [mark, next(encoded)]
            ends[i] = sum(map(len, pieces))
            joined += pieces
        return np.concatenate(joined), ends

    def _encode(
        self, texts: Sequence[str], threads: int, by_library: bool
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
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
        """The piece with id ``i`` as SentencePiece writes it."""
        return str(self._model.id_to_piece(i))

    def is_special(self, i: int) -> bool:
        """Whether id ``i`` stands for no text: a control piece, or the unknown one."""
        return bool(self._model.is_control(i) or self._model.is_unknown(i))

    def is_byte(self, i: int) -> bool:
        """Whether id ``i`` is a byte piece."""
        return bool(self._model.is_byte(i))

    def byte_lengths(self) -> npt.NDArray[np.int32]:
        """[vocabulary]: the bytes of UTF-8 text that every id stands for; 0 for control pieces.

        For tokenizers that megapoly trains the lengths of an encoded text sum to its length in bytes. One that
        normalises text, adds a space or has no byte pieces comes close to that only.
        """
        model = self._model
        lengths = np.zeros(self.vocabulary, np.int32)
        for i in range(self.vocabulary):
            if model.is_byte(i):
                lengths[i] = 1
            elif not (model.is_control(i) or model.is_unknown(i) or model.is_unused(i)):
                lengths[i] = len(model.id_to_piece(i).replace(SPACE, " ").encode())
        return lengths


def check_matches(tokenizer: Tokenizer, dataset: IndexedDataset) -> None:
    """Refuse a dataset that another tokenizer wrote. A foreign dataset, without a sidecar, is not known to differ.

    Raises:
        DataError: the hashes or the vocabularies differ.
    """
    if dataset.sidecar is None:
        return
    made = dataset.sidecar.tokenizer
    if (made.sha256, made.vocabulary) != (tokenizer.sha256, tokenizer.vocabulary):
        raise DataError(
            f"{dataset.prefix}: was built with a tokenizer of {made.vocabulary} ids, SHA-256 {made.sha256[:16]}..., but"
            f" {tokenizer.path} has {tokenizer.vocabulary}, SHA-256 {tokenizer.sha256[:16]}...; give the tokenizer that"
            " built the dataset, or build the dataset again"
        )
