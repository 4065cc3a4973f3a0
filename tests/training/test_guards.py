"""Which steps make a spike or end a run, and that what is not finite never reaches the weights."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest
import torch
from rich.console import Console

from megapoly import config
from megapoly.config import Stability
from megapoly.context import ParallelContext
from megapoly.data.samples import Batch
from megapoly.engine import Engine
from megapoly.errors import TrainingError
from megapoly.optim.scaler import LossScaler
from megapoly.run import prepare
from megapoly.stability import Guards, Spike
from megapoly.trainer import train
from tests.corpus import lines

# ------------------------------------------------------------------------------------------------ decisions


def observed(losses: list[float], stage: str = "a", **settings) -> list[Spike]:
    guards = Guards(Stability(**{"spike": 0.5, "spike_window": 4, "spike_steps": 2, **settings}))
    seen = (guards.observe(step, loss, stage) for step, loss in enumerate(losses, 1))
    return [spike for spike in seen if spike]


def test_a_spike_is_so_many_high_losses_in_a_row() -> None:
    quiet = [4.0, 3.0, 2.0, 1.0]  # their median is 2.5
    assert observed([*quiet, 3.01, 3.2]) == [Spike(5, 6, (3.01, 3.2), 2.5)]
    assert observed([*quiet, 3.0, 3.0, 3.0]) == []  # not more than half a nat above
    assert observed([*quiet, 9.0, 2.0, 9.0, 2.0]) == []  # not in a row
    assert observed([1.0, 9.0, 9.0, 9.0]) == []  # no whole window yet
    assert observed([*quiet, 9.0, 9.0], spike_steps=3) == []
    assert observed([*quiet, 9.0, 9.0], spike=None) == []


def test_high_losses_that_were_no_spike_join_the_median() -> None:
    # 9 joins with the 2 after it: the window is 2, 1, 9, 2.
    assert observed([4.0, 3.0, 2.0, 1.0, 9.0, 2.0, 2.6, 2.6]) == [Spike(7, 8, (2.6, 2.6), 2.0)]


def test_a_stage_has_a_median_of_its_own() -> None:
    guards = Guards(Stability(spike=0.5, spike_window=2, spike_steps=1))
    for step in range(1, 5):
        assert guards.observe(step, 1.0, "easy") is None
    for step in range(5, 7):
        assert guards.observe(step, 3.0, "hard") is None
    assert guards.observe(7, 3.6, "hard") == Spike(7, 7, (3.6,), 3.0)


def test_restored_guards_decide_alike() -> None:
    settings = Stability(nonfinite="skip", most_skips=4, spike=0.5, spike_window=4, spike_steps=3)
    losses = [4.0, 3.0, 2.0, 1.0, 9.0, math.nan, 9.0, math.inf, 9.0]
    for stop in range(1, len(losses)):
        guards = Guards(settings)
        for step, loss in enumerate(losses, 1):
            if step == stop:
                state = json.loads(json.dumps(guards.state(), allow_nan=False))
                guards = Guards(settings)
                guards.restore(state)
            spike = guards.observe(step, loss, "a") if math.isfinite(loss) else guards.skip(step, loss, 1.0)
        assert spike == Spike(5, 9, (9.0, 9.0, 9.0), 2.5)
        assert guards.skipped == 2


def test_too_many_skips_in_a_row_end_the_run() -> None:
    guards = Guards(Stability(nonfinite="skip", most_skips=3))
    guards.skip(1, math.nan, math.nan)
    guards.skip(2, math.nan, math.nan)
    guards.observe(3, 1.0, "a")
    guards.skip(4, math.nan, math.nan)
    guards.skip(5, math.nan, math.nan)
    with pytest.raises(TrainingError, match=r"step 6: .* not finite, in 3 steps in a row \(stability.most_skips\)"):
        guards.skip(6, math.nan, math.nan)
    assert guards.skipped == 5
    with pytest.raises(TrainingError, match=r"step 1: the loss .nan. .* set stability.nonfinite to 'skip'"):
        Guards(Stability()).skip(1, math.nan, math.nan)


# ------------------------------------------------------------------------------------------------ skipped steps


def engine(toml: Path, *sets: str) -> Engine:
    built = Engine(config.load(toml, sets).on(1), ParallelContext.create())
    built.initialise()
    return built


def batch(label: int) -> list[Batch]:
    rows, length = 8, 16
    tokens = torch.ones(rows, length, dtype=torch.int64)
    labels = torch.full((rows, length), label)
    positions = torch.arange(length).expand(rows, length)
    return Batch(torch.arange(rows), torch.zeros(rows, dtype=torch.int32), tokens, labels, positions, None).split(1)


def go(size: int, toml: Path, run: Path, *sets: str, stop_step: int | None = None, resume: bool = False) -> None:
    settings = config.load(toml, [f"train.directory={str(run)!r}", *sets]).on(size)
    context = ParallelContext.create(settings.mesh)
    train(prepare(settings, context, "always" if resume else "never"), Console(quiet=True), stop_step=stop_step)
    context.close()


def state(built: Engine) -> list[torch.Tensor]:
    moments = [tensor for each in built.optimizer.states for tensor in each.values()]
    return [tensor.clone() for tensor in (*(p.detach() for p in built.buffers.parameters), *moments)]


def test_a_batch_without_counted_tokens(toml: Path) -> None:
    with pytest.raises(TrainingError, match="no token of this global batch is counted"):
        engine(toml).step(batch(-1), 0.01)


@pytest.mark.parametrize("precision", ["fp64", "fp16"])
def test_what_is_not_finite_never_reaches_the_weights(toml: Path, precision: str) -> None:
    built = engine(toml, f"train.precision={precision}")
    built.step(batch(3), 0.01)
    before, scale, steps = state(built), built.scaler and built.scaler.scale, built.optimizer.steps
    norm = next(stage for stage in built.stages.values() if stage.last).final_norm.weight
    finite = float(norm.detach()[0])
    with torch.no_grad():
        norm[0] = torch.inf
    result = built.step(batch(3), 0.01)
    assert result.skipped == "nonfinite"
    assert not math.isfinite(result.loss)
    with torch.no_grad():
        norm[0] = finite
    for old, new in zip(before, state(built), strict=True):
        assert torch.equal(old, new)
    assert built.optimizer.steps == steps
    assert (built.scaler and built.scaler.scale) == scale  # a loss that is not finite is not the scale's fault
    assert built.step(batch(3), 0.01).skipped == ""


def test_an_overflow_skips_the_step_and_halves_the_scale(toml: Path) -> None:
    built, plain = engine(toml, "train.precision=fp16"), engine(toml, "train.precision=fp32")
    assert plain.scaler is None
    assert plain.step(batch(3), 0.0).loss_scale is None
    built.scaler.scale = 2.0**40  # even the smallest gradients are beyond 65504
    before = state(built)
    result = built.step(batch(3), 0.01)
    assert (result.skipped, result.loss_scale) == ("overflow", 2.0**40)
    assert math.isfinite(result.loss)
    assert (built.scaler.scale, built.scaler.overflows, built.optimizer.steps) == (2.0**39, 1, 0)
    for old, new in zip(before, state(built), strict=True):
        assert torch.equal(old, new)
    while (result := built.step(batch(3), 0.01)).skipped:
        assert result.skipped == "overflow"
    assert built.scaler.scale == 2.0 ** (40 - built.scaler.overflows) > 1.0
    assert built.optimizer.steps == 1
    # The scale is taken out again: the norm is that of the gradient, as without any scaling.
    assert result.gradient_norm == pytest.approx(
        engine(toml, "train.precision=fp32").step(batch(3), 0.0).gradient_norm, rel=2e-3
    )


def test_an_overflow_without_scaling_is_not_finite(toml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = engine(toml, "train.precision=fp16")
    built.scaler.scale = 1.0
    gradients = built.gradients

    def infinite(*args, **kwargs):
        head, sums = gradients(*args, **kwargs)
        head[0] = math.inf
        return head, sums

    monkeypatch.setattr(built, "gradients", infinite)
    result = built.step(batch(3), 0.01)
    assert result.skipped == "nonfinite"
    assert math.isnan(result.gradient_norm)
    assert built.optimizer.steps == built.scaler.overflows == 0


def test_a_skipped_step_is_reported_and_the_run_goes_on(
    toml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gradients = Engine.gradients

    def poor(self, *args, **kwargs):
        head, sums = gradients(self, *args, **kwargs)
        if self.optimizer.steps == 4 and self.poor:
            self.poor -= 1
            sums[0, 1] = math.nan
            head[0] = math.nan
        return head, sums

    monkeypatch.setattr(Engine, "gradients", poor)
    monkeypatch.setattr(Engine, "poor", 2, raising=False)
    console = Console(record=True, width=200, force_terminal=False, file=io.StringIO())
    settings = config.load(toml, [f"train.directory={str(tmp_path / 'run')!r}", "stability.nonfinite='skip'"]).on(1)
    train(prepare(settings, ParallelContext.create()), console, stop_step=8)
    events = lines(tmp_path / "run", "train")
    assert [event["skipped"] for event in events] == [""] * 4 + ["nonfinite"] * 2 + [""] * 2
    assert [event["skipped_steps"] for event in events] == [0] * 4 + [1, 2, 2, 2]
    assert [event["loss"] is None for event in events] == [event["skipped"] != "" for event in events]
    norms = [event["parameter_norm"] for event in events]  # before the update of the step
    assert norms[4] == norms[5] == norms[6] != norms[7]
    assert [event["sample"] for event in events] == list(range(8, 65, 8))
    assert "loss not finite (skipped: nonfinite)" in console.export_text(clear=False)
    assert console.export_text().count("skipped 2") == 3
    monkeypatch.setattr(Engine, "poor", 2)
    settings = config.load(toml, [f"train.directory={str(tmp_path / 'stop')!r}"]).on(1)
    with pytest.raises(TrainingError, match=r"step 5: the loss .nan. or the gradient norm .nan. is not finite"):
        train(prepare(settings, ParallelContext.create()), Console(quiet=True))


def test_the_scale_of_a_resumed_run_is_that_of_one_that_never_stopped(
    toml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megapoly.optim.scaler.GOOD_STEPS", 5)
    monkeypatch.setattr("megapoly.engine.LossScaler", lambda: LossScaler(scale=2.0**30))
    runs = {}
    for name, stops in {"whole": [None], "parts": [4, 17, None]}.items():
        for number, stop in enumerate(stops):
            go(1, toml, tmp_path / name, "train.precision='fp16'", stop_step=stop, resume=number > 0)
        runs[name] = lines(tmp_path / name, "train")
    keys = ("loss", "loss_scale", "overflows", "skipped", "gradient_norm", "parameter_norm")
    assert [[event[key] for key in keys] for event in runs["parts"]] == [
        [event[key] for key in keys] for event in runs["whole"]
    ]
    scales = [event["loss_scale"] for event in runs["whole"]]
    overflows = [event["skipped"] == "overflow" for event in runs["whole"]]
    assert overflows[:4] == [True] * 4  # the first part stops between two of them
    assert overflows[4]
    assert runs["whole"][-1]["overflows"] == sum(overflows)
    assert not overflows[-1]
    good = 0
    for scale, overflow, after in zip(scales, overflows, scales[1:]):
        good = 0 if overflow else good + 1
        assert after == (scale / 2 if overflow else scale * 2 if good == 5 else scale)
        good %= 5
    assert runs["whole"][0]["gradient_norm"] is None
