"""The picture of a tokenizer report: compression by language beside a baseline, and what a sentence costs. No torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megapoly.charts.figure import new_figure
from megapoly.data.tokenizer_report import Report

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_report(report: Report, baseline: int) -> Figure:
    """Grouped bars by language, as in PolyLM's figure: bytes per token over the baseline's; tokens per sentence.

    Of one tokenizer alone the upper bars are its bytes per token.
    """
    names = [f"{name} ({size:,})" for name, size in zip(report.tokenizers, report.vocabularies)]
    labels = [*(row.language for row in report.rows), "mean"]
    compression = [*(row.bytes_per_token for row in report.rows), report.mean_bytes_per_token()]
    costs = [*(row.tokens_per_sentence for row in report.rows), report.mean_tokens_per_sentence()]
    alone = len(names) == 1
    figure = new_figure(max(6.0, 0.16 * len(labels) * (len(names) + 1.5)), 7.0)
    above, below = figure.subplots(2, 1)
    ratios = compression if alone else [tuple(value / row[baseline] for value in row) for row in compression]
    for axes, rows in ((above, ratios), (below, costs)):
        width = 0.84 / len(names)
        for i, name in enumerate(names):
            places = [place + (i - (len(names) - 1) / 2) * width for place in range(len(labels))]
            axes.bar(places, [row[i] for row in rows], width, label=name, color=f"C{i}")
        axes.set_xticks(range(len(labels)), labels)
        axes.set_xlim(-0.6, len(labels) - 0.4)
        axes.axvline(len(labels) - 1.5, color="0.7", linewidth=0.8)
        axes.grid(axis="y", color="0.9")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    if alone:
        above.set_ylabel("bytes per token (more is better)")
    else:
        above.axhline(1, color="0.3", linewidth=0.8)
        above.set_ylabel(f"bytes per token, relative to {report.tokenizers[baseline]}\n(more is better)")
    below.set_ylabel("tokens per sentence\n(fewer is better)")
    figure.legend(*above.get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    return figure
