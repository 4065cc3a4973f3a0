"""The picture, read back from its SVG."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections import Counter

import pytest

from megapoly.pipeline.actions import Kind
from megapoly.pipeline.comparison import Compared, compare
from megapoly.pipeline.picture import draw
from megapoly.pipeline.schedule import build
from megapoly.pipeline.timeline import simulate

SVG = "{http://www.w3.org/2000/svg}"


def parse(timelines):
    """Per rank of every panel: offset of the row, and bars (x, width, colour) with the numbers on them."""
    root = ET.fromstring(draw(timelines))
    rows = []
    for row in root.iter(f"{SVG}g"):
        left, _ = (float(each) for each in row.get("transform").removeprefix("translate(").rstrip(")").split())
        bars = [(float(e.get("x")), float(e.get("width")), e.get("fill")) for e in row.iter(f"{SVG}rect")]
        rows.append((left, bars, [text.text for text in row.iter(f"{SVG}text")]))
    return root, rows


def test_bars_stand_where_the_simulator_says():
    timelines = [each.timeline for each in compare(4, 8, communication=0.25) if isinstance(each, Compared)]
    root, rows = parse(timelines)
    spans = [rank for timeline in timelines for rank in timeline.spans]
    assert len(rows) == len(spans) == 5 * 4
    last = max(x + width for _, bars, _ in rows for x, width, _ in bars)
    longest = max(timeline.makespan for timeline in timelines)
    scale = last / longest
    for (left, bars, _), expected in zip(rows, spans, strict=True):
        assert left + last <= float(root.get("width"))
        assert [x for x, _, _ in bars] == pytest.approx([span.start * scale for span in expected], abs=1.1)
        ends = [x + width for x, width, _ in bars]
        assert ends == pytest.approx([span.stop * scale for span in expected], abs=1.1)


def test_bars_carry_their_micro_batch_and_a_colour_per_kind_and_stage():
    timeline = simulate(build("zero-bubble-v", 2, 3))
    _, rows = parse([timeline])
    for (_, bars, numbers), spans in zip(rows, timeline.spans, strict=True):
        assert numbers == [str(span.action.microbatch) for span in spans]
        colours = {(span.action.kind, span.action.stage): fill for (_, _, fill), span in zip(bars, spans, strict=True)}
        assert len(set(colours.values())) == len(colours) == 6
    _, rows = parse([simulate(build("1f1b", 2, 1000))])
    assert [len(bars) for _, bars, _ in rows] == [2000, 2000]
    assert not any(numbers for _, _, numbers in rows)  # no room


def test_titles_say_bubbles_and_peak():
    timelines = [simulate(build(name, 4, 16), 0.5, 1.0) for name in ("interleaved", "zero-bubble-v")]
    root, _ = parse(timelines)
    texts = ["".join(text.itertext()) for text in root.iter(f"{SVG}text")]
    facts = "bubble 8.6% · without barrier 8.6% · peak 5.5 live micro-batches · time 52.5 · 2 stages per rank"
    assert f"interleaved{facts}" in texts
    facts = "bubble 3.0% · without barrier 0.0% · peak 4 live micro-batches · time 49.5 · 2 stages per rank"
    assert f"zero-bubble-v{facts}" in texts
    assert Counter(texts)["rank 3"] == 2
    assert {kind.value for kind in Kind if kind.value.startswith(("forward", "backward"))} <= set(texts)


def test_a_picture_of_nothing_is_refused():
    with pytest.raises(ValueError, match="no timeline"):
        draw([])
