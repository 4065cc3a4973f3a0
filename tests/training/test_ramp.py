"""Growing global batches: the same run under every layout, also when it goes on inside the ramp."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from megapoly import config
from megapoly.context import ParallelContext
from megapoly.optim.lr import learning_rate
from megapoly.run import prepare
from megapoly.trainer import train
from tests.corpus import STEP, lines
from tests.ranks import run_ranks

# 2, 4 and 6 samples, in 7, 4 and 3 steps: 48 samples, 6 global batches of 8. The first stage ends at sample 32, inside
# the step from 30 to 36.
SETS = (
    f"data.stages=[{{name='first',tokens={4 * STEP},weights={{en=0.7,ru=0.3}}}},"
    f"{{name='second',tokens={16 * STEP},weights={{en=0.4,ru=0.6}}}}]",
    f"train.batch_ramp={{start=2,increment=2,tokens={5 * STEP}}}",
)
SIZES = [2] * 7 + [4] * 4 + [6] * 3 + [8] * 14


def go(size: int, toml: Path, run: Path, layout: str, stop_step: int | None, resume: bool) -> None:
    settings = config.load(toml, [f"train.directory={str(run)!r}", f"layout={layout}", *SETS]).on(size)
    context = ParallelContext.create(settings.mesh)
    train(prepare(settings, context, "always" if resume else "never"), Console(quiet=True), stop_step=stop_step)
    context.close()


def parts(rank: int, size: int, toml: Path, run: Path) -> None:
    go(size, toml, run, "{dp=2,pp=2,device='cpu'}", 5, False)
    go(size, toml, run, "{dp=1,pp=2,tp=2,micro_batch=2,device='cpu'}", 13, True)
    go(size, toml, run, "{dp=2,tp=2,device='cpu',schedule='gpipe'}", None, True)


def test_a_ramp_goes_on_under_other_layouts(toml: Path, tmp_path: Path) -> None:
    go(1, toml, tmp_path / "whole", "{device='cpu'}", None, False)
    run_ranks(4, parts, toml, tmp_path / "parts")
    whole, parted = (lines(tmp_path / name, "train") for name in ("whole", "parts"))
    assert [event["batch_size"] for event in whole] == SIZES
    assert [event["sample"] for event in whole] == [sum(SIZES[: i + 1]) for i in range(28)]
    assert [event["stage"] for event in whole] == ["first"] * 12 + ["second"] * 16
    optimizer = config.load(toml).optimizer
    for event, size, other in zip(whole, SIZES, parted, strict=True):
        assert event["tokens"] == event["sample"] * 16
        assert event["learning_rate"] == learning_rate(optimizer, event["tokens"] - size * 16, 20 * STEP)
        # Labels that would cross into another document are not counted; all others are.
        assert 0.5 * size * 16 < sum(source["tokens"] for source in event["sources"].values()) <= size * 16
        for key in ("loss", "gradient_norm", "parameter_norm"):
            assert other[key] == pytest.approx(event[key], rel=1e-10), (event["step"], key)
        for key in ("step", "sample", "tokens", "batch_size", "stage", "stage_share"):
            assert other[key] == event[key]
    assert whole[-1]["loss"] < whole[0]["loss"] - 0.5
    # Validation between the stages comes at the first step boundary after theirs.
    for name in ("whole", "parts"):
        found = [(event["at"], event["step"]) for event in lines(tmp_path / name, "validation")]
        assert found == [("before", 0), ("between", 12), ("after", 28)]
