"""Communication is under way while the rank computes: seen in the order of calls, not in times."""

from __future__ import annotations

from typing import Any

import pytest

from megapoly import comm
from megapoly.config import Config
from megapoly.pipeline.runtime import Pipeline
from tests.parity import cases
from tests.ranks import run_ranks


def reductions_and_gathers(rank: int, size: int, settings: Config) -> tuple[list[int], list[int], list[int], int]:
    """Of a sharded optimizer: gradients still missing as each bucket is reduced; buckets that are being gathered after
    the step, after the next forward pass has embedded its tokens, and how many there are.
    """
    built = cases.engine(size, settings)
    buffers, missing, gathering = built.buffers, [], []
    reduce = comm.reduce_scatter_async

    def watched(*args: Any) -> comm.Pending:
        missing.append(sum(buffers._missing.values()))
        return reduce(*args)

    comm.reduce_scatter_async = watched
    batches = cases.mine(cases.global_batch(0), built)
    built.step(batches, rate=0.01, sources=2)
    after_step = sorted(buffers._gathering)
    stage = built.stages[0]
    embed = stage._embed

    def embedded(call: Any) -> Any:
        out = embed(call)
        gathering.append(sorted(buffers._gathering))
        return out

    stage._embed = embedded
    built.step(batches, rate=0.01, sources=2)
    own = {buffers._bucket_of[id(p)] for module in (stage.embedding, stage.positions) for p in module.parameters()}
    assert set(after_step) - set(gathering[0]) == own
    built.context.close()
    return missing[: len(buffers.buckets)], after_step, gathering[0], len(buffers.buckets)


def test_a_full_bucket_is_reduced_while_others_fill_and_gathered_while_the_next_forward_runs() -> None:
    settings = cases.config(dp=2, micro_batch=2, bucket_mb=0.05)
    for missing, after_step, during_forward, buckets in run_ranks(2, reductions_and_gathers, settings):
        assert buckets > 4
        assert len(missing) == buckets
        assert missing[0] > missing[len(missing) // 2] > 0  # neither the first bucket nor those after it waited
        assert missing[-1] == 0
        assert after_step == list(range(buckets))  # the step waits for none
        assert 0 < len(during_forward) < buckets  # and a module for its own


def order_of_messages(rank: int, size: int, settings: Config) -> list[str]:
    built = cases.engine(size, settings)
    events: list[str] = []
    send, receive, timed = comm.send, comm.receive, Pipeline._timed

    class Watched(comm.Pending):
        def wait(self) -> Any:
            if self._works:
                events.append(f"wait {self._what.split()[0]}")
            return super().wait()

    def watch(pending: comm.Pending) -> comm.Pending:
        pending.__class__ = Watched
        return pending

    def sent(*args: Any) -> comm.Pending:
        events.append("send")
        return watch(send(*args))

    def received(*args: Any) -> comm.Pending:
        events.append("receive")
        return watch(receive(*args))

    def computed(self: Any, *args: Any) -> None:
        events.append("compute")
        timed(self, *args)

    comm.send, comm.receive, Pipeline._timed = sent, received, computed
    built.gradients(cases.mine(cases.global_batch(0), built), sources=2)
    built.context.close()
    return events


@pytest.mark.parametrize("schedule", ["1f1b", "zero-bubble", "interleaved"])
def test_sends_are_not_waited_for_and_receives_are_posted_early(schedule: str) -> None:
    settings = cases.config(dp=1, pp=2, micro_batch=1, schedule=schedule)
    first, second = run_ranks(2, order_of_messages, settings)
    in_flight, most = 0, 0
    for event in first:
        in_flight += {"send": 1, "wait send": -1}.get(event, 0)
        most = max(most, in_flight)
        assert in_flight <= 1 + 2 * settings.layout.stages
    assert most > 2
    # An action is computed right after a receive is posted, whose message it does not wait for.
    assert any(second[i : i + 2] == ["receive", "compute"] for i in range(len(second)))
