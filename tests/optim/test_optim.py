"""Buckets, AdamW against torch.optim.AdamW, and the learning-rate shapes against closed formulas."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from megapoly.config import Optimizer
from megapoly.context import ParallelContext
from megapoly.errors import TrainingError
from megapoly.optim.adam import AdamW
from megapoly.optim.buffers import Buffers
from megapoly.optim.layout import buckets
from megapoly.optim.lr import learning_rate
from megapoly.spec import Box, ParamSpec, shard


def spec(name: str, *shape: int, decay: bool = True, partial: tuple[str, ...] = ()) -> ParamSpec:
    return ParamSpec(name, shape, Box.whole(shape), shape, decay=decay, partial=partial)


@given(
    st.lists(st.tuples(st.integers(0, 300), st.booleans(), st.sampled_from([(), ("tied",)])), min_size=1, max_size=30),
    st.integers(1, 500),
    st.integers(1, 5),
)
def test_buckets_hold_every_parameter_once_without_overlap(
    parts: list[tuple[int, bool, tuple[str, ...]]], limit: int, shards: int
) -> None:
    specs = [spec(str(i), n, decay=decay, partial=partial) for i, (n, decay, partial) in enumerate(parts)]
    laid = buckets(specs, limit, shards)
    assert sorted(slot.parameter for bucket in laid for slot in bucket.slots) == list(range(len(specs)))
    for bucket in laid:
        end = 0
        for slot in bucket.slots:
            assert slot.start >= end
            assert slot.stop - slot.start == specs[slot.parameter].shape[0]
            assert (specs[slot.parameter].decay, specs[slot.parameter].partial) == (bucket.decay, bucket.partial)
            end = slot.stop
        assert end <= bucket.size
        ranges = [bucket.shard(number) for number in range(shards)]
        assert [cut for each in ranges for cut in (each.start, each.stop)][1:-1] == [
            cut for each in ranges[1:] for cut in (each.start, each.start)
        ]
        assert (ranges[0].start, ranges[-1].stop) == (0, bucket.size)
        assert len(bucket.slots) == 1 or end <= limit
    numbers = [slot.parameter for b in laid if b.decay and not b.partial for slot in b.slots]
    assert numbers == sorted(numbers, reverse=True)  # the backward pass finishes the last layers first


def parameters(dtype: torch.dtype) -> list[nn.Parameter]:
    torch.manual_seed(0)
    made = []
    for name, shape, decay in (("a", (70, 1000), True), ("b", (9,), False), ("c", (3, 4, 5), True)):
        parameter = nn.Parameter(torch.randn(shape, dtype=dtype))
        parameter.spec = spec(name, *shape, decay=decay)  # type: ignore[attr-defined]
        made.append(parameter)
    return made


def adder(value: torch.Tensor) -> Callable[[torch.Tensor], object]:
    return lambda out: out.add_(value)


def test_adamw_equals_torch_in_float64() -> None:
    config = Optimizer(learning_rate=0.01, beta1=0.8, beta2=0.9, epsilon=1e-7, weight_decay=0.3)
    mine, theirs = parameters(torch.float64), parameters(torch.float64)
    buffers = Buffers([(p, 1) for p in mine], ParallelContext.create(), bucket_mb=0.3)
    assert len(buffers.buckets) > 2
    optimizer = AdamW(buffers, config)
    oracle = torch.optim.AdamW(
        [{"params": [theirs[0], theirs[2]]}, {"params": [theirs[1]], "weight_decay": 0.0}],
        lr=0.01, betas=(0.8, 0.9), eps=1e-7, weight_decay=0.3,
    )  # fmt: skip
    for step in range(5):
        torch.manual_seed(step)
        rate, scale = 0.01 * (step + 1), 0.5 / (step + 1)
        buffers.begin(1)
        for ours, other in zip(mine, theirs):
            gradient = torch.randn_like(ours)
            buffers.add(ours, adder(gradient))
            other.grad = gradient * scale
        buffers.finish()
        for group in oracle.param_groups:
            group["lr"] = rate
        oracle.step()
        optimizer.step(rate, scale)
    for ours, other in zip(mine, theirs):
        torch.testing.assert_close(ours, other, rtol=0, atol=1e-14)


def test_bf16_parameters_have_fp32_master_weights() -> None:
    """Updates too small for bf16 add up in the master weights, as in an fp32 run."""
    config = Optimizer(learning_rate=1e-4, weight_decay=0.0)
    narrow = parameters(torch.bfloat16)
    wide = [nn.Parameter(p.detach().float()) for p in narrow]
    start = narrow[0].detach().clone()
    buffers = Buffers([(p, 1) for p in narrow], ParallelContext.create(), bucket_mb=1.0)
    assert all(bucket.gradients.dtype == torch.float32 for bucket in buffers.buckets)
    optimizer = AdamW(buffers, config)
    oracle = torch.optim.AdamW(wide, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.0)
    for _ in range(200):
        buffers.begin(1)
        for ours, other in zip(narrow, wide):
            buffers.add(ours, adder(torch.ones_like(ours)))
            other.grad = torch.ones_like(other)
        buffers.finish()
        optimizer.step(1e-4, 1.0)
        oracle.step()
    for ours, other in zip(narrow, wide):
        assert torch.equal(ours, other.detach().bfloat16())
    assert not torch.equal(start, narrow[0])


def test_the_norm_of_a_large_float32_gradient_is_that_of_float64() -> None:
    parameter = nn.Parameter(torch.zeros((1 << 22) + 5))
    parameter.spec = spec("a", (1 << 22) + 5)  # type: ignore[attr-defined]
    gradient = torch.rand((1 << 22) + 5, generator=torch.Generator().manual_seed(0))
    buffers = Buffers([(parameter, 1)], ParallelContext.create(), bucket_mb=64)
    buffers.begin(1)
    buffers.add(parameter, adder(gradient))
    assert float(buffers.statistics()[0]) == pytest.approx(float(gradient.double().square().sum()), rel=1e-7)


def test_statistics_count_what_this_rank_owns_without_padding() -> None:
    box, local = shard((5, 3), 0, 1, 2, pad=True)  # two rows of the tensor and one of padding
    made = [nn.Parameter(torch.ones(local)), nn.Parameter(torch.full((4,), 2.0)), nn.Parameter(torch.ones(7))]
    specs = [ParamSpec("a", (5, 3), box, local), spec("b", 4), replace(spec("c", 7), owner=False)]
    for parameter, its in zip(made, specs):
        parameter.spec = its  # type: ignore[attr-defined]
    buffers = Buffers([(p, 1) for p in made], ParallelContext.create(), bucket_mb=1.0)
    buffers.begin(1)
    for parameter in made:
        gradient = torch.zeros(parameter.shape)
        gradient.view(-1)[:3] = 3.0
        buffers.add(parameter, adder(gradient))
    buffers.finish()
    gradients, zeros, weights = buffers.statistics().tolist()
    assert zeros == 3 + 1
    assert (gradients, weights) == pytest.approx((2 * 27.0, 6 + 16.0), rel=1e-6)


def test_too_many_and_missing_gradients_are_errors() -> None:
    made = parameters(torch.float32)
    buffers = Buffers([(p, 1) for p in made], ParallelContext.create(), bucket_mb=1.0)
    buffers.begin(1)
    buffers.add(made[0], adder(torch.ones_like(made[0])))
    with pytest.raises(TrainingError, match="a: more gradients arrived"):
        buffers.add(made[0], adder(torch.ones_like(made[0])))
    with pytest.raises(TrainingError, match="no gradient arrived for b, c"):
        buffers.finish()


def test_learning_rates() -> None:
    def at(tokens: int, **keys: object) -> float:
        return learning_rate(Optimizer(learning_rate=1.0, warmup_tokens=100, **keys), tokens, 1000)  # type: ignore[arg-type]

    assert [at(t, warmup_start=0.2) for t in (0, 50)] == pytest.approx([0.2, 0.6])
    assert [at(t) for t in (100, 550, 1000)] == pytest.approx([1.0, 0.55, 0.1])
    assert at(325) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert [at(t, decay_tokens=500) for t in (300, 500, 999)] == pytest.approx([0.55, 0.1, 0.1])
    wsd = {"shape": "wsd", "minimum": 0.0, "decay_tokens": 400}
    assert [at(t, **wsd) for t in (100, 600, 800, 1000)] == pytest.approx([1.0, 1.0, 0.5, 0.0])
    assert at(950, shape="wsd", minimum=0.0) == pytest.approx(0.5)
    assert [at(t, shape="constant") for t in (100, 999)] == [1.0, 1.0]
