"""Calls and bytes of every axis in one step, against closed formulas."""

from __future__ import annotations

from megapoly.config import Config
from tests.parity import cases
from tests.ranks import run_ranks

FLOAT64 = 8


def traffic(rank: int, size: int, settings: Config) -> dict[str, tuple[int, int]]:
    built = cases.engine(size, settings)
    built.gradients(cases.mine(cases.global_batch(0), built), sources=2)
    result = {axis.name: (axis.traffic.calls, axis.traffic.bytes) for axis in built.context.axes()}
    result["buckets"] = (len(built.buffers.buckets), sum(b.gradients.nbytes for b in built.buffers.buckets))
    built.context.close()
    return result


def test_data_and_tensor_parallel() -> None:
    settings = cases.config(dp=2, tp=2, micro_batch=2)
    model, microbatches = settings.model, 2
    tokens = 2 * cases.SEQUENCE
    statistics = (2 + 2 * 2) * FLOAT64  # norm, stop, and two numbers for each of two sources
    for rank in run_ranks(4, traffic, settings):
        buckets, gradient_bytes = rank["buckets"]
        assert rank["dp"] == (buckets + 1, gradient_bytes + statistics)
        # Of a micro-batch: two sums in a layer each way, the embedding, the gradient before the logits; then the
        # maximum, and in one call the sum and the target of every token.
        whole = 4 * model.layers + 2
        assert rank["tp"][0] == microbatches * (whole + 2)
        assert rank["tp"][1] == microbatches * tokens * (whole * model.hidden + 3) * FLOAT64
        assert rank["model"] == (1, statistics)
        assert rank["pp"] == rank["backward"] == rank["tied"] == rank["control"] == (0, 0)


def test_pipeline_sends_activations_down_and_gradients_up() -> None:
    settings = cases.config(dp=1, pp=4, micro_batch=2, schedule="1f1b")
    microbatches, payload = 4, 2 * cases.SEQUENCE * settings.model.hidden * FLOAT64
    embedding = settings.model.vocabulary * settings.model.hidden * FLOAT64
    for number, rank in enumerate(run_ranks(4, traffic, settings)):
        sends, receives = (microbatches * (number < 3), microbatches * (number > 0))
        assert rank["pp"] == (sends + receives, sends * payload)
        assert rank["backward"] == (sends + receives, receives * payload)
        calls, size = rank["tied"]
        assert calls == (number in (0, 3))
        assert embedding <= size < embedding + 64 * FLOAT64 if calls else size == 0
        assert rank["tp"] == rank["dp"] == (0, 0)
