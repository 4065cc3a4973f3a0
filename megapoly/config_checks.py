"""Every check of one key of a config against others. Messages say which keys, what they are, and what would fit."""

from __future__ import annotations

from collections.abc import Sequence

from megapoly.config_schema import Model, Ramp, Schema
from megapoly.errors import ConfigError
from megapoly.mixture import groups_of


def check(config: Schema) -> None:
    """Refuse values that do not fit together.

    Raises:
        ConfigError: the first that does not.
    """
    check_model(config.model)
    for each in (
        _check_shares,
        _check_layout,
        _check_kernels,
        _check_data,
        _check_schedule,
        check_batch,
        _check_stability,
        _check_checkpoint,
    ):
        each(config)


def check_model(model: Model) -> None:
    """Refuse keys of a model that do not fit together.

    Raises:
        ConfigError: the first that does not.
    """
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
    _check_rope(model)


def check_shares(model: Model, tp: int, key: str = "layout.tp") -> None:
    """Refuse a number of tensor-parallel ranks, given as ``key``, that the model does not divide by.

    Raises:
        ConfigError: what does not divide.
    """
    if model.groups % tp:
        what = "model.key_value_heads" if model.key_value_heads else "model.heads"
        raise ConfigError(
            f"{what} {model.groups} does not divide by {key} {tp}; choose {key} from"
            f" {_divisors(model.groups)}, or a number of heads that is a multiple of {tp}"
        )
    if model.ffn % tp:
        raise ConfigError(
            f"model.ffn {model.ffn} does not divide by {key} {tp}; the nearest that does is"
            f" {max(1, round(model.ffn / tp)) * tp}"
        )


def _check_shares(config: Schema) -> None:
    model = config.model
    check_shares(model, config.layout.tp)
    if config.train.sequence > model.positions:
        table = "the position table, " if model.position == "learned" else ""
        raise ConfigError(
            f"train.sequence {config.train.sequence} is longer than {table}model.positions"
            f" {model.positions}; raise model.positions or shorten train.sequence"
        )


def _check_rope(model: Model) -> None:
    if model.position != "rope":
        given = [key for key in ("rope_base", "rope_scaling") if getattr(model, key) is not None]
        if given:
            raise ConfigError(
                f"model.{given[0]} is set, but model.position {model.position!r} has no rotary angles; remove it, or"
                " set model.position to 'rope'"
            )
        return
    if model.head_dim % 2:
        raise ConfigError(
            f"model.hidden {model.hidden} / model.heads {model.heads} = {model.head_dim} channels a head, and rotary"
            " embedding turns pairs of them; choose heads for an even number, or another model.position"
        )
    scaling = model.rope_scaling
    if scaling is None:
        return
    own = ("original_positions", "low_frequency_factor", "high_frequency_factor")
    if scaling.kind == "linear":
        given = [key for key in own if getattr(scaling, key) is not None]
        if given:
            raise ConfigError(
                f"model.rope_scaling.{given[0]} belongs to kind 'llama3', and kind is 'linear'; remove it, or change"
                " the kind"
            )
        return
    if scaling.original_positions is None:
        raise ConfigError(
            "model.rope_scaling: kind 'llama3' needs original_positions, the longest sequence of the first training"
            " (8192 for LLaMA 3.1)"
        )
    if scaling.low >= scaling.high:
        raise ConfigError(
            f"model.rope_scaling: low_frequency_factor {scaling.low} has to be below high_frequency_factor"
            f" {scaling.high}"
        )


def _check_layout(config: Schema) -> None:
    model, layout = config.model, config.layout
    name, stages = layout.schedule, layout.stages
    if layout.virtual_stages is not None and layout.virtual_stages != layout.stages_per_rank:
        raise ConfigError(
            f"layout.virtual_stages {layout.virtual_stages}: schedule {name!r} has {layout.stages_per_rank} a rank;"
            " leave it out, or set layout.schedule to 'interleaved'"
        )
    if name == "interleaved" and layout.stages_per_rank == 1:
        raise ConfigError("layout.virtual_stages 1 makes 'interleaved' the same as '1f1b'; set it to 2, or take '1f1b'")
    if layout.pp == 1 and name in ("interleaved", "zero-bubble", "zero-bubble-v"):
        raise ConfigError(
            f"layout.schedule {name!r} fills the bubbles of a pipeline, and layout.pp is 1; set layout.schedule to"
            " '1f1b', or layout.pp to 2 or more"
        )
    if stages > model.layers:
        most = model.layers // layout.stages_per_rank
        raise ConfigError(
            f"layout.pp {layout.pp} x {layout.stages_per_rank} stages a rank is more than model.layers {model.layers}:"
            " a stage would have no layer; "
            + (f"set layout.pp to {most}" if most > 1 or name in ("gpipe", "1f1b") else "take schedule '1f1b'")
        )
    given = layout.stage_layers
    if given is not None:
        if len(given) != stages or sum(given) != model.layers:
            raise ConfigError(
                f"layout.stage_layers {list(given)}: {len(given)} stages with {sum(given)} layers, but the layout has"
                f" {stages} stages and the model {model.layers} layers; give {stages} numbers that add up to"
                f" {model.layers}, or leave it out to have them balanced"
            )
        if 0 in given[1:-1]:
            raise ConfigError(
                f"layout.stage_layers {list(given)}: only the first and the last stage, which hold the embedding and"
                " the output, may have no layer"
            )
    if layout.recompute_every > 1 and layout.recompute != "full":
        raise ConfigError(
            f"layout.recompute_every {layout.recompute_every} counts whole layers; set layout.recompute to 'full', or"
            " leave it out"
        )
    if config.train.sequence % layout.sequence_shards:
        below = config.train.sequence // layout.tp * layout.tp
        raise ConfigError(
            f"train.sequence {config.train.sequence} does not divide by layout.tp {layout.tp}, as sequence parallelism"
            f" needs; set train.sequence to {below or layout.tp}, or layout.sequence_parallel to false"
        )


def _check_kernels(config: Schema) -> None:
    model, chosen, precision = config.model, config.kernels.attention, config.train.precision
    if chosen == "auto":
        return
    key = f"kernels.attention is {chosen!r}"
    if model.attention_dropout > 0 or not (model.fp32_softmax or precision in ("fp32", "fp64")):
        why = "model.attention_dropout is above 0" if model.attention_dropout > 0 else "model.fp32_softmax is false"
        raise ConfigError(f"{key}, but {why}, which takes attention with all probabilities in memory; set it to 'auto'")
    if chosen == "flash_attn" and precision not in ("bf16", "fp16"):
        raise ConfigError(f"{key}, which is for bf16 and fp16, and train.precision is {precision!r}; set one of them")
    if chosen == "triton" and precision == "fp64":
        raise ConfigError(f"{key}, which is not for train.precision 'fp64'; set it to 'auto'")


def _check_data(config: Schema) -> None:
    data = config.data
    names = [stage.name for stage in data.stages]
    if len(set(names)) < len(names):
        raise ConfigError(f"data.stages: two stages have one name among {names}; give each its own")
    languages = {name: source.language for name, source in data.sources.items()}
    for i, stage in enumerate(data.stages):
        where = f"data.stages.{i} ({stage.name})"
        if (stage.tokens is None) == (stage.epochs is None):
            found = "both" if stage.tokens is not None else "none of them"
            raise ConfigError(f"{where}: its length is given by tokens or by epochs; found {found}")
        try:
            groups_of(stage, languages)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None
        if stage.gradual and not i:
            raise ConfigError(f"{where}: gradual moves from the weights of the stage before, and there is none")
        # Compared with its default: a config that was written out names every key.
        if stage.weights is not None and stage.alpha != type(stage).model_fields["alpha"].default:
            raise ConfigError(f"{where}: alpha has nothing to split, since weights are of sources; remove it")
        if stage.tokens is not None and stage.tokens % config.step_tokens:
            below = stage.tokens // config.step_tokens * config.step_tokens
            nearest = [str(tokens) for tokens in (below, below + config.step_tokens) if tokens]
            raise ConfigError(
                f"{where}: {stage.tokens} tokens are not a whole number of global batches of"
                f" {config.train.global_batch} x {config.train.sequence} = {config.step_tokens} tokens; set it to"
                f" {' or '.join(nearest)}"
            )
    if data.over_epochs == "respread" and all(
        cap is None for cap in (data.max_epochs, *(source.max_epochs for source in data.sources.values()))
    ):
        raise ConfigError("data.over_epochs is set, but no cap; set data.max_epochs, or max_epochs of a source")


def _check_schedule(config: Schema) -> None:
    if not config.settled:
        return
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


def check_batch(config: Schema) -> None:
    layout, train = config.layout, config.train
    dp, rounds = layout.dp or 1, layout.pp if layout.schedule == "interleaved" else 1
    unit = layout.micro_batch * dp * rounds
    product = f"layout.micro_batch {layout.micro_batch} x dp {dp}"
    if rounds > 1:
        product += f" x pp {rounds} (the interleaved schedule goes round in groups of pp micro-batches)"
    if train.global_batch % unit:
        nearest = max(1, round(train.global_batch / unit)) * unit
        raise ConfigError(
            f"train.global_batch {train.global_batch} does not divide by {product} = {unit}; change the number of"
            " ranks, layout.micro_batch, or, which changes the run itself, train.global_batch (the nearest that fits"
            f" is {nearest})"
        )
    if train.batch_ramp is None or not config.settled:
        return
    _check_ramp(config, train.batch_ramp)
    for size in config.batches.sizes:
        if size % unit:
            raise ConfigError(
                f"train.batch_ramp has global batches of {size} samples, which does not divide by {product} = {unit};"
                f" {_nearest_ramp(train.batch_ramp, train.global_batch, unit)}"
            )


def _check_ramp(config: Schema, ramp: Ramp) -> None:
    batch = config.train.global_batch
    if ramp.start >= batch:
        raise ConfigError(
            f"train.batch_ramp.start {ramp.start} is not below train.global_batch {batch}; lower it, or leave"
            " train.batch_ramp out"
        )
    if (batch - ramp.start) % ramp.increment:
        raise ConfigError(
            f"train.batch_ramp: no whole number of increments of {ramp.increment} leads from {ramp.start} to"
            f" train.global_batch {batch}; choose increment from {_divisors(batch - ramp.start)}"
        )
    least = sum(range(ramp.start, batch, ramp.increment)) * config.train.sequence
    if ramp.tokens < least:
        raise ConfigError(
            f"train.batch_ramp.tokens {ramp.tokens} is less than one step of every size takes; set it to {least} or"
            " more, or raise the increment"
        )
    length = config.batches.ramp_samples * config.train.sequence
    if length >= config.total_tokens:
        raise ConfigError(
            f"train.batch_ramp takes {length} tokens (in whole steps of every size, up to a whole number of global"
            f" batches), and the run has {config.total_tokens}; shorten train.batch_ramp.tokens, or choose start and"
            " increment with a larger common divisor"
        )


def _check_stability(config: Schema) -> None:
    stability, checkpoint = config.stability, config.checkpoint
    reach = (checkpoint.keep - 1) * checkpoint.every_steps
    if stability.spike is not None and reach < stability.spike_steps - 1:
        raise ConfigError(
            f"stability.spike_steps {stability.spike_steps} is more than the {checkpoint.keep} checkpoints that are"
            f" kept, {checkpoint.every_steps} steps apart, reach back: none could be from before a spike; raise"
            f" checkpoint.keep to {2 + (stability.spike_steps - 2) // checkpoint.every_steps}, or"
            " checkpoint.every_steps"
        )


def _check_checkpoint(config: Schema) -> None:
    every, kept = config.checkpoint.every_steps, config.checkpoint.keep_every_steps
    if kept is not None and kept % every:
        raise ConfigError(
            f"checkpoint.keep_every_steps {kept} is not a multiple of checkpoint.every_steps {every}, so that most"
            f" of the steps to keep have no checkpoint; set it to {max(1, round(kept / every)) * every}"
        )


def _nearest_ramp(ramp: Ramp, batch: int, unit: int) -> str:
    if unit == batch:
        return (
            "train.global_batch is the least that does; lower layout.micro_batch, use fewer ranks, or leave"
            " train.batch_ramp out"
        )
    start = _nearest(range(unit, batch, unit), ramp.start)
    increment = _nearest([n for n in _divisors(batch - start) if n % unit == 0], ramp.increment)
    return f"the nearest values that fit are start {start} and increment {increment}"


def _nearest(values: Sequence[int], wanted: int) -> int:
    return min(values, key=lambda value: abs(value - wanted))


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
