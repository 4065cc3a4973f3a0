"""What a run writes, and its line on the terminal."""

from __future__ import annotations

import io
import json
import math
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from megapoly.config import load
from megapoly.context import ParallelContext
from megapoly.metrics import Recorder
from megapoly.run import prepare
from megapoly.trainer import train
from tests.corpus import lines


def test_a_run_writes_its_log_and_tensorboard(toml: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sets = [f"train.directory={str(tmp_path / 'run')!r}", "log.tensorboard=true", "log.peak_tflops=1.0"]
    config = load(toml, [*sets, "validation.every_steps=5"]).on(1)
    console = Console(record=True, width=200, force_terminal=False, file=io.StringIO())
    train(prepare(config, ParallelContext.create()), console)
    events = lines(tmp_path / "run", "train")
    assert [event["batch_size"] for event in events] == [8] * 20
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
        "train/parameter_norm",
        "train/zero_gradients",
        "train/batch_size",
        "train/skipped_steps",
        "train/loss by language/ru",
        "train/loss by source/en",
        "validation/bits_per_byte/en",
        "speed/MFU",
        "seconds/data",
    ):
        assert tag in tags


def test_norms_and_zero_gradients(toml: Path, tmp_path: Path) -> None:
    """Half of the position table is never used: its gradients are zero, and no others but those of rounding."""
    config = load(toml, [f"train.directory={str(tmp_path / 'run')!r}", "model.positions=32"]).on(1)
    run = prepare(config, ParallelContext.create())
    parameters = run.engine.buffers.parameters
    squares = sum(float(parameter.detach().square().sum()) for parameter in parameters)
    console = Console(record=True, width=200, force_terminal=False, file=io.StringIO())
    train(run, console, stop_step=1)
    (event,) = lines(tmp_path / "run", "train")
    assert event["parameter_norm"] == pytest.approx(math.sqrt(squares), rel=1e-12)
    unused, biases_of_keys = 16 * 32, 4 * 32  # the latter have a true gradient of zero
    assert unused <= event["zero_gradients"] <= unused + biases_of_keys
    zeros = sum(int((bucket.gradients[bucket.mine] == 0).sum()) for bucket in run.engine.buffers.buckets)
    assert event["zero_gradients"] <= zeros  # which counts the padding of the buckets too
    assert f"weights {event['parameter_norm']:.2f}  zeros {event['zero_gradients']}  batch 8" in console.export_text()


def test_a_warning_is_in_the_log_and_on_the_terminal(toml: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    config = load(toml, [f"train.directory={str(tmp_path / 'run')!r}"]).on(1)
    context = ParallelContext.create()
    (tmp_path / "run").mkdir()
    console = Console(record=True, width=200, force_terminal=False, file=io.StringIO())
    recorder = Recorder(config, context, list(config.data.sources), console, 1)
    recorder.warn("slow data: [10 s]")
    recorder.active = False
    recorder.warn("slow data: 20 s")
    assert console.export_text() == "slow data: [10 s]\n"
    assert lines(tmp_path / "run", "warning") == [{"kind": "warning", "text": "slow data: [10 s]"}]
    assert capsys.readouterr().err == "megapoly: rank 0: slow data: 20 s\n"


def test_steps_that_a_resumed_run_leaves_do_not_mix_with_the_new(toml: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run"
    sets = [f"train.directory={str(run)!r}", "log.tensorboard=true", "checkpoint.every_steps=4", "validation.windows=0"]
    config = load(toml, sets).on(1)

    def go(stop_step: int) -> None:
        train(prepare(config, ParallelContext.create(), "if-any"), Console(quiet=True), stop_step=stop_step)

    def shown(folder: Path) -> list[float]:
        steps = []
        for path in folder.glob("events.*"):
            board = EventAccumulator(str(path), size_guidance={"tensors": 0})
            board.Reload()
            steps += [event.step / config.step_tokens for event in board.Tensors("train/loss")]
        return sorted(steps)

    go(6)
    shutil.rmtree(run / "checkpoints/step-00000006")  # as if steps 5 and 6 had been killed before the next checkpoint
    go(8)
    go(9)
    assert [event["step"] for event in lines(run, "train")] == list(range(1, 10))
    left = [json.loads(line) for line in (run / "log.left-at-4.jsonl").read_text().splitlines()]
    assert [event["step"] for event in left] == [5, 6]
    assert shown(run / "tensorboard") == [1, 2, 3, 4, 5, 6]
    assert [path.name for path in (run / "tensorboard").iterdir() if path.is_dir()] == ["1-from-step-4"]
    assert shown(run / "tensorboard/1-from-step-4") == [5, 6, 7, 8, 9]


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
