"""A loss spike is rolled back to a checkpoint from before it, and its data skipped."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from megapoly import config
from megapoly.checkpoint import folders, store
from megapoly.context import ParallelContext
from megapoly.data.indexed import IndexedDataset
from megapoly.data.load_tokenizer import load_tokenizer
from megapoly.data.loader import open_datasets
from megapoly.data.plan import Plan, plan_from_config
from megapoly.data.samples import read
from megapoly.engine import Engine
from megapoly.errors import ConfigError, TrainingError
from megapoly.optim.lr import learning_rate
from megapoly.run import prepare
from megapoly.trainer import train
from tests.corpus import STEP, lines
from tests.ranks import run_ranks


def poison(folder: Path, plan: Plan, samples: range) -> None:
    """Overwrite the text of these samples, in the datasets' files, with one token again and again."""
    located = plan.locate(np.array(samples))
    for number, source in enumerate(plan.sources):
        tokens = np.memmap(folder / f"{source.name}.bin", dtype="<u2", mode="r+")
        for window in located.window[located.source == number].tolist():
            tokens[window * plan.sequence : (window + 1) * plan.sequence] = 5
        tokens.flush()


def opened(toml: Path) -> tuple[Plan, dict[str, IndexedDataset]]:
    settings = config.load(toml)
    datasets = open_datasets(settings.data, load_tokenizer(settings.data.tokenizer))
    return plan_from_config(settings, datasets), datasets


@pytest.fixture(scope="module")
def spiking(toml: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose steps 10 to 12, samples 72 to 95, have poisoned data: the loss is 2 nats higher there."""
    folder = tmp_path_factory.mktemp("spiking")
    shutil.copytree(toml.parent, folder, dirs_exist_ok=True)
    poison(folder, opened(folder / "run.toml")[0], range(72, 96))
    return folder / "run.toml"


SETS = [
    f"stability={{spike=1.0,spike_window=5,spike_steps=2,spike_skip_tokens={STEP}}}",
    "checkpoint={every_steps=2,keep=3}",
]


def go(size: int, toml: Path, run: Path, *sets: str, stop_step: int | None = None, resume: bool = False) -> None:
    settings = config.load(toml, [f"train.directory={str(run)!r}", *SETS, *sets]).on(size)
    context = ParallelContext.create(settings.mesh)
    train(prepare(settings, context, "always" if resume else "never"), Console(quiet=True), stop_step=stop_step)
    context.close()


def by_hand(toml: Path) -> list[float]:
    """Losses of the 20 steps as the rollback should leave them: from step 9 on, data without samples 64 to 95."""
    settings = config.load(toml).on(1)
    built = Engine(settings, ParallelContext.create())
    built.initialise()
    plan, datasets = opened(toml)
    skipping = plan.skipping(64, 32)
    losses = []
    for step in range(20):
        samples = np.arange(8 * step, 8 * step + 8)
        rows = read(
            plan if step < 8 else skipping, datasets, samples,
            vocabulary=settings.model.vocabulary, separate_documents=True, with_tokens=True,
        )  # fmt: skip
        rate = learning_rate(settings.optimizer, step * STEP, 20 * STEP)
        losses.append(built.step(rows.split(1), rate, sources=2).loss)
    return losses


def check_rolled_back(run: Path, losses: list[float]) -> None:
    """One rollback; the log and the checkpoints are those of the new branch, with the old one's beside them."""
    events = lines(run, "train")
    assert [event["step"] for event in events] == list(range(1, 21))
    assert [event["sample"] for event in events] == list(range(8, 161, 8))
    assert [event["loss"] for event in events] == pytest.approx(losses, rel=1e-10)
    (rollback,) = lines(run, "rollback")
    assert "loss spike in steps 10 to 11" in rollback["cause"]
    details = {key: rollback[key] for key in ("step", "sample", "branch", "parent", "left_at_step", "skipped_samples")}
    assert details == {"step": 8, "sample": 64, "branch": 1, "parent": 0, "left_at_step": 11, "skipped_samples": 32}
    events = [json.loads(line) for line in (run / "log.left-at-8.jsonl").read_text().splitlines()]
    left = {event["step"]: event["loss"] for event in events if event["kind"] == "train"}
    assert sorted(left) == [9, 10, 11]
    assert min(left[10], left[11]) > max(losses[8:]) + 1.5
    assert folders.steps(run / "checkpoints") == [16, 18, 20]
    assert folders.steps(run / "checkpoints/left-branch-0") == [10]
    newest = store.Reader(run / "checkpoints/step-00000020").meta
    assert newest["guards"]["branch"] == [{"step": 8, "sample": 64, "skipped": 32}]
    assert Plan.from_document(newest["plan"]).segments[-1].skipped == 32
    assert store.Reader(run / "checkpoints/left-branch-0/step-00000010").meta["guards"]["branch"] == []


def test_a_spike_is_rolled_back_and_its_data_skipped(spiking: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run"
    losses = by_hand(spiking)
    go(1, spiking, run, "log.tensorboard=true")
    check_rolled_back(run, losses)
    for folder, last in ((run / "tensorboard", 11 * STEP), (run / "tensorboard/1-from-step-8", 20 * STEP)):
        (path,) = folder.glob("events.*")
        board = EventAccumulator(str(path), size_guidance={"tensors": 0})
        board.Reload()
        shown = [event.step for event in board.Tensors("train/loss")]
        assert shown == list(range(STEP if "from" not in folder.name else 9 * STEP, last + 1, STEP))
    (retired,) = lines(run, "rollback")[0]["retired"]
    assert retired == 10


def in_ranks(rank: int, size: int, toml: Path, run: Path) -> None:
    """Half of the run on some ranks up to before the spike, over it under another layout, and inside the new branch."""
    go(size, toml, run, "layout={dp=2,pp=2,device='cpu'}", stop_step=10)
    go(size, toml, run, "layout={dp=1,pp=2,tp=2,device='cpu'}", stop_step=14, resume=True)
    go(size, toml, run, "layout={dp=4,device='cpu'}", resume=True)


def test_the_ranks_of_every_layout_roll_back_alike(spiking: Path, tmp_path: Path) -> None:
    run_ranks(4, in_ranks, spiking, tmp_path / "run")
    check_rolled_back(tmp_path / "run", by_hand(spiking))


def test_a_rollback_that_is_interrupted_is_made_again(
    spiking: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(folders, "retire", killed)
        with pytest.raises(KeyboardInterrupt):
            go(1, spiking, run)
    with monkeypatch.context() as patched:  # once more, after everything but the first step of the new branch
        patched.setattr("megapoly.metrics.Recorder.rollback", killed)
        with pytest.raises(KeyboardInterrupt):
            go(1, spiking, run, resume=True)
    assert folders.steps(run / "checkpoints") == [6, 8]
    go(1, spiking, run, resume=True)
    check_rolled_back(run, by_hand(spiking))


def test_no_checkpoint_from_before_the_spike(spiking: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"steps 10 to 11: 6\..*has no checkpoint from before it") as raised:
        go(1, spiking, tmp_path / "run", "checkpoint.every_steps=1000")
    assert raised.value.everywhere
    assert len(lines(tmp_path / "run", "train")) == 11


def test_a_run_rolls_back_so_many_times_only(spiking: Path, tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    shutil.copytree(spiking.parent, folder)
    plan, _ = opened(folder / "run.toml")
    poison(folder, plan.skipping(64, 32), range(64, 96))  # what comes after the first rollback
    run = tmp_path / "run"
    go(1, folder / "run.toml", run, "stability.most_rollbacks=2", stop_step=12)
    assert [(event["branch"], event["step"], event["skipped_samples"]) for event in lines(run, "rollback")] == [
        (1, 8, 32), (2, 8, 24),
    ]  # fmt: skip
    with pytest.raises(TrainingError, match=r"rolled back 1 times already \(stability.most_rollbacks\)"):
        go(1, folder / "run.toml", tmp_path / "once", "stability.most_rollbacks=1")


def test_checkpoints_that_could_not_reach_back_are_refused(spiking: Path) -> None:
    def check(*sets: str) -> None:
        config.load(spiking, ["stability={spike=1.0,spike_steps=5}", *sets])

    check("checkpoint={every_steps=4,keep=2}")
    with pytest.raises(ConfigError, match=r"spike_steps 5 is more than the 2 checkpoints .* 3 steps apart.*keep to 3"):
        check("checkpoint={every_steps=3,keep=2}")
    check("checkpoint={every_steps=3,keep=3}")
    with pytest.raises(ConfigError, match=r"raise checkpoint.keep to 5"):
        check("checkpoint={every_steps=1,keep=4}")
    check("checkpoint={every_steps=1,keep=5}")
