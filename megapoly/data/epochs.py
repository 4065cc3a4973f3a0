"""Stages that are given in epochs, as stages of so many tokens: what the opened data makes of a config. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction

from megapoly.config import Config
from megapoly.config_checks import check
from megapoly.config_schema import Stage
from megapoly.data.curriculum import weights_of
from megapoly.data.plan import Dataset
from megapoly.data.segments import Source
from megapoly.errors import ConfigError, DataError
from megapoly.mixture import groups_of


def settle(config: Config, datasets: Mapping[str, Dataset]) -> tuple[Config, list[str]]:
    """``config`` with the tokens of every stage, and lines for people about those that were given in epochs.

    An epoch of a stage is all training windows of the sources that have a share of it. Up to the next whole global
    batch, so that every window comes as often as it was asked for. Without a mixture a source's share is that of its
    windows.

    Args:
        datasets: by source name.

    Raises:
        ConfigError: a length that other keys do not fit.
        DataError: sources without a whole window.
    """
    if config.settled:
        return config, []
    windows = {
        name: Source(name, "", "", datasets[name].train_tokens, datasets[name].pack).windows(config.train.sequence)
        for name in config.data.sources
    }
    stages, lines = [], []
    for stage in config.data.stages:
        settled = stage
        if stage.epochs is not None:
            settled, used = _settled(config, stage, windows)
            epochs = f"{stage.epochs:g} epoch{'' if stage.epochs == 1 else 's'}"
            lines.append(
                f"stage {stage.name!r}: {epochs} of {used:,} windows are {settled.tokens:,} tokens,"
                f" {(settled.tokens or 0) // config.step_tokens:,} global batches"
            )
        stages.append(settled)
    config = config.model_copy(update={"data": config.data.model_copy(update={"stages": stages})})
    try:
        check(config)
    except ConfigError as error:
        raise ConfigError(f"{'; '.join(lines)}; {error}") from None
    return config, lines


def _settled(config: Config, stage: Stage, windows: Mapping[str, int]) -> tuple[Stage, int]:
    """A stage with tokens in place of epochs, and the windows of one."""
    assert stage.epochs is not None
    languages = {name: source.language for name, source in config.data.sources.items()}
    groups = groups_of(stage, languages)
    whole = not (stage.weights or stage.languages or stage.non_english is not None)
    weights = weights_of(groups, windows, languages, 1.0 if whole else stage.alpha)
    used = sum(count for name, count in windows.items() if weights.get(name))
    if not used:
        raise DataError(
            f"stage {stage.name!r}: its sources have no whole window of {config.train.sequence} tokens; add text, or"
            " shorten train.sequence"
        )
    samples = math.ceil(Fraction(str(stage.epochs)) * used)
    batches = -(-samples // config.train.global_batch)
    update = {"epochs": None, "tokens": batches * config.step_tokens, **({"weights": weights} if whole else {})}
    return stage.model_copy(update=update), used
