"""A multilingual corpus with aligned pairs from Debian packages: see README.md."""

from __future__ import annotations

import gzip
import json
import os
import re
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from extract import Page
from fetch import Cache
from rich.console import Console
from sources import LANGUAGES, SOURCES, Request

from megapoly.cli.common import make_table, write_rows
from megapoly.errors import ConfigError, DataError, MegapolyError

PACKAGES = Path("runs/debian/packages")
_SCRIPTS = {
    "zh": r"[\u3400-\u9fff]",
    "ja": r"[\u3040-\u30ff\u3400-\u9fff]",
    "ko": r"[\uac00-\ud7a3]",
    "ru": r"[\u0400-\u04ff]",
    "ar": r"[\u0600-\u06ff]",
    "th": r"[\u0e00-\u0e7f]",
    "he": r"[\u0590-\u05ff]",
}


@dataclass
class Size:
    """Of a language's text in a source; ``pairs`` are with English."""

    documents: int = 0
    bytes: int = 0
    pairs: int = 0

    def __iadd__(self, other: Size) -> Size:
        self.documents += other.documents
        self.bytes += other.bytes
        self.pairs += other.pairs
        return self


Sizes = Mapping[str, Mapping[str, Size]]  # by source and language


def translated(language: str, english: str | None, text: str) -> bool:
    """Whether a text is a translation and not the English left as it was, as far as script and lengths tell."""
    if language in _SCRIPTS and not re.search(_SCRIPTS[language], text):
        return False
    if english is None:
        return True
    short, long = sorted((len(text.encode()), len(english.encode())))
    return text.casefold() != english.casefold() and (long < 120 or long < 5 * short)


class Distinct:
    """Of pages in order, each text of a language once; and the same units in every language."""

    def __init__(self) -> None:
        self._seen: dict[str, set[int]] = defaultdict(set)

    def page(self, page: Page) -> dict[str, dict[str, str]]:
        """The units to keep, by language. Where the English of a unit was met before, its translations go with it."""
        english = page.units.get("en", {})
        kept = {"en": {name: text for name, text in english.items() if self._new("en", text)}}
        for language, units in page.units.items():
            if language != "en":
                kept[language] = {
                    name: text
                    for name, text in units.items()
                    if (name in kept["en"] or name not in english)
                    and translated(language, english.get(name), text)
                    and self._new(language, text)
                }
        return kept

    def _new(self, language: str, text: str) -> bool:
        if not any(c.isalpha() for c in text):
            return False
        mark, seen = hash(text.casefold()), self._seen[language]
        new = mark not in seen
        seen.add(mark)
        return new


class Writer:
    """``NAME.jsonl.gz`` in a folder. Equal records make equal files."""

    def __init__(self, folder: Path, open_files: ExitStack) -> None:
        self._folder, self._open = folder, open_files
        self._files: dict[str, gzip.GzipFile] = {}

    def write(self, name: str, record: Mapping[str, str]) -> None:
        if name not in self._files:
            raw = self._open.enter_context((self._folder / f"{name}.jsonl.gz").open("wb"))
            self._files[name] = self._open.enter_context(gzip.GzipFile("", "wb", fileobj=raw, mtime=0))
        self._files[name].write((json.dumps(record, ensure_ascii=False) + "\n").encode())


def write_source(name: str, pages: Iterable[Page], distinct: Distinct, writer: Writer) -> dict[str, Size]:
    """Write one source's documents and pairs; returns their sizes by language.

    ``key`` names the page and is the same in all its languages and pairs, and no text stands under two keys: a
    validation split which goes by it holds out a text together with its translations.
    """
    sizes: dict[str, Size] = defaultdict(Size)
    for page in pages:
        kept = distinct.page(page)
        key = f"{name}/{page.key}"
        for language, units in kept.items():
            if not units:
                continue
            text = "\n".join(units.values())
            writer.write(language, {"text": text, "language": language, "source": name, "key": key})
            sizes[language] += Size(1, len(text.encode()))
            if page.aligned and language != "en":
                for identifier in (unit for unit in units if unit in kept["en"]):
                    pair = {"en": kept["en"][identifier], language: units[identifier], "source": name, "key": key}
                    writer.write(f"en-{language}", pair)
                    sizes[language] += Size(pairs=1)
    return dict(sizes)


def collect(request: Request, names: Sequence[str], folder: Path) -> Sizes:
    """Write the corpus of some sources to a folder.

    Raises:
        DataError: a package that is not to be had, a tool that is not here, a file that is not as expected, or a source
            that has packages and no text.
    """
    sizes = {}
    with ExitStack() as open_files:
        writer, distinct = Writer(folder, open_files), Distinct()
        for name in names:
            had = len(request.taken)
            sizes[name] = write_source(name, SOURCES[name].pages(request), distinct, writer)
            if not sizes[name] and len(request.taken) > had:
                raise DataError(f"{name}: no text in its packages, which this release lays out otherwise; leave it out")
    return sizes


def show(sizes: Sizes) -> None:
    """Print documents, MB of text and pairs by language and by source."""
    by_language: dict[str, Size] = {language: Size() for language in (*LANGUAGES, "all")}
    by_source: dict[str, Size] = {name: Size() for name in sizes}
    for name, found in sizes.items():
        for language, size in found.items():
            by_language[language] += size
            by_language["all"] += size
            by_source[name] += size
    for title, rows in (("language", by_language), ("source", by_source)):
        table = make_table(title, "documents", "MB", "pairs with English")
        for name, size in rows.items():
            if size.documents:
                table.add_row(
                    name, f"{size.documents:,}", f"{size.bytes / 1e6:.2f}", f"{size.pairs:,}" if size.pairs else "-"
                )
        Console().print(table)


def rows(sizes: Sizes) -> list[dict[str, Any]]:
    return [
        {"name": name, "language": language, **asdict(size), "licence": SOURCES[name].licence}
        for name, found in sizes.items()
        for language, size in sorted(found.items())
    ]


def choose(text: str, known: Sequence[str], what: str) -> list[str]:
    """Names of a comma-separated list, in the order of ``known``; all of them for an empty one."""
    chosen = {name.strip() for name in text.split(",") if name.strip()}
    if unknown := sorted(chosen - set(known)):
        raise ConfigError(f"{what} {unknown[0]!r} is not known; choose from {', '.join(known)}")
    return [name for name in known if name in chosen or not chosen]


def main(
    output: Annotated[Path, typer.Option(help="Folder to write: LANG.jsonl.gz, en-LANG.jsonl.gz, report.json.")],
    packages: Annotated[Path, typer.Option(help="Folder that keeps what was downloaded.")] = PACKAGES,
    sources: Annotated[str, typer.Option(help=f"Of {', '.join(SOURCES)}; all where not given.")] = "",
    languages: Annotated[str, typer.Option(help="Such as th,ko; all 18 where not given. English is always in.")] = "",
    skip_missing: Annotated[bool, typer.Option("--skip-missing", help="Go on without missing packages.")] = False,
    offline: Annotated[bool, typer.Option("--offline", help="Download nothing.")] = False,
) -> None:
    """Build a corpus in up to 18 languages, and its pairs with English, from Debian packages. Needs no root.

    Example: python examples/debian/collect.py --output runs/debian/text --languages th,ko --sources debian-handbook
    """
    try:
        if output.exists():
            raise DataError(f"{output}: exists already; remove it, or choose another --output")
        chosen = choose(f"en,{languages}" if languages else "", LANGUAGES, "language")
        names = choose(sources, list(SOURCES), "source")
        request = Request(Cache(packages, offline=offline), chosen, skip_missing)
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f"{output.name}.", dir=output.parent) as folder:
            text = Path(folder) / "text"
            text.mkdir()
            sizes = collect(request, names, text)
            write_rows(text / "report.json", [*rows(sizes), {"name": "packages", **request.taken}])
            os.replace(text, output)
    except MegapolyError as error:
        raise SystemExit(f"error: {error}") from error
    show(sizes)
    for line in request.skipped:
        print(f"skipped: {line}")
    print("Licences: " + "; ".join(f"{name} {SOURCES[name].licence}" for name in names))


if __name__ == "__main__":
    typer.run(main)
