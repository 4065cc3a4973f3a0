"""The demo's text: what is taken from catalogues, what is dropped, and that nothing held out is met in training."""

from __future__ import annotations

import json
import pydoc_data.topics
from collections import defaultdict
from pathlib import Path

import pytest

pytest.importorskip("polib", reason="needs the demo's packages: pip install -e '.[demo]'")

import corpora
from corpora import LANGUAGES, Message

from megapoly.errors import DataError

PO = """
msgid ""
msgstr "Content-Type: text/plain; charset=UTF-8\\n"

msgid "Save"
msgstr "{save}"

#, fuzzy
msgid "Maybe"
msgstr "Vielleicht"

msgid "Empty"
msgstr ""

msgctxt "month"
msgid "May"
msgstr "{may}"

msgid "%d day"
msgid_plural "%d days"
msgstr[0] "{day}"
msgstr[1] "{days}"

msgid ""
"Two lines,\\n"
"   one text."
msgstr "{two}"

msgid "…"
msgstr "…"

#~ msgid "Old"
#~ msgstr "Alt"
"""
GERMAN = {"save": "Sichern", "may": "Mai", "day": "%d Tag", "days": "%d Tage", "two": "Zwei Zeilen,\\nein Text."}
CHINESE = {"save": "保存", "may": "五月", "day": "", "days": "%d 天", "two": "两行，一个文本。"}


def catalogue(root: Path, code: str, words: dict[str, str]) -> None:
    path = root / "contrib/app/locale" / code / "LC_MESSAGES/django.po"
    path.parent.mkdir(parents=True)
    path.write_text(PO.format(**words), encoding="utf-8")


def home_assistant(root: Path, fragment: str, code: str, tree: dict[str, object], mark: str = "0") -> None:
    path = root / "static/translations" / fragment / f"{code}-{mark * 32}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(tree), encoding="utf-8")


def test_django_catalogues(tmp_path: Path) -> None:
    catalogue(tmp_path, "en", dict.fromkeys(GERMAN, ""))
    catalogue(tmp_path, "de", GERMAN)
    catalogue(tmp_path, "zh_Hans", CHINESE)
    found = {m.english: m for m in corpora.distinct(corpora.django_messages(tmp_path))}
    # Fuzzy and obsolete entries are no messages; one with no word is none either.
    assert list(found) == ["Save", "Empty", "May", "%d days", "Two lines, one text."]
    assert {m.key for m in found.values()} == {"django/contrib.app/000"}
    assert found["Save"].translations == {"de": "Sichern", "zh": "保存"}
    assert found["%d days"].translations == {"de": "%d Tage", "zh": "%d 天"}
    assert found["Two lines, one text."].translations == {"de": "Zwei Zeilen, ein Text.", "zh": "两行，一个文本。"}
    assert found["Empty"].translations == {}


def test_home_assistant_joins_on_the_key(tmp_path: Path) -> None:
    home_assistant(tmp_path, "", "en", {"ui": {"a": "Light", "b": "Door", "c": {"d": "OK"}}})
    home_assistant(tmp_path, "", "en-GB", {"ui": {"a": "British light"}})
    home_assistant(tmp_path, "", "fr", {"ui": {"b": "Porte", "a": "Lumière", "c": {"d": "OK"}, "z": "Rien"}})
    home_assistant(tmp_path, "", "pt-BR", {"ui": {"a": "Luz"}})
    home_assistant(tmp_path, "", "pt", {"ui": {"a": "Luz de Portugal"}})
    plural = "{count, plural,\n one {light}\n other {lights}\n}"
    home_assistant(tmp_path, "energy", "en", {"e": "Energy", "n": plural})
    home_assistant(tmp_path, "energy", "fr", {"e": "Énergie", "n": plural})
    found = {m.english: m for m in corpora.distinct(corpora.home_assistant_messages(tmp_path))}
    assert {m.english: dict(m.translations) for m in found.values()} == {
        "Light": {"fr": "Lumière", "pt": "Luz"},
        "Door": {"fr": "Porte"},
        "OK": {},  # equal to the English
        "Energy": {"fr": "Énergie"},  # and the plural's code is dropped
    }
    assert found["Light"].key == "home-assistant/main/000"
    assert found["Energy"].key == "home-assistant/energy/000"


def test_two_files_of_one_language_are_refused(tmp_path: Path) -> None:
    home_assistant(tmp_path, "", "en", {"a": "A door"})
    home_assistant(tmp_path, "", "en", {"a": "A gate"}, mark="1")
    with pytest.raises(DataError, match=r"translations: 2 files for language en, expected one"):
        list(corpora.home_assistant_messages(tmp_path))


def test_repeated_text_is_kept_once() -> None:
    messages = [
        Message("s", "a", "Delete", {"de": "Löschen", "fr": "Supprimer"}),
        Message("s", "b", "delete", {"de": "Entfernen", "fr": "Enlever"}),
        Message("s", "b", "Remove", {"de": "löschen", "fr": "Retirer"}),
    ]
    first, last = corpora.distinct(messages)
    assert first == messages[0]
    assert last == Message("s", "b", "Remove", {"fr": "Retirer"})
    assert [d.text for d in corpora.documents([first, last], "fr")] == ["Supprimer", "Retirer"]
    assert [(d.key, d.text) for d in corpora.documents([first, last], "de")] == [("a", "Löschen")]


def test_components_end_when_full_or_at_a_section() -> None:
    full, half = "x" * corpora.MESSAGES_BYTES, "x" * (corpora.MESSAGES_BYTES // 2)
    sections = [("a", "x"), ("b", full), ("b", half), ("b", "x"), ("c", "x"), ("d", "x")]
    assert corpora.components(sections, "p") == ["p/000", "p/000", "p/001", "p/001", "p/002", "p/002"]


def test_python_reference_has_every_paragraph_once() -> None:
    table = "+----+----+\n| a  | b  |\n+----+----+"
    topics = {"b": f"One.\n\nTwo.\n\n{table}\n\nThree.\n******", "a": "Two.\n\n   code\n", "c": "One."}
    documents = list(corpora.python_documents(topics))
    assert [(d.key, d.text) for d in documents] == [
        ("python/a/000", "Two.\n\n   code"),
        ("python/b/000", "One.\n\nThree."),
    ]
    long = list(corpora.python_documents({"t": "\n\n".join(f"{i} {'x' * 1000}" for i in range(5))}))
    assert [d.key for d in long] == ["python/t/000", "python/t/001", "python/t/002"]


def test_a_language_without_text_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home_assistant(tmp_path, "", "en", {"a": "A door"})
    monkeypatch.setattr(corpora, "package_folder", lambda name: tmp_path)
    with pytest.raises(DataError, match="language zh: no text in the installed packages"):
        corpora.write_all(tmp_path / "out")


def test_a_missing_package_is_refused() -> None:
    with pytest.raises(DataError, match="package no_such_package is not installed; install the demo's packages"):
        corpora.package_folder("no_such_package")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for name in ("django", "hass_frontend"):
        pytest.importorskip(name, reason="needs the demo's packages: pip install -e '.[demo]'")
    folder = tmp_path_factory.mktemp("text")
    corpora.write_all(folder)
    return folder


def read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_installed_packages_have_all_languages(written: Path) -> None:
    assert {path.name for path in (written / "corpus").iterdir()} == {f"{language}.jsonl" for language in LANGUAGES}
    assert len(list((written / "pairs").iterdir())) == len(LANGUAGES) - 1
    for language in LANGUAGES:
        records = read(written / f"corpus/{language}.jsonl")
        assert {tuple(record) for record in records} == {("text", "language", "source", "key")}
        assert {record["language"] for record in records} == {language}
        assert sum(len(record["text"].encode()) for record in records) > 50_000
    scripts = {"ru": "аеио", "he": "אוי", "ar": "اوي", "th": "านก", "ko": "다이", "ja": "のを", "zh": "的定"}
    for language, letters in scripts.items():
        text = (written / f"corpus/{language}.jsonl").read_text(encoding="utf-8")
        assert all(text.count(letter) > 100 for letter in letters), language
    english = " ".join(record["text"] for record in read(written / "corpus/en.jsonl"))
    assert pydoc_data.topics.topics["assert"].split("\n\n")[1] in english


def test_no_text_stands_in_two_components(written: Path) -> None:
    """So a held-out component's lines, and their translations, are met nowhere in training."""
    for language in LANGUAGES:
        components: dict[str, set[str]] = defaultdict(set)
        for record in read(written / f"corpus/{language}.jsonl"):
            if record["source"] != "python":
                for line in record["text"].splitlines():
                    components[line].add(record["key"])
        if language != "en":
            for pair in read(written / f"pairs/en-{language}.jsonl"):
                assert components[pair[language]] == {pair["key"]}
        assert all(len(keys) == 1 for keys in components.values()), language


def test_components_are_the_same_in_every_language(written: Path) -> None:
    english = {r["key"]: set(r["text"].splitlines()) for r in read(written / "corpus/en.jsonl")}
    for language in LANGUAGES[1:]:
        for pair in read(written / f"pairs/en-{language}.jsonl"):
            assert pair["en"] in english[pair["key"]]
