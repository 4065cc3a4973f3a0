"""Counts against the model itself and against the paper, and what a run writes."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest
from rich.console import Console

from megapoly.checkpoint.state import logical_shapes
from megapoly.config import Model, load
from megapoly.context import ParallelContext
from megapoly.metrics import flops_per_token, parameter_count
from megapoly.trainer import prepare, train
from tests.corpus import lines

POLYLM_13B = Model(layers=40, hidden=5120, heads=40, ffn=20480, vocabulary=256000, positions=2048)


@pytest.mark.parametrize(
    "model",
    [
        Model(layers=3, hidden=24, heads=4, ffn=52, vocabulary=61, positions=32),
        Model(layers=2, hidden=24, heads=4, key_value_heads=2, ffn=50, vocabulary=61, positions=32),
    ],
)
def test_parameter_count_is_that_of_the_modules(model: Model) -> None:
    assert parameter_count(model) == sum(math.prod(shape) for shape in logical_shapes(model).values())


def test_polylm_counts() -> None:
    assert parameter_count(POLYLM_13B) == pytest.approx(13.907e9, rel=1e-4)
    # The paper's 13B at 1170 tokens/s on an A100 of 312 TFLOP/s: 31 % by 6 N alone.
    attention = 12 * 40 * 5120 * 2048
    assert 1170 * (flops_per_token(POLYLM_13B, 2048) - attention) / 312e12 == pytest.approx(0.313, abs=0.002)


def test_a_run_writes_its_log_and_tensorboard(toml: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sets = [f"train.directory={str(tmp_path / 'run')!r}", "log.tensorboard=true", "log.peak_tflops=1.0"]
    config = load(toml, [*sets, "validation.every_steps=5"]).on(1)
    console = Console(record=True, width=200, force_terminal=False, file=io.StringIO())
    train(prepare(config, ParallelContext.create()), console)
    events = lines(tmp_path / "run", "train")
    assert [event["tokens"] for event in events] == [config.step_tokens * step for step in range(1, 21)]
    assert [event["stage"] for event in events] == ["first"] * 12 + ["second"] * 8
    for event in events:
        counted = sum(values["tokens"] for values in event["sources"].values())
        total = sum(values["tokens"] * values["loss"] for values in event["sources"].values())
        assert event["loss"] == pytest.approx(total / counted, rel=1e-12)
        assert event["traffic"] == {}  # one rank
        assert event["seconds"]["step"] >= event["seconds"]["forward_backward"] > 0
    assert [event["at"] for event in lines(tmp_path / "run", "validation")] == [
        "before", "periodic", "periodic", "between", "periodic", "after",
    ]  # fmt: skip
    assert json.loads((tmp_path / "run/config.json").read_text())["model"]["hidden"] == 32
    text = console.export_text()
    assert "step    20/20  second 100%" in text
    assert "left 0:00" in text

    board = EventAccumulator(str(tmp_path / "run/tensorboard"))
    board.Reload()
    tags = set(board.Tags()["scalars"]) | set(board.Tags()["tensors"])
    for tag in (
        "train/loss",
        "train/loss by language/ru",
        "train/loss by source/en",
        "validation/bits_per_byte/en",
        "speed/MFU",
        "seconds/data",
    ):
        assert tag in tags


@pytest.mark.parametrize("width", [40, 80, 200])
def test_the_live_line_fits_its_terminal(toml: Path, tmp_path: Path, width: int) -> None:
    """A line that wrapped could not be written over by the next."""
    screen = io.StringIO()
    config = load(toml, [f"train.directory={str(tmp_path / 'run')!r}", "validation.windows=0"]).on(1)
    console = Console(force_terminal=True, width=width, file=screen)
    train(prepare(config, ParallelContext.create()), console, stop_step=3)
    shown = [part.splitlines()[0] for part in screen.getvalue().split("\r\x1b[K")[1:]]
    assert len(shown) == 3
    assert all(len(line) < width for line in shown), shown
    assert all(line.startswith(f"step     {step}/20  first") for step, line in enumerate(shown, 1))
    assert ("loss" in shown[0], "norm" in shown[0]) == (width >= 80, width >= 200)
