"""The picture of a tokenizer report: the bars are the report's numbers."""

from __future__ import annotations

import pytest

from megapoly.charts.tokenizers import draw_report
from megapoly.data.tokenizer_report import Report, Row

ROWS = (Row("th", 1, 10, 1200, (100, 400)), Row("en", 1, 20, 800, (200, 160)))


def heights(axes):
    return [[bar.get_height() for bar in bars] for bars in axes.containers]


def test_bars_relative_to_a_baseline():
    figure = draw_report(Report(("ours", "other"), (256_000, 50_257), ROWS), 1)
    above, below = figure.axes
    # Bytes per token are 12 and 4 of ours, 3 and 5 of the other; the means are 8 and 4.
    assert heights(above) == [pytest.approx([12 / 3, 4 / 5, 8 / 4]), pytest.approx([1, 1, 1])]
    assert heights(below) == [pytest.approx([10, 10, 10]), pytest.approx([40, 8, 24])]
    assert [label.get_text() for label in above.get_xticklabels()] == ["th", "en", "mean"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["ours (256,000)", "other (50,257)"]
    assert "relative to other" in above.get_ylabel()


def test_one_tokenizer_alone_shows_its_own_figures():
    figure = draw_report(
        Report(("ours",), (500,), tuple(Row(r.language, 1, r.sentences, r.bytes, r.tokens[:1]) for r in ROWS)), 0
    )
    assert heights(figure.axes[0]) == [pytest.approx([12, 4, 8])]
    assert figure.axes[0].get_ylabel().startswith("bytes per token (")
