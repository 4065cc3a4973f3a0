"""The cases of :mod:`tests.data.fuzz` that are of text: files that are read, and models of tokenizers."""

from __future__ import annotations

import gzip
import io
import json
import random
from collections.abc import Callable, Iterable
from pathlib import Path

import pyarrow
import sentencepiece
import zstandard
from pyarrow import parquet
from sentencepiece import sentencepiece_model_pb2

from megapoly.data.load_tokenizer import load_tokenizer
from megapoly.data.readers import BadRecord, Input, Reader, Record, open_reader, parse
from megapoly.errors import DataError
from tests.data.fuzz import ODD, Case, damage

WORDS = [
    "the",
    "data",
    "of",
    "a",
    "model",
    "ein",
    "für",
    "слово",
    "言語の",
    "ภาษาไทย",
    "한국어",
    "ﬁn",
    "1999",
    "😀",
    "a\u2028b",
]
BAD = object()  # stands for a bad record
Texts = list[object]


def cases(kind: str, folder: Path) -> Case:
    return Models(folder) if kind == "model" else Inputs(folder, kind)


# Oracles: the texts of a file that is damaged, by other means.


def _text(value: object) -> object:
    if not isinstance(value, str) or not value.strip():
        return BAD
    return BAD if any("\ud800" <= character <= "\udfff" for character in value) else value


def json_lines(content: bytes) -> Texts:
    found: Texts = []
    lines = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    for line in lines if lines[-1] else lines[:-1]:
        try:
            value = json.loads(line.decode().rstrip())
            found.append(_text(value["text"] if isinstance(value, dict) else None))
        except (ValueError, KeyError, RecursionError):
            found.append(BAD)
    return found


def text_lines(content: bytes) -> Texts:
    found: Texts = []
    lines = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    for i, line in enumerate(lines if lines[-1] else lines[:-1]):
        try:
            found.append(_text((line.removesuffix(b"\r") if i + 1 < len(lines) else line).decode()))
        except UnicodeDecodeError:
            found.append(BAD)
    return found


def whole_file(content: bytes) -> Texts:
    body = content.removeprefix(b"\xef\xbb\xbf")
    if body.endswith(b"\n"):
        body = body[:-1].removesuffix(b"\r")
    try:
        return [_text(body.decode())]
    except UnicodeDecodeError:
        return [BAD]


def _difference(found: Texts | None, wanted: Texts | None) -> str:
    if found is None or wanted is None:
        return "one of the two is refused"
    first = next((i for i, (one, other) in enumerate(zip(found, wanted, strict=False)) if one != other), None)
    where = f"record {first} is {found[first]!r}, not {wanted[first]!r}" if first is not None else "the first are alike"
    return f"{len(found)} records and {len(wanted)}; {where}"


class Inputs:
    """Cases of a kind of file: ``jsonl``, ``jsonl.gz``, ``jsonl.zst``, ``txt`` (of lines), ``file.txt``, ``parquet``.

    What is read has to be what the oracle reads in the damaged file; of compressed files and tables, which have
    checksums, it has to be what was written, but for what was cut off at the border of a member or frame. Of
    ``plain.parquet``, a table without checksums, any text may come.
    """

    def __init__(self, folder: Path, kind: str) -> None:
        self._path = folder / f"x.{kind}"
        draw = random.Random(kind)
        self._texts = [" ".join(draw.choices(WORDS, k=draw.randint(1, 40))) for _ in range(300)]
        rows = [{"n": i, "text": text, "m": {"k": [1.5, None]}} for i, text in enumerate(self._texts)]
        lines = "".join(json.dumps(row, ensure_ascii=row["n"] % 2 == 0) + "\n" for row in rows).encode()
        half = lines.index(b"\n", len(lines) // 2) + 1
        self._input, self._oracle = Input(), None
        if kind == "jsonl":
            self._whole, self._oracle = lines, json_lines
        elif kind == "jsonl.gz":
            self._whole = gzip.compress(lines[:half]) + gzip.compress(lines[half:])
        elif kind == "jsonl.zst":
            frames = zstandard.ZstdCompressor(write_checksum=True)
            self._whole = frames.compress(lines[:half]) + frames.compress(lines[half:])
        elif kind.endswith("parquet"):
            file = io.BytesIO()
            options = {"row_group_size": 90, "write_page_checksum": kind == "parquet", "data_page_size": 2000}
            parquet.write_table(pyarrow.table({"n": range(300), "text": self._texts}), file, **options)
            self._whole, self._input = file.getvalue(), Input(fields=("text",))
        else:
            self._whole = "".join(f"{text}\n" for text in self._texts).encode()
            self._input = Input("line" if kind == "txt" else "file")
            self._oracle = text_lines if kind == "txt" else whole_file
        self._wanted = list(self._texts) if self._oracle is None else self._oracle(self._whole)
        self._path.write_bytes(self._whole)
        if self._read(iter) != self._wanted:
            raise AssertionError(f"{kind} cannot be read undamaged")

    def __call__(self, draw: random.Random) -> str:
        damaged = damage(draw, self._whole)
        self._path.write_bytes(damaged)
        whole = self._read(iter)
        size = draw.choice((1, 100, 1000, 10_000))
        pieces = self._read(lambda reader: (record for chunk in reader.chunks(size) for record in parse(chunk)))
        if whole != pieces:
            raise AssertionError(f"pieces of {size} are not the whole: {_difference(whole, pieces)}")
        if whole is None:
            return "refused"
        if self._path.name == "x.plain.parquet":
            return "same" if whole == self._wanted else "told"
        wanted = self._wanted if self._oracle is None else self._oracle(damaged)
        if self._oracle is None and len(whole) < len(wanted) and len(damaged) < len(self._whole):
            wanted = wanted[: len(whole)]  # ends where a member does
        if whole != wanted:
            raise AssertionError(f"not what was expected: {_difference(whole, wanted)}")
        return "same" if whole == self._wanted else "told"

    def _read(self, records: Callable[[Reader], Iterable[object]]) -> Texts | None:
        """What a file holds; nothing where it is refused."""
        found: Texts = []
        try:
            for record in records(open_reader(self._path, self._input)):
                if not isinstance(record, Record | BadRecord):
                    raise AssertionError(f"found {record}")
                if isinstance(record, BadRecord):
                    if self._path.name not in str(record):
                        raise AssertionError(f"{record} names no file")
                    found.append(BAD)
                    continue
                try:
                    found.append(record.text("text"))
                except BadRecord:
                    found.append(BAD)
        except DataError as error:
            if self._path.name not in str(error):
                raise AssertionError(f"{error} names no file") from error
            return None
        return found


class Models:
    """Cases of the models of tokenizers: of their bytes, and of the values in them.

    A model that is not refused encodes as SentencePiece does with the same bytes, whoever does the work.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / "t.model"
        draw = random.Random(0)
        self._texts = [" ".join(draw.choices(WORDS, k=draw.randint(0, 30))) for _ in range(20)]
        self._texts += ["", "  ", "\u2581a \u2581", "e\u0301가", "12345", "\0", "a" * 300]
        bytes_too = {"byte_fallback": True, "normalization_rule_name": "identity", "add_dummy_prefix": False}
        self._models = [
            self._train(model_type="bpe", **bytes_too),
            self._train(model_type="bpe"),
            self._train(model_type="bpe", normalization_rule_name="nmt_nfkc_cf", treat_whitespace_as_suffix=True),
            self._train(model_type="unigram"),
            self._train(model_type="unigram", user_defined_symbols=["<sep>"], **bytes_too),
            self._train(model_type="char"),
            self._train(model_type="word"),
        ]

    def _train(self, **options: object) -> bytes:
        model = io.BytesIO()
        settings = {"vocab_size": 400, "hard_vocab_limit": False, "minloglevel": 2, **options}
        if options["model_type"] in ("char", "word"):
            settings["vocab_size"] = 40
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(self._texts * 5), model_writer=model, **settings
        )
        return model.getvalue()

    def __call__(self, draw: random.Random) -> str:
        whole = draw.choice(self._models)
        changed = self._changed_values(draw, whole) if draw.random() < 0.5 else damage(draw, whole)
        self._path.write_bytes(changed)
        try:
            tokenizer = load_tokenizer(self._path)
        except DataError as error:
            if self._path.name not in str(error):
                raise AssertionError(f"{error} names no file") from error
            return "refused"
        texts = [*self._texts, "".join(map(chr, draw.choices(range(0xD7FF), k=40)))]
        ids, lengths = tokenizer.encode_flat(texts, threads=1)
        if len(ids) and not 0 <= ids.min() <= ids.max() < tokenizer.vocabulary:
            raise AssertionError(f"ids from {ids.min()} to {ids.max()} of {tokenizer.vocabulary}")
        theirs, counts = tokenizer.encode_flat(texts, threads=1, by_library=True)
        if ids.tolist() != theirs.tolist() or lengths.tolist() != counts.tolist():
            raise AssertionError(f"{tokenizer.encoder} and the library differ")
        tokenizer.decode(ids.tolist())
        tokenizer.byte_lengths()
        return "same" if changed == whole else "told"

    def _changed_values(self, draw: random.Random, whole: bytes) -> bytes:
        """Scores, types and texts of pieces, and settings, that training does not write."""
        model = sentencepiece_model_pb2.ModelProto.FromString(whole)
        for _ in range(draw.choice((1, 1, 3))):
            piece = draw.choice(model.pieces)
            other = draw.choice(model.pieces)
            trainer, normalizer = model.trainer_spec, model.normalizer_spec
            match draw.randrange(12):
                case 0:
                    piece.score = draw.choice((float("nan"), float("inf"), float("-inf"), 0.0, -1e38, other.score))
                case 1:
                    piece.type = draw.randint(1, 6)
                case 2:
                    piece.piece = draw.choice(
                        ("", " ", "\u2581", other.piece, "<0x41>", "<0xZZ>", "a" * 500, "\0", "</s>")
                    )
                case 3:
                    model.pieces.remove(piece)
                case 4:
                    model.pieces.add(piece=other.piece + "x", score=draw.random(), type=draw.randint(1, 6))
                case 5:
                    trainer.model_type = draw.randint(1, 4)
                case 6:
                    trainer.byte_fallback = not trainer.byte_fallback
                case 7:
                    trainer.treat_whitespace_as_suffix = not trainer.treat_whitespace_as_suffix
                case 8:
                    table = normalizer.precompiled_charsmap or draw.randbytes(40)
                    normalizer.precompiled_charsmap = damage(draw, table)
                case 9:
                    model.denormalizer_spec.precompiled_charsmap = damage(
                        draw, normalizer.precompiled_charsmap or b"abcd"
                    )
                case 10:
                    normalizer.escape_whitespaces = not normalizer.escape_whitespaces
                case 11:
                    name = draw.choice(("unk_id", "bos_id", "eos_id", "pad_id", "vocab_size"))
                    setattr(trainer, name, draw.choice([value for value in ODD if abs(value) < 2**31]))
        return model.SerializeToString()
