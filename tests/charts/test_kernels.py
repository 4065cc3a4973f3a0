"""Pictures of kernels' benchmarks: bars and curves are the rows' numbers."""

from __future__ import annotations

from typing import Any

import pytest

from megapoly.charts.kernels import draw_kernels


def row(name: str, shape: str, value: float, peers: dict[str, float], op: str = "norm", **more: Any) -> list[dict]:
    base = {"op": op, "name": name, "shape": shape, "value": value, "unit": "GB/s", "limit": 10.0, "dtype": "float32"}
    return [{**base, "peer": peer, "peer_value": number, **more} for peer, number in peers.items()]


def widths(axes: Any) -> list[list[float]]:
    return [[bar.get_width() for bar in bars] for bars in axes.containers]


def test_bars_by_shape_and_contender() -> None:
    rows = [
        {"name": "copy", "value": 10.0, "unit": "GB/s"},
        *row("layer norm forward", "A: 2 x 3", 5.0, {"eager": 4.0, "compile": 6.0}),
        *row("rms norm forward", "B: 2 x 4", 7.0, {"eager": 3.0}),
        *row("layer norm backward", "A: 2 x 3", 2.0, {"eager": 1.0, "compile": 20.0}),
        *row("layer norm forward", "C: 2 x 5", 8.0, {"eager": 9.0}),
    ]
    figure = draw_kernels(rows, "a device")
    forward, backward = figure.axes
    # One op after the other: layer norm of A and C, then RMSNorm of B.
    assert widths(forward) == [[5.0, 8.0, 7.0], [4.0, 9.0, 3.0], [6.0, 0.0, 0.0]]
    labels = [label.get_text() for label in forward.get_yticklabels()]
    assert labels == ["layer norm\nA: 2 x 3", "layer norm\nC: 2 x 5", "rms norm\nB: 2 x 4"]
    assert forward.get_title("left") == "norm, forward, float32"
    assert forward.get_xlabel() == "GB/s"
    assert list(forward.lines[0].get_xdata()) == [10.0, 10.0]
    assert widths(backward) == [[2.0], [1.0], [20.0]]
    assert [label.get_text() for label in backward.get_yticklabels()] == ["A: 2 x 3"]
    assert backward.get_xlim()[1] > 20.0
    named = {text.get_text() for text in figure.legends[0].get_texts()}
    assert named == {"megapoly", "eager", "compile", "measured limit"}
    assert len({tuple(bars.patches[0].get_facecolor()) for bars in forward.containers}) == 3


def test_curves_over_what_is_swept() -> None:
    rows = [
        *row("layer norm forward", "A: 2 x 3", 5.0, {"eager": 4.0}),
        *row("layer norm forward", "hidden 2048: 2 x 2048", 6.0, {"eager": 4.5}),
        *row("layer norm forward", "hidden 1024: 2 x 1024", 5.5, {"eager": 4.0}),
        *row("attention forward", "head 64, sequence 512: 1 x 2 x 512 x 64", 3.0, {"sdpa": 2.0}, op="attention"),
        *row("attention forward", "head 128, sequence 512: 1 x 2 x 512 x 128", 4.0, {"sdpa": 1.0}, op="attention"),
    ]
    bars, norm, *attention = draw_kernels(rows, "a device").axes
    assert widths(bars) == [[5.0], [4.0]]
    own, eager, limit = norm.lines
    assert (list(own.get_xdata()), list(own.get_ydata())) == ([1024, 2048], [5.5, 6.0])
    assert list(eager.get_ydata()) == [4.0, 4.5]
    assert list(limit.get_ydata()) == [10.0, 10.0]
    assert norm.get_xlabel() == "hidden size"
    assert [axes.get_title("left") for axes in attention] == [
        "attention forward, head 64, float32", "attention forward, head 128, float32",
    ]  # fmt: skip
    assert attention[0].get_xlabel() == "sequence length"


def test_memory_of_the_loss_is_drawn_in_megabytes() -> None:
    more = {"op": "linear_cross_entropy", "extra_bytes": 128e6, "peer_extra_bytes": 2.5e9}
    figure = draw_kernels(row("linear + cross-entropy", "256K: 2 x 3 x 4", 1.0, {"eager": 2.0}, **more), "a device")
    memory = figure.axes[-1]
    assert widths(memory) == [pytest.approx([128]), pytest.approx([2500])]
    assert memory.get_xlabel() == "MB"
    assert not memory.lines  # the limit is of speed
