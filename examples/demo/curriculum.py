"""The demo's two-stage curriculum: weights of the sources, the run's config, and how often each source is read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rich.table import Table

from megapoly.config import Config

PAIRS = "pairs"  # the bilingual source; half of its text is English

# Of each stage: the share of non-English text in all, and of bilingual documents, whose other half is English.
STAGES = ({"non_english": 0.30, "pairs": 0.05}, {"non_english": 0.60, "pairs": 0.20})
ALPHA = 0.3  # of the languages' shares: sizes to this power, as XLM-R's (arXiv 1911.02116)
_UNIT = 1_000_000  # weights are written in six digits, and sum to 1 in them


def weights(sizes: Mapping[str, int], *, non_english: float, pairs: float) -> dict[str, float]:
    """A stage's weights by source, from the sizes of the sources (any unit), which include ``en`` and ``pairs``.

    >>> weights({"en": 9, "th": 1, "ko": 1, "pairs": 5}, non_english=0.3, pairs=0.2)
    {'en': 0.6, 'th': 0.1, 'ko': 0.1, 'pairs': 0.2}
    """
    others = {name: size**ALPHA for name, size in sizes.items() if name not in ("en", PAIRS)}
    mono = non_english - pairs / 2
    units = {name: round(_UNIT * mono * share / sum(others.values())) for name, share in others.items()}
    units[PAIRS] = round(_UNIT * pairs)
    units["en"] = _UNIT - sum(units.values())
    return {name: units[name] / _UNIT for name in sizes}


def write_config(template: Path, output: Path, vocabulary: int, sizes: Mapping[str, int]) -> None:
    """Fill in the template's sources (datasets in ``data/`` beside ``output``) and the weights of its stages."""
    text = template.read_text(encoding="utf-8").replace("@VOCABULARY@", str(vocabulary))
    sources = "\n".join(f'{name} = {{ path = "data/{name}", language = "{name}" }}' for name in sizes)
    text = text.replace("@SOURCES@", sources)
    for i, stage in enumerate(STAGES, start=1):
        table = weights(sizes, **stage)
        text = text.replace(f"@STAGE_{i}@", "\n".join(f"{name} = {table[name]:.6f}" for name in sizes))
    output.write_text(text, encoding="utf-8")


def epochs_table(config: Config, sizes: Mapping[str, int]) -> Table:
    """How often the run will read each source, of ``sizes`` training tokens."""
    stages = config.data.stages
    table = Table(title=f"The run to come: {config.total_tokens:,} tokens", title_justify="left")
    for column in ("", "tokens", *(f"{stage.name}" for stage in stages), "trained tokens", "epochs"):
        table.add_column(column, justify="right" if column else "left")
    for name, size in sizes.items():
        trained = sum(stage.tokens * stage.weights[name] for stage in stages)
        shares = [f"{stage.weights[name]:.1%}" for stage in stages]
        table.add_row(name, f"{size:,}", *shares, f"{trained:,.0f}", f"{trained / size:.2f}")
    return table
