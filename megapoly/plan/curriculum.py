"""What a data plan will have trained: tokens, shares and epochs by source, language and stage. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from megapoly.data.plan import Plan
from megapoly.data.segments import counts_in
from megapoly.mixture import non_english_part

_STEP = 1024  # samples of a step of the picture, at most
_STEPS = 100  # of a picture, about, where the steps would be fewer


@dataclass(frozen=True)
class Use:
    """Of a source or a language.

    Attributes:
        tokens: of its training part.
        trained: of them in every stage, with repetitions.
        epochs: passes over their windows in every stage.
    """

    name: str
    language: str
    tokens: int
    trained: tuple[int, ...]
    epochs: tuple[float, ...]

    @property
    def total(self) -> int:
        return sum(self.trained)


@dataclass(frozen=True)
class Outlook:
    """A plan, added up. A stage that an edit brought back comes twice."""

    stages: tuple[str, ...]
    sources: tuple[Use, ...]
    languages: tuple[Use, ...]

    @property
    def totals(self) -> tuple[int, ...]:
        """Tokens of every stage."""
        return tuple(map(sum, zip(*(use.trained for use in self.sources), strict=True)))

    def non_english(self) -> tuple[float, ...]:
        """Share of every stage, and of all of them, that is not English; pairs with English count half."""
        parts = [non_english_part(use.language) for use in self.sources]
        columns = [*zip(*(use.trained for use in self.sources), strict=True), [use.total for use in self.sources]]
        return tuple(sum(p * t for p, t in zip(parts, column, strict=True)) / sum(column) for column in columns)


def outlook(plan: Plan) -> Outlook:
    """Add up a plan, exactly: from the counts of its samples."""
    stages = plan.stages()
    counts = [[0] * len(plan.sources) for _ in stages]
    stage = 0
    for segment in plan.segments:
        stage += segment.first_sample >= stages[stage][2]
        inside = counts_in(plan.seed, segment, segment.samples).tolist()
        for i, (end, start) in enumerate(zip(inside, segment.starts, strict=True)):
            counts[stage][i] += end - start
    windows = plan.windows.tolist()
    sources = [
        Use(
            source.name,
            source.language,
            source.tokens,
            tuple(row[i] * plan.sequence for row in counts),
            tuple(row[i] / windows[i] if row[i] else 0.0 for row in counts),
        )
        for i, source in enumerate(plan.sources)
    ]
    by_language: dict[str, list[int]] = {}
    for i, use in enumerate(sources):
        by_language.setdefault(use.language, []).append(i)
    joined = [
        _join(language, [sources[i] for i in places], sum(windows[i] for i in places) * plan.sequence)
        for language, places in by_language.items()
    ]
    largest = sorted(joined, key=lambda use: (-use.total, use.name))
    return Outlook(tuple(name for name, _, _ in stages), tuple(sources), tuple(largest))


def _join(language: str, uses: Sequence[Use], epoch: int) -> Use:
    """All sources of a language; ``epoch`` is the tokens of one pass over their windows."""
    trained = tuple(map(sum, zip(*(use.trained for use in uses), strict=True)))
    passes = tuple(each / epoch if each else 0.0 for each in trained)
    return Use(language, language, sum(use.tokens for use in uses), trained, passes)


def shares_over_time(plan: Plan) -> tuple[list[int], dict[str, list[float]]]:
    """Steps for a picture: the tokens where each begins, the end at last, and the share of every language in each.

    A step is a segment, or several short ones in a row, whose whole numbers alone would not show a share.
    """
    begins: list[int] = []
    length = 0
    step = min(_STEP, -(-plan.total_samples // _STEPS))
    rows: dict[str, list[float]] = {source.language: [] for source in plan.sources}
    for i, segment in enumerate(plan.segments):
        if not i or length >= step or segment.stage != plan.segments[i - 1].stage:
            begins.append(segment.first_sample * plan.sequence)
            length = 0
            for row in rows.values():
                row.append(0.0)
        length += segment.samples
        for source, quota in zip(plan.sources, segment.quotas, strict=True):
            rows[source.language][-1] += segment.samples * quota / segment.block
    edges = [*begins, plan.total_samples * plan.sequence]
    sizes = [(end - begin) / plan.sequence for begin, end in pairwise(edges)]
    return edges, {name: [n / size for n, size in zip(row, sizes, strict=True)] for name, row in rows.items()}


def cells(found: Outlook, by: str, caps: Mapping[str, float | None]) -> tuple[list[str], list[list[str]]]:
    """Heads and rows of a table by ``source`` or by ``language``."""
    totals, share = [*found.totals, sum(found.totals)], by == "language"
    heads = [by, *([] if share else ["language"]), "training tokens"]
    for stage in (*found.stages, "in all"):
        heads += [f"{stage}\ntokens", "share" if share else "epochs"]
    heads += ["epochs"] if share else (["at most"] if any(caps.values()) else [])
    rows = []
    for use in found.languages if share else found.sources:
        row = [use.name, *([] if share else [use.language]), short(use.tokens)]
        for tokens, epochs, total in zip(
            (*use.trained, use.total), (*use.epochs, sum(use.epochs)), totals, strict=True
        ):
            row += [short(tokens), f"{tokens / total:.2%}" if share else _epochs(epochs)]
        if share:
            row.append(_epochs(sum(use.epochs)))
        elif any(caps.values()):
            cap = caps.get(use.name)
            row.append("" if cap is None else f"{cap:g}")
        rows.append(row)
    last = ["all", *([] if share else [""]), short(sum(use.tokens for use in found.sources))]
    for total in totals:
        last += [short(total), ""]
    rows.append(last + [""] * (len(heads) - len(last)))
    if share:
        row = ["not English", ""]
        for part in found.non_english():
            row += ["", f"{part:.2%}"]
        rows.append([*row, ""])
    return heads, rows


def rows(found: Outlook) -> list[dict[str, Any]]:
    """A row for every source and stage, for JSON."""
    totals = found.totals
    return [
        {
            "stage": stage,
            "source": use.name,
            "language": use.language,
            "training_tokens": use.tokens,
            "tokens": use.trained[i],
            "share": use.trained[i] / totals[i],
            "epochs": use.epochs[i],
            "epochs_so_far": sum(use.epochs[: i + 1]),
        }
        for i, stage in enumerate(found.stages)
        for use in found.sources
    ]


def _epochs(epochs: float) -> str:
    return f"{epochs:.2f}" if epochs >= 0.1 or not epochs else f"{epochs:.2g}"


def short(tokens: int) -> str:
    """Four digits and a unit, such as ``97.00 B``; small counts in full."""
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if tokens >= unit:
            digits = max(0, 3 - len(str(int(tokens / unit))))
            return f"{tokens / unit:.{digits + 1 if digits else 1}f} {name}"
    return f"{tokens:,}"
