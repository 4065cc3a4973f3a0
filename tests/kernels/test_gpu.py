"""Training steps on a GPU, by its kernels, beside the same steps on the CPU."""

from __future__ import annotations

import pytest
import torch

from megapoly.bench.run_megapoly import make_work
from megapoly.bench.task import make_config
from megapoly.context import ParallelContext
from megapoly.engine import Engine
from tests.kernels.rule import GPU


def losses(device: str, precision: str) -> list[float]:
    config = make_config(
        layers=2, hidden=256, heads=4, sequence=128, vocabulary=1000, micro_batch=2, global_batch=4, precision=precision
    )
    engine = Engine(config, ParallelContext.create(config.mesh, torch.device(device)))
    engine.initialise()
    work = make_work(engine)
    return [work.step() for _ in range(4)]


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="there is no GPU")
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-3), ("bf16", 1e-2)])
def test_a_gpu_trains_as_the_cpu_does(precision: str, tolerance: float) -> None:
    assert losses("cuda", precision) == pytest.approx(losses("cpu", "fp32"), rel=tolerance)
