"""Real text in PolyLM's 18 languages, and its aligned pairs with English, from packages that pip installs.

Sources: the message catalogues of Django (BSD-3) and of Home Assistant's front end (Apache-2.0), which are aligned with
English by construction, and for English prose the language reference inside Python itself (PSF licence). Written under
``--output``::

    corpus/LANG.jsonl     {"text", "language", "source", "key"}     documents
    pairs/en-LANG.jsonl   {"en", LANG, "source", "key"}             single messages

A document is one *component*: neighbouring messages of one catalogue, a message a line. ``key`` names the component and
is the same in every language and in the pairs, so that a validation split keyed by it holds out the same content
everywhere. A message that occurs twice in a language is kept once, for the same reason.
"""

from __future__ import annotations

import importlib.util
import json
import os
import pydoc_data.topics
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import polib
import typer
from rich import box
from rich.console import Console
from rich.table import Table

from megapoly.errors import DataError, MegapolyError

LANGUAGES = ("en", "zh", "es", "fr", "pt", "ru", "de", "it", "ar", "ja", "ko", "th", "vi", "id", "nl", "pl", "tr", "he")
SOURCES = ("home-assistant", "django", "python")
MESSAGES_BYTES = 600  # of English in a component
PROSE_BYTES = 2000

_DJANGO_CODES = {"zh": "zh_Hans", "pt": "pt_BR"}
_HOME_ASSISTANT_CODES = {"zh": "zh-Hans", "pt": "pt-BR"}
_CODE_IN_MESSAGE = re.compile(r"\{\s*\w+\s*,\s*(plural|select|selectordinal)\s*,")


@dataclass(frozen=True)
class Message:
    """An English text with its translations, by language. ``key`` is the component that it belongs to."""

    source: str
    key: str
    english: str
    translations: Mapping[str, str]


@dataclass(frozen=True)
class Document:
    source: str
    key: str
    text: str


def package_folder(name: str) -> Path:
    """Folder of an installed package, which is not imported."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise DataError(f"package {name} is not installed; install the demo's packages: pip install -e '.[demo]'")
    return Path(spec.origin).parent


def tidy(text: str) -> str:
    """One line with single spaces; empty where it has no word, or is code around words (ICU plurals)."""
    line = " ".join(text.split())
    return line if any(c.isalpha() for c in line) and not _CODE_IN_MESSAGE.search(line) else ""


def components(sections: Iterable[tuple[str, str]], prefix: str) -> list[str]:
    """A component key for each message, given as (section, English text), in order.

    A component ends when it is full, or at a new section once it is half full.
    """
    keys: list[str] = []
    number = size = 0
    before = ""
    for section, english in sections:
        if size >= MESSAGES_BYTES or (section != before and 2 * size >= MESSAGES_BYTES):
            number, size = number + 1, 0
        before = section
        size += len(english.encode())
        keys.append(f"{prefix}/{number:03}")
    return keys


def _catalogue(path: Path) -> dict[tuple[str, str], str]:
    """(context, English) -> translation. A plural entry stands with its most general form, the last one.

    Not every application is translated to every language: no file, no messages.
    """
    found = {}
    for entry in polib.pofile(str(path)) if path.is_file() else ():
        if entry.obsolete or entry.fuzzy:
            continue
        plural = entry.msgstr_plural
        translation = plural[max(plural)] if plural else entry.msgstr
        found[entry.msgctxt or "", entry.msgid_plural or entry.msgid] = translation
    return found


def django_messages(root: Path) -> Iterator[Message]:
    """Messages of Django's own catalogues, ``root`` being its package folder."""
    for english_path in sorted(root.glob("**/locale/en/LC_MESSAGES/django.po")):
        locale = english_path.parents[2]
        app = ".".join(locale.parent.relative_to(root).parts)
        messages = [(key, tidy(key[1])) for key in _catalogue(english_path)]
        keys = components([("", english) for _, english in messages], f"django/{app}")
        folders = {lang: locale / _DJANGO_CODES.get(lang, lang) for lang in LANGUAGES[1:]}
        catalogues = {lang: _catalogue(folder / "LC_MESSAGES/django.po") for lang, folder in folders.items()}
        for (entry, english), key in zip(messages, keys):
            yield Message("django", key, english, {lang: tidy(c.get(entry, "")) for lang, c in catalogues.items()})


def _flatten(tree: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _flatten(value, (*path, name))
        else:
            yield (*path, name), str(value)


def _translation(folder: Path, code: str) -> dict[tuple[str, ...], str]:
    pattern = re.compile(re.escape(code) + r"-[0-9a-f]{32}\.json")  # 'en' is not 'en-GB'
    found = [path for path in folder.glob(f"{code}-*.json") if pattern.fullmatch(path.name)]
    if len(found) > 1:
        raise DataError(f"{folder}: {len(found)} files for language {code}, expected one; reinstall the package")
    return dict(_flatten(json.loads(found[0].read_text(encoding="utf-8")))) if found else {}


def home_assistant_messages(root: Path) -> Iterator[Message]:
    """Messages of Home Assistant's front end, ``root`` being the package folder of ``hass_frontend``."""
    top = root / "static" / "translations"
    for folder in [top, *sorted(path for path in top.glob("*") if path.is_dir())]:
        fragment = "main" if folder == top else folder.name
        english = {path: tidy(text) for path, text in _translation(folder, "en").items()}
        keys = components([(".".join(path[:4]), text) for path, text in english.items()], f"home-assistant/{fragment}")
        tables = {lang: _translation(folder, _HOME_ASSISTANT_CODES.get(lang, lang)) for lang in LANGUAGES[1:]}
        for (path, text), key in zip(english.items(), keys):
            yield Message("home-assistant", key, text, {lang: tidy(t.get(path, "")) for lang, t in tables.items()})


def prose(paragraph: str) -> str:
    """Without lines that only draw (underlines of titles); empty where signs outweigh letters (tables, grammars)."""
    lines = [line for line in paragraph.splitlines() if any(c.isalnum() for c in line)]
    signs = sum(not c.isalpha() and not c.isspace() for line in lines for c in line)
    letters = sum(c.isalpha() for line in lines for c in line)
    return "\n".join(lines) if letters > 2 * signs else ""


def python_documents(topics: Mapping[str, str]) -> Iterator[Document]:
    """The language reference in pieces of about ``PROSE_BYTES``; a paragraph that several topics share stands once."""
    seen: set[str] = set()
    for topic in sorted(topics):
        pieces: list[list[str]] = [[]]
        for paragraph in map(prose, re.split(r"\n\s*\n", topics[topic])):
            if not paragraph or paragraph in seen:
                continue
            seen.add(paragraph)
            if sum(len(p.encode()) for p in pieces[-1]) >= PROSE_BYTES:
                pieces.append([])
            pieces[-1].append(paragraph)
        for i, piece in enumerate(pieces):
            if piece:
                yield Document("python", f"python/{topic}/{i:03}", "\n\n".join(piece).strip())


def distinct(messages: Iterable[Message]) -> list[Message]:
    """Each English text once, and in each language each translation once and only where it differs from the English."""
    seen: dict[str, set[str]] = defaultdict(set)

    def new(language: str, text: str) -> bool:
        folded = text.casefold()
        if not text or folded in seen[language]:
            return False
        seen[language].add(folded)
        return True

    kept = []
    for m in messages:
        if not new("en", m.english):
            continue
        own = {lang: t for lang, t in m.translations.items() if t.casefold() != m.english.casefold() and new(lang, t)}
        kept.append(Message(m.source, m.key, m.english, own))
    return kept


def documents(messages: Iterable[Message], language: str) -> list[Document]:
    """One document a component, of the messages that the language has."""
    lines: dict[tuple[str, str], list[str]] = defaultdict(list)
    for m in messages:
        text = m.english if language == "en" else m.translations.get(language)
        if text:
            lines[m.source, m.key].append(text)
    return [Document(source, key, "\n".join(texts)) for (source, key), texts in lines.items()]


def write_jsonl(path: Path, records: Iterable[Mapping[str, str]]) -> None:
    """Whole or absent: written under a temporary name and renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_all(output: Path) -> Table:
    """Collect and write everything; returns the table of what there is.

    Raises:
        DataError: a package that is not installed, or that has no text in one of the languages.
    """
    messages = distinct(
        [*home_assistant_messages(package_folder("hass_frontend")), *django_messages(package_folder("django"))]
    )
    table = Table(title="Text by language, in bytes", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("")
    for column in ("docs", "bytes", *SOURCES, "pairs", "bytes"):
        table.add_column(column, justify="right")
    for language in LANGUAGES:
        found = documents(messages, language)
        if not found:
            raise DataError(f"language {language}: no text in the installed packages; install the pinned releases")
        if language == "en":
            found += python_documents(pydoc_data.topics.topics)
        write_jsonl(
            output / "corpus" / f"{language}.jsonl",
            ({"text": d.text, "language": language, "source": d.source, "key": d.key} for d in found),
        )
        sizes = [sum(len(d.text.encode()) for d in found if d.source == source) for source in SOURCES]
        numbers = [len(found), sum(sizes), *sizes]
        if language != "en":
            pairs = [
                {"en": m.english, language: m.translations[language], "source": m.source, "key": m.key}
                for m in messages
                if language in m.translations
            ]
            write_jsonl(output / "pairs" / f"en-{language}.jsonl", pairs)
            numbers += [len(pairs), sum(len((p["en"] + p[language]).encode()) for p in pairs)]
        table.add_row(language, *(f"{n:,}" if n else "-" for n in numbers))
    return table


def main(output: Annotated[Path, typer.Option(help="folder for corpus/ and pairs/")]) -> None:
    """Take text in 18 languages and its pairs with English from the installed packages.

    Example: python examples/demo/corpora.py --output runs/demo/text
    """
    try:
        Console().print(write_all(output))
    except MegapolyError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    typer.run(main)
