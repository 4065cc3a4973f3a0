"""All schedules side by side."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megapoly.pipeline.comparison import HEADS, Compared, Refused, cells, closed_formula, compare, pick, rows
from tests.pipeline.cases import NAMES


@given(st.integers(1, 6), st.integers(1, 18), st.integers(2, 4), st.sampled_from([(1.0, 2.0), (3.0, 2.0), (2.0, 1.0)]))
@settings(max_examples=60)
def test_wherever_a_closed_formula_holds_the_simulator_says_the_same(p, m, v, times):
    compared = compare(p, m, v, *times)
    assert [each.name for each in compared] == list(NAMES)
    for each in compared:
        if isinstance(each, Refused):
            assert (each.name, m % p > 0) == ("interleaved", True)
        elif each.formula is not None:
            assert each.timeline.bubble == pytest.approx(each.formula, abs=1e-12)
    # Each takes as much computing, however the stages are cut.
    assert {round(sum(each.timeline.busy), 9) for each in compared if isinstance(each, Compared)} == {
        round(p * m * sum(times), 9)
    }


def test_closed_formulas_are_those_of_the_papers():
    assert closed_formula("gpipe", 4, 16, 1, 1.0, 1.0, 1.0) == 3 / 19
    assert closed_formula("1f1b", 4, 16, 1, 1.0, 5.0, 0.1) == pytest.approx(3 / 19)
    assert closed_formula("interleaved", 4, 16, 3, 1.0, 1.0, 1.0) == 3 / (3 * 16 + 3)
    assert closed_formula("zero-bubble", 4, 16, 1, 1.0, 2.0, 0.5) == 3 * 2.5 / (16 * 3.5 + 3 * 2.5)
    assert closed_formula("zero-bubble-v", 4, 16, 2, 1.0, 1.0, 1.0) == 1.5 / (16 * 3 + 1.5)


def test_no_formula_where_none_holds():
    assert closed_formula("zero-bubble", 4, 3, 1, 1.0, 1.0, 1.0) is None
    assert closed_formula("zero-bubble", 4, 8, 1, 1.0, 1.0, 1.1) is None
    assert closed_formula("zero-bubble-v", 4, 6, 2, 1.0, 1.0, 1.0) is None
    assert closed_formula("zero-bubble-v", 4, 8, 2, 1.0, 2.0, 1.0) is None


def test_the_table_and_the_rows_of_four_ranks():
    compared = compare(4, 16)
    assert [cells(each) for each in compared] == [
        ("gpipe", "15.8%", "15.8%", "15.8%", "16", "57", "96"),
        ("1f1b", "15.8%", "15.8%", "15.8%", "4", "57", "96"),
        ("interleaved", "8.6%", "8.6%", "8.6%", "5.5", "52.5", "224"),
        ("zero-bubble", "5.9%", "5.9%", "5.9%", "4", "51", "96"),
        ("zero-bubble-v", "3.0%", "3.0%", "0.0%", "4", "49.5", "192"),
    ]
    made = {row["name"]: row for row in rows(pick(compared, "interleaved"), compared)}
    assert made["interleaved: bubble"]["value"] == pytest.approx(made["interleaved: bubble"]["limit"])
    assert [made[f"interleaved, rank {rank}: peak"]["value"] for rank in range(4)] == [5.5, 4.5, 3.5, 2.5]


def test_what_cannot_run_is_listed_with_the_reason():
    compared = compare(4, 10)
    assert cells(compared[2]) == ("interleaved", *["-"] * (len(HEADS) - 1))
    made = {row["name"]: row for row in rows(pick(compared, "1f1b"), compared)}
    assert made["interleaved"]["value"] is None
    assert made["interleaved"]["note"].endswith("the nearest that works is 8 or 12")
    with pytest.raises(ValueError, match="not a multiple of 4"):
        pick(compared, "interleaved")
    with pytest.raises(ValueError, match="above 0 and finite"):
        compare(4, 8, forward=-1.0)
