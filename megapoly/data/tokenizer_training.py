"""Training of a SentencePiece tokenizer over languages of very different size. No torch.

The trained tokenizer is PolyLM's (arXiv 2307.06018, section 3.1): BPE, numbers split into digits, characters that are
not in the vocabulary written as UTF-8 bytes, languages sampled by their size to the power of an exponent. Text passes
through it unchanged to the byte: nothing is normalised, no space is added, and a newline is the byte piece <0x0A>.
"""

from __future__ import annotations

import hashlib
import io
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import sentencepiece

from megapoly.data.files import write_whole
from megapoly.data.readers import BadRecords, Document, read_texts
from megapoly.data.sentencepiece_tokenizer import SPACE, SentencePieceTokenizer
from megapoly.errors import DataError

_LONGEST = 1000  # characters of one training sentence; SentencePiece leaves out what is much longer


def train_tokenizer(
    files: Mapping[str, Sequence[Path]],
    output: Path,
    *,
    vocabulary: int,
    alpha: float = 0.3,
    budget: int = 200_000_000,
    text_field: str = "text",
    document: Document = "file",
    bad: BadRecords | None = None,
    overwrite: bool = False,
) -> SentencePieceTokenizer:
    """Train a tokenizer on text in several languages; the same input gives the same file.

    Args:
        files: the files of every language, as :func:`megapoly.data.readers.expand` takes them.
        output: the model file to write.
        vocabulary: number of ids, with <unk> 0, <s> 1, </s> 2 and 256 byte pieces.
        alpha: a language with n bytes is seen in proportion to n^alpha (arXiv 1911.02116). 1 is as the corpus
            is; 0 makes all alike. Lines of small languages are repeated.
        budget: bytes of text to train on, at most as many as there are. 200 MB need some 2 GB of memory.
        text_field: the field of a record that holds the text.
        document: what is a document of plain text.
        bad: what becomes of bad records; the first ends the training where not given.
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
    bad = bad or BadRecords()

    def read(language: str, bad: BadRecords) -> Iterator[str]:
        return read_texts(files[language], text_field, bad, document)

    sizes = {language: sum(len(text.encode()) for text in read(language, bad)) for language in files}
    for language, size in sizes.items():
        if not size:
            raise DataError(f"language {language!r}: no document in {[str(path) for path in files[language]]}")
    # What was skipped in the first pass is skipped again, and counted once.
    again = {language: read(language, BadRecords("skip")) for language in files}
    write_whole(output, _train(_sentences(again, sampling_rates(sizes, alpha, budget)), vocabulary))
    return SentencePieceTokenizer(output)


def _train(sentences: Iterator[str], vocabulary: int) -> bytes:
    """A model with PolyLM's choices."""
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sentences,
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
            required_chars=SPACE,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            max_sentence_length=4 * _LONGEST,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _explain(error, vocabulary) from error
    return model.getvalue()


def sampling_rates(sizes: Mapping[str, int], alpha: float, budget: int) -> dict[str, float]:
    """How often a line of every language is seen in training: its share of the text is its size^alpha.

    The bytes that this makes of all languages are ``budget``, or all that there are if those are fewer.
    """
    total = min(budget, sum(sizes.values()))
    largest = max(sizes.values())
    weights = {name: (size / largest) ** alpha for name, size in sizes.items()}
    norm = math.fsum(weights.values())
    return {name: total * weights[name] / norm / size for name, size in sizes.items()}


def _sentences(texts: Mapping[str, Iterable[str]], rates: Mapping[str, float]) -> Iterator[str]:
    """Lines, so that no piece holds a newline; a line comes floor(rate + u) times, with u from a hash of its number."""
    for language in sorted(texts):
        number = 0
        for text in texts[language]:
            for line in text.split("\n"):
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
