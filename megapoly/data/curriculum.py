"""From the stages of a config to weights of sources: sizes, gradual moves and caps on epochs. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from megapoly.config import Config
from megapoly.data.segments import Int64s, Source, Stage
from megapoly.errors import ConfigError
from megapoly.mixture import Group, groups_of

MOST_PIECES = 256  # of a stage whose weights move


class _Piece(NamedTuple):
    """Samples of constant weights."""

    stage: str
    samples: int
    weights: dict[str, float]
    groups: tuple[Group, ...]


@dataclass(frozen=True)
class _Cap:
    """``samples`` that a source may have in the whole run, ``used`` of them before what is planned here."""

    epochs: float
    samples: float
    used: int


def stages_of(
    config: Config, sources: Sequence[Source], at_sample: int = 0, counts: Int64s | None = None
) -> list[Stage]:
    """What the plan of a run is made of from ``at_sample`` on, where ``sources`` have had ``counts`` samples.

    Weights that move are constant inside pieces of whole global batches, each with the weights of its middle; the
    pieces have the name of their stage. Caps hold to within one sample in a block of the plan.

    Raises:
        ConfigError: a source is read more often than its cap allows, and refused or without others to take its place.
    """
    languages = {name: source.language for name, source in config.data.sources.items()}
    sizes = {source.name: source.tokens for source in sources}
    pieces: list[_Piece] = []
    before: dict[str, float] | None = None
    for stage in config.data.stages:
        groups = groups_of(stage, languages)
        weights = weights_of(groups, sizes, languages, stage.alpha)
        assert stage.tokens is not None, "megapoly.data.epochs.settle comes first"
        batches = stage.tokens // config.step_tokens
        count = min(MOST_PIECES, batches) if stage.gradual and before else 1
        for i in range(count):
            length = ((i + 1) * batches // count - i * batches // count) * config.train.global_batch
            share = (i + 0.5) / count
            there = weights if count == 1 or before is None else _between(before, weights, share)
            pieces.append(_Piece(stage.name, length, there, groups))
        before = weights
    pieces = _from(pieces, at_sample)
    caps = _caps(config, sources, counts)
    if caps:
        over = config.data.over_epochs
        pieces = _respread(pieces, caps) if over == "respread" else _refuse(pieces, caps, config.train.sequence)
    return [(piece.stage, piece.samples, piece.weights) for piece in pieces]


def weights_of(
    groups: Sequence[Group], sizes: Mapping[str, int], languages: Mapping[str, str], alpha: float
) -> dict[str, float]:
    """Weight of every source. A group is split over its languages, and a language over its sources, by size^alpha."""
    weights: dict[str, float] = {}
    for group in groups:
        if group.weights is not None:
            weights |= group.weights
            continue
        by_language: dict[str, dict[str, int]] = {}
        for name in group.sources:
            by_language.setdefault(languages[name], {})[name] = sizes[name]
        outer = _split({language: sum(inside.values()) for language, inside in by_language.items()}, alpha)
        for language, inside in by_language.items():
            for name, share in _split(inside, alpha).items():
                weights[name] = group.share * outer[language] * share
    return weights


def _split(sizes: Mapping[str, int], alpha: float) -> dict[str, float]:
    """Shares by size^alpha; nothing where there is nothing, unless all are empty."""
    powers = {name: float(size) ** alpha if size else 0.0 for name, size in sizes.items()}
    total = sum(powers.values())
    return {name: power / total if total else 1 / len(powers) for name, power in powers.items()}


def _between(first: Mapping[str, float], last: Mapping[str, float], share: float) -> dict[str, float]:
    names = sorted(first.keys() | last.keys())
    return {name: (1 - share) * first.get(name, 0.0) + share * last.get(name, 0.0) for name in names}


def _from(pieces: Sequence[_Piece], sample: int) -> list[_Piece]:
    """What is left of the pieces from ``sample`` on."""
    total = sum(piece.samples for piece in pieces)
    if sample > total:
        raise ConfigError(
            f"data.stages: end after {total} samples, but the run has trained {sample}; lengthen the stages, so that"
            " they describe the whole run from its beginning"
        )
    left = []
    for piece in pieces:
        gone = min(sample, piece.samples)
        sample -= gone
        if gone < piece.samples:
            left.append(piece._replace(samples=piece.samples - gone))
    return left


def _caps(config: Config, sources: Sequence[Source], counts: Int64s | None) -> dict[str, _Cap]:
    caps = {}
    for i, planned in enumerate(sources):
        source = config.data.sources[planned.name]
        epochs = config.data.max_epochs if source.max_epochs is None else source.max_epochs
        if epochs is not None:
            used = 0 if counts is None else int(counts[i])
            caps[planned.name] = _Cap(epochs, epochs * planned.windows(config.train.sequence), used)
    return caps


def _refuse(pieces: list[_Piece], caps: Mapping[str, _Cap], sequence: int) -> list[_Piece]:
    problems = []
    for name, cap in caps.items():
        by_stage: dict[str, float] = {}
        for piece in pieces:
            by_stage[piece.stage] = by_stage.get(piece.stage, 0.0) + piece.samples * piece.weights.get(name, 0.0)
        total = cap.used + sum(by_stage.values())
        if total > cap.samples * (1 + 1e-9):
            trained = [f"{cap.used} trained"] if cap.used else []
            parts = trained + [f"{samples:.0f} in {stage}" for stage, samples in by_stage.items() if samples]
            once = cap.samples / cap.epochs
            reached = f"{total / once:.2f} epochs" if once else "more than it has"
            problems.append(
                f"source {name!r} would be read {reached}, above its max_epochs {cap.epochs:g}: samples of {sequence}"
                f" tokens {' + '.join(parts)} = {total:.0f}, and one epoch has {once:.0f}"
            )
    if problems:
        raise ConfigError(
            "data.max_epochs: " + "\n  ".join(problems) + "\nlower the weights or the tokens of the stages, add text,"
            " raise the cap, or set data.over_epochs = 'respread' to have other sources take the place of a source"
            " that has reached its cap"
        )
    return pieces


def _respread(pieces: Sequence[_Piece], caps: Mapping[str, _Cap]) -> list[_Piece]:
    """In order: what a source may not give comes from the others of its group, in proportion to their weights."""
    left = {name: max(0.0, cap.samples - cap.used) for name, cap in caps.items()}
    result = []
    for piece in pieces:
        weights = dict(piece.weights)
        members = {name for group in piece.groups for name in group.sources}
        strangers = tuple(name for name in weights if name not in members)  # of the stage that weights move from
        for names, key in (*((group.sources, group.key) for group in piece.groups), (strangers, "the stage before")):
            most = {name: left[name] / piece.samples for name in names if name in left}
            weights |= _fill({name: weights.get(name, 0.0) for name in names}, most, f"{piece.stage}: {key}")
        for name in left:
            left[name] = max(0.0, left[name] - piece.samples * weights.get(name, 0.0))
        result.append(piece._replace(weights=weights))
    return result


def _fill(weights: Mapping[str, float], most: Mapping[str, float], where: str) -> dict[str, float]:
    """The same sum, with no weight above its ``most``; the free ones keep their proportions."""
    total = sum(weights.values())
    full: dict[str, float] = {}
    while True:
        free = {name: weight for name, weight in weights.items() if weight and name not in full}
        rest = total - sum(full.values())
        scale = rest / sum(free.values()) if free else 0.0
        over = [name for name in free if free[name] * scale > most.get(name, float("inf"))]
        if not over:
            break
        full |= {name: most[name] for name in over}
    if not free and rest > 1e-9:
        raise ConfigError(
            f"data.max_epochs: stage {where}: its sources {', '.join(sorted(full))} have a share of {total:g} of the"
            f" samples, and all together are at their caps with {total - rest:g}; lower the share or the tokens of"
            " the stage, add text, or raise the caps"
        )
    return {name: full.get(name, weight * scale) for name, weight in weights.items()}
