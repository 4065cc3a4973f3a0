"""The training loop: steps, what to do about those that go wrong, validation, checkpoints."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from megapoly import comm
from megapoly.checkpoint import folders, store
from megapoly.checkpoint.state import Counters
from megapoly.data.loader import Loader
from megapoly.engine import StepResult
from megapoly.errors import TrainingError
from megapoly.metrics import Recorder
from megapoly.models.cost import parameter_count, stage_flops, stage_layers
from megapoly.optim.lr import learning_rate
from megapoly.pipeline import schedule
from megapoly.pipeline.timeline import simulate
from megapoly.profiling import Profiler
from megapoly.run import Run, agree, unchecked
from megapoly.stability import Rollback, Spike
from megapoly.validation import validate


def train(
    run: Run,
    console: Console,
    *,
    stop_step: int | None = None,
    stopping: Callable[[], bool] = lambda: False,
    profile: range = range(0),
) -> Counters:
    """Train to the end of the plan, to ``stop_step``, or until some rank's ``stopping()``; save; return the counters.

    Collective. Writes a trace of the steps of ``profile``, and says of which it does not.
    """
    last = run.config.total_steps if stop_step is None else min(stop_step, run.config.total_steps)
    answers = any(dataset.marked for dataset in run.datasets.values())
    recorder = Recorder(run.config, run.context, [source.name for source in run.plan.sources], console, last, answers)
    try:
        _announce(run, recorder)
        settle = run.engine.buffers.settle
        with Profiler(profile, run.config.train.directory, run.context, recorder.note, settle) as profiler:
            profiler.announce(run.counters.step + 1, last)
            _loop(run, recorder, profiler, last, stopping)
    finally:
        recorder.close()
    return run.counters


def _announce(run: Run, recorder: Recorder) -> None:
    config, counters = run.config, run.counters
    layout, sequence = config.layout, config.train.sequence
    if recorder.active:
        recorder.note(
            f"{parameter_count(config.model) / 1e6:.1f} M parameters, {run.context.mesh}, {config.microbatches} x"
            f" {layout.micro_batch} sequences, {layout.schedule}{_bubble(run)}, {config.train.precision}"
        )
        recorder.note("kernels: " + ", ".join(f"{op} {what}" for op, what in run.engine.backends.items()))
        sizes, ramp_tokens = config.batches.sizes, config.batches.ramp_samples * sequence
        if counters.tokens < ramp_tokens:
            several = ", ".join(map(str, sizes[:-1])) if len(sizes) < 8 else f"{sizes[0]}, {sizes[1]}, ... {sizes[-2]}"
            recorder.note(f"global batches of {several} samples up to {ramp_tokens:,} tokens, then {sizes[-1]}")
        for line in [*run.lengths, *unchecked(run.datasets)]:
            recorder.note(line)
    if run.resumed_from is not None:
        branch = f" of branch {run.branch.number}" if run.branch.number else ""
        recorder.note(f"goes on from {run.resumed_from.name}{branch} at step {counters.step}, sample {counters.sample}")
    if run.began:
        recorder.note("\n".join(run.began))
    if run.edits:
        recorder.note(f"from sample {counters.sample} on with an edited curriculum:\n" + "\n".join(run.edits))
    recorder.start(counters.step, counters.sample, counters.tokens, str(run.resumed_from) if run.resumed_from else None)


def _bubble(run: Run) -> str:
    """Idle share of the pipeline that the schedule's simulation predicts, from the cost of every stage."""
    config = run.config
    layout = config.layout
    if layout.pp == 1:
        return ""
    counts = tuple(end - begin for begin, end in stage_layers(config))
    costs = stage_flops(config.model, config.train.sequence, counts)
    built = schedule.build(layout.schedule, layout.pp, config.microbatches, layout.stages_per_rank)
    times = [max(1, cost) for cost in costs]  # a stage may hold the embedding alone, which takes next to none
    return f" with a bubble of {simulate(built, times, [2 * time for time in times]).bubble:.1%}"


def _loop(run: Run, recorder: Recorder, profiler: Profiler, last_step: int, stopping: Callable[[], bool]) -> None:
    if run.counters.step == 0:
        _validate(run, recorder, "before")
    elif run.counters.step >= last_step:
        recorder.note(f"nothing to do: the run is at step {run.counters.step} already, and was to end at {last_step}")
    while True:
        with Loader(
            run.config,
            run.plan,
            run.datasets,
            start=run.counters.sample,
            rank=run.context.dp.rank,
            with_tokens=run.engine.needs_tokens,
            say=recorder.warn,
            pin=run.context.device.type == "cuda",
        ) as loader:
            spike = _steps(run, recorder, profiler, loader, last_step, stopping)
        if spike is None:
            break
        _roll_back(run, recorder, spike)
    if run.saved_step != run.counters.step:
        _save(run, recorder)
    _settle(run, recorder)


def _steps(
    run: Run,
    recorder: Recorder,
    profiler: Profiler,
    loader: Loader,
    last_step: int,
    stopping: Callable[[], bool],
) -> Spike | None:
    """Train until the end, a request to stop, or a spike, which is returned."""
    while run.counters.step < last_step:
        with profiler.step(run.counters.step + 1):
            result = _step(run, recorder, loader, stopping())
            if profiler.ends_with(run.counters.step):
                run.doing = f"after step {run.counters.step}, writing the profile"
        step, began = run.counters.step, run.counters.sample - result.samples
        if result.skipped == "nonfinite":
            run.guards.skip(step, result.loss, result.gradient_norm)
        elif spike := run.guards.observe(step, result.loss, run.plan.stage_at(began).stage):
            return spike
        _validate_if_due(run, recorder, began)
        if step % run.config.checkpoint.every_steps == 0:
            _save(run, recorder)
        if result.stop:
            recorder.note("asked to stop")
            break
    return None


def _step(run: Run, recorder: Recorder, loader: Loader, stop: bool) -> StepResult:
    """One step of the run; ``counters`` move on."""
    config, engine, counters, axes = run.config, run.engine, run.counters, run.context.axes()
    begin = time.perf_counter()
    before = [replace(axis.traffic) for axis in axes]
    run.doing = f"at step {counters.step + 1}, reading data"
    batches = next(loader)
    run.doing = f"at step {counters.step + 1}, training"
    loaded = time.perf_counter()
    rate = learning_rate(config.optimizer, counters.tokens, config.total_tokens)
    result = engine.step(batches, rate, len(run.plan.sources), stop)
    first, end = run.plan.stage_bounds(counters.sample)
    run.counters = now = Counters(
        counters.step + 1, counters.sample + result.samples, counters.tokens + result.samples * config.train.sequence
    )
    values = {
        "step": now.step,
        "tokens": now.tokens,
        "sample": now.sample,
        "stage": run.plan.stage_at(counters.sample).stage,
        "stage_share": (min(now.sample, end) - first) / (end - first),
        "batch_size": result.samples,
        "loss": result.loss,
        "learning_rate": rate,
        "gradient_norm": result.gradient_norm,
        "parameter_norm": result.parameter_norm,
        "zero_gradients": result.zero_gradients,
        "skipped": result.skipped,
        "skipped_steps": run.guards.skipped + (result.skipped == "nonfinite"),
        "source_loss": result.source_loss,
        "source_tokens": result.source_tokens,
    }
    if engine.scaler is not None:
        values |= {"loss_scale": result.loss_scale, "overflows": engine.scaler.overflows}
    seconds = {"step": time.perf_counter() - begin, "data": loaded - begin, **result.seconds}
    recorder.step(
        values,
        seconds,
        {axis.name: axis.traffic.since(start) for axis, start in zip(axes, before) if axis.size > 1},
    )
    if report := run.stragglers.step(now.step, seconds["data"] + seconds["optimizer"]):
        recorder.stragglers(report)
    return result


def _validate_if_due(run: Run, recorder: Recorder, began: int) -> None:
    """After a step from sample ``began`` on. The batch of a ramp may reach over the end of its stage."""
    every, counters = run.config.validation.every_steps, run.counters
    if counters.step == run.config.total_steps:
        _validate(run, recorder, "after")
    elif counters.sample >= run.plan.stage_bounds(began)[1]:
        _validate(run, recorder, "between")
    elif every and counters.step % every == 0:
        _validate(run, recorder, "periodic")


def _validate(run: Run, recorder: Recorder, at: str) -> None:
    if not run.config.validation.windows:
        return
    run.doing = f"validating after step {run.counters.step}"
    losses = validate(run.engine, run.plan, run.datasets, run.tokenizer)
    recorder.validation(at, run.counters.step, run.counters.tokens, *losses)


def _save(run: Run, recorder: Recorder) -> None:
    _settle(run, recorder)
    run.doing = f"saving the checkpoint of step {run.counters.step}"
    path = run.save()
    if run.writer is None:
        recorder.note(f"saved {path.parent.name}/{path.name}")


def _settle(run: Run, recorder: Recorder) -> None:
    """Wait for the checkpoint that is being written in the background, where there is one."""
    run.doing = "waiting for the checkpoint that is being written"
    path = run.settle()
    if path is not None:
        recorder.note(f"saved {path.parent.name}/{path.name} in the background")


def _roll_back(run: Run, recorder: Recorder, spike: Spike) -> None:
    """Go back to the newest checkpoint from before the spike, and on from there with the data from after it.

    Collective.

    Raises:
        TrainingError: there is no such checkpoint, or the run has rolled back as often as it may.
    """
    _settle(run, recorder)
    context, left = run.context, run.counters
    run.doing = f"rolling back from step {left.step}"
    path = agree(context, lambda: _before(run, spike) if context.rank == 0 else None)
    path = comm.broadcast_object(path, context.control)
    agree(context, lambda: run.restore(store.Reader(path)))
    counters, parent = run.counters, run.branch.number
    further = -(-run.config.stability.spike_skip_tokens // run.config.train.sequence)
    skipped = min(left.sample + further, run.plan.total_samples) - counters.sample
    run.plan = run.plan.skipping(counters.sample, skipped)
    run.branch = run.branch.after(Rollback(counters.step, counters.sample, skipped))
    # Before the first step of the new branch: a checkpoint of the old one must never be taken for one of the new.
    folder = f"left-branch-{parent}"
    retired = agree(
        context, lambda: folders.retire(run.checkpoints, counters.step, folder) if context.rank == 0 else None
    )
    recorder.rollback(
        str(spike),
        step=counters.step,
        sample=counters.sample,
        tokens=counters.tokens,
        branch=run.branch.number,
        parent=parent,
        left_at_step=left.step,
        skipped_samples=skipped,
        retired=retired,
    )


def _before(run: Run, spike: Spike) -> Path:
    """The newest checkpoint from before ``spike``."""
    stability = run.config.stability
    hint = "Lower optimizer.learning_rate, look at the data of these steps"
    if run.branch.number >= stability.most_rollbacks:
        raise TrainingError(
            f"{spike}; the run has rolled back {run.branch.number} times already (stability.most_rollbacks). {hint}, or"
            " raise stability.most_rollbacks"
        )
    steps = [step for step in folders.steps(run.checkpoints) if step < spike.first]
    if not steps:
        raise TrainingError(
            f"{spike}; {run.checkpoints} has no checkpoint from before it to go back to. {hint}, or save more often"
            " (checkpoint.every_steps) and keep more (checkpoint.keep)"
        )
    return folders.folder(run.checkpoints, steps[-1])
