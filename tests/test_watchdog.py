"""The watchdog's rounds, with several ranks as threads of one process over one store."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress

import pytest
import torch.distributed as dist

from megapoly import watchdog
from megapoly.comm import PeerLost
from megapoly.context import Axis
from megapoly.mesh import Mesh
from megapoly.watchdog import Standing, Watchdog


class Rank:
    """A rank whose place the test moves."""

    def __init__(self, store: dist.Store, mesh: Mesh, rank: int, patience: float, timeout: float = 600.0) -> None:
        self.lines: list[str] = []
        self.ends: list[str] = []
        self.at = Standing()
        self.looks = 0
        self.watchdog = Watchdog(
            store.clone(), mesh, rank, patience=patience, timeout=timeout, say=self.lines.append, end=self.ends.append
        )
        self.watchdog.watch(self.where)

    def where(self) -> Standing:
        self.looks += 1
        return self.at


def settle(*ranks: Rank, doing: str = "at step 3, training") -> None:
    """Go through two steps, each seen by the watchdogs, to ``doing`` in the third."""
    for step in range(3):
        seen = [rank.looks + 2 for rank in ranks]
        for rank in ranks:
            rank.at = Standing(step, doing)
        until(lambda seen=seen: all(rank.looks >= looks for rank, looks in zip(ranks, seen)))  # type: ignore[misc]


def until(true: Callable[[], object], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "never came"
        time.sleep(0.01)


def test_every_rank_says_where_it_stands_and_the_lowest_names_the_silent() -> None:
    place = "at step 3, training: action 4 of 9: receive forward of stage 1, micro-batch 0"
    store, mesh = dist.HashStore(), Mesh(dp=2, pp=2)
    ranks = [Rank(store, mesh, rank, patience=0.6) for rank in (1, 3)]  # 0 and 2 are stopped
    with ranks[0].watchdog, ranks[1].watchdog:
        settle(*ranks, doing=place)
        until(lambda: len(ranks[0].lines) == 2 and ranks[1].lines)
        time.sleep(0.6)
    first, second = (rank.lines for rank in ranks)
    assert re.fullmatch(rf"rank 1 \(dp 1, pp 0, tp 0\) has not moved for \d+\.\d s: {place}", first[0])
    silent = "no answer from rank 0 (dp 0, pp 0, tp 0), rank 2 (dp 0, pp 1, tp 0): stopped, gone, or cut off"
    assert first[1:] == [silent]
    assert len(second) == 1  # once for a hang, and only the lowest names the silent
    assert second[0].endswith(place)
    assert ranks[1].watchdog.lost() == "no answer from rank 0 (dp 0, pp 0, tp 0), rank 2 (dp 0, pp 1, tp 0)"


def test_a_hang_is_told_again_before_the_timeout() -> None:
    rank = Rank(dist.HashStore(), Mesh(), 0, patience=0.2, timeout=1.5)
    with rank.watchdog:
        settle(rank)
        until(lambda: len(rank.lines) == 2)
        time.sleep(0.5)
    assert [line.split(" for ")[0] for line in rank.lines] == ["rank 0 (dp 0, pp 0, tp 0) has not moved"] * 2
    first, second = (float(line.split(" for ")[1].split()[0]) for line in rank.lines)
    assert first >= 0.2
    assert second >= 1.3  # 0.9 of the timeout


def test_no_alarm_while_a_run_starts_up_or_moves() -> None:
    rank = Rank(dist.HashStore(), Mesh(), 0, patience=0.6)
    with rank.watchdog:
        time.sleep(0.8)  # starting up
        rank.at = Standing(0, "at step 1, training")
        time.sleep(0.8)  # in the first step
        settle(rank)
        for moves in range(25):  # one action with many collectives
            rank.at = Standing(2, "at step 3, training", moves)
            time.sleep(0.05)
    assert rank.lines == []


def test_a_killed_neighbour_is_named_and_ends_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "GRACE", 0.3)
    store, mesh = dist.HashStore(), Mesh(tp=4)
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    for number, pid in ((2, child.pid), (3, finished())):
        store.append(f"machine/{watchdog._machine()}", f"{number} {pid};")
    store.set("ended/3", "")  # in order: a rank that is done is no loss
    ranks = [Rank(store, mesh, number, patience=0.2) for number in (0, 1)]
    with ranks[0].watchdog:
        with suppress(PeerLost), ranks[1].watchdog:
            for rank in ranks:
                rank.at = Standing(4, "at step 5, training")
            time.sleep(0.5)
            assert ranks[0].ends == []
            child.kill()  # unwaited for, it stays in the table
            raise PeerLost("all-reduce", Axis("tp", (0, 1, 2, 3)), RuntimeError("Connection closed by peer"))
        assert ranks[1].watchdog.lost(wait=30) == "rank 2 is gone"  # and not rank 1 itself, which gave up for it
        until(lambda: ranks[0].ends)
    assert ranks[0].ends[0] == "rank 2 is gone; rank 0 (dp 0, pp 0, tp 0) was at step 5, training"
    child.wait()


def test_an_error_of_one_rank_ends_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "GRACE", 0.1)
    store = dist.HashStore()
    ranks = [Rank(store, Mesh(dp=2), number, patience=0.2) for number in (0, 1)]
    with ranks[0].watchdog:
        with pytest.raises(ValueError, match="own"), ranks[1].watchdog:
            raise ValueError("of its own")
        until(lambda: ranks[0].ends)
    assert ranks[0].ends[0] == "rank 1 has ended with an error; rank 0 (dp 0, pp 0, tp 0) was starting up"


def finished() -> int:
    """The process id of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    assert not os.path.exists(f"/proc/{process.pid}")
    return process.pid
