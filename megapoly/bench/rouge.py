"""The ROUGE-L filter of self-instruct: candidates into a growing pool, beside rouge-score. No torch.

The peer is what Self-Instruct and Alpaca do: rouge-score's F for one pair after another, here of words that are cut
already. It would take hours for a full pool, so it is given some thousands of random pairs in every turn, and rates are
compared.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megapoly.bench import report
from megapoly.data.inputs import expand
from megapoly.data.readers import open_reader
from megapoly.data.records import BadRecord
from megapoly.errors import ConfigError
from megapoly.instruct.rouge import Pool
from megapoly.instruct.words import load_words

HEADS = ("rouge", "tasks", "kept", "words", "cut, s", "sift, s", "Mpairs/s", "peer", "ratio")
_BLOCK = 17  # tasks of an answer
_PEER_PAIRS = 3000  # of a turn


@dataclass(frozen=True)
class Options:
    """``tasks`` is how many candidates a full pool has; fewer real ones are repeated with other words."""

    files: dict[str, list[Path]]
    tasks: int = 15_000
    repeats: int = 3


def measure(options: Options, progress: Callable[[str], object]) -> list[dict[str, Any]]:
    """A row for each language.

    Raises:
        ConfigError: rouge-score is not installed.
        DataError: a file holds no instructions.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ConfigError("the peer is not installed: pip install rouge-score") from error
    rows = []
    for language, files in options.files.items():
        texts = _instructions(files)
        words = load_words(language)
        begin = time.perf_counter()
        own = [words(text) for text in texts]
        cutting = (time.perf_counter() - begin) * options.tasks / len(texts)
        block = _full(own, options.tasks)
        turns = []
        for turn in range(options.repeats):
            progress(f"{language}: turn {turn + 1} of {options.repeats}")
            turns.append((*_sift(block), _peer(RougeScorer, own, turn)))
        rows.append(_row(language, block, cutting, turns))
    return rows


def _sift(candidates: Sequence[list[str]]) -> tuple[float, int, int]:
    """Seconds, pairs that a brute force would compare, and what is kept."""
    pool, pairs = Pool(0.7), 0
    begin = time.perf_counter()
    for at in range(0, len(candidates), _BLOCK):
        block = candidates[at : at + _BLOCK]
        pairs += len(pool) * len(block)
        pool.sift(block, [True] * len(block))
    return time.perf_counter() - begin, pairs, len(pool)


def _peer(scorer_class: Any, texts: Sequence[list[str]], turn: int) -> float:
    """Pairs of rouge-score in a second."""

    class Cut:
        @staticmethod
        def tokenize(text: str) -> list[str]:
            return text.split("\n")

    joined = ["\n".join(words) for words in texts]
    pick = random.Random(turn)
    pairs = [(pick.choice(joined), pick.choice(joined)) for _ in range(_PEER_PAIRS)]
    scorer = scorer_class(["rougeL"], tokenizer=Cut)
    begin = time.perf_counter()
    for one, other in pairs:
        scorer.score(one, other)
    return len(pairs) / (time.perf_counter() - begin)


def _full(own: Sequence[list[str]], wanted: int) -> list[list[str]]:
    """So many candidates: the real ones in random order, then again with a third of their words from others."""
    pick = random.Random(0)
    found = list(own)
    vocabulary = [word for words in own for word in words]
    while len(found) < wanted:
        words = list(own[len(found) % len(own)])
        for i in range(len(words)):
            if pick.random() < 1 / 3:
                words[i] = pick.choice(vocabulary)
        found.append(words)
    pick.shuffle(found)
    return found[:wanted]


def _row(
    language: str, block: Sequence[list[str]], cutting: float, turns: Sequence[tuple[float, int, int, float]]
) -> dict[str, Any]:
    rates = [pairs / seconds for seconds, pairs, _, _ in turns]
    ratios = [rate / peer for rate, (*_, peer) in zip(rates, turns)]
    return {
        "name": language,
        "number": len(block),
        "kept": turns[0][2],
        "words": statistics.mean(map(len, block)),
        "cutting_seconds": cutting,
        "seconds": statistics.median(seconds for seconds, *_ in turns),
        "pairs": turns[0][1],
        "value": statistics.median(rates),
        "unit": "pairs/s",
        "spread": [min(rates), max(rates)],
        "peer": "rouge-score",
        "peer_value": statistics.median(peer for *_, peer in turns),
        "ratio": statistics.median(ratios),
        "ratio_spread": [min(ratios), max(ratios)],
    }


def _instructions(files: Sequence[Path]) -> list[str]:
    texts = []
    for file in expand(files):
        for record in open_reader(file):
            if isinstance(record, BadRecord):
                raise record
            texts.append(record.text("instruction"))
    return texts


def settings(options: Options) -> dict[str, Any]:
    """Plain values for the report."""
    return {"tasks": options.tasks, "repeats": options.repeats, "threshold": 0.7, "block": _BLOCK}


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """A row of the table; see :data:`HEADS`."""
    return (
        row["name"],
        f"{row['number']:,}",
        f"{row['kept']:,}",
        f"{row['words']:.1f}",
        f"{row['cutting_seconds']:.1f}",
        f"{row['seconds']:.1f}",
        f"{row['value'] / 1e6:,.1f}",
        f"{row['peer_value'] / 1e6:.4f}",
        f"{row['ratio']:,.0f}",
    )


def notes(document: dict[str, Any]) -> list[str]:
    """Lines below the table: on what it ran, and what the columns mean."""
    pairs = ", ".join(f"{row['name']} {row['pairs'] / 1e6:,.1f} M" for row in document["rows"])
    return [
        report.origin(document),
        ", ".join(f"{key} {value}" for key, value in document["settings"].items()),
        "cut: all instructions into words; sift: into the pool, by one thread; pairs that a brute force would compare:"
        f" {pairs}; the peer is rouge-score",
    ]


def markdown(document: dict[str, Any]) -> str:
    """A page with the table, for a repository."""
    table = report.markdown_table(HEADS, [cells(row) for row in document["rows"]])
    return "\n".join(["# megapoly bench rouge", "", *(f"- {line}" for line in notes(document)), "", *table]) + "\n"
