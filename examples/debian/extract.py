"""From the files of Debian packages to aligned text: an extractor for each format.

An extractor yields :class:`Page`s. A page's units are pieces of text (a paragraph, a message) by an identifier that is
the same in every language, so that units of one identifier are translations of each other. Where a format gives none,
its place in the page is the identifier, and only where the page has the same sequence of elements in both languages.
"""

from __future__ import annotations

import gzip
import itertools
import json
import os
import re
import struct
import subprocess
import zlib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import polib
from lxml import etree, html

from megapoly.errors import DataError

_WIDE = r"[\u3000-\u30ff\u3400-\u9fff\uff00-\uffef\u0e00-\u0e7f]"
_LINE_BREAK = re.compile(rf"(?<={_WIDE})[ \t]*\n\s*(?={_WIDE})")
_MARK_UP = re.compile(r"</?[a-zA-Z][^>]*>|\{\{|\[\[|\$\d|\bPLURAL\b")
_BLOCKS = frozenset({"p", "h1", "h2", "h3", "h4", "h5", "div.para", "dt"})
_NOT_PROSE = frozenset({"pre", "div.navheader", "div.navfooter", "ul.docnav", "div.toc", "div.revhistory"})
_NUMBER = re.compile(r"^(?:\S+\s)?\S*\d+(?:\.\d+)*\.(?:[\d.]*)\s+")
_LISTS = frozenset({"ul", "ol", "dl", "table", "div"})
_MALLARD_LEAVE = frozenset({"info", "media", "screen", "list", "steps", "table", "note"})
_RULE = re.compile(r"\s*[\u2500-\u257f][\u2500-\u257f\s]*")  # a line of a table's frame
_GAP = re.compile(r"[ \u00a0]*[\u2500-\u257f][ \u00a0\u2500-\u257f]*|[ \u00a0]{2,}")  # between columns
MESSAGES = 40  # in a page, of formats that are a list of messages


@dataclass(frozen=True)
class Page:
    """One page in every language that has it: ``units[language][identifier]`` is a piece of text."""

    key: str
    units: Mapping[str, Mapping[str, str]]
    aligned: bool = True


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError, zlib.error, ValueError, SyntaxError) as error:
        raise DataError(f"{path}: cannot be read ({error}); remove the package's folder to get it anew") from error


def tidy(text: str) -> str:
    """One line with single spaces, and none where a line of Chinese, Japanese or Thai was only wrapped."""
    return " ".join(_LINE_BREAK.sub("", text.replace("\u00ad", "").strip()).split())


def _text(element: etree._Element, leave: frozenset[str]) -> str:
    """The text of an element without that of some elements inside."""

    def parts(node: etree._Element) -> Iterator[str]:
        yield node.text or ""
        for child in node:
            if isinstance(child.tag, str) and etree.QName(child).localname not in leave:
                yield from parts(child)
            yield child.tail or ""

    return tidy("".join(parts(element)))


def libreoffice_help(roots: Mapping[str, Path]) -> Iterator[Page]:
    """Pages of LibreOffice's help, aligned by the ids of headings and paragraphs. ``roots``: the ``text`` folders."""
    for english in sorted(roots["en"].rglob("*.html")):
        name = english.relative_to(roots["en"])
        units = {}
        for language, root in roots.items():
            if (root / name).is_file():
                units[language] = _help_page(root / name)
        yield Page(str(name.with_suffix("")), units)


def _help_page(path: Path) -> dict[str, str]:
    with _reading(path):
        area = html.parse(str(path), html.HTMLParser(encoding="utf-8")).find(".//div[@id='DisplayArea']")
    found: dict[str, str] = {}
    for element in area.iter("h1", "h2", "h3", "h4", "h5", "p") if area is not None else ():
        identifier = element.get("id")
        if identifier and identifier not in found:
            found[identifier] = _text(element, frozenset({"script", "button"}))
    return found


def _by_place(blocks: Mapping[str, list[tuple[str, str]]]) -> dict[str, dict[str, str]]:
    """Units by place, of languages whose page has the same sequence of elements as the English one."""
    shape = [tag for tag, _ in blocks["en"]]
    return {
        language: {str(i): text for i, (_, text) in enumerate(found)}
        for language, found in blocks.items()
        if [tag for tag, _ in found] == shape
    }


def docbook_html(roots: Mapping[str, Path]) -> Iterator[Page]:
    """Pages of a book that DocBook made into HTML: titles and paragraphs, aligned by place."""
    for english in sorted(roots["en"].glob("*.html")):
        paths = {language: root / english.name for language, root in roots.items()}
        blocks = {language: list(_book_blocks(path)) for language, path in paths.items() if path.is_file()}
        yield Page(english.stem, _by_place(blocks))


def _book_blocks(path: Path) -> Iterator[tuple[str, str]]:
    """(kind, text) of every block in order; blocks inside a block are its own units, and not of its text."""

    def kinds(node: etree._Element) -> set[str]:
        return {node.tag, *(f"{node.tag}.{name}" for name in node.get("class", "").split())}

    def own(node: etree._Element) -> Iterator[str]:
        yield node.text or ""
        for child in node:
            if isinstance(child.tag, str) and not kinds(child) & (_BLOCKS | _NOT_PROSE) and child.tag not in _LISTS:
                yield from own(child)
            yield child.tail or ""

    def walk(node: etree._Element) -> Iterator[tuple[str, str]]:
        if not isinstance(node.tag, str) or kinds(node) & _NOT_PROSE:
            return
        if block := sorted(kinds(node) & _BLOCKS):
            text = tidy("".join(own(node)))
            yield block[-1], _NUMBER.sub("", text) if node.tag.startswith("h") else text
        for child in node:
            yield from walk(child)

    with _reading(path):
        body = html.parse(str(path), html.HTMLParser(encoding="utf-8")).find("body")
    for node in body if body is not None else ():
        if node.get("id") not in ("banner", "title"):
            yield from walk(node)


def mallard(roots: Mapping[str, Path]) -> Iterator[Page]:
    """Pages of GNOME's help (Mallard XML), aligned by place. ``roots``: folders of one document's ``.page`` files."""
    for english in sorted(roots["en"].glob("*.page")):
        paths = {language: root / english.name for language, root in roots.items()}
        blocks = {language: _mallard_blocks(path) for language, path in paths.items() if path.is_file()}
        yield Page(english.stem, _by_place(blocks))


def _mallard_blocks(path: Path) -> list[tuple[str, str]]:
    with _reading(path):
        root = etree.parse(str(path)).getroot()
    found = []
    for element in root.iter("{*}title", "{*}p", "{*}desc"):
        inside = {etree.QName(parent).localname for parent in element.iterancestors()}
        name = etree.QName(element).localname
        if name == "desc" or "info" not in inside:  # an <info> also holds names of people and titles of links
            found.append((name, _text(element, _MALLARD_LEAVE)))
    return found


def _lists(key: str, tables: Mapping[str, Mapping[str, str]]) -> Iterator[Page]:
    """Pages of some messages each, of a long list of messages by identifier."""
    english = list(tables["en"])
    for start in range(0, len(english), MESSAGES):
        names = english[start : start + MESSAGES]
        units = {
            language: {name: tidy(table[name]) for name in names if name in table and not _MARK_UP.search(table[name])}
            for language, table in tables.items()
        }
        yield Page(f"{key}/{start // MESSAGES:04}", units)


def mediawiki(root: Path, codes: Mapping[str, str]) -> Iterator[Page]:
    """MediaWiki's messages, aligned by their names; those with mark-up or parameters are left out."""
    for english in sorted(root.rglob("i18n/**/en.json")):
        tables = {}
        for language, code in codes.items():
            path = english.with_name(f"{code}.json")
            if path.is_file():
                with _reading(path):
                    table = json.loads(path.read_text(encoding="utf-8"))
                tables[language] = {n: t for n, t in table.items() if isinstance(t, str) and not n.startswith("@")}
        yield from _lists(str(english.parent.relative_to(root)), tables)


def gettext(paths: Mapping[str, Path], key: str) -> Iterator[Page]:
    """One gettext catalogue (``.mo``) in several languages: the English message is the identifier."""
    tables: dict[str, dict[str, str]] = {"en": {}}
    for language, path in sorted(paths.items()):
        tables[language] = {}
        with _reading(path):
            entries = polib.mofile(str(path))
        for entry in entries:
            if entry.msgid and entry.msgstr and not entry.msgid_plural:
                identifier = f"{entry.msgctxt or ''}\x04{entry.msgid}"
                tables["en"][identifier] = _plain_message(entry.msgid)
                tables[language][identifier] = _plain_message(entry.msgstr)
    yield from _lists(key, tables)


def _plain_message(text: str) -> str:
    """Without the context before ``^`` (Wesnoth) and the mark of a keyboard shortcut (LibreOffice)."""
    text = re.sub(r"^\w[\w ]*\^", "", text)
    text = re.sub(r"\s?\([~_&]\w\)", "", text)
    return re.sub(r"[~_&](?=\w)", "", text) if re.match(r"^[^\n]{1,60}$", text) else text


def chromium(root: Path, codes: Mapping[str, str]) -> Iterator[Page]:
    """Chromium's interface strings, aligned by their numbers; the English is British, which the package has."""
    tables = {
        language: read_pak(root / f"{code}.pak") for language, code in codes.items() if (root / f"{code}.pak").is_file()
    }
    yield from _lists("strings", tables)


def read_pak(path: Path) -> dict[str, str]:
    """Strings by number of a ``.pak`` file: version 5 of ui/base/resource/data_pack.cc, UTF-8.

    Raises:
        DataError: another version or encoding, or a file that is cut.
    """
    data = path.read_bytes()
    if len(data) < 12:
        raise DataError(f"{path}: {len(data)} bytes, shorter than the header of a .pak file")
    version, encoding, resources, aliases = struct.unpack_from("<IB3xHH", data)
    if version != 5 or encoding != 1:
        raise DataError(f"{path}: .pak version {version}, encoding {encoding}; this reads version 5 in UTF-8 (1)")
    if len(data) < 12 + 6 * (resources + 1) + 4 * aliases:
        raise DataError(f"{path}: is cut inside its table")
    entries = [struct.unpack_from("<HI", data, 12 + 6 * i) for i in range(resources + 1)]
    if entries[-1][1] > len(data):
        raise DataError(f"{path}: is cut: {len(data)} bytes, expected {entries[-1][1]}")
    found = {}
    for (number, start), (_, stop) in itertools.pairwise(entries):
        try:
            found[f"{number:05}"] = data[start:stop].decode()
        except UnicodeDecodeError:
            continue  # a picture or a compressed file, not a string
    return found


def descriptions(files: Mapping[str, Iterable[Path]]) -> Iterator[Page]:
    """Descriptions of packages, aligned by Description-md5; their paragraphs where both have as many."""
    tables: dict[str, dict[str, list[str]]] = {}
    names: dict[str, str] = {}
    for language, paths in files.items():
        tables[language] = {}
        for path in paths:
            with _reading(path):
                blocks = path.read_text(encoding="utf-8").split("\n\n")
            for block in blocks:
                match = re.match(r"Package: (.+)\nDescription-md5: (\w+)\nDescription-\S+: (.*)", block, re.DOTALL)
                if match:
                    name, digest, text = match.groups()
                    names.setdefault(digest, name)
                    tables[language].setdefault(digest, _paragraphs(text))
    for digest, english in tables["en"].items():
        units = {"en": {str(i): text for i, text in enumerate(english)}}
        for language, table in tables.items():
            own = table.get(digest, [])
            if language != "en" and len(own) == len(english):
                units[language] = {str(i): text for i, text in enumerate(own)}
        yield Page(f"{names[digest]}/{digest[:8]}", units)


def _paragraphs(description: str) -> list[str]:
    """The summary and the paragraphs of the long text. Lists keep their lines; <trans> marks what is not translated."""
    summary, _, long = description.partition("\n")
    found = [tidy(summary)]
    for paragraph in re.split(r"\n \.(?:\n|$)", long):
        lines = [line for line in paragraph.splitlines() if line.strip()]
        listed = any(line.startswith("  ") for line in lines)
        found.append("\n".join(line.strip() for line in lines) if listed else tidy("\n".join(x.strip() for x in lines)))
    return ["" if "<trans" in text else text for text in found if text]


def man_pages(folder: Path, language: str, prefix: str = "") -> Iterator[Page]:
    """Manual pages as text, one paragraph a line; their translations are not aligned with the English.

    Raises:
        DataError: groff is not here.
    """
    paths = sorted(folder.glob("man[1-8]/*.gz"))
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # the work is groff's, in processes of its own
        for path, text in zip(paths, pool.map(_formatted, paths)):
            if text:
                yield Page(f"{prefix}{path.stem}", {language: {"": text}}, aligned=False)


def _formatted(path: Path) -> str:
    """A page by groff, without its head and foot; empty for a pointer to another page and where it is not UTF-8."""
    with _reading(path):
        source = gzip.decompress(path.read_bytes())
    if re.match(rb"\s*\.so\s", source):
        return ""
    command = ["groff", "-Kutf8", "-Tutf8", "-t", "-man", "-P-cbou", "-rLL=20000n", "-rHY=0", "-rIN=0"]
    try:
        done = subprocess.run(command, input=source, capture_output=True, check=False)
    except FileNotFoundError as error:
        raise DataError("groff is not here; apt-get install groff-base, or leave out manpages") from error
    lines = done.stdout.decode(errors="replace").splitlines()[1:-1]
    lines = [_GAP.sub(" ", line).strip() for line in lines if not _RULE.fullmatch(line)]
    text = re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()
    return "" if "\ufffd" in text else text
