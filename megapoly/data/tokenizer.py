"""SentencePiece tokenizers: loading, training over languages of very different size, and a report. No torch.

The trained tokenizer is PolyLM's (arXiv 2307.06018, section 3.1): BPE, numbers split into digits, characters that are
not in the vocabulary written as UTF-8 bytes, languages sampled by their size to the power of an exponent. Text passes
through it unchanged to the byte: nothing is normalised, no space is added, and a newline is the byte piece <0x0A>.
"""

from __future__ import annotations

import hashlib
import io
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import sentencepiece

from megapoly.data.files import JsonLines, write_whole
from megapoly.data.indexed import IndexedDataset
from megapoly.errors import DataError

_SPACE = "\u2581"  # how SentencePiece writes a space inside a piece
_LONGEST = 1000  # characters of one training sentence; SentencePiece leaves out what is much longer


class Tokenizer:
    """A loaded SentencePiece model.

    Attributes:
        path: the model file.
        sha256: hex digest of the file's bytes.
        vocabulary: number of ids.
        eod: id of ``</s>``, which ends a document.
    """

    def __init__(self, path: Path, model: bytes) -> None:
        self.path = Path(path)
        self.sha256 = hashlib.sha256(model).hexdigest()
        self._model = sentencepiece.SentencePieceProcessor()
        try:
            self._model.LoadFromSerializedProto(model)
        except RuntimeError as error:
            raise DataError(f"{path}: is not a SentencePiece model; give one that SentencePiece has trained") from error
        self.vocabulary = int(self._model.vocab_size())
        self.eod = int(self._model.piece_to_id("</s>"))
        if not self._model.is_control(self.eod):
            raise DataError(f"{path}: has no control piece </s>, which ends documents; train it with one")
        # Text may hold the very character that stands for a space. Its bytes keep the two apart, where there are byte
        # pieces and splitting the text adds no space.
        mark = self._model.piece_to_id([f"<0x{byte:02X}>" for byte in _SPACE.encode()])
        adds_space = str(self._model.id_to_piece(self._model.encode("a")[0])).startswith(_SPACE)
        self._mark: list[int] = [] if adds_space or not all(map(self._model.is_byte, mark)) else mark

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Load a SentencePiece model file.

        Raises:
            DataError: the file is missing, or is not such a model, or has no ``</s>``.
        """
        try:
            model = Path(path).read_bytes()
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}); give a SentencePiece .model file") from error
        return cls(Path(path), model)

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text], threads=1)[0]

    def encode_batch(self, texts: Sequence[str], threads: int = 0) -> list[list[int]]:
        """Ids of several texts, on ``threads`` threads (0: one for each core). No begin or end piece is added."""
        parts = [text.split(_SPACE) if self._mark else [text] for text in texts]
        encoded = iter(self._model.encode([part for text in parts for part in text], num_threads=threads or -1))
        result: list[list[int]] = []
        for text in parts:
            ids = next(encoded)
            for _ in text[1:]:
                ids += self._mark + next(encoded)
            result.append(ids)
        return result

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._model.decode(list(ids)))

    def byte_lengths(self) -> npt.NDArray[np.int32]:
        """[vocabulary]: the bytes of UTF-8 text that every id stands for; 0 for control pieces.

        For tokenizers of :func:`train_tokenizer` the lengths of an encoded text sum to its length in bytes. One that
        normalises text, adds a space or has no byte pieces comes close to that only.
        """
        model = self._model
        lengths = np.zeros(self.vocabulary, np.int32)
        for i in range(self.vocabulary):
            if model.is_byte(i):
                lengths[i] = 1
            elif not (model.is_control(i) or model.is_unknown(i) or model.is_unused(i)):
                lengths[i] = len(model.id_to_piece(i).replace(_SPACE, " ").encode())
        return lengths


def train_tokenizer(
    files: Mapping[str, Sequence[Path]],
    output: Path,
    *,
    vocabulary: int,
    alpha: float = 0.3,
    budget: int = 200_000_000,
    text_field: str = "text",
    overwrite: bool = False,
) -> Tokenizer:
    """Train a tokenizer on JSON lines of several languages; the same input gives the same file.

    Args:
        files: the .jsonl or .jsonl.gz files of every language.
        output: the model file to write.
        vocabulary: number of ids, with <unk> 0, <s> 1, </s> 2 and 256 byte pieces.
        alpha: a language with n bytes is seen in proportion to n^alpha (arXiv 1911.02116). 1 is as the corpus
            is; 0 makes all alike. Lines of small languages are repeated.
        budget: bytes of text to train on, at most as many as there are. 200 MB need some 2 GB of memory.
        text_field: the field of a record that holds the text.
        overwrite: replace ``output`` where it exists.

    Raises:
        DataError: bad input, a language without text, a vocabulary that the text cannot fill or that has no room for
            its characters, or an ``output`` that exists.
    """
    output = Path(output)
    if output.exists() and not overwrite:
        raise DataError(f"{output}: exists already, and datasets may depend on it; choose another name or overwrite it")
    if not 0 <= alpha <= 1:
        raise DataError(f"alpha {alpha} is not from 0 (all languages alike) to 1 (as the corpus is)")
    rates = sampling_rates({name: _text_bytes(name, paths, text_field) for name, paths in files.items()}, alpha, budget)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sentences(files, rates, text_field),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocabulary,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            byte_fallback=True,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            required_chars=_SPACE,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            max_sentence_length=4 * _LONGEST,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _explain(error, vocabulary) from error
    write_whole(output, model.getvalue())
    return Tokenizer.load(output)


def sampling_rates(sizes: Mapping[str, int], alpha: float, budget: int) -> dict[str, float]:
    """How often a line of every language is seen in training: its share of the text is its size^alpha.

    The bytes that this makes of all languages are ``budget``, or all that there are if those are fewer.
    """
    total = min(budget, sum(sizes.values()))
    largest = max(sizes.values())
    weights = {name: (size / largest) ** alpha for name, size in sizes.items()}
    norm = math.fsum(weights.values())
    return {name: total * weights[name] / norm / size for name, size in sizes.items()}


def _text_bytes(language: str, paths: Sequence[Path], field: str) -> int:
    size = sum(len(record.text(field).encode()) for path in paths for record in JsonLines(path))
    if not size:
        raise DataError(f"language {language!r}: no document in {[str(path) for path in paths]}")
    return size


def _sentences(files: Mapping[str, Sequence[Path]], rates: Mapping[str, float], field: str) -> Iterator[str]:
    """Lines, so that no piece holds a newline; a line comes floor(rate + u) times, with u from a hash of its number."""
    for language in sorted(files):
        number = 0
        for record in (record for path in files[language] for record in JsonLines(path)):
            for line in record.text(field).split("\n"):
                for start in range(0, len(line), _LONGEST):
                    number += 1
                    draw = hashlib.blake2b(f"{language} {number}".encode(), digest_size=8).digest()
                    copies = math.floor(rates[language] + int.from_bytes(draw, "little") / 2**64)
                    for _ in range(copies):
                        yield line[start : start + _LONGEST]


def _explain(error: RuntimeError, vocabulary: int) -> DataError:
    if found := re.search(r"Vocabulary size too high.*<= (\d+)", str(error)):
        return DataError(
            f"a vocabulary of {vocabulary} is more than this text can fill; the largest possible is {found[1]}"
        )
    if found := re.search(r"smaller than required_chars\. \d+ vs (\d+)", str(error)):
        return DataError(
            f"a vocabulary of {vocabulary} has no room for the characters of this text; the smallest possible is"
            f" {found[1]}"
        )
    return DataError(f"SentencePiece cannot train on this text: {error}")


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
    is_byte = np.array([tokenizer._model.is_byte(i) for i in range(tokenizer.vocabulary)])
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
    for record in (record for path in paths for record in JsonLines(path)):
        batch.append(record.text(field))
        held += len(batch[-1])
        if held >= characters:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


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
