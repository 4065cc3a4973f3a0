"""bf16 and fp16 against fp32: the same curve, within bounds that an engine with a mistake in it exceeds.

The run's 20 steps at a rate of 0.003, in which the loss falls by one nat. Largest difference of a step's loss to fp32,
in nats, as measured, and what it becomes where the optimizer updates narrow weights and keeps no master weights:

    bf16   0.0011   0.0195
    fp16   0.00008  0.0008

And the relative error of the gradient of 160 micro-batches, with fp32 and with narrow accumulation:

    bf16   0.0009   0.014
    fp16   0.00007  0.0016
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from megapoly import config
from megapoly.context import ParallelContext
from megapoly.data.load_tokenizer import load_tokenizer
from megapoly.data.loader import open_datasets
from megapoly.data.plan import plan_from_config
from megapoly.data.samples import read
from megapoly.engine import DTYPES, Engine
from megapoly.optim.adam import AdamW
from megapoly.optim.buffers import Buffers
from megapoly.run import prepare
from megapoly.trainer import train
from tests.corpus import lines
from tests.ranks import run_ranks

CURVE = {"bf16": 0.003, "fp16": 0.00025}
GRADIENT = {"bf16": 0.003, "fp16": 0.0003}


def go(size: int, toml: Path, run: Path, precision: str, *sets: str, stop_step: int | None = None) -> list[float]:
    """Losses of the run, begun or gone on with."""
    sets = (f"train.precision={precision}", "optimizer.learning_rate=0.003", "validation.windows=0", *sets)
    settings = config.load(toml, [f"train.directory={str(run)!r}", *sets]).on(size)
    context = ParallelContext.create(settings.mesh)
    train(prepare(settings, context, "if-any"), Console(quiet=True), stop_step=stop_step)
    context.close()
    return [event["loss"] for event in lines(run, "train")]


@pytest.fixture(scope="module")
def wide(toml: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    losses = go(1, toml, tmp_path_factory.mktemp("fp32") / "run", "fp32")
    assert losses[0] - losses[-1] > 0.9
    return losses


def apart(losses: list[float], others: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(losses, others, strict=True))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_the_curve_is_that_of_fp32(toml: Path, tmp_path: Path, wide: list[float], precision: str) -> None:
    assert 0 < apart(go(1, toml, tmp_path / "run", precision), wide) < CURVE[precision]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_without_master_weights_it_would_not_be(
    toml: Path, tmp_path: Path, wide: list[float], precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = AdamW.step

    def forgetful(self: AdamW, *args: Any) -> None:
        self.refresh_master()
        step(self, *args)

    monkeypatch.setattr(AdamW, "step", forgetful)
    assert apart(go(1, toml, tmp_path / "run", precision), wide) > 2 * CURVE[precision]


def ranks(rank: int, size: int, toml: Path, run: Path, precision: str) -> None:
    layouts = ("layout={dp=2,pp=2,device='cpu'}", "layout={dp=2,tp=2,shard_optimizer=false,device='cpu'}")
    for layout, stop_step in zip(layouts, (10, None)):
        go(size, toml, run, precision, layout, stop_step=stop_step)


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp16", marks=pytest.mark.long)])
def test_the_same_over_a_change_of_layout(toml: Path, tmp_path: Path, wide: list[float], precision: str) -> None:
    run_ranks(4, ranks, toml, tmp_path / "run", precision)
    assert apart([event["loss"] for event in lines(tmp_path / "run", "train")], wide) < CURVE[precision]


def gradient(built: Engine, scale: float) -> torch.Tensor:
    """Of the first 160 samples, one in a micro-batch."""
    settings = built.config
    datasets = open_datasets(settings.data, load_tokenizer(settings.data.tokenizer))
    plan = plan_from_config(settings, datasets)
    rows = read(
        plan, datasets, np.arange(160),
        vocabulary=settings.model.vocabulary, separate_documents=True, with_tokens=True,
    )  # fmt: skip
    built.gradients(rows.split(1), sources=2, scale=scale)
    return torch.cat([bucket.gradients.double() for bucket in built.buffers.buckets]) / scale


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_gradients_are_accumulated_in_fp32(toml: Path, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def engine(of: str) -> Engine:
        built = Engine(config.load(toml, [f"train.precision={of}"]).on(1), ParallelContext.create())
        built.initialise()
        return built

    narrow, exact = engine(precision), engine("fp32")
    for to, source in zip(exact.buffers.parameters, narrow.buffers.parameters, strict=True):
        to.data.copy_(source.data)  # the same weights, rounded
    scale = 2.0**12 if precision == "fp16" else 1.0
    expected = gradient(exact, 1.0)

    def error() -> float:
        return float((gradient(narrow, scale) - expected).norm() / expected.norm())

    assert 0 < error() < GRADIENT[precision]
    add = Buffers.add

    def rounding(self: Buffers, parameter: torch.Tensor, accumulate: Callable[[torch.Tensor], object]) -> None:
        def rounded(out: torch.Tensor) -> None:
            accumulate(out)
            out.copy_(out.to(DTYPES[precision]))

        add(self, parameter, rounded)

    monkeypatch.setattr(Buffers, "add", rounding)
    assert error() > 2 * GRADIENT[precision]
