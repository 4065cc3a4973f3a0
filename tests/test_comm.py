"""Collectives of several ranks against what they are defined as, and the connecting of a ring."""

from __future__ import annotations

import pytest
import torch

from megapoly import comm
from megapoly.context import ALONE, ParallelContext
from megapoly.mesh import Mesh
from tests.ranks import run_ranks


def values(rank: int, size: int) -> torch.Tensor:
    return torch.arange(2.0 * size * 3, dtype=torch.float64).view(2 * size, 3) * (rank + 1) + rank


def on_rank(rank: int, size: int) -> dict[str, torch.Tensor]:
    context = ParallelContext.create(Mesh(tp=size))
    mine = values(rank, size)
    part = slice(2 * rank, 2 * rank + 2)
    inside, whole = mine.clone(), torch.zeros_like(mine)
    comm.reduce_scatter_async(inside, context.tp, inside[part]).wait()
    whole[part] = mine[part]
    comm.all_gather_async(whole[part], context.tp, whole).wait()
    return {
        "sum": comm.all_reduce(mine.clone(), context.tp),
        "scattered": comm.reduce_scatter(mine, context.tp),
        "in place": inside[part],
        "gathered": comm.all_gather(mine[part].contiguous(), context.tp),
        "gathered in place": whole,
    }


@pytest.mark.parametrize("size", [2, 3])
def test_collectives(size: int) -> None:
    total = sum(values(rank, size) for rank in range(size))
    gathered = torch.cat([values(rank, size)[2 * rank : 2 * rank + 2] for rank in range(size)])
    for rank, found in enumerate(run_ranks(size, on_rank)):
        part = total[2 * rank : 2 * rank + 2]
        for name, expected in (("sum", total), ("scattered", part), ("in place", part)):
            assert torch.equal(found[name], expected), name
        assert torch.equal(found["gathered"], gathered)
        assert torch.equal(found["gathered in place"], gathered)


def test_alone_every_collective_is_the_identity() -> None:
    x = torch.randn(4, 3)
    for function in (comm.all_reduce, comm.all_gather, comm.reduce_scatter):
        assert function(x, ALONE) is x


def connected(rank: int, size: int) -> tuple[int, int]:
    context = ParallelContext.create(Mesh(pp=size))
    comm.connect(context.pp, torch.device("cpu"))
    return context.pp.traffic.calls, context.backward.traffic.calls


@pytest.mark.parametrize("size", [2, 3, 4])
def test_every_pair_of_neighbours_in_the_ring_meets_both_ways(size: int) -> None:
    pairs = 1 if size == 2 else 2
    assert run_ranks(size, connected) == [(2 * pairs, 0)] * size


def test_a_rank_alone_has_no_ring() -> None:
    comm.connect(ALONE, torch.device("cpu"))
