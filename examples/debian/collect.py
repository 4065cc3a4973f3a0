"""A multilingual corpus with aligned pairs from Debian packages: see README.md."""

from __future__ import annotations

import gzip
import json
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import extract
import typer
from extract import Page
from fetch import Cache
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from megapoly.errors import ConfigError, DataError, MegapolyError

LANGUAGES = ("en", "zh", "es", "fr", "pt", "ru", "de", "it", "ar", "ja", "ko", "th", "vi", "id", "nl", "pl", "tr", "he")
_SCRIPTS = {
    "zh": r"[\u3400-\u9fff]",
    "ja": r"[\u3040-\u30ff\u3400-\u9fff]",
    "ko": r"[\uac00-\ud7a3]",
    "ru": r"[\u0400-\u04ff]",
    "ar": r"[\u0600-\u06ff]",
    "th": r"[\u0e00-\u0e7f]",
    "he": r"[\u0590-\u05ff]",
}
_BOOK = {"en": "en-US", "zh": "zh-CN", "pt": "pt-BR", "ar": "ar-MA", "ja": "ja-JP", "ko": "ko-KR", "vi": "vi-VN"}


class Missing(DataError):
    """A package that is not to be had."""


@dataclass(frozen=True)
class Request:
    """What a source is asked for, and how it gets its packages: ``package`` returns None for one that is skipped."""

    cache: Cache
    languages: Sequence[str]
    skip_missing: bool
    skipped: list[str] = field(default_factory=list)

    def package(self, name: str) -> Path | None:
        try:
            return self.cache.package(name)
        except DataError as error:
            if not self.skip_missing:
                raise Missing(f"{error}; --skip-missing goes on without it") from error
            self.skipped.append(f"{name}: {error}")
            return None

    def codes(self, **special: str) -> dict[str, str]:
        """The source's own code of each language."""
        return {language: special.get(language, language) for language in self.languages}


def _existing(roots: Mapping[str, Path]) -> dict[str, Path]:
    found = {language: root for language, root in roots.items() if root.exists()}
    return found if "en" in found else {}


def libreoffice_help(request: Request) -> Iterator[Page]:
    roots = {}
    for language, code in request.codes(en="en-us", zh="zh-cn", pt="pt-br").items():
        if language in ("ar", "th", "he"):
            continue  # the package has no such translation
        if folder := request.package(f"libreoffice-help-{code}"):
            name = {"en-us": "en-US", "zh-cn": "zh-CN", "pt-br": "pt-BR"}.get(code, code)
            roots[language] = folder / f"usr/share/libreoffice/help/{name}/text"
    if roots := _existing(roots):
        yield from extract.libreoffice_help(roots)


def libreoffice_messages(request: Request) -> Iterator[Page]:
    catalogues: dict[str, dict[str, Path]] = defaultdict(dict)
    for language in set(request.languages) & {"ar", "th", "he"}:  # the others have the help, which is prose
        if folder := request.package(f"libreoffice-l10n-{language}"):
            for path in sorted(folder.rglob("*.mo")):
                catalogues[path.stem][language] = path
    for name in sorted(catalogues):
        yield from extract.gettext(catalogues[name], name)


def descriptions(request: Request) -> Iterator[Page]:
    codes = request.codes(zh="zh_CN", pt="pt_BR")
    found = request.cache.translations(codes.values())
    yield from extract.descriptions({language: found.get(code, []) for language, code in codes.items()})


def man_pages(request: Request) -> Iterator[Page]:
    for language, code in request.codes(pt="pt-br").items():
        for suffix in ("", "-dev"):
            if language in ("ar", "ko", "th", "he") or (suffix and language in ("id", "vi", "tr", "zh")):
                continue  # there is no such package
            if folder := request.package(f"manpages{'' if language == 'en' else '-' + code}{suffix}"):
                name = {"en": "", "pt": "pt_BR", "zh": "zh_CN"}.get(language, language)
                yield from extract.man_pages(folder / "usr/share/man" / name, language, "dev/" if suffix else "")


def handbook(request: Request) -> Iterator[Page]:
    if folder := request.package("debian-handbook"):
        root = folder / "usr/share/doc/debian-handbook/html"
        roots = {lang: root / _BOOK.get(lang, f"{lang}-{lang.upper()}") for lang in request.languages}
        yield from extract.docbook_html(_existing(roots))


def installation_guide(request: Request) -> Iterator[Page]:
    if folder := request.package("installation-guide-amd64"):
        root = folder / "usr/share/doc/installation-guide-amd64"
        codes = request.codes(zh="zh_CN")
        yield from extract.docbook_html(_existing({lang: root / code for lang, code in codes.items()}))


def gnome_help(request: Request) -> Iterator[Page]:
    if folder := request.package("gnome-user-docs"):
        root = folder / "usr/share/help"
        codes = request.codes(en="C", zh="zh_CN", pt="pt_BR")
        for document in ("gnome-help", "system-admin-guide"):
            for page in extract.mallard(_existing({lang: root / code / document for lang, code in codes.items()})):
                yield Page(f"{document}/{page.key}", page.units)


def mediawiki(request: Request) -> Iterator[Page]:
    if folder := request.package("mediawiki"):
        yield from extract.mediawiki(folder / "usr/share/mediawiki", request.codes(zh="zh-hans", pt="pt-br"))


def wesnoth(request: Request) -> Iterator[Page]:
    if folder := request.package("wesnoth-1.16-data"):
        root = folder / "usr/share/games/wesnoth/1.16/locale"
        catalogues: dict[str, dict[str, Path]] = defaultdict(dict)
        for language, code in request.codes(zh="zh_CN", pt="pt_BR").items():
            for path in sorted((root / code).rglob("*.mo")) if language != "en" else ():
                catalogues[path.stem][language] = path
        for name in sorted(catalogues):
            yield from extract.gettext(catalogues[name], name)


def chromium(request: Request) -> Iterator[Page]:
    if folder := request.package("chromium-l10n"):
        codes = request.codes(en="en-GB", zh="zh-CN", pt="pt-BR")
        yield from extract.chromium(folder / "usr/lib/chromium/locales", codes)


@dataclass(frozen=True)
class Source:
    licence: str
    pages: Callable[[Request], Iterator[Page]]


SOURCES = {
    "libreoffice-help": Source("MPL-2.0", libreoffice_help),
    "libreoffice": Source("MPL-2.0", libreoffice_messages),
    "debian-handbook": Source("GPL-2+ or CC-BY-SA-3.0", handbook),
    "installation-guide": Source("GPL-2", installation_guide),
    "gnome-help": Source("CC-BY-SA-3.0", gnome_help),
    "descriptions": Source("that of each package", descriptions),
    "manpages": Source("of each page: GPL, LDP, BSD and others", man_pages),
    "mediawiki": Source("GPL-2+", mediawiki),
    "wesnoth": Source("GPL-2+", wesnoth),
    "chromium": Source("BSD-3-Clause", chromium),
}


@dataclass
class Size:
    documents: int = 0
    bytes: int = 0
    pairs: int = 0


def translated(language: str, english: str, text: str) -> bool:
    """Whether a text is a translation and not the English left as it was, as far as signs and lengths tell."""
    if text.casefold() == english.casefold():
        return False
    if language in _SCRIPTS and not re.search(_SCRIPTS[language], text):
        return False
    sizes = sorted((len(text.encode()), len(english.encode())))
    return sizes[1] < 120 or sizes[1] < 5 * sizes[0]


class Distinct:
    """Of the pages of one source, in order: each text of a language once, the same message in the same page everywhere."""

    def __init__(self) -> None:
        self._seen: dict[str, set[int]] = defaultdict(set)

    def page(self, page: Page) -> dict[str, dict[str, str]]:
        english = page.units.get("en", {})
        fresh = {name for name, text in english.items() if self._new("en", text)}
        kept = {"en": {name: text for name, text in english.items() if name in fresh}}
        for language, units in page.units.items():
            if language != "en":
                kept[language] = {
                    name: text
                    for name, text in units.items()
                    if (name in fresh or name not in english)
                    and translated(language, english.get(name, ""), text)
                    and self._new(language, text)
                }
        return kept

    def _new(self, language: str, text: str) -> bool:
        if not any(c.isalpha() for c in text):
            return False
        mark, seen = hash(text.casefold()), self._seen[language]
        if mark in seen:
            return False
        seen.add(mark)
        return True


class Writer:
    """``LANG.jsonl.gz`` and ``en-LANG.jsonl.gz`` in a folder, each whole or absent."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, Any] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def write(self, name: str, record: Mapping[str, str]) -> None:
        if name not in self._files:
            # without a name and a time inside, equal text makes equal files
            raw = (self.folder / f"{name}.jsonl.gz.tmp").open("wb")
            self._files[name] = (gzip.GzipFile("", "wb", compresslevel=6, fileobj=raw, mtime=0), raw)
        self._files[name][0].write((json.dumps(record, ensure_ascii=False) + "\n").encode())

    def finish(self) -> None:
        for name in sorted(self._files):
            packed, raw = self._files[name]
            packed.close()
            raw.flush()
            os.fsync(raw.fileno())
            raw.close()
            os.replace(raw.name, self.folder / f"{name}.jsonl.gz")

    def discard(self) -> None:
        for packed, raw in self._files.values():
            with suppress(OSError, ValueError):
                packed.close()
            raw.close()
            Path(raw.name).unlink(missing_ok=True)


def write_source(name: str, pages: Iterable[Page], writer: Writer) -> dict[str, Size]:
    """Write one source's documents and pairs; returns their sizes by language."""
    sizes: dict[str, Size] = defaultdict(Size)
    distinct = Distinct()
    for page in pages:
        kept = distinct.page(page)
        key = f"{name}/{page.key}"
        for language, units in kept.items():
            if not units:
                continue
            text = "\n".join(units.values())
            writer.write(language, {"text": text, "lang": language, "source": name, "key": key})
            sizes[language].documents += 1
            sizes[language].bytes += len(text.encode())
            if language == "en" or not page.aligned:
                continue
            for identifier, text in units.items():
                if identifier in kept["en"]:
                    record = {"en": kept["en"][identifier], language: text, "source": name, "key": key}
                    writer.write(f"en-{language}", record)
                    sizes[language].pairs += 1
    return dict(sizes)


def table(sizes: Mapping[str, Mapping[str, Size]], unit: str) -> Table:
    """``unit``, a field of :class:`Size`, by language and source; bytes as MB."""
    title = {"documents": "documents", "bytes": "MB of text", "pairs": "pairs with English"}[unit]
    result = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for column in ("", *sizes, "all"):
        result.add_column(column.replace("-", "-\n"), justify="right" if column else "left", no_wrap=True)
    languages = [lang for lang in LANGUAGES if any(lang in found for found in sizes.values())]
    for row in [[lang] for lang in languages] + [languages]:
        numbers = [sum(getattr(found[lang], unit) for lang in row if lang in found) for found in sizes.values()]
        numbers.append(sum(numbers))
        shown = [f"{n / 1e6:.2f}" if unit == "bytes" else f"{n:,}" for n in numbers]
        result.add_row(row[0] if len(row) == 1 else "all", *(text if n else "-" for n, text in zip(numbers, shown)))
    return result


def collect(output: Path, request: Request, sources: Sequence[str]) -> dict[str, dict[str, Size]]:
    """Write the corpus of some sources to ``output``; returns the sizes by source and language.

    Raises:
        DataError: a package that is not to be had, a tool that is not here, or a file that is not as expected.
    """
    writer = Writer(output)
    sizes = {}
    try:
        for name in sources:
            sizes[name] = write_source(name, SOURCES[name].pages(request), writer)
        writer.finish()
    except BaseException:
        writer.discard()
        raise
    facts = {name: {"licence": SOURCES[name].licence, "languages": sorted(sizes[name])} for name in sources}
    temporary = output / "sources.json.tmp"
    temporary.write_text(json.dumps(facts, indent=1), encoding="utf-8")
    os.replace(temporary, output / "sources.json")
    return sizes


def choose(text: str, known: Sequence[str], what: str) -> list[str]:
    """Names of a comma-separated list, in the order of ``known``; all of them for an empty one."""
    chosen = {name.strip() for name in text.split(",") if name.strip()}
    if unknown := sorted(chosen - set(known)):
        raise ConfigError(f"{what} {unknown[0]!r} is not known; choose from {', '.join(known)}")
    return [name for name in known if name in chosen or not chosen]


def main(
    output: Annotated[Path, typer.Option(help="Folder for LANG.jsonl.gz and en-LANG.jsonl.gz.")] = Path(
        "runs/debian/text"
    ),
    packages: Annotated[Path, typer.Option(help="Folder that packages are downloaded to.")] = Path(
        "runs/debian/packages"
    ),
    sources: Annotated[str, typer.Option(help=f"Of {', '.join(SOURCES)}; all where not given.")] = "",
    languages: Annotated[
        str, typer.Option(help="Such as en,th,ko; all 18 where not given. English is always in.")
    ] = "",
    skip_missing: Annotated[
        bool, typer.Option("--skip-missing", help="Go on without packages that are not to be had.")
    ] = False,
    offline: Annotated[bool, typer.Option("--offline", help="Download nothing.")] = False,
) -> None:
    """Build a corpus in up to 18 languages, and its pairs with English, from Debian packages. Needs no root.

    Example: python examples/debian/collect.py --languages en,th,ko --sources mediawiki,descriptions
    """
    try:
        chosen = choose(f"en,{languages}" if languages else "", LANGUAGES, "language")
        request = Request(Cache(packages, offline=offline), chosen, skip_missing)
        sizes = collect(output, request, choose(sources, list(SOURCES), "source"))
    except MegapolyError as error:
        raise SystemExit(f"error: {error}") from error
    console = Console()
    console = Console(width=max(console.width, 140))
    for unit in ("documents", "bytes", "pairs"):
        console.print(table(sizes, unit))
    for line in request.skipped:
        print(f"skipped: {line}")
    print("Licences: " + "; ".join(f"{name} {SOURCES[name].licence}" for name in sizes))


if __name__ == "__main__":
    typer.run(main)
