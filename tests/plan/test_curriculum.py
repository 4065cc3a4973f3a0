"""What is said of a plan, against a walk through all of its samples."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from megapoly.data.plan import Plan
from megapoly.data.segments import Source
from megapoly.plan.curriculum import cells, outlook, rows, shares_over_time, short

SOURCES = [
    Source("code", "code", "c", 401),
    Source("en-th", "en-th", "p", 201),
    Source("th-web", "th", "w", 801),
    Source("th-wiki", "th", "x", 41),
]
STAGES = [
    ("one", 400, {"code": 0.5, "en-th": 0.2, "th-web": 0.3}),
    *[("move", 30, {"code": 0.5 - i / 100, "en-th": 0.2, "th-web": 0.2, "th-wiki": 0.1 + i / 100}) for i in range(40)],
]


@pytest.fixture(scope="module")
def plan():
    built = Plan.build(STAGES, SOURCES, 4, 1)
    return built.skipping(500, 100)


def walk(plan, first, end):
    return np.bincount(plan.locate(np.arange(first, end)).source, minlength=4) * 4


def test_tokens_and_epochs(plan):
    found = outlook(plan)
    assert found.stages == ("one", "move")
    by_stage = [walk(plan, 0, 400), walk(plan, 400, 1600)]
    for i, use in enumerate(found.sources):
        assert use.trained == tuple(int(stage[i]) for stage in by_stage)
        windows = (SOURCES[i].tokens - 1) // 4
        assert use.epochs == pytest.approx([stage[i] / 4 / windows for stage in by_stage])
    assert found.totals == (1600, 4800)
    thai = next(use for use in found.languages if use.name == "th")
    assert (thai.tokens, thai.total) == (842, int(sum(stage[2] + stage[3] for stage in by_stage)))
    code = next(use for use in found.languages if use.name == "code")
    assert code.epochs == pytest.approx(found.sources[0].epochs)  # one source, the same figures
    assert [use.total for use in found.languages] == sorted((use.total for use in found.languages), reverse=True)
    for stage, total, share in zip((*by_stage, sum(by_stage)), (1600, 4800, 6400), found.non_english(), strict=True):
        assert share == pytest.approx((stage[1] / 2 + stage[2] + stage[3]) / total)


def test_a_source_without_windows_is_not_read():
    sources = [Source("x", "x", "x", 37), Source("y", "y", "y", 4)]
    found = outlook(Plan.build([("a", 10, {"x": 1.0, "y": 0.0})], sources, 4, 1))
    assert [use.epochs for use in found.sources] == [(pytest.approx(10 / 9),), (0.0,)]


def test_rows_and_tables_agree(plan):
    found = outlook(plan)
    listed = rows(found)
    assert len(listed) == 8
    assert sum(row["share"] for row in listed if row["stage"] == "one") == pytest.approx(1)
    wiki = [row for row in listed if row["source"] == "th-wiki"]
    assert wiki[1]["epochs_so_far"] == pytest.approx(wiki[0]["epochs"] + wiki[1]["epochs"])
    heads, table = cells(found, "source", {"th-wiki": 50.0})
    assert heads[:3] == ["source", "language", "training tokens"]
    assert heads[-1] == "at most"
    assert all(len(row) == len(heads) for row in table)
    assert table[3][:3] == ["th-wiki", "th", "41"]
    assert table[3][-3:] == [f"{found.sources[3].total:,}", f"{sum(found.sources[3].epochs):.2f}", "50"]
    assert table[-1][3:8:2] == ["1,600", "4,800", "6,400"]
    assert cells(found, "source", dict.fromkeys(["code"]))[0][-1] == "epochs"  # no cap, no column
    heads, table = cells(found, "language", {})
    assert all(len(row) == len(heads) for row in table)
    assert table[-1][0] == "not English"
    assert table[-1][3] == f"{found.non_english()[0]:.2%}"


def test_shares_over_time(plan):
    edges, shares = shares_over_time(plan)
    assert edges[0] == 0
    assert edges[-1] == 6400
    assert 1600 in edges  # where a stage ends
    assert len(edges) == 1 + 40 + 1  # one, the pieces of the move, the end
    for i, (begin, end) in enumerate(pairwise(edges)):
        assert sum(row[i] for row in shares.values()) == pytest.approx(1)
        samples = walk(plan, begin // 4, end // 4)
        expected = (samples[2] + samples[3]) / (end - begin)
        assert shares["th"][i] == pytest.approx(expected, abs=0.2)


@pytest.mark.parametrize(
    ("tokens", "text"),
    [(0, "0"), (999_999, "999,999"), (1_000_000, "1.000 M"), (97_001_668_608, "97.00 B"), (542_629_691_392, "542.6 B"),
     (1_234_000_000_000, "1.234 T")],
)  # fmt: skip
def test_short(tokens, text):
    assert short(tokens) == text
