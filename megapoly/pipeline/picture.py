"""Simulated schedules drawn as SVG, one panel each on one axis of time. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from xml.sax.saxutils import escape

from megapoly.pipeline.actions import Kind
from megapoly.pipeline.schedule import Span
from megapoly.pipeline.timeline import Timeline

_COLOURS = {  # of the first stage of a rank; later ones are lighter
    Kind.FORWARD: (61, 122, 190),
    Kind.BACKWARD: (214, 108, 58),
    Kind.BACKWARD_INPUT: (233, 158, 60),
    Kind.BACKWARD_WEIGHT: (92, 158, 110),
}
_LIGHTEST = 0.55  # share of white in the colours of a rank's last stage
_LEFT, _RIGHT, _TOP, _TITLE, _ROW, _GAP, _AXIS = 64, 24, 58, 26, 20, 22, 30  # in pixels, as all that follow
_NARROWEST, _WIDEST = 760.0, 1900.0  # of the axis of time
_DIGIT = 6.0
_STYLE = (
    "text{font:11px -apple-system,'Segoe UI',Helvetica,Arial,sans-serif;fill:#333}"
    ".n text{font-size:10px;text-anchor:middle;fill:#fff}.n .d{fill:#222}"
    ".h{font-size:13px;font-weight:600}.q{fill:#777}.m{text-anchor:middle;fill:#777}.e{text-anchor:end}"
    ".t{paint-order:stroke;stroke:#fff;stroke-width:6px}"  # keeps lines of the axis off
)


def draw(timelines: Sequence[Timeline]) -> str:
    """SVG of timelines: a row per rank, a bar per compute action, grey where a rank idles.

    Bars carry their micro-batch where any number fits. ValueError where there is no timeline.
    """
    if not timelines:
        raise ValueError("a picture of no timeline")
    longest = max(timeline.makespan for timeline in timelines)
    scale = _width(timelines, longest) / longest
    width = _LEFT + longest * scale + _RIGHT
    heights = [_TITLE + _ROW * timeline.schedule.ranks + _GAP for timeline in timelines]
    bottom = _TOP + sum(heights) - _GAP / 2
    body = [*_legend(timelines), *_axis(longest, scale, bottom)]
    for i, timeline in enumerate(timelines):
        body += _panel(timeline, _TOP + sum(heights[:i]), scale)
    size = f'width="{width:.0f}" height="{bottom + _AXIS:.0f}"'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} viewBox="0 0 {width:.0f} {bottom + _AXIS:.0f}">',
            f"<style>{_STYLE}</style>",
            '<rect width="100%" height="100%" fill="#fff"/>',
            *body,
            "</svg>\n",
        ]
    )


def _width(timelines: Sequence[Timeline], longest: float) -> float:
    """Of the axis of time: so that numbers fit into the bars, within reason."""
    shortest = min(span.stop - span.start for timeline in timelines for spans in timeline.spans for span in spans)
    digits = max(len(str(timeline.schedule.microbatches - 1)) for timeline in timelines)
    return min(max(longest / shortest * (_DIGIT * digits + 5), _NARROWEST), _WIDEST)


def _panel(timeline: Timeline, top: float, scale: float) -> Iterator[str]:
    schedule = timeline.schedule
    virtual = len(schedule.placement) // schedule.ranks
    facts = [
        f"bubble {timeline.bubble:.1%}",
        f"without barrier {timeline.bubble_without_barrier:.1%}",
        f"peak {timeline.peak:.4g} live micro-batches",
        f"time {timeline.makespan:g}",
        *([f"{virtual} stages per rank"] if virtual > 1 else []),
    ]
    title = f'<tspan class="h">{escape(schedule.name)}</tspan><tspan class="q" dx="10">{" · ".join(facts)}</tspan>'
    yield f'<text class="t" x="{_LEFT}" y="{top + 16:.0f}">{title}</text>'
    for rank, spans in enumerate(timeline.spans):
        y = top + _TITLE + _ROW * rank
        yield f'<text class="e" x="{_LEFT - 8}" y="{y + 13:.0f}">rank {rank}</text>'
        idle = f'width="{timeline.makespan * scale:.2f}" height="{_ROW - 2}" fill="#ececec"'
        yield f'<rect x="{_LEFT}" y="{y:.0f}" {idle}/>'
        yield f'<g class="n" transform="translate({_LEFT} {y:.0f})">'
        yield from _bars(spans, schedule.stages(rank), scale, _DIGIT * len(str(schedule.microbatches - 1)) + 1)
        yield "</g>"


def _bars(spans: Sequence[Span], stages: Sequence[int], scale: float, least: float) -> Iterator[str]:
    for (kind, stage, microbatch), start, stop in spans:
        x, width = start * scale, (stop - start) * scale
        white = _LIGHTEST * stages.index(stage) / max(1, len(stages) - 1)
        colour = tuple(round(each + (255 - each) * white) for each in _COLOURS[kind])
        gap = min(1.0, width / 8)
        size = f'width="{width - gap:.2f}" height="{_ROW - 2}"'
        yield f'<rect x="{x:.2f}" {size} fill="#{bytes(colour).hex()}"/>'
        if width >= least:
            dark = ' class="d"' if sum(colour) > 430 else ""
            yield f'<text{dark} x="{x + (width - gap) / 2:.2f}" y="13">{microbatch}</text>'


def _legend(timelines: Sequence[Timeline]) -> Iterator[str]:
    first = timelines[0].schedule
    yield f'<text class="h" x="{_LEFT}" y="20">{first.ranks} ranks, {first.microbatches} micro-batches</text>'
    shown = {kind for timeline in timelines for kind in timeline.schedule.kinds}
    several = any(len(timeline.schedule.placement) > timeline.schedule.ranks for timeline in timelines)
    x = float(_LEFT)
    for kind, colour in _COLOURS.items():
        if kind in shown:
            yield f'<rect x="{x:.0f}" y="30" width="12" height="12" fill="#{bytes(colour).hex()}"/>'
            yield f'<text x="{x + 17:.0f}" y="40">{kind.value}</text>'
            x += 17 + _DIGIT * len(kind.value) + 18
    yield f'<rect x="{x:.0f}" y="30" width="12" height="12" fill="#ececec"/>'
    yield f'<text x="{x + 17:.0f}" y="40">idle{"; later stages of a rank are lighter" if several else ""}</text>'


def _axis(longest: float, scale: float, bottom: float) -> Iterator[str]:
    tick = 10.0 ** math.floor(math.log10(longest))
    tick = next(tick / part for part in (1, 2, 5, 10) if longest / (tick / part) >= 8)
    yield f'<text class="q e" x="{_LEFT - 8}" y="{bottom + 16:.0f}">time</text>'
    for i in range(math.floor(longest / tick + 1e-9) + 1):
        x = _LEFT + i * tick * scale
        yield f'<path d="M{x:.2f} {_TOP}V{bottom:.0f}" stroke="#ddd"/>'
        yield f'<text class="m" x="{x:.2f}" y="{bottom + 16:.0f}">{i * tick:g}</text>'
