"""The training loop: a run folder, its plan and data, steps, validation, checkpoints."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from rich.console import Console

from megapoly import comm
from megapoly.checkpoint import state, store
from megapoly.checkpoint.state import Counters
from megapoly.config import Config
from megapoly.context import ParallelContext
from megapoly.data.files import write_whole
from megapoly.data.indexed import IndexedDataset
from megapoly.data.loader import Loader, open_datasets
from megapoly.data.plan import Plan, check_datasets, plan_from_config
from megapoly.data.samples import Batch, validation
from megapoly.data.tokenizer import Tokenizer
from megapoly.engine import Engine
from megapoly.errors import CheckpointError, ConfigError, MegapolyError, everywhere
from megapoly.metrics import Recorder, parameter_count
from megapoly.optim.lr import learning_rate

CHECKPOINTS = "checkpoints"
CONFIG = "config.json"
_VALIDATION_BATCHES = 32  # micro-batches of one pass, which bounds what is on the device
T = TypeVar("T")
Resume = Literal["never", "always", "if-any"]


@dataclass
class Run:
    """Everything that a loop needs; ``counters`` move on."""

    config: Config
    context: ParallelContext
    engine: Engine
    plan: Plan
    datasets: dict[str, IndexedDataset]
    tokenizer: Tokenizer
    counters: Counters
    resumed_from: Path | None

    @property
    def checkpoints(self) -> Path:
        return self.config.train.directory / CHECKPOINTS


def train(
    run: Run,
    console: Console,
    *,
    stop_step: int | None = None,
    stopping: Callable[[], bool] = lambda: False,
) -> Counters:
    """Train to the end of the plan, to ``stop_step``, or until some rank's ``stopping()``; save; return the counters.

    Collective.
    """
    last = run.config.total_steps if stop_step is None else min(stop_step, run.config.total_steps)
    recorder = Recorder(run.config, run.context, [source.name for source in run.plan.sources], console, last)
    try:
        _announce(run, recorder)
        _loop(run, recorder, last, stopping)
    finally:
        recorder.close()
    return run.counters


def prepare(config: Config, context: ParallelContext, resume: Resume = "never") -> Run:
    """A run that is ready to train, new or from its newest whole checkpoint.

    Collective. An error on some ranks is raised on all, so that none is left waiting.

    Args:
        resume: ``never`` needs a folder without a run, ``always`` needs a checkpoint, ``if-any`` takes a checkpoint
            where there is one and else begins: for jobs that are queued or restarted by themselves.
    """
    control = context.control
    _agree(context, lambda: _check_same(config, context))
    # Rank 0 alone looks into the folder: what another rank sees of a network file system may be older.
    path = _agree(context, lambda: _choose(config, resume) if context.rank == 0 else None)
    path = comm.broadcast_object(path, control)
    run = _agree(context, lambda: _prepare(config, context, path))
    if path is None:
        _agree(context, lambda: _write_config(config) if context.rank == 0 else None)
    return run


def _agree(context: ParallelContext, work: Callable[[], T]) -> T:
    """``work()`` of this rank, once every rank has done its own; the error of any rank is raised on all."""
    result: Any = None
    error = None
    try:
        result = work()
    except MegapolyError as caught:
        error = caught
    outcomes = comm.broadcast_object(comm.gather_objects(error, context.control), context.control)
    first = next((outcome for outcome in outcomes if outcome is not None), None)
    if first is not None:
        raise everywhere(first)
    return result


def _check_same(config: Config, context: ParallelContext) -> None:
    """Two machines may have been given different files."""
    document = config.document()
    mine = {**config.identity(), **{key: document[key] for key in ("layout", "checkpoint", "validation", "log")}}
    lines = state.differences(comm.broadcast_object(mine, context.control), mine, "rank 0", f"rank {context.rank}")
    if lines:
        raise ConfigError("the ranks were started with different configs:\n" + "\n".join(lines))


def _prepare(config: Config, context: ParallelContext, path: Path | None) -> Run:
    """Open data, build the engine, and take the run's state from a checkpoint or from the seed."""
    tokenizer = Tokenizer.load(config.data.tokenizer)
    if tokenizer.vocabulary > config.model.vocabulary:
        raise ConfigError(
            f"model.vocabulary {config.model.vocabulary} is less than the {tokenizer.vocabulary} pieces of"
            f" {config.data.tokenizer}; set it to {tokenizer.vocabulary} or more"
        )
    datasets = open_datasets(config.data, tokenizer)
    reader = None if path is None else store.Reader(path)
    if reader is not None:
        state.check_identity(reader, config)
        plan = Plan.from_document(reader.meta["plan"])
        check_datasets(plan, datasets)
    else:
        plan = plan_from_config(config, datasets)
    engine = Engine(config, context)
    counters = Counters()
    if reader is None:
        engine.initialise()
    else:
        counters = state.load(reader, config, engine.optimizer)
    return Run(config, context, engine, plan, datasets, tokenizer, counters, path)


def _choose(config: Config, resume: Resume) -> Path | None:
    """The checkpoint to go on from; None begins a run."""
    folder = config.train.directory
    checkpoints = folder / CHECKPOINTS
    whole = store.steps(checkpoints)
    if resume == "always" or (resume == "if-any" and whole):
        return state.newest(checkpoints)
    begun = (folder / CONFIG).exists()
    if resume == "if-any":
        if begun:
            _check_begun(folder / CONFIG, config)
        return None
    if whole:
        raise CheckpointError(
            f"{folder}: holds a run already; give --resume to go on with it, or set train.directory to a new folder"
        )
    if begun:
        raise CheckpointError(
            f"{folder}: holds a run that ended before its first checkpoint; give --resume-if-any to begin it again, or"
            " set train.directory to a new folder"
        )
    return None


def _check_begun(path: Path, config: Config) -> None:
    try:
        found = Config.model_validate_json(path.read_text(encoding="utf-8")).identity()
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: is not the config of a run ({error}); remove it to begin a run here") from error
    lines = state.differences(found, config.identity(), "the run", "the config")
    if lines:
        raise ConfigError(f"{path}: belongs to a run with another config; differing keys:\n" + "\n".join(lines))


def _write_config(config: Config) -> None:
    text = json.dumps(config.document(), indent=2) + "\n"
    write_whole(config.train.directory / CONFIG, text.encode())


def _announce(run: Run, recorder: Recorder) -> None:
    config, counters = run.config, run.counters
    count = parameter_count(config.model)
    recorder.note(
        f"{count / 1e6:.1f} M parameters, {run.context.mesh}, {config.microbatches} x"
        f" {config.layout.micro_batch} sequences, {config.layout.schedule}, {config.train.precision}"
    )
    if run.resumed_from is not None:
        recorder.note(f"goes on from {run.resumed_from.name} at step {counters.step}, sample {counters.sample}")
    recorder.start(counters.step, counters.sample, counters.tokens, str(run.resumed_from) if run.resumed_from else None)


def _loop(run: Run, recorder: Recorder, last_step: int, stopping: Callable[[], bool]) -> None:
    config, engine = run.config, run.engine
    if run.counters.step == 0:
        _validate(run, recorder, "before")
    elif run.counters.step >= last_step:
        recorder.note(f"nothing to do: the run is at step {run.counters.step} already, and was to end at {last_step}")
    saved = run.resumed_from is not None
    axes = run.context.axes()
    with Loader(
        config,
        run.plan,
        run.datasets,
        start=run.counters.sample,
        rank=run.context.dp.rank,
        with_tokens=engine.needs_tokens,
    ) as loader:
        while run.counters.step < last_step:
            begin = time.perf_counter()
            before = [replace(axis.traffic) for axis in axes]
            batches = next(loader)
            loaded = time.perf_counter()
            counters = run.counters
            rate = learning_rate(config.optimizer, counters.tokens, config.total_tokens)
            result = engine.step(batches, rate, len(run.plan.sources), stopping())
            stage = run.plan.stage_at(counters.sample)
            run.counters = counters = Counters(
                counters.step + 1, counters.sample + config.train.global_batch, counters.tokens + config.step_tokens
            )
            saved = False
            recorder.step(
                {
                    "step": counters.step,
                    "tokens": counters.tokens,
                    "sample": counters.sample,
                    "stage": stage.stage,
                    "stage_share": (counters.sample - stage.first_sample) / stage.samples,
                    "loss": result.loss,
                    "learning_rate": rate,
                    "gradient_norm": result.gradient_norm,
                    "source_loss": result.source_loss,
                    "source_tokens": result.source_tokens,
                },
                {
                    "step": time.perf_counter() - begin,
                    "data": loaded - begin,
                    **result.seconds,
                },
                {axis.name: axis.traffic.since(start) for axis, start in zip(axes, before) if axis.size > 1},
            )
            _validate_if_due(run, recorder, stage.end)
            if counters.step % config.checkpoint.every_steps == 0:
                saved = _save(run, recorder)
            if result.stop:
                recorder.note("asked to stop")
                break
    if not saved:
        _save(run, recorder)


def _validate_if_due(run: Run, recorder: Recorder, stage_end: int) -> None:
    every, counters = run.config.validation.every_steps, run.counters
    if counters.step == run.config.total_steps:
        _validate(run, recorder, "after")
    elif counters.sample == stage_end:
        _validate(run, recorder, "between")
    elif every and counters.step % every == 0:
        _validate(run, recorder, "periodic")


def _save(run: Run, recorder: Recorder) -> bool:
    path = state.save(
        run.checkpoints,
        run.config,
        run.plan,
        run.counters,
        run.engine.optimizer,
        run.context,
        tokenizer=run.tokenizer.sha256,
    )
    recorder.note(f"saved {path.parent.name}/{path.name}")
    return True


def _validate(run: Run, recorder: Recorder, at: str) -> None:
    """Loss sums, counted tokens and bytes of every source's held-out windows, over all ranks."""
    config, context = run.config, run.context
    if not config.validation.windows:
        return
    sources = len(run.plan.sources)
    totals = torch.zeros(3, sources, dtype=torch.float64)
    token_bytes = torch.zeros(config.model.vocabulary, dtype=torch.int64)
    token_bytes[: run.tokenizer.vocabulary] = torch.from_numpy(run.tokenizer.byte_lengths().astype(np.int64))
    for source in range(sources):
        batches = _validation_batches(run, source)
        for begin in range(0, len(batches), _VALIDATION_BATCHES):
            chunk = batches[begin : begin + _VALIDATION_BATCHES]
            for losses_SB, batch in zip(run.engine.evaluate(chunk), chunk):
                assert batch.labels is not None
                counted = batch.labels >= 0
                values = (losses_SB.double().sum(), counted.sum(), token_bytes[batch.labels[counted]].sum())
                for row, value in enumerate(values):
                    totals[row, source] += float(value)
    if context.tp.rank > 0:
        totals.zero_()
    totals = totals.to(context.device)
    comm.all_reduce(totals, context.dp)
    comm.all_reduce(totals, context.model)
    sums, counts, sizes = totals.tolist()
    recorder.validation(at, run.counters.step, run.counters.tokens, sums, counts, sizes)


def _validation_batches(run: Run, source: int) -> list[Batch]:
    """This data-parallel rank's micro-batches of one source's held-out windows."""
    config, dp = run.config, run.context.dp
    return validation(
        run.plan,
        run.datasets,
        source,
        windows=config.validation.windows,
        rows_multiple=config.layout.micro_batch * dp.size,
        part=(dp.rank, dp.size),
        vocabulary=config.model.vocabulary,
        separate_documents=config.data.separate_documents,
        with_tokens=run.engine.needs_tokens,
    ).split(config.layout.micro_batch)
