"""The corpus from Debian packages: each format's extractor on files made here, packages, pairs, and keys."""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import struct
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

pytest.importorskip("lxml", reason="needs the packages of the Debian example: pip install -e '.[debian]'")
pytest.importorskip("polib", reason="needs the packages of the Debian example: pip install -e '.[debian]'")

import collect
import extract
import polib
from extract import Page
from fetch import Cache
from sources import LANGUAGES, SOURCES, Request

from megapoly.errors import ConfigError, DataError

needs_dpkg = pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="needs dpkg-deb, which Debian and Ubuntu have")


def put(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in gzip.decompress(path.read_bytes()).decode().splitlines()]


def units(pages: list[Page]) -> list[tuple[str, dict[str, dict[str, str]]]]:
    return [(page.key, {language: dict(found) for language, found in page.units.items()}) for page in pages]


# What each format holds, and that translations are found by what identifies them, not by their order.


def test_libreoffice_help_is_aligned_by_ids(tmp_path: Path) -> None:
    page = "<html><body><p id='menu'>Menu</p><div id='DisplayArea'>{}</div></body></html>"
    english = "<h1 id='hd1'>Cells</h1><p id='par2'>Press <b>Enter</b>.<script>run()</script></p><p>no id</p>"
    german = "<p id='par2'>Drücken Sie\n <b>Enter</b>.</p><p id='par3'>Nur hier.</p><h1 id='hd1'>Zellen</h1>"
    put(tmp_path / "en/scalc/a.html", page.format(english))
    put(tmp_path / "de/scalc/a.html", page.format(german))
    put(tmp_path / "en/b.html", "<html><body></body></html>")
    assert units(list(extract.libreoffice_help({"en": tmp_path / "en", "de": tmp_path / "de"}))) == [
        ("b", {"en": {}}),
        (
            "scalc/a",
            {
                "en": {"hd1": "Cells", "par2": "Press Enter."},
                "de": {"par2": "Drücken Sie Enter.", "par3": "Nur hier.", "hd1": "Zellen"},
            },
        ),
    ]


def test_books_are_aligned_by_place_where_their_elements_agree(tmp_path: Path) -> None:
    page = (
        "<html><body><div class='navheader'><p>Next</p></div><h2>{}</h2><div class='para'>{}"
        "<pre>ls -l</pre><ul><li><p>{}</p></li></ul></div>{}</body></html>"
    )
    put(tmp_path / "en/a.html", page.format("2.1. Disks", "A disk\nspins.", "Slowly.", ""))
    put(tmp_path / "ja/a.html", page.format("2.1. ディスク", "ディスクは\n回る。", "ゆっくり。", ""))
    put(tmp_path / "fr/a.html", page.format("2.1. Disques", "Un disque tourne.", "Lentement.", "<p>De plus.</p>"))
    (found,) = extract.docbook_html({language: tmp_path / language for language in ("en", "ja", "fr", "ko")})
    assert found.units == {
        "en": {"0": "Disks", "1": "A disk spins.", "2": "Slowly."},
        "ja": {"0": "ディスク", "1": "ディスクは回る。", "2": "ゆっくり。"},  # a line break is no space there
    }


def test_mallard(tmp_path: Path) -> None:
    page = (
        "<page xmlns='http://projectmallard.org/1.0/'><info><credit><name>A. Writer</name></credit>"
        "<desc>{}</desc><title type='link'>short</title></info><title>{}</title>"
        "<p>{}<media type='image'><p>alt</p></media></p><code>ls</code></page>"
    )
    put(tmp_path / "en/a.page", page.format("About files.", "Files", "Run <code>ls</code> here."))
    put(tmp_path / "ru/a.page", page.format("О файлах.", "Файлы", "Запустите <code>ls</code>."))
    (found,) = extract.mallard({"en": tmp_path / "en", "ru": tmp_path / "ru"})
    assert list(found.units["en"].values()) == ["About files.", "Files", "Run ls here.", "alt"]
    assert list(found.units["ru"].values()) == ["О файлах.", "Файлы", "Запустите ls.", "alt"]
    assert found.units["en"].keys() == found.units["ru"].keys()


def test_mediawiki_is_aligned_by_names(tmp_path: Path) -> None:
    folder = tmp_path / "languages/i18n"
    english = {"@metadata": {"authors": []}, "save": "Save page", "link": "See [[Main]]", "n": "$1 pages", "x": "Undo"}
    put(folder / "en.json", json.dumps(english))
    put(folder / "zh-hans.json", json.dumps({"x": "撤销", "save": "保存页面", "link": "见[[首页]]"}))
    put(folder / "zh-hant.json", json.dumps({"x": "復原"}))
    assert units(list(extract.mediawiki(tmp_path, {"en": "en", "zh": "zh-hans", "fr": "fr"}))) == [
        ("languages/i18n/0000", {"en": {"save": "Save page", "x": "Undo"}, "zh": {"x": "撤销", "save": "保存页面"}})
    ]


def test_gettext_is_aligned_by_messages(tmp_path: Path) -> None:
    messages = {
        "de": [("", "~File", "~Datei"), ("menu", "Open", "Öffnen"), ("verb", "Open", "Auf"), ("", "Never", "")],
        "th": [("", "~File", "แฟ้ม(~F)"), ("", "wesnoth^Elf", "เอลฟ์")],
    }
    for language, entries in messages.items():
        catalogue = polib.MOFile()
        catalogue.metadata = {"Content-Type": "text/plain; charset=utf-8"}
        for context, english, translation in entries:
            catalogue.append(polib.MOEntry(msgctxt=context or None, msgid=english, msgstr=translation))
        catalogue.save(str(tmp_path / f"{language}.mo"))
    (found,) = extract.gettext({language: tmp_path / f"{language}.mo" for language in messages}, "sw")
    pairs = {
        language: {found.units["en"][name]: text for name, text in found.units[language].items()}
        for language in messages
    }
    assert pairs["th"] == {"File": "แฟ้ม", "Elf": "เอลฟ์"}
    assert {name: found.units["de"][name] for name in found.units["de"]}.keys() <= found.units["en"].keys()
    german = sorted((found.units["en"][name], text) for name, text in found.units["de"].items())
    assert german == [("File", "Datei"), ("Open", "Auf"), ("Open", "Öffnen")]


def pak(strings: Mapping[int, bytes], version: int = 5, encoding: int = 1) -> bytes:
    """A file as ui/base/resource/data_pack.h describes it: header, table of (id, offset) with a last one, data."""
    header = struct.pack("<IB3xHH", version, encoding, len(strings), 0)
    offset, table = len(header) + 6 * (len(strings) + 1), b""
    for number, text in strings.items():
        table += struct.pack("<HI", number, offset)
        offset += len(text)
    return header + table + struct.pack("<HI", 0, offset) + b"".join(strings.values())


def test_chromium_is_aligned_by_numbers(tmp_path: Path) -> None:
    (tmp_path / "en-GB.pak").write_bytes(pak({7: b"Close tab", 9: b"\x89PNG\xff", 300: b"New tab"}))
    (tmp_path / "he.pak").write_bytes(pak({7: "סגירת כרטיסייה".encode(), 300: "כרטיסייה חדשה".encode()}))
    (found,) = extract.chromium(tmp_path, {"en": "en-GB", "he": "he", "th": "th"})
    assert found.units == {
        "en": {"00007": "Close tab", "00300": "New tab"},
        "he": {"00007": "סגירת כרטיסייה", "00300": "כרטיסייה חדשה"},
    }


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (pak({1: b"x"}, version=4), "version 4, encoding 1; this reads version 5"),
        (pak({1: b"x"}, encoding=2), "version 5, encoding 2; this reads version 5"),
        (pak({1: b"text"})[:-1], r"is cut: 27 bytes, expected 28"),
        (pak({1: b"x", 2: b"y"})[:20], "is cut inside its table"),
        (b"\x05\0\0\0", "4 bytes, shorter than the header"),
    ],
)
def test_an_unsound_pak_is_refused(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "a.pak").write_bytes(data)
    with pytest.raises(DataError, match=message):
        extract.read_pak(tmp_path / "a.pak")


def test_descriptions_are_aligned_by_their_hash(tmp_path: Path) -> None:
    one, two = "1" * 32, "2" * 32
    english = put(
        tmp_path / "en",
        f"Package: zip\nDescription-md5: {one}\nDescription-en: packer\n It packs\n files.\n .\n It is old:\n  - very\n"
        "\n"
        f"Package: tar\nDescription-md5: {two}\nDescription-en: archiver\n It archives.\n",
    )
    spanish = put(
        tmp_path / "es",
        f"Package: tar\nDescription-md5: {two}\nDescription-es: archivador\n Archiva.\n .\n Y más.\n\n"
        f"Package: zip\nDescription-md5: {one}\nDescription-es: compresor\n Comprime\n archivos.\n .\n <trans>\n",
    )
    assert units(list(extract.descriptions({"en": [english], "es": [spanish]}))) == [
        (
            "zip/11111111",
            {
                "en": {"0": "packer", "1": "It packs files.", "2": "It is old:\n- very"},
                "es": {"0": "compresor", "1": "Comprime archivos.", "2": ""},
            },
        ),
        ("tar/22222222", {"en": {"0": "archiver", "1": "It archives."}}),  # another number of paragraphs
    ]


@pytest.mark.skipif(shutil.which("groff") is None, reason="needs groff")
def test_manual_pages(tmp_path: Path) -> None:
    page = (
        "'\\\" t\n.TH TEST 1 2024 Debian Manual\n.SH BEZEICHNUNG\ntest \\- prüft\n.PP\nEin Satz, der\nweiter geht.\n"
        ".TS\nallbox expand;\nl l.\nWert\tSinn\n0\tgut\n.TE\n"
    )
    (tmp_path / "man1").mkdir()
    (tmp_path / "man1/test.1.gz").write_bytes(gzip.compress(page.encode()))
    (tmp_path / "man1/other.1.gz").write_bytes(gzip.compress(b".so man1/test.1\n"))
    (found,) = extract.man_pages(tmp_path, "de", "dev/")
    assert (found.key, found.aligned) == ("dev/test.1", False)
    lines = [line for line in found.units["de"][""].splitlines() if line]
    assert [line.replace("‐", "-").replace("−", "-") for line in lines] == [
        "BEZEICHNUNG", "test - prüft", "Ein Satz, der weiter geht.", "Wert Sinn", "0 gut"
    ]  # fmt: skip
    (tmp_path / "man1/cut.1.gz").write_bytes(gzip.compress(page.encode())[:-9])
    with pytest.raises(DataError, match=r"cut\.1\.gz: cannot be read"):
        list(extract.man_pages(tmp_path, "de"))


# What is kept of a page.


def test_what_is_no_translation_is_dropped() -> None:
    long = (
        "A sentence of more than a hundred and twenty bytes, so that lengths of its translations are looked at too. "
        * 2
    )
    assert collect.translated("de", "Save", "Sichern")
    assert not collect.translated("de", "Save", "save")  # left as it was
    assert not collect.translated("ru", "Save", "Save as")  # another script
    assert collect.translated("ru", "Save", "Сохранить")
    assert not collect.translated("de", long, "Kurz.")
    assert collect.translated("de", long, long[: len(long) // 4])
    assert collect.translated("de", None, long)  # with no English beside it


def test_a_text_is_kept_once_and_its_translations_with_it() -> None:
    distinct = collect.Distinct()
    first = distinct.page(Page("a", {"en": {"1": "Open", "2": "Close"}, "fr": {"1": "Ouvrir", "2": "Fermer"}}))
    assert first == {"en": {"1": "Open", "2": "Close"}, "fr": {"1": "Ouvrir", "2": "Fermer"}}
    second = distinct.page(
        Page("b", {"en": {"1": "open", "2": "Shut", "3": "42"}, "fr": {"1": "Lancer", "2": "fermer", "4": "Seul"}})
    )
    # "open" was met, and "Lancer" goes with it; "fermer" was met; "Seul" has no English.
    assert second == {"en": {"2": "Shut"}, "fr": {"4": "Seul"}}


# A whole run, on packages that lie in the cache.

BOOK = "usr/share/doc/debian-handbook/html"
TITLES = {"en": "Disk", "de": "Platte", "th": "ดิสก์"}


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    """A cache with a book of 40 pages and the messages of a wiki, in English, German and Thai."""
    root = tmp_path / "packages"
    for language, folder in (("en", "en-US"), ("de", "de-DE"), ("th", "th-TH")):
        for number in range(40):
            text = (
                f"<html><body><h1>{TITLES[language]} {number}</h1><p>{TITLES[language]} = {number}.</p></body></html>"
            )
            put(root / f"debian-handbook/{BOOK}/{folder}/p{number:02}.html", text)
        messages = json.dumps({"a": f"{TITLES[language]}!", "b": "OK"})
        put(root / f"mediawiki/usr/share/mediawiki/i18n/{language}.json", messages)
    put(root / "debian-handbook/package.txt", "debian-handbook_1_all.deb")
    put(root / "mediawiki/package.txt", "mediawiki_2_all.deb")
    return root


def test_a_run(tmp_path: Path, packages: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "text"
    arguments = {"packages": packages, "sources": "mediawiki,debian-handbook", "offline": True}
    collect.main(output, languages="de,th", **arguments)
    assert sorted(path.name for path in output.iterdir()) == [
        "de.jsonl.gz", "en-de.jsonl.gz", "en-th.jsonl.gz", "en.jsonl.gz", "report.json", "th.jsonl.gz"
    ]  # fmt: skip
    documents = {language: read(output / f"{language}.jsonl.gz") for language in TITLES}
    for language, title in TITLES.items():
        assert documents[language][7] == {
            "text": f"{title} 7\n{title} = 7.",
            "language": language,
            "source": "debian-handbook",
            "key": "debian-handbook/p07",
        }
        assert [document["key"] for document in documents[language]] == [d["key"] for d in documents["en"]]
    pairs = read(output / "en-th.jsonl.gz")
    assert len(pairs) == 81  # "OK" is the same in both languages
    assert pairs[14] == {"en": "Disk 7", "th": "ดิสก์ 7", "source": "debian-handbook", "key": "debian-handbook/p07"}
    assert pairs[-1] == {"en": "Disk!", "th": "ดิสก์!", "source": "mediawiki", "key": "mediawiki/i18n/0000"}

    shown = [line.split() for line in capsys.readouterr().out.splitlines()]
    size = sum(len(document["text"].encode()) for document in documents["th"])
    assert ["th", "41", f"{size / 1e6:.2f}", "81"] in shown
    assert ["debian-handbook", "120", "0.00", "160"] in shown
    rows = json.loads((output / "report.json").read_text(encoding="utf-8"))["rows"]
    thai = next(row for row in rows if (row["name"], row.get("language")) == ("debian-handbook", "th"))
    assert (thai["documents"], thai["pairs"], thai["licence"]) == (40, 80, "GPL-2+ or CC-BY-SA-3.0")
    assert rows[-1]["mediawiki"] == "mediawiki_2_all.deb"

    collect.main(tmp_path / "again", languages="th,de", **arguments)
    for path in output.glob("*.gz"):
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()
    with pytest.raises(SystemExit, match=r"text: exists already; remove it, or choose another --output"):
        collect.main(output, **arguments)


def test_no_text_stands_under_two_keys(tmp_path: Path, packages: Path) -> None:
    """A split by key then holds out a text with its translations, in documents and in pairs."""
    for path in packages.rglob("p*.html"):  # every second page repeats a text of another in the same language
        number, text = int(path.stem[1:]), path.read_text(encoding="utf-8")
        other = path.with_name(f"p{(number + 20) % 40:02}.html").read_text(encoding="utf-8")
        if number % 2:
            put(path, text.replace("</body>", other[other.index("<p>") :]))
    collect.main(tmp_path / "text", packages=packages, sources="debian-handbook", languages="de,th", offline=True)
    keys: dict[tuple[str, str], set[str]] = {}
    for language in TITLES:
        for record in read(tmp_path / f"text/{language}.jsonl.gz"):
            for line in record["text"].splitlines():
                keys.setdefault((language, line), set()).add(record["key"])
    assert len(keys) == 3 * 80
    for language in ("de", "th"):
        for pair in read(tmp_path / f"text/en-{language}.jsonl.gz"):
            assert keys["en", pair["en"]] == keys[language, pair[language]] == {pair["key"]}


def test_a_run_that_fails_leaves_nothing_behind(tmp_path: Path, packages: Path) -> None:
    put(packages / "mediawiki/usr/share/mediawiki/i18n/th.json", "{broken")
    arguments = {"packages": packages, "sources": "debian-handbook,mediawiki", "offline": True}
    with pytest.raises(SystemExit, match=r"^error: .*th\.json: cannot be read .*; remove the package's folder"):
        collect.main(tmp_path / "text", **arguments)
    shutil.rmtree(packages / f"debian-handbook/{BOOK}/en-US")
    with pytest.raises(SystemExit, match=r"en-US: is not in the package"):
        collect.main(tmp_path / "text", **arguments)
    shutil.rmtree(packages / "mediawiki/usr")
    with pytest.raises(SystemExit, match=r"^error: mediawiki: no text in its packages"):
        collect.main(tmp_path / "text", packages=packages, sources="mediawiki", offline=True)
    assert [path.name for path in tmp_path.iterdir()] == ["packages"]


def test_missing_packages(tmp_path: Path, packages: Path) -> None:
    missing = r"gnome-user-docs: not in .*; run without --offline to download it"
    arguments = {"packages": packages, "sources": "gnome-help,mediawiki", "offline": True}
    with pytest.raises(SystemExit, match=rf"^error: {missing}; --skip-missing goes on without it"):
        collect.main(tmp_path / "text", **arguments)
    request = Request(Cache(packages, offline=True), LANGUAGES, skip_missing=True)
    (tmp_path / "text").mkdir()
    sizes = collect.collect(request, ["gnome-help", "wesnoth", "mediawiki"], tmp_path / "text")
    assert {name: len(found) for name, found in sizes.items()} == {"gnome-help": 0, "wesnoth": 0, "mediawiki": 3}
    assert re.match(missing, request.skipped[0])
    assert request.skipped[1] == "wesnoth-1.*-data: no such package"


def test_unknown_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"language 'eo' is not known; choose from en, zh, es"):
        collect.choose("en,eo", LANGUAGES, "language")
    assert collect.choose("th, ko", LANGUAGES, "language") == ["ko", "th"]
    with pytest.raises(SystemExit, match=r"^error: source 'openoffice' is not known; choose from libreoffice-help"):
        collect.main(tmp_path / "text", packages=tmp_path, sources="openoffice")
    assert collect.choose("", list(SOURCES), "source") == list(SOURCES)


# Packages from apt, of which the tests have a stand-in; dpkg-deb is the real one.


@pytest.fixture
def apt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of packages that a stand-in for apt-get and apt-cache knows."""
    archive = tmp_path / "archive"
    archive.mkdir()
    tools = tmp_path / "tools"
    put(
        tools / "apt-get",
        f'#!/bin/sh\nfor last; do :; done\ncp {archive}/"$last"_*.deb . || {{ echo "E: no $last" >&2; exit 100; }}',
    )
    put(tools / "apt-cache", f"#!/bin/sh\ncd {archive} && ls | sed 's/_.*//'")
    for tool in tools.iterdir():
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    return archive


def make_package(archive: Path, name: str, files: Mapping[str, str]) -> None:
    root = archive.parent / "build" / name
    put(
        root / "DEBIAN/control",
        f"Package: {name}\nVersion: 1.0\nArchitecture: all\nMaintainer: T <t@e.org>\nDescription: t\n",
    )
    for path, text in files.items():
        put(root / path, text)
    subprocess.run(["dpkg-deb", "--build", root, archive / f"{name}_1.0_all.deb"], check=True, capture_output=True)


@needs_dpkg
def test_packages_are_downloaded_once(tmp_path: Path, apt: Path) -> None:
    make_package(apt, "mediawiki", {"usr/share/mediawiki/i18n/en.json": "{}"})
    cache = Cache(tmp_path / "cache")
    folder = cache.package("mediawiki")
    assert (folder / "usr/share/mediawiki/i18n/en.json").read_text(encoding="utf-8") == "{}"
    assert cache.file_name(folder) == "mediawiki_1.0_all.deb"
    (apt / "mediawiki_1.0_all.deb").unlink()
    assert cache.package("mediawiki") == folder
    with pytest.raises(DataError, match=r"apt-get download -qq manpages ended with code 100: E: no manpages"):
        cache.package("manpages")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["mediawiki"]


@needs_dpkg
def test_the_newest_of_several_releases_is_taken(tmp_path: Path, apt: Path) -> None:
    for name in ("wesnoth-1.8-data", "wesnoth-1.16-data", "wesnoth-1.16-music", "wesnoth-data"):
        make_package(apt, name, {})
    assert Cache(tmp_path / "cache").package("wesnoth-1.*-data").name == "wesnoth-1.16-data"
    assert Cache(tmp_path / "cache", offline=True).package("wesnoth-1.*-data").name == "wesnoth-1.16-data"


def test_without_apt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match="apt-get is not here; this example needs Debian or Ubuntu, with apt and dpkg"):
        Cache(tmp_path / "cache").package("mediawiki")
