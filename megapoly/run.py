"""A run: its folder, plan, data and engine, made ready to train from the seed or from a checkpoint."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from megapoly import comm
from megapoly.checkpoint import folders, state, store, weights
from megapoly.checkpoint.background import Writer
from megapoly.checkpoint.state import Counters
from megapoly.config import Config
from megapoly.context import ParallelContext
from megapoly.data.epochs import settle
from megapoly.data.files import write_whole
from megapoly.data.indexed import IndexedDataset
from megapoly.data.load_tokenizer import load_tokenizer
from megapoly.data.loader import open_datasets
from megapoly.data.plan import Plan, check_datasets, edited_plan, plan_from_config
from megapoly.data.samples import check_pack
from megapoly.data.templates import Template
from megapoly.data.tokenizer import Tokenizer
from megapoly.engine import Engine
from megapoly.errors import CheckpointError, ConfigError, DataError, MegapolyError, everywhere
from megapoly.stability import Branch, Guards
from megapoly.stragglers import Stragglers
from megapoly.watchdog import Standing

CONFIG = "config.json"
T = TypeVar("T")
Resume = Literal["never", "always", "if-any"]
_BOTH = (
    "--resume goes on with a run, and --init-from begins a new one with the weights of a checkpoint; give one of them"
    " (--resume-if-any with --init-from begins so where the run has no checkpoint yet)"
)


@dataclass
class Run:
    """Everything that a loop needs. ``counters`` move on; a rollback takes plan, counters and guards elsewhere.

    Attributes:
        resumed_from: the checkpoint that this start went on from.
        began: where a new run begins with the weights of a checkpoint, lines that say so.
        edits: where its config has another curriculum than the checkpoint, lines that say so.
        saved_step: of the newest checkpoint, -1 where there is none.
        writer: of checkpoints in the background, where the config asks for it.
        lengths: where stages are given in epochs, lines that say how long they are.
        template: of the instructions that it trains on, or that the weights it began with were trained on.
        doing: what this rank is at, for its watchdog.
    """

    config: Config
    context: ParallelContext
    engine: Engine
    plan: Plan
    datasets: dict[str, IndexedDataset]
    tokenizer: Tokenizer
    guards: Guards
    resumed_from: Path | None
    edits: list[str] = field(default_factory=list)
    began: list[str] = field(default_factory=list)
    lengths: list[str] = field(default_factory=list)
    template: Template | None = None
    branch: Branch = field(default_factory=Branch)
    counters: Counters = field(default_factory=Counters)
    saved_step: int = -1
    writer: Writer | None = None
    doing: str = "starting up"
    stragglers: Stragglers = field(init=False)

    def __post_init__(self) -> None:
        self.stragglers = Stragglers(self.config.log.stragglers_every, self.context, self.engine.pipeline)

    def standing(self) -> Standing:
        """Where this rank stands, for its watchdog."""
        doing = ": ".join(filter(None, (self.doing, self.engine.pipeline.place)))
        return Standing(self.counters.step, doing, sum(axis.traffic.calls for axis in self.context.axes()))

    @property
    def checkpoints(self) -> Path:
        return self.config.train.directory / folders.CHECKPOINTS

    def save(self) -> Path:
        """Write a checkpoint, or begin to; its folder. Collective.

        Raises:
            CheckpointError: on every rank: it could not be written, or the one before that was written meanwhile.
        """
        scaler = self.engine.scaler
        path = state.save(
            self.checkpoints,
            self.config,
            self.plan,
            self.counters,
            self.engine.optimizer,
            self.context,
            tokenizer=self.tokenizer.sha256,
            template=self.template,
            guards={
                "stability": self.guards.state(),
                "scaler": None if scaler is None else scaler.state(),
                "branch": self.branch.state(),
            },
            keep_before=self.guards.high_since,
            writer=self.writer,
        )
        self.saved_step = self.counters.step
        return path

    def settle(self) -> Path | None:
        """Wait for the checkpoint that is being written in the background; its folder, or None. Collective.

        Raises:
            CheckpointError: on every rank: it could not be written.
        """
        return None if self.writer is None else self.writer.wait()

    def restore(self, reader: store.Reader) -> None:
        """Take weights, optimizer, counters and guards, but neither plan nor branch, from a checkpoint of this run."""
        self.counters = state.load(reader, self.config, self.engine.optimizer)
        self.saved_step = self.counters.step
        saved = reader.meta.get("guards")
        if saved is None:  # of the time before there were any
            return
        self.guards.restore(saved["stability"])
        if self.engine.scaler is not None:
            self.engine.scaler.restore(saved["scaler"])


def prepare(config: Config, context: ParallelContext, resume: Resume = "never", init_from: Path | None = None) -> Run:
    """A run that is ready to train, new or from its newest whole checkpoint.

    Collective. An error on some ranks is raised on all, so that none is left waiting.

    Args:
        resume: ``never`` needs a folder without a run, ``always`` needs a checkpoint, ``if-any`` takes a checkpoint
            where there is one and else begins: for jobs that are queued or restarted by themselves.
        init_from: a checkpoint, run folder, folder of checkpoints or of Hugging Face, whose weights a new run begins
            with.
    """
    if resume == "always" and init_from is not None:
        raise everywhere(ConfigError(_BOTH))
    control = context.control
    agree(context, lambda: _check_same(config, context))
    # Rank 0 alone looks into the folder: what another rank sees of a network file system may be older.
    path = agree(context, lambda: _choose(config, resume) if context.rank == 0 else None)
    path = comm.broadcast_object(path, control)
    first = None
    if path is None and init_from is not None:
        first = agree(context, lambda: weights.find(init_from) if context.rank == 0 else None)
        first = comm.broadcast_object(first, control)
    run = agree(context, lambda: _prepare(config, context, path, first))
    if config.checkpoint.background:
        timeout = datetime.timedelta(seconds=config.layout.timeout_seconds)
        run.writer = Writer(context.another_control("saving", timeout))
    if path is None or run.edits:
        agree(context, lambda: _write_config(run.config) if context.rank == 0 else None)
    return run


def agree(context: ParallelContext, work: Callable[[], T]) -> T:
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
    mine = {
        **config.identity(),
        "curriculum": config.curriculum(),
        **{key: document[key] for key in ("layout", "stability", "checkpoint", "validation", "log")},
    }
    lines = state.differences(comm.broadcast_object(mine, context.control), mine, "rank 0", f"rank {context.rank}")
    if lines:
        raise ConfigError("the ranks were started with different configs:\n" + "\n".join(lines))


def _prepare(config: Config, context: ParallelContext, path: Path | None, first: Path | None) -> Run:
    """Open data, build the engine, and take the run's state from a checkpoint, its weights from one, or the seed's."""
    config, tokenizer, datasets, lengths = open_data(config)
    template = template_of(datasets)
    reader = None if path is None else store.Reader(path)
    if reader is not None:
        state.check_identity(reader, config)
        state.check_tokenizer(reader, tokenizer)
    initial = None if first is None else weights.open_weights(first)
    if initial is not None:
        known = weights.check_tokenizer(initial, tokenizer)
    plan, edits = _plan(config, datasets, reader)
    engine = Engine(config, context)
    run = Run(config, context, engine, plan, datasets, tokenizer, Guards(config.stability), path, edits)
    run.lengths = lengths
    run.template = template or _template_before(reader, initial)
    if initial is not None:
        weights.load_initial(initial, config, engine.optimizer)
        unknown = "" if known else ", which does not tell the tokenizer that it was trained with"
        run.began = [f"begins with the weights of {initial.path}{unknown}", *initial.notes]
        run.began += state.model_differences(initial.model, config)
    elif reader is None:
        engine.initialise()
    else:
        run.restore(reader)
        run.branch = Branch.restored(reader.meta.get("guards", {}).get("branch", []))
    return run


def _template_before(reader: store.Reader | None, initial: weights.Weights | None) -> Template | None:
    """Of the checkpoint that the run goes on from or begins with."""
    if reader is not None:
        return state.read_template(reader.path, reader.meta)
    return None if initial is None else weights.template_of(initial)


def open_data(config: Config) -> tuple[Config, Tokenizer, dict[str, IndexedDataset], list[str]]:
    """The data of a run, where it fits its model and its sequences.

    Returns:
        The config with the lengths of its stages in tokens, the tokenizer, the datasets by source name, and lines for
        people about those lengths (:func:`megapoly.data.epochs.settle`).

    Raises:
        ConfigError: a vocabulary that is smaller than the tokenizer's, or what :func:`settle` refuses.
        DataError: what :func:`open_datasets`, :func:`check_pack` and :func:`settle` refuse.
    """
    tokenizer = load_tokenizer(config.data.tokenizer)
    if tokenizer.vocabulary > config.model.vocabulary:
        raise ConfigError(
            f"model.vocabulary {config.model.vocabulary} is less than the {tokenizer.vocabulary} pieces of"
            f" {config.data.tokenizer}; set it to {tokenizer.vocabulary} or more"
        )
    datasets = open_datasets(config.data, tokenizer)
    for name, dataset in datasets.items():
        check_pack(name, dataset, config.train.sequence, config.data.separate_documents)
    config, lengths = settle(config, datasets)
    return config, tokenizer, datasets, lengths


def template_of(datasets: Mapping[str, IndexedDataset]) -> Template | None:
    """The template of a run's instructions; None where it has none.

    Raises:
        DataError: there are several.
    """
    found = {
        name: dataset.sidecar.instructions
        for name, dataset in datasets.items()
        if dataset.sidecar is not None and dataset.sidecar.instructions is not None
    }
    first = next(iter(found), None)
    for name, template in found.items():
        if first is not None and template != found[first]:
            raise DataError(
                f"sources {first!r} and {name!r} were built with templates {found[first]!r} and {template!r}, and a"
                " model keeps one to be asked with; build both with one --template"
            )
    return None if first is None else found[first]


def unchecked(datasets: Mapping[str, IndexedDataset]) -> list[str]:
    """Lines for people about datasets that are trusted more than checked, and that are not validated."""
    bare = [f"{name!r} ({dataset.prefix})" for name, dataset in datasets.items() if dataset.sidecar is None]
    streams = [repr(name) for name, dataset in datasets.items() if dataset.marked and not dataset.pack]
    none = [repr(name) for name, dataset in datasets.items() if dataset.tokens == dataset.train_tokens]
    lines = []
    if bare:
        lines.append(
            f"without a .json, so that tokenizer, language, bytes and held-out part are unknown: {', '.join(bare)}"
        )
    if streams:
        lines.append(
            f"instructions in a stream, whose windows cut examples, so that answers are learned without their prompts:"
            f" {', '.join(streams)}; `megapoly data build --pack` keeps them whole"
        )
    if none:
        lines.append(f"not validated, since nothing of them is held out: {', '.join(none)}")
    return lines


def _plan(
    config: Config, datasets: Mapping[str, IndexedDataset], reader: store.Reader | None
) -> tuple[Plan, list[str]]:
    """The plan of a new run, or of one that goes on, and what the config edits in it."""
    if reader is None:
        return plan_from_config(config, datasets), []
    plan = Plan.from_document(reader.meta["plan"])
    check_datasets(plan, datasets)
    edits = state.curriculum_edits(reader, config)
    if edits:
        plan = edited_plan(plan, reader.meta["counters"]["sample"], config, datasets)
    return plan, edits


def plan_of_run(config: Config, datasets: Mapping[str, IndexedDataset], *, resume: bool) -> tuple[Plan, list[str]]:
    """The data plan that a start of ``config`` would train by, and lines for people about where it comes from.

    Raises:
        ConfigError, DataError, CheckpointError: what the start would refuse of the plan.
    """
    if not resume:
        return _plan(config, datasets, None)
    reader = store.Reader(state.newest(config.train.directory / folders.CHECKPOINTS))
    state.check_identity(reader, config)
    plan, edits = _plan(config, datasets, reader)
    sample = reader.meta["counters"]["sample"]
    lines = [f"goes on from {reader.path.name}, sample {sample}" + (" with an edited curriculum:" if edits else "")]
    return plan, [*lines, *edits]


def _choose(config: Config, resume: Resume) -> Path | None:
    """The checkpoint to go on from; None begins a run."""
    folder = config.train.directory
    checkpoints = folder / folders.CHECKPOINTS
    whole = folders.steps(checkpoints)
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
