"""The pool of ranks itself: results, and what a test sees when a rank fails, dies or hangs."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
from multiprocessing.connection import wait
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.ranks import RankError, _Rank, run_cases, run_ranks


def sum_of_ranks(rank: int, size: int, scale: float) -> torch.Tensor:
    values = torch.full((3,), scale * (rank + 1), dtype=torch.float64)
    dist.all_reduce(values)
    return values


def threads(rank: int, size: int) -> tuple[int, int]:
    return torch.get_num_threads(), os.getpid()


def rank_one_fails(rank: int, size: int) -> None:
    if rank == 1:
        raise KeyError("the reason")
    dist.barrier()


def rank_one_is_killed(rank: int, size: int) -> None:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def rank_one_exits(rank: int, size: int) -> None:
    if rank == 1:
        os._exit(7)
    dist.barrier()


def rank_one_hangs(rank: int, size: int) -> None:
    if rank == 1:
        threading.Event().wait()


def says_that_it_runs_and_hangs(rank: int, size: int, path: str) -> None:
    Path(path).touch()
    threading.Event().wait()


def unpicklable(rank: int, size: int) -> object:
    return lambda: None


def fails_at_two(rank: int, size: int, value: int) -> int:
    if value == 2:
        raise ValueError("two")
    return value * 10 + rank


@pytest.fixture(autouse=True)
def no_process_left():
    yield
    assert multiprocessing.active_children() == []


def test_results_come_back_in_rank_order_and_the_group_reduces():
    results = run_ranks(4, sum_of_ranks, 0.5)
    assert [result.tolist() for result in results] == [[5.0] * 3] * 4


def test_every_rank_is_a_process_with_one_thread():
    results = run_ranks(3, threads)
    assert [count for count, _ in results] == [1, 1, 1]
    assert len({pid for _, pid in results} | {os.getpid()}) == 4


def test_cases_share_the_ranks():
    results = run_cases(2, sum_of_ranks, [(1.0,), (2.0,)])
    assert [[tensor[0].item() for tensor in case] for case in results] == [[3.0, 3.0], [6.0, 6.0]]


def test_a_failing_case_is_named():
    with pytest.raises(RankError, match=r"(?s)ValueError: two.*in case \(2,\)"):
        run_cases(2, fails_at_two, [(1,), (2,), (3,)])


def test_the_traceback_of_a_failing_rank_is_the_message():
    with pytest.raises(RankError) as caught:
        run_ranks(3, rank_one_fails, timeout=60)
    message = str(caught.value)
    assert message.startswith("rank 1 failed:\nTraceback")
    assert "in rank_one_fails" in message
    assert "KeyError: 'the reason'" in message
    assert "after it" not in message  # its peers, stuck in the barrier, were ended rather than left to time out


def test_a_killed_rank_is_named():
    with pytest.raises(RankError, match=r"^rank 1 died without an exception: SIGKILL"):
        run_ranks(3, rank_one_is_killed, timeout=60)


def test_a_rank_that_exits_is_named():
    with pytest.raises(RankError, match=r"^rank 1 died without an exception: exit code 7"):
        run_ranks(3, rank_one_exits, timeout=60)


def test_a_hanging_rank_is_named_with_its_stack():
    run_ranks(2, threads)  # so that the time-out does not count the start of the server
    with pytest.raises(RankError, match=r"(?s)from ranks 1\n.*in rank_one_hangs"):
        run_ranks(2, rank_one_hangs, timeout=5)


def test_a_result_that_cannot_be_pickled_is_an_error():
    with pytest.raises(RankError, match=r"(?s)rank 0 failed.*pickle"):
        run_ranks(1, unpicklable)


def test_a_rank_ends_when_its_parent_is_gone(tmp_path):
    """The kernel closes the parent's end of the connection, however the parent died."""
    each = _Rank(0, 1, tmp_path, 60.0, pickle.dumps((says_that_it_runs_and_hangs, (str(tmp_path / "runs"),))))
    try:
        while not (tmp_path / "runs").exists():
            assert not wait([each.connection], 0.02), "the rank ended early"
        each.connection.close()
        each.process.join(30)
        assert each.process.exitcode == 0
    finally:
        each.end()
