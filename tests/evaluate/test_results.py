"""Averages, tables, files and pictures of figures that are made up here."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from megapoly.charts.evaluation import draw_evaluation
from megapoly.cli.common import write_rows
from megapoly.errors import ConfigError, DataError
from megapoly.evaluate.results import (
    Figure,
    averages,
    check_unique,
    markdown,
    notes,
    read_figures,
    table,
    tell_apart,
)


def figure(model: str, task: str, language: str, value: float, metric: str = "acc") -> Figure:
    return Figure(model, task, language, metric, value, value / 10, "%", 100, split="test")


FIGURES = [
    figure("a", "xcopa", "th", 60), figure("a", "xcopa", "zh", 50), figure("a", "xcopa", "qu", 40),
    figure("a", "wmt20", "de-en", 20, "bleu"), figure("a", "wmt20", "en-de", 10, "bleu"),
    figure("a", "wmt20", "en-zh", 30, "bleu"), figure("b", "xcopa", "th", 70), figure("b", "xcopa", "zh", 30),
]  # fmt: skip


def test_averages_are_over_languages_and_directions() -> None:
    found = {(each.model, each.name): each for each in averages(FIGURES, ["th", "zh", "de"])}
    assert {key: each.value for key, each in found.items()} == {
        ("a", "xcopa/average"): 50, ("a", "xcopa/covered"): 55, ("a", "wmt20/X-en"): 20, ("a", "wmt20/en-X"): 20,
        ("b", "xcopa/average"): 50, ("b", "xcopa/covered"): 50,
    }  # fmt: skip
    whole = found["a", "xcopa/average"]
    assert whole.error == pytest.approx(math.sqrt(36 + 25 + 16) / 3)
    assert (whole.samples, whole.parts) == (300, ("th", "zh", "qu"))
    assert ("a", "xcopa/covered") not in {(each.model, each.name) for each in averages(FIGURES)}
    unknown = [FIGURES[0], Figure("a", "xcopa", "zh", "acc", 50, None)]
    assert averages(unknown)[0].error is None


def test_a_table_has_a_column_for_each_model() -> None:
    figures = [*FIGURES, *averages(FIGURES)]
    made = table(figures)
    assert made.heads == ["task", "language", "records", "a", "b"]
    assert made.rows[0] == ["xcopa, accuracy", "th", "100", "60.0 ± 6.0", "70.0 ± 7.0"]
    assert made.rows[2] == ["", "qu", "100", "40.0 ± 4.0", "-"]
    assert made.rows[3][1:3] == ["average", "300"]
    assert made.rows[4] == [""] * 5
    page = markdown(figures, notes(figures))
    assert "| xcopa, accuracy | th | 100 | 60.0 ± 6.0 | 70.0 ± 7.0 |\n" in page
    assert "- xcopa: test, no example; chance gets 50.0\n" in page
    assert "Of bits per byte" not in page
    bits = Figure("a", "bits_per_byte", "th", "bits_per_byte", 1.23456, 0.01, "bits/byte", 3)
    assert table([bits]).rows == [["bits_per_byte, bits per byte", "th", "3", "1.235 ± 0.010"]]
    assert notes([bits])[1].startswith("Of bits per byte less is better")


def test_figures_come_back_from_a_file(tmp_path: Path) -> None:
    figures = [*FIGURES, *averages(FIGURES)]
    write_rows(tmp_path / "a.json", [each.row() for each in figures])
    assert read_figures(tmp_path / "a.json") == figures
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert rows[0]["name"] == "xcopa/th"
    check_unique(FIGURES)
    with pytest.raises(ConfigError, match="a: has xcopa/th twice"):
        check_unique([*FIGURES, FIGURES[0]])
    (tmp_path / "b.json").write_text('{"rows": [{"name": "x"}]}')
    for name, message in (("b.json", "is no file of megapoly evaluate --json"), ("c.json", "cannot be read")):
        with pytest.raises(DataError, match=message):
            read_figures(tmp_path / name)


def test_models_are_told_apart() -> None:
    assert tell_apart(["/x/demo", "/y/poly"]) == ["demo", "poly"]
    assert tell_apart(["/x/one/run", "/x/two/run"]) == ["one/run", "two/run"]
    assert tell_apart([]) == []


def test_a_picture_has_a_bar_for_each_figure() -> None:
    pytest.importorskip("matplotlib")
    figures = [*FIGURES, *averages(FIGURES)]
    picture = draw_evaluation(figures)
    above, xcopa, wmt = picture.axes
    assert [text.get_text() for text in above.get_xticklabels()] == ["xcopa", "wmt20\nX-en", "wmt20\nen-X"]
    assert [text.get_text() for text in xcopa.get_xticklabels()] == ["th", "zh", "qu", "average"]
    assert len(xcopa.patches) == 4 + 3
    assert {patch.get_height() for patch in wmt.patches} == {20, 10, 30}
    (one,) = draw_evaluation([FIGURES[0]]).axes
    assert [text.get_text() for text in one.get_xticklabels()] == ["th"]
