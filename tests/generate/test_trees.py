"""Trees of rows against the rows themselves: what each token sees, its place, and what is asked for."""

from __future__ import annotations

import random

import pytest

from megapoly.generate.trees import PrefixTree, plant


def rows_of(tree: PrefixTree) -> dict[int, list[tuple[list[int], int]]]:
    """Of every row, what stands before each scored token, from the mask alone, and the token."""
    seen = tree.mask(len(tree) + 3)
    assert not seen[: len(tree), len(tree) :].any()
    assert seen.diagonal().all()
    asked = {number: label for label, number in tree.labels.items()}
    found = {}
    for number, labels in tree.rows:
        found[number] = []
        for at, token in (asked[label] for label in labels):
            before = seen[at].nonzero()[0].tolist()
            assert [tree.positions[i] for i in before] == list(range(len(before)))
            found[number].append(([tree.tokens[i] for i in before], token))
    return found


def test_every_row_is_there_and_sees_itself_alone() -> None:
    draw = random.Random(1)
    for _ in range(40):
        stems = [[draw.randrange(4) for _ in range(draw.randrange(1, 30))] for _ in range(3)]
        rows = [draw.choice(stems) + [draw.randrange(4) for _ in range(draw.randrange(1, 12))] for _ in range(12)]
        counts = [draw.randrange(1, len(row)) for row in rows]
        trees = plant(rows, counts)
        found = {number: asked for tree in trees for number, asked in rows_of(tree).items()}
        assert found == {
            i: [(row[:at], row[at]) for at in range(len(row) - count, len(row))]
            for i, (row, count) in enumerate(zip(rows, counts, strict=True))
        }
        assert sum(map(len, trees)) < sum(len(row) - 1 for row in rows)


def test_options_share_their_question() -> None:
    question = list(range(10, 30))
    (tree,) = plant([[*question, 1, 5], [*question, 2, 5], [*question, 3]], [2, 2, 1])
    assert len(tree) == 22
    assert not tree.is_chain
    assert len(tree.labels) == 5  # of the last token of the question three, and one after each first option
    (tree,) = plant([[*question, option] for option in (1, 2, 3)], [1, 1, 1])
    assert (len(tree), tree.is_chain) == (20, True)


@pytest.mark.parametrize(("length", "trees"), [(100, 1), (400, 2)])
def test_a_tree_stays_small(length: int, trees: int) -> None:
    """At most twice as long as its first row, or 512 tokens: three rows of 400 that share the half have 800."""
    rows = [[1] * (length // 2) + [i] * (length // 2) + [9] for i in (2, 3, 4, 5)]
    assert len(plant(rows, [1] * 4)) == trees


def test_rows_that_share_little_stand_apart() -> None:
    rows = [[1, i, *range(20)] for i in (2, 3)]
    assert [len(tree) for tree in plant(rows, [1, 1])] == [21, 21]
