"""The picture of a data plan: areas and bars are the plan's numbers."""

from __future__ import annotations

import pytest

from megapoly.charts.curriculum import draw_curriculum
from megapoly.charts.figure import save_figure
from megapoly.data.plan import Plan
from megapoly.data.segments import Source
from megapoly.plan.curriculum import outlook

SOURCES = [Source("en", "en", "e", 4001), Source("pairs", "en-th", "p", 801), Source("th", "th", "t", 401)]
PLAN = Plan.build(
    [("one", 3000, {"en": 0.5, "pairs": 0.2, "th": 0.3}), ("two", 1000, {"en": 0.1, "th": 0.9})], SOURCES, 4, 1
)


def test_areas_bars_and_marks():
    figure = draw_curriculum(PLAN, {"en": None, "pairs": None, "th": 20.0})
    above, below = figure.axes
    assert [text.get_text() for text in above.get_legend().get_texts()][::-1][:3] == ["en", "en-th", "th"]
    areas = [path.get_paths()[0].vertices for path in above.collections[:3]]
    # English at the bottom, pairs upon it, Thai to the top; the second stage begins after 12,000 tokens.
    assert areas[0][:, 1].max() == pytest.approx(0.5)
    assert areas[1][:, 1].max() == pytest.approx(0.7)
    assert areas[2][:, 1].max() == pytest.approx(1.0)
    assert 12_000 in areas[0][:, 0]
    line = above.patches[0].get_data()
    assert line.values.tolist() == pytest.approx([0.6, 0.1])  # English and half of the pairs
    assert [text.get_text() for text in above.texts] == ["one", "two"]
    found = outlook(PLAN)
    for i, bars in enumerate(below.containers):
        assert [bar.get_height() for bar in bars] == pytest.approx([use.epochs[i] for use in found.sources])
    assert below.collections[0].get_offsets().tolist() == [[2.0, 20.0]]


def test_the_same_file_every_time(tmp_path):
    for name in ("a.svg", "b.svg"):
        save_figure(draw_curriculum(PLAN, {}), tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
