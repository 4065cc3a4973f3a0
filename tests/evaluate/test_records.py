"""What is asked, from files of the real formats and from data sets as the hub has them; and what is wrong."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from megapoly.errors import DataError
from megapoly.evaluate.benchmarks import BENCHMARKS
from megapoly.evaluate.records import fetch_records, find_languages, read_records
from megapoly.evaluate.words import BECAUSE, NAMES, RIGHT
from tests.evaluate import benchmark

REAL = Path(__file__).resolve().parents[3] / "shared/data/benchmarks"
DOCS: dict[str, dict[str, Any]] = {
    "xnli": {"premise": "Er ging. ", "hypothesis": "Er blieb.", "label": "neutral"},
    "pawsx": {"sentence1": "他走了。", "sentence2": "他离开了。", "label": 1},
    "xcopa": {
        "premise": "Yağmur yağdı.",
        "choice1": "Islandım.",
        "choice2": "İyiyim.",
        "question": "effect",
        "label": 0,
    },
    "xwinograd": {"sentence": "A sah B, weil _ kam.", "option1": "A", "option2": "B", "label": 1},
}


def test_options_are_whole_sentences() -> None:
    for name, language, expected in (
        ("xnli", "de", [f"Er ging, richtig? {word}, Er blieb." for word in ("Ja", "Auch", "Nein")]),
        ("pawsx", "zh", ["他走了，对吗？不是，他离开了。", "他走了，对吗？是的，他离开了。"]),
        ("xcopa", "tr", ["Yağmur yağdı bu yüzden ıslandım.", "Yağmur yağdı bu yüzden iyiyim."]),
        ("xwinograd", "en", ["A sah B, weil A kam.", "A sah B, weil B kam."]),
    ):  # fmt: skip
        options = BENCHMARKS[name].options
        assert options
        assert options(DOCS[name], language) == expected
    assert BENCHMARKS["xnli"].answer(DOCS["xnli"]) == 1


def test_prompts_are_the_papers() -> None:
    made = BENCHMARKS["wmt20"].prompt({"source": "Guten Tag. "}, "de-en")
    assert made == "Guten Tag. Translate this sentence from German to English."
    made = BENCHMARKS["tydiqa_goldp"].prompt({"context": "C.", "question": "Q?"}, "ko")
    assert made.startswith("Read the context and answer the question in one or a few words in Korean.\n")


def test_every_language_has_its_words() -> None:
    for name, words in (("xnli", RIGHT), ("pawsx", RIGHT), ("xcopa", BECAUSE), ("tydiqa_goldp", NAMES)):
        assert set(BENCHMARKS[name].languages) <= set(words)
    for form, *words in [*RIGHT.values(), *BECAUSE.values()]:
        assert form.format(first="1", word="2", second="3")[0] == "1"
        assert len(set(words)) == len(words)


def test_languages_and_splits_of_a_folder(tmp_path: Path) -> None:
    folder = benchmark.make(tmp_path)
    found = {name: find_languages(each, folder) for name, each in BENCHMARKS.items()}
    assert {name: languages for name, languages in found.items() if languages} == {
        "xnli": ["de", "zh"], "pawsx": ["en", "zh"], "xcopa": ["th", "zh"], "xwinograd": ["en", "ja"],
        "tydiqa_goldp": ["en"], "wmt20": ["de-en", "zh-en", "en-zh"], "mtg_title": ["de"],
    }  # fmt: skip
    records = read_records(BENCHMARKS["xnli"], "de", folder)
    assert (records.split, len(records.docs), len(records.examples)) == ("test", 4, 4)
    assert records.docs[0] != records.examples[0]
    assert read_records(BENCHMARKS["pawsx"], "zh", folder).split == "dev"
    winograd = read_records(BENCHMARKS["xwinograd"], "en", folder).docs
    assert [doc["sentence"] for doc in winograd] == [
        "He saw the cat because _ was old.", 'She said "no" because _ was old.'
    ]  # fmt: skip
    assert read_records(BENCHMARKS["xwinograd"], "ja", folder).docs[0]["sentence"] == "猫は犬を見た。_は悪かった。"


@pytest.mark.skipif(not REAL.is_dir(), reason="the real benchmarks are not in shared/data")
def test_all_real_records_are_read() -> None:
    counts = {
        f"{name}/{language}": len(read_records(each, language, REAL).docs)
        for name, each in BENCHMARKS.items()
        for language in find_languages(each, REAL)[:2]
    }
    assert counts["xnli/ar"] == 5010
    assert counts["pawsx/en"] == 2000
    assert counts["xcopa/et"] == 500
    assert counts["xwinograd/en"] == 2325
    assert counts["wmt20/de-en"] == 785


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        ("xcopa/test.th.jsonl", [{**DOCS["xcopa"], "label": 2}], "line 1: answer 2 is none of the 2"),
        (
            "xcopa/test.th.jsonl",
            [{**DOCS["xcopa"], "premise": None}],
            "line 1: field 'premise' holds None; expected str",
        ),
        ("xnli/test.th.jsonl", [DOCS["xnli"], {**DOCS["xnli"], "label": "maybe"}], "line 2: is no record of xnli"),
        ("xnli/test.th.jsonl", [], "has no record of th"),
        ("tydiqa_goldp/dev.th.jsonl", [], None),
    ],
)
def test_files_that_are_wrong(tmp_path: Path, name: str, rows: list[dict[str, Any]], message: str | None) -> None:
    benchmark.write(tmp_path / name, rows)
    task = name.split("/")[0]
    if message is None:
        with pytest.raises(
            DataError, match=r"has no tydiqa_goldp/dev\.ko\.jsonl or tydiqa_goldp/train\.ko\.jsonl, also"
        ):
            read_records(BENCHMARKS[task], "ko", tmp_path)
        return
    with pytest.raises(DataError) as error:
        read_records(BENCHMARKS[task], "th", tmp_path)
    assert message in str(error.value)
    assert str(tmp_path / name) in str(error.value)


def test_a_row_of_winograd_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "xwinograd").mkdir()
    (tmp_path / "xwinograd/dataset.tsv").write_text('en\tx\t?\tHe ran.\t["She"]\t["he", [0, 1], ["he"]]\t[[], []]\n')
    with pytest.raises(DataError, match=r"line 1: is no row of XWinograd \(token 'She' is not in the sentence\)"):
        read_records(BENCHMARKS["xwinograd"], "en", tmp_path)


def test_records_of_the_hub_are_those_of_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    asked = []

    def load(path: str, subset: str, split: str) -> list[dict[str, Any]]:
        asked.append((path.split("/")[1], subset, split))
        return {
            "xnli": [{**DOCS["xnli"], "label": 2}],
            "xwinograd": [{"sentence": "A _", "option1": "x", "option2": "y", "answer": "2"}],
            "tydiqa": [
                {"id": f"{name}-1", "context": "c", "question": "q", "answers": {"text": ["t"], "answer_start": [0]}}
                for name in ("korean", "arabic")
            ],
        }[asked[-1][0]]

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert fetch_records(BENCHMARKS["xnli"], "de").docs[0]["label"] == "contradiction"
    assert fetch_records(BENCHMARKS["xwinograd"], "ja").docs[0]["label"] == 1
    (doc,) = fetch_records(BENCHMARKS["tydiqa_goldp"], "ko").docs
    assert doc["answers"] == [{"text": "t"}]
    assert asked[0] == ("xnli", "de", "test")
    assert asked[2][1] == "jp"
    with pytest.raises(
        DataError, match=r"mtg_title: is not on the hub; give --data FOLDER with mtg/title\.LANG\.jsonl"
    ):
        fetch_records(BENCHMARKS["mtg_title"], "de")

    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(DataError, match=r"xcopa in th: could not be fetched \(no route to host\); give --data FOLDER"):
        fetch_records(BENCHMARKS["xcopa"], "th")

    sacrebleu = pytest.importorskip("sacrebleu")
    for name, lines in (("source", "eins\nzwei\n"), ("target", "one\ntwo\n")):
        (tmp_path / name).write_text(lines)
    monkeypatch.setattr(sacrebleu, "get_source_file", lambda *_: os.fspath(tmp_path / "source"))
    monkeypatch.setattr(sacrebleu, "get_reference_files", lambda *_: [os.fspath(tmp_path / "target")])
    docs = fetch_records(BENCHMARKS["wmt20"], "de-en").docs
    assert docs == [{"source": "eins", "target": "one"}, {"source": "zwei", "target": "two"}]
