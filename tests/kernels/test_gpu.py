"""A training step on a GPU, by its kernels, beside that on the CPU: the loss, and every parameter's gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megapoly.bench.task import make_config
from megapoly.bench.worker import random_rows
from megapoly.context import ParallelContext
from megapoly.data.samples import Batch
from megapoly.engine import Engine
from megapoly_kernels import linear_cross_entropy
from tests.kernels.rule import GPU

on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not GPU, reason="there is no GPU")]
TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2}  # of a gradient's norm


def step(device: str, precision: str) -> tuple[float, list[Tensor]]:
    """The loss, and the gradients by parameter, in fp32 on the CPU."""
    config = make_config(
        layers=2, hidden=256, heads=4, sequence=128, vocabulary=1000, micro_batch=2, global_batch=2, precision=precision
    )
    engine = Engine(config, ParallelContext.create(config.mesh, torch.device(device)))
    engine.initialise()
    tokens, labels = random_rows(config)
    rows, length = tokens.shape
    positions = torch.arange(length).expand(rows, length)
    batch = Batch(torch.arange(rows), torch.zeros(rows, dtype=torch.int32), tokens, labels, positions, None)
    _, sums = engine.gradients([batch])
    buckets = [bucket.gradients[bucket.mine].detach().cpu() for bucket in engine.buffers.buckets]
    gradients = [buckets[part.bucket][part.at] for part in engine.buffers.parts()]
    return float(sums[0].sum() / sums[1].sum()), gradients


def compare(device: str, precision: str) -> None:
    (loss, found), (wanted, exact) = step(device, precision), step("cpu", "fp32")
    assert loss == pytest.approx(wanted, rel=TOLERANCE[precision] / 10)
    largest = max(float(each.norm()) for each in exact)
    for mine, theirs in zip(found, exact, strict=True):
        # The bias of keys has a true gradient of zero: what is left there is rounding.
        assert float((mine - theirs).norm()) <= TOLERANCE[precision] * (float(theirs.norm()) + 1e-3 * largest)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=on_gpu)])
@pytest.mark.parametrize("precision", TOLERANCE)
def test_a_step_is_that_of_the_cpu_in_fp32(device: str, precision: str) -> None:
    compare(device, precision)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="there is no GPU")
def test_the_loss_over_256k_entries_takes_less_than_768_mib() -> None:
    """Beyond inputs, results and gradients; all logits would take 8 GiB."""
    x = torch.randn(8192, 2048, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(262_144, 2048, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(262_144, (8192,), device="cuda")
    buffer = torch.zeros(weight.shape, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    losses = linear_cross_entropy(x, weight, labels, token_gradient=1.0, weight_gradient=buffer)
    losses.sum().backward()
    torch.cuda.synchronize()
    assert x.grad is not None
    kept = x.grad.nbytes + losses.nbytes
    assert torch.cuda.max_memory_allocated() - before - kept < 768 << 20
