"""Calls and bytes of every axis in one step, against closed formulas. Bytes are those that a rank hands in."""

from __future__ import annotations

import pytest

from megapoly.config import Config
from tests.parity import cases
from tests.ranks import run_ranks

FLOAT64 = 8
STATISTICS = (4 + 2 * 2) * FLOAT64  # two squared norms, zeros, stops, and two numbers for each of two sources


def traffic(rank: int, size: int, settings: Config) -> dict[str, tuple[int, int]]:
    built = cases.engine(size, settings)
    built.step(cases.mine(cases.global_batch(0), built), rate=0.01, sources=2)
    built.buffers.settle()
    result = {axis.name: (axis.traffic.calls, axis.traffic.bytes) for axis in built.context.axes()}
    buckets = built.buffers.buckets
    partial = [b for b in buckets if b.plan.partial == ("tp",)]
    result["buckets"] = (len(buckets), sum(b.gradients.nbytes for b in buckets))
    result["partial"] = (len(partial), sum(b.gradients[b.mine].nbytes for b in partial))
    built.context.close()
    return result


@pytest.mark.parametrize("shard", [False, True])
@pytest.mark.parametrize("split", [False, True], ids=["whole", "sequence parallel"])
def test_data_and_tensor_parallel(shard: bool, split: bool) -> None:
    settings = cases.config(dp=2, tp=2, micro_batch=2, sequence_parallel=split, shard_optimizer=shard)
    layers, microbatches, tp = settings.model.layers, 2, 2
    tokens = 2 * cases.SEQUENCE
    activation = tokens * settings.model.hidden * FLOAT64
    for rank in run_ranks(4, traffic, settings):
        buckets, size = rank["buckets"]
        # One reduction of the gradients; sharded, a gathering of the parameters, to which a rank hands in its half.
        assert rank["dp"] == (buckets * (1 + shard) + 1, size + shard * size // 2 + STATISTICS)
        assert rank["model"] == (1, STATISTICS)
        assert rank["pp"] == rank["pp (gradients)"] == rank["tied"] == rank["control"] == (0, 0)
        # Two pairs of linear layers in each layer, the embedding and the output. Without slices a pair is a sum each
        # way, and the embedding and the output are one each. With slices a pair is a gathering and a reduce-scatter
        # each way, and a gathering of its input again; the embedding is one of either, the output one more gathering.
        pairs = 2 * layers
        gathers, sums = (3 * pairs + 1 + 2, 2 * pairs + 1 + 1) if split else (0, 2 * pairs + 2)
        # The loss: a maximum, and in one call the sum and the target of every token.
        assert rank["tp"][0] == microbatches * (gathers + sums + 2) + rank["partial"][0]
        per_microbatch = gathers * activation // tp + sums * activation + 3 * tokens * FLOAT64
        assert rank["tp"][1] == microbatches * per_microbatch + rank["partial"][1]
        assert (rank["partial"][0] > 0) == split


def test_a_weight_part_gathers_as_often_and_a_layer_computed_again_twice() -> None:
    """Under sequence parallelism, whatever puts gradients off; full recomputation repeats a layer's forward pass."""
    keys = {"dp": 1, "pp": 2, "tp": 2, "micro_batch": 2, "stage_layers": (5, 4)}
    whole, put_off, again = (
        run_ranks(4, traffic, cases.config(**keys, **more))
        for more in ({}, {"schedule": "zero-bubble"}, {"recompute": "full"})
    )
    activation = 2 * cases.SEQUENCE * 32 * FLOAT64
    for rank in range(4):
        calls, size = whole[rank]["tp"]
        assert put_off[rank]["tp"] == (calls, size)
        layers, microbatches = (5, 5, 4, 4)[rank], 4
        # Of the two gatherings and two sums of a layer the last sum is not needed again, but stands before the end.
        repeated = microbatches * layers
        assert again[rank]["tp"] == (calls + 4 * repeated, size + repeated * (2 * activation // 2 + 2 * activation))


@pytest.mark.parametrize("schedule", ["1f1b", "zero-bubble"])
def test_pipeline_sends_activations_down_and_gradients_up(schedule: str) -> None:
    settings = cases.config(dp=1, pp=4, micro_batch=2, schedule=schedule)
    microbatches, payload = 4, 2 * cases.SEQUENCE * settings.model.hidden * FLOAT64
    embedding = settings.model.vocabulary * settings.model.hidden * FLOAT64
    for number, rank in enumerate(run_ranks(4, traffic, settings)):
        sends, receives = (microbatches * (number < 3), microbatches * (number > 0))
        assert rank["pp"] == (sends + receives, sends * payload)
        assert rank["pp (gradients)"] == (sends + receives, receives * payload)
        calls, size = rank["tied"]
        assert calls == (number in (0, 3))
        assert embedding <= size < embedding + 64 * FLOAT64 if calls else size == 0
        assert rank["tp"] == rank["dp"] == (0, 0)


@pytest.mark.parametrize("schedule", ["interleaved", "zero-bubble-v"])
def test_every_boundary_between_ranks_is_one_message_each_way(schedule: str) -> None:
    """Four stages on two ranks: in turns they have three boundaries between ranks, there and back two."""
    settings = cases.config(dp=1, pp=2, micro_batch=2, schedule=schedule)
    microbatches, payload = 4, 2 * cases.SEQUENCE * settings.model.hidden * FLOAT64
    downward = [2, 1] if schedule == "interleaved" else [1, 1]
    for number, rank in enumerate(run_ranks(2, traffic, settings)):
        boundaries = sum(downward)
        assert rank["pp"] == (microbatches * boundaries, microbatches * downward[number] * payload)
        assert rank["pp (gradients)"] == (microbatches * boundaries, microbatches * downward[1 - number] * payload)
        assert rank["tied"][0] == (schedule == "interleaved")
