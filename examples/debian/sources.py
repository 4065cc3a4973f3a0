"""The packages that text is taken from, how their languages are named, and under which licences they are."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import extract
from extract import Page
from fetch import Cache

from megapoly.errors import DataError

LANGUAGES = ("en", "zh", "es", "fr", "pt", "ru", "de", "it", "ar", "ja", "ko", "th", "vi", "id", "nl", "pl", "tr", "he")
_BOOK = {"en": "en-US", "zh": "zh-CN", "pt": "pt-BR", "ar": "ar-MA", "ja": "ja-JP", "ko": "ko-KR", "vi": "vi-VN"}


@dataclass(frozen=True)
class Request:
    """What a source is asked for, and how it gets its packages.

    Attributes:
        taken: the packages that were had, with their file names, which have the version.
        skipped: why a package was left out, where ``skip_missing`` allows it.
    """

    cache: Cache
    languages: Sequence[str]
    skip_missing: bool = False
    taken: dict[str, str] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)

    def package(self, name: str) -> Path | None:
        """The folder that a package is unpacked in; None for one that is skipped.

        Raises:
            DataError: it is not to be had, and may not be skipped.
        """
        try:
            folder = self.cache.package(name)
        except DataError as error:
            if not self.skip_missing:
                raise DataError(f"{error}; --skip-missing goes on without it") from error
            self.skipped.append(str(error))
            return None
        self.taken[folder.name] = self.cache.file_name(folder)
        return folder

    def codes(self, **special: str) -> dict[str, str]:
        """The source's own code of each language."""
        return {language: special.get(language, language) for language in self.languages}


def _present(roots: Mapping[str, Path]) -> dict[str, Path]:
    """The languages that there are, English at least.

    Raises:
        DataError: the package is not laid out as here.
    """
    if not roots["en"].is_dir():
        raise DataError(f"{roots['en']}: is not in the package, which this release lays out otherwise; leave it out")
    return {language: root for language, root in roots.items() if root.is_dir()}


def libreoffice_help(request: Request) -> Iterator[Page]:
    roots = {}
    for language, code in request.codes(en="en-us", zh="zh-cn", pt="pt-br").items():
        if language in ("ar", "th", "he"):
            continue  # the package has no such translation
        if folder := request.package(f"libreoffice-help-{code}"):
            name = {"en-us": "en-US", "zh-cn": "zh-CN", "pt-br": "pt-BR"}.get(code, code)
            roots[language] = folder / f"usr/share/libreoffice/help/{name}/text"
    if "en" in roots:
        yield from extract.libreoffice_help(_present(roots))


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
    request.taken["descriptions"] = f"{sum(map(len, found.values()))} files of apt"
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
        yield from extract.docbook_html(_present(roots))


def installation_guide(request: Request) -> Iterator[Page]:
    if folder := request.package("installation-guide-amd64"):
        root = folder / "usr/share/doc/installation-guide-amd64"
        codes = request.codes(zh="zh_CN")
        yield from extract.docbook_html(_present({lang: root / code for lang, code in codes.items()}))


def gnome_help(request: Request) -> Iterator[Page]:
    if folder := request.package("gnome-user-docs"):
        root = folder / "usr/share/help"
        codes = request.codes(en="C", zh="zh_CN", pt="pt_BR")
        for document in ("gnome-help", "system-admin-guide"):
            for page in extract.mallard(_present({lang: root / code / document for lang, code in codes.items()})):
                yield Page(f"{document}/{page.key}", page.units)


def mediawiki(request: Request) -> Iterator[Page]:
    if folder := request.package("mediawiki"):
        yield from extract.mediawiki(folder / "usr/share/mediawiki", request.codes(zh="zh-hans", pt="pt-br"))


def wesnoth(request: Request) -> Iterator[Page]:
    if folder := request.package("wesnoth-1.*-data"):
        catalogues: dict[str, dict[str, Path]] = defaultdict(dict)
        for language, code in request.codes(zh="zh_CN", pt="pt_BR").items():
            for path in sorted(folder.glob(f"usr/share/games/wesnoth/*/locale/{code}/**/*.mo")):
                catalogues[path.stem][language] = path
        for name in sorted(catalogues):
            yield from extract.gettext(catalogues[name], name)


def chromium(request: Request) -> Iterator[Page]:
    if folder := request.package("chromium-l10n"):
        codes = request.codes(en="en-GB", zh="zh-CN", pt="pt-BR")
        yield from extract.chromium(folder / "usr/lib/chromium/locales", codes)


@dataclass(frozen=True)
class Source:
    """Where text comes from: its licence, and a function that gets the packages and yields what is in them."""

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
