"""The schema of a run: TOML in, frozen models out, every cross-field check in one place.

Paths in a file are relative to the folder of that file. ``--set section.key=value`` overrides are TOML too. Training
length is counted in tokens. A wrong file is a :class:`ConfigError` that names the key, what was found and what to do.
"""

from __future__ import annotations

import difflib
import math
import os
import sys
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pydantic
from pydantic import Field, PositiveFloat, PositiveInt

from megapoly.errors import ConfigError
from megapoly.mesh import Mesh

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Share = typing.Annotated[float, Field(ge=0.0, le=1.0)]
Count = typing.Annotated[int, Field(ge=0)]


class _Section(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


class Model(_Section):
    """A decoder of the PolyLM / GPT-2 family: learned positions, pre-LayerNorm, tanh GELU, biases, tied embeddings."""

    layers: PositiveInt
    hidden: PositiveInt
    heads: PositiveInt
    ffn: PositiveInt
    vocabulary: PositiveInt
    positions: PositiveInt = Field(description="rows of the learned position table; the longest sequence")
    key_value_heads: PositiveInt | None = Field(None, description="grouped queries; as many as heads where not given")
    norm_epsilon: PositiveFloat = 1e-5
    init_std: PositiveFloat = 0.02
    fp32_residual: bool = Field(True, description="keep the residual stream in fp32 under a lower precision")

    @property
    def groups(self) -> int:
        return self.key_value_heads or self.heads

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads


class Layout(_Section):
    """How the ranks share the model and the batch."""

    dp: PositiveInt | None = Field(None, description="data-parallel ranks; where not given, all that pp x tp leaves")
    pp: PositiveInt = 1
    tp: PositiveInt = 1
    micro_batch: PositiveInt = Field(1, description="samples of one forward pass of one rank")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: a GPU for each rank where there are any")
    schedule: Literal["gpipe", "1f1b"] = "1f1b"
    bucket_mb: PositiveFloat = Field(32.0, description="size of a gradient bucket, in MB")


class Source(_Section):
    """One indexed dataset: ``path`` + ``.bin``/``.idx`` and, where megapoly wrote it, ``.json``."""

    path: Path
    language: str


class Stage(_Section):
    """A part of the curriculum: so many tokens drawn by these weights."""

    name: str
    tokens: PositiveInt
    weights: dict[str, Share] = Field(min_length=1)


class Data(_Section):
    tokenizer: Path
    sources: dict[str, Source] = Field(min_length=1)
    stages: list[Stage] = Field(min_length=1)
    separate_documents: bool = Field(False, description="no attention across documents; positions restart")


class Train(_Section):
    directory: Path
    sequence: PositiveInt
    global_batch: PositiveInt = Field(description="samples of one optimizer step, over all ranks")
    seed: Count = 1234
    precision: Literal["fp32", "bf16", "fp64"] = "fp32"


class Optimizer(_Section):
    """AdamW. Rates are functions of the trained tokens."""

    learning_rate: PositiveFloat
    minimum: Share = Field(0.1, description="the final rate, as a share of learning_rate")
    shape: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup_tokens: Count = 0
    warmup_start: float = Field(0.0, ge=0.0, description="rate of the first step of the warm-up")
    decay_tokens: PositiveInt | None = Field(
        None, description="cosine: end of the decay (default: the run's); wsd: length of the final decay (a tenth)"
    )
    beta1: float = Field(0.9, ge=0.0, lt=1.0)
    beta2: float = Field(0.95, ge=0.0, lt=1.0)
    epsilon: PositiveFloat = 1e-8
    weight_decay: float = Field(0.1, ge=0.0)
    clip: PositiveFloat = Field(1.0, description="largest global gradient norm")


class Checkpoint(_Section):
    every_steps: PositiveInt = 500
    keep: PositiveInt = Field(2, description="whole checkpoints kept; older ones are removed")


class Validation(_Section):
    every_steps: PositiveInt | None = Field(None, description="beside before, between and after the stages")
    windows: Count = Field(16, description="windows of each source's held-out documents; 0 switches validation off")


class Log(_Section):
    every_steps: PositiveInt = 1
    tensorboard: bool = True
    peak_tflops: PositiveFloat | None = Field(None, description="of one rank's device, for MFU; known for common GPUs")


class Config(_Section):
    model: Model
    layout: Layout = Layout()
    data: Data
    train: Train
    optimizer: Optimizer
    checkpoint: Checkpoint = Checkpoint()
    validation: Validation = Validation()
    log: Log = Log()

    @property
    def mesh(self) -> Mesh:
        if self.layout.dp is None:
            raise ConfigError("layout.dp is not settled yet: call config.on(world_size) first")
        return Mesh(dp=self.layout.dp, pp=self.layout.pp, tp=self.layout.tp)

    @property
    def microbatches(self) -> int:
        """Micro-batches of one rank in one step."""
        return self.train.global_batch // (self.layout.micro_batch * self.mesh.dp)

    @property
    def total_tokens(self) -> int:
        return sum(stage.tokens for stage in self.data.stages)

    @property
    def step_tokens(self) -> int:
        return self.train.global_batch * self.train.sequence

    @property
    def total_steps(self) -> int:
        return self.total_tokens // self.step_tokens

    def on(self, world_size: int) -> Config:
        """This config for a number of ranks: settles ``layout.dp`` and checks the layout against the batch."""
        layout = self.layout
        inner = layout.pp * layout.tp
        if layout.dp is None and world_size % inner:
            raise ConfigError(
                f"layout: {world_size} ranks were started, which pp {layout.pp} x tp {layout.tp} = {inner} does not"
                f" divide; start a multiple of {inner} or change layout.pp or layout.tp"
            )
        dp = layout.dp or world_size // inner
        if dp * inner != world_size:
            raise ConfigError(
                f"layout: {world_size} ranks were started, but dp {dp} x pp {layout.pp} x tp {layout.tp} needs"
                f" {dp * inner}; start {dp * inner}, or leave layout.dp out to use what there is"
            )
        settled = self.model_copy(update={"layout": layout.model_copy(update={"dp": dp})})
        _check_batch(settled)
        return settled

    def document(self) -> dict[str, Any]:
        """Plain values, as kept in a run folder and in checkpoints."""
        return self.model_dump(mode="json")

    def identity(self) -> dict[str, Any]:
        """The part of :meth:`document` that defines the logical run and may not change inside it.

        Layout, saving and logging are free to change; so are paths: datasets and tokenizer are known by content.
        """
        document = self.document()
        kept = {key: document[key] for key in ("model", "data", "train", "optimizer")}
        kept["train"].pop("directory")
        kept["data"].pop("tokenizer")
        for source in kept["data"]["sources"].values():
            source.pop("path")
        return kept


def load(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Read a TOML file, apply ``section.key=value`` overrides, check everything.

    Raises:
        ConfigError: a missing file, a syntax error, an unknown key, a wrong value, or values that do not fit together.
    """
    path = Path(path)
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); give the path of a TOML file") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text, at byte {error.start}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: is not TOML: {error}") from error
    for override in overrides:
        _apply(tree, override)
    return parse(tree, where=str(path), folder=path.parent)


def parse(tree: Mapping[str, Any], *, where: str = "config", folder: Path = Path(".")) -> Config:
    """A checked :class:`Config` from plain values. Relative paths are taken from ``folder``."""
    _refuse_unknown(Config, tree, (), where)
    try:
        config = Config.model_validate(tree)
    except pydantic.ValidationError as error:
        raise ConfigError("\n".join(f"{where}: {_explain(problem)}" for problem in error.errors())) from error
    config = _resolve(config, folder)
    try:
        for check in (_check_model, _check_data, _check_schedule, _check_batch):
            check(config)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    return config


def _apply(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    path = key.strip().split(".")
    if not separator or not all(path):
        raise ConfigError(f"--set {override}: expected section.key=value, such as --set layout.tp=2")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    at: Any = tree
    for i, part in enumerate(path):
        last = i == len(path) - 1
        if isinstance(at, list):
            if not part.isdecimal() or int(part) >= len(at):
                raise ConfigError(
                    f"--set {override}: {'.'.join(path[:i])} is a list of {len(at)}, which has no entry {part!r};"
                    " entries are counted from 0"
                )
            if last:
                at[int(part)] = value
            else:
                at = at[int(part)]
        elif isinstance(at, dict):
            if last:
                at[part] = value
            else:
                at = at.setdefault(part, {})
        else:
            raise ConfigError(f"--set {override}: {'.'.join(path[:i])} is a value, not a section")


def _annotation_model(annotation: Any) -> tuple[type[_Section] | None, str]:
    """The section inside an annotation and how it is held: 'one', 'list' or 'dict'."""
    origin = get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        for option in get_args(annotation):
            found = _annotation_model(option)
            if found[0]:
                return found
        return None, "one"
    if origin in (list, dict):
        return _annotation_model(get_args(annotation)[-1])[0], origin.__name__
    return (annotation, "one") if isinstance(annotation, type) and issubclass(annotation, _Section) else (None, "one")


def _refuse_unknown(section: type[_Section], tree: Any, path: tuple[str, ...], where: str) -> None:
    if not isinstance(tree, Mapping):
        return
    known = section.model_fields
    for key, value in tree.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(sorted(known))}"
            raise ConfigError(f"{where}: unknown key {'.'.join((*path, key))!r}; {hint}")
        inner, held = _annotation_model(known[key].annotation)
        if inner is None:
            continue
        if held == "list" and isinstance(value, list):
            parts: Iterable[tuple[str, Any]] = ((str(i), item) for i, item in enumerate(value))
        elif held == "dict" and isinstance(value, Mapping):
            parts = value.items()
        else:
            _refuse_unknown(inner, value, (*path, key), where)
            continue
        for name, item in parts:
            _refuse_unknown(inner, item, (*path, key, name), where)


def _explain(problem: Any) -> str:
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "missing":
        return f"key {key!r} is missing"
    return f"{key}: {problem['msg'][0].lower()}{problem['msg'][1:]}, found {problem['input']!r}"


def _resolve(config: Config, folder: Path) -> Config:
    def at(path: Path) -> Path:
        return Path(os.path.abspath(folder / path))  # a saved config is read from anywhere

    data = config.data
    sources = {name: source.model_copy(update={"path": at(source.path)}) for name, source in data.sources.items()}
    return config.model_copy(
        update={
            "data": data.model_copy(update={"tokenizer": at(data.tokenizer), "sources": sources}),
            "train": config.train.model_copy(update={"directory": at(config.train.directory)}),
        }
    )


def _check_model(config: Config) -> None:
    model, layout = config.model, config.layout
    if model.hidden % model.heads:
        raise ConfigError(
            f"model.hidden {model.hidden} does not divide by model.heads {model.heads};"
            f" choose heads from {_divisors(model.hidden)}"
        )
    if model.heads % model.groups:
        raise ConfigError(
            f"model.heads {model.heads} does not divide by model.key_value_heads {model.groups};"
            f" choose key_value_heads from {_divisors(model.heads)}"
        )
    if model.groups % layout.tp:
        what = "model.key_value_heads" if model.key_value_heads else "model.heads"
        raise ConfigError(
            f"{what} {model.groups} does not divide by layout.tp {layout.tp}; choose layout.tp from"
            f" {_divisors(model.groups)}, or a number of heads that is a multiple of {layout.tp}"
        )
    if model.ffn % layout.tp:
        raise ConfigError(
            f"model.ffn {model.ffn} does not divide by layout.tp {layout.tp}; the nearest that does is"
            f" {max(1, round(model.ffn / layout.tp)) * layout.tp}"
        )
    if layout.pp > model.layers:
        raise ConfigError(
            f"layout.pp {layout.pp} is more than model.layers {model.layers}: a stage would have no layer;"
            f" set layout.pp to {model.layers} or less"
        )
    if config.train.sequence > model.positions:
        raise ConfigError(
            f"train.sequence {config.train.sequence} is longer than the position table, model.positions"
            f" {model.positions}; raise model.positions or shorten train.sequence"
        )


def _check_data(config: Config) -> None:
    data = config.data
    names = [stage.name for stage in data.stages]
    if len(set(names)) < len(names):
        raise ConfigError(f"data.stages: two stages have one name among {names}; give each its own")
    for i, stage in enumerate(data.stages):
        where = f"data.stages.{i} ({stage.name})"
        for name in stage.weights:
            if name not in data.sources:
                near = difflib.get_close_matches(name, data.sources, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"sources: {', '.join(sorted(data.sources))}"
                raise ConfigError(f"{where}: weight of an unknown source {name!r}; {hint}")
        total = math.fsum(stage.weights.values())
        if abs(total - 1) > 1e-6:
            hint = f"divide each by {total:.9g}" if total else "give a source a weight"
            raise ConfigError(f"{where}: the weights sum to {total:.9g}, not 1; {hint}")
        if stage.tokens % config.step_tokens:
            below = stage.tokens // config.step_tokens * config.step_tokens
            nearest = [str(tokens) for tokens in (below, below + config.step_tokens) if tokens]
            raise ConfigError(
                f"{where}: {stage.tokens} tokens are not a whole number of global batches of"
                f" {config.train.global_batch} x {config.train.sequence} = {config.step_tokens} tokens; set it to"
                f" {' or '.join(nearest)}"
            )


def _check_schedule(config: Config) -> None:
    optimizer, total = config.optimizer, config.total_tokens
    if optimizer.warmup_tokens >= total:
        raise ConfigError(
            f"optimizer.warmup_tokens {optimizer.warmup_tokens} is not less than the run's {total} tokens;"
            f" shorten it, for example to {total // 100}"
        )
    if optimizer.warmup_start > optimizer.learning_rate:
        raise ConfigError(
            f"optimizer.warmup_start {optimizer.warmup_start} is above optimizer.learning_rate"
            f" {optimizer.learning_rate}; lower it, or leave it out for 0"
        )
    if optimizer.decay_tokens is None:
        return
    if optimizer.shape == "constant":
        raise ConfigError("optimizer.decay_tokens is set, but optimizer.shape 'constant' has no decay; remove one")
    if optimizer.shape == "wsd" and optimizer.warmup_tokens + optimizer.decay_tokens > total:
        raise ConfigError(
            f"optimizer: warmup_tokens {optimizer.warmup_tokens} and the final decay_tokens {optimizer.decay_tokens}"
            f" together exceed the run's {total} tokens"
        )
    if optimizer.shape == "cosine" and optimizer.decay_tokens <= optimizer.warmup_tokens:
        raise ConfigError(
            f"optimizer.decay_tokens {optimizer.decay_tokens} is the end of the decay and has to be after"
            f" warmup_tokens {optimizer.warmup_tokens}"
        )


def _check_batch(config: Config) -> None:
    layout, batch = config.layout, config.train.global_batch
    per_round = layout.micro_batch * (layout.dp or 1)
    if batch % per_round:
        nearest = max(1, round(batch / per_round)) * per_round
        raise ConfigError(
            f"train.global_batch {batch} does not divide by layout.micro_batch {layout.micro_batch} x dp"
            f" {layout.dp or 1} = {per_round}; change the number of ranks, layout.micro_batch, or, which changes the"
            f" run itself, train.global_batch (the nearest that fits is {nearest})"
        )


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
