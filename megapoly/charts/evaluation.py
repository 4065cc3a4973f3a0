"""The picture of an evaluation: averages by task, and below every task by language, a bar for each model. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from megapoly.charts.figure import new_figure
from megapoly.evaluate.results import COVERED, Figure, chance_of, title_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Picture


def draw_evaluation(figures: Sequence[Figure]) -> Picture:
    """Grouped bars with standard errors; a dashed line is what guessing gets.

    Averages have a panel of their own where there are two or more of them.
    """
    models = list(dict.fromkeys(each.model for each in figures))
    panels: list[tuple[str, dict[str, list[Figure]]]] = []
    means: dict[str, list[Figure]] = {}
    for each in figures:
        if each.parts and each.unit == "%" and each.language != COVERED:
            name = "" if each.language == "average" else f"\n{each.language}"
            means.setdefault(f"{each.task}{name}".replace("_", "\n"), []).append(each)
    if len(means) > 1:
        panels.append(("averages", means))
    for task, metric in dict.fromkeys((each.task, each.metric) for each in figures):
        mine = [each for each in figures if (each.task, each.metric) == (task, metric)]
        groups: dict[str, list[Figure]] = {}
        for each in sorted(mine, key=lambda each: bool(each.parts)):
            groups.setdefault(each.language or "all", []).append(each)
        panels.append((f"{task}\n{title_of(metric, figures)}", groups))
    most = max(len(groups) for _, groups in panels)
    picture = new_figure(max(6.0, 2.0 + 0.2 * most * (len(models) + 1.5)), 0.6 + 2.2 * len(panels))
    all_axes: Any = picture.subplots(len(panels), 1, squeeze=False)[:, 0]
    for axes, (title, groups) in zip(all_axes, panels):
        _panel(axes, title, groups, models)
        chance = chance_of(next(iter(groups.values()))[0].task) if title != "averages" else None
        if chance is not None:
            axes.axhline(chance, color="0.3", linewidth=0.8, linestyle="--")
    picture.align_ylabels()
    handles, labels = all_axes[0].get_legend_handles_labels()
    picture.legend(handles, labels, loc="outside upper center", ncols=min(4, len(models)), frameon=False)
    return picture


def _panel(axes: Any, title: str, groups: dict[str, list[Figure]], models: Sequence[str]) -> None:
    width = 0.84 / len(models)
    for i, model in enumerate(models):
        found = [(place, each) for place, group in enumerate(groups.values()) for each in group if each.model == model]
        places = [place + (i - (len(models) - 1) / 2) * width for place, _ in found]
        errors = [each.error or 0.0 for _, each in found]
        axes.bar(
            places, [each.value for _, each in found], width, yerr=errors, label=model, color=f"C{i % 10}",
            error_kw={"elinewidth": 0.8, "ecolor": "0.2"},
        )  # fmt: skip
    axes.set_xticks(range(len(groups)), list(groups))
    axes.set_xlim(-0.6, len(groups) - 0.4)
    axes.set_ylim(0, None if any(each.value for group in groups.values() for each in group) else 1)
    first = next((place for place, group in enumerate(groups.values()) if group[0].parts), 0)
    if first > 0:
        axes.axvline(first - 0.5, color="0.7", linewidth=0.8)
    axes.set_ylabel(title)
    axes.grid(axis="y", color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
