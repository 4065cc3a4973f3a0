"""What the benchmark of the data engine reads: datasets of random tokens, text in several scripts. No torch."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import sentencepiece

from megapoly.data import _index
from megapoly.data.indexed import HEADER, MAGIC, dtype_code

# First character and number of characters of an alphabet, and how many of them a word has at most.
_SCRIPTS = {
    "latin": ("a", 26, 10),
    "cyrillic": ("а", 32, 10),
    "greek": ("α", 25, 10),
    "hebrew": ("א", 27, 8),
    "arabic": ("ب", 35, 8),
    "devanagari": ("अ", 50, 8),
    "thai": ("ก", 46, 8),
    "kana": ("ぁ", 80, 6),
    "han": ("一", 3000, 3),
    "hangul": ("가", 2000, 4),
}
_WORDS = 4000  # of a script


def lengths_of_documents(documents: int, mean: int) -> npt.NDArray[np.int32]:
    """[documents], from 1 to 2 x ``mean`` - 1."""
    return np.random.default_rng(1).integers(1, 2 * mean, documents, dtype=np.int32)


def write_index_only(prefix: Path, documents: int, mean: int, vocabulary: int) -> int:
    """A dataset whose .bin is a hole of the right size: enough for what reads no token. Returns its tokens."""
    code = dtype_code(vocabulary)
    item = 2 if code == 8 else 4
    lengths = lengths_of_documents(documents, mean)
    ends = np.cumsum(lengths, dtype=np.int64) * item
    with open(f"{prefix}.idx", "wb") as file:
        file.write(HEADER.pack(MAGIC, 1, code, documents, documents + 1))
        lengths.tofile(file)
        np.concatenate([[0], ends[:-1]]).astype("<i8").tofile(file)
        np.arange(documents + 1, dtype="<i8").tofile(file)
    with open(f"{prefix}.bin", "wb") as file:
        os.truncate(file.fileno(), int(ends[-1]))
    return int(ends[-1]) // item


def write_stream(prefix: Path, tokens: int, mean: int, vocabulary: int) -> int:
    """A dataset of about ``tokens`` random tokens. Id 0 ends every document and stands nowhere else."""
    rng = np.random.default_rng(2)
    lengths = lengths_of_documents(max(1, tokens // mean), mean).astype(np.int64)
    writer = _index.Writer(f"{prefix}.bin", f"{prefix}.idx", dtype_code(vocabulary), vocabulary)
    for part in np.array_split(lengths, -(-len(lengths) // 10_000)):
        ids = rng.integers(1, vocabulary, part.sum(), dtype=np.int32)
        ids[np.cumsum(part) - 1] = 0
        writer.append(ids, part)
    return writer.finish()[1]


def generated_text(size: int, seed: int = 3) -> Iterator[str]:
    """Documents of ``size`` bytes in all, each in one script; words come as often as in text (Zipf's law)."""
    rng = np.random.default_rng(seed)
    share = 1 / np.arange(1, _WORDS + 1)
    share /= share.sum()
    lexica = []
    for first, count, longest in _SCRIPTS.values():
        letters = [chr(ord(first) + i) for i in range(count)]
        lengths = rng.integers(1, longest + 1, _WORDS)
        lexica.append(np.array(["".join(rng.choice(letters, length)) for length in lengths]))
    done = 0
    while done < size:
        words = rng.choice(lexica[rng.integers(len(lexica))], rng.integers(20, 600), p=share)
        lines = [" ".join(words[i : i + 12]) + "." for i in range(0, len(words), 12)]
        text = "\n".join(lines) + f"\n{rng.integers(1900, 2100)}"
        done += len(text.encode())
        yield text


def write_text(path: Path, size: int) -> int:
    """Generated text as JSON lines; the bytes of text in it."""
    written = 0
    with open(path, "w", encoding="utf-8") as file:
        for text in generated_text(size):
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            written += len(text.encode())
    return written


def train_tokenizer(path: Path, texts: Iterator[str], vocabulary: int) -> None:
    """A BPE model of PolyLM's kind, from a little text."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in texts for line in text.split("\n")),
        model_writer=model, model_type="bpe", vocab_size=vocabulary, unk_id=0, bos_id=1, eos_id=2, pad_id=-1,
        byte_fallback=True, split_digits=True, allow_whitespace_only_pieces=True, required_chars="\u2581",
        normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=False,
        character_coverage=0.9995, minloglevel=2,
    )  # fmt: skip
    path.write_bytes(model.getvalue())
