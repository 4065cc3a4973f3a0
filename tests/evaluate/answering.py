"""What the ranks of a test run. The harness, whose import takes seconds, is loaded by the first rank alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megapoly.context import ParallelContext
from megapoly.evaluate.leader import Leader, lead
from megapoly.generate import Generator
from megapoly.mesh import Mesh

Answers = dict[str, list[Any]]


def answers(samples: Mapping[str, list[dict[str, Any]]]) -> Answers:
    """Of every task, what the model said to every request."""
    return {name: [each for sample in mine for each in sample["resps"]] for name, mine in samples.items()}


def own_answers(rank: int, size: int, folder: Path, layout: tuple[int, int, int], asked: dict[str, Any]) -> Any:
    """Of the first rank: what the model said, and its figures; nothing of the others."""
    dp, pp, tp = layout
    context = ParallelContext.create(Mesh(dp=dp, pp=pp, tp=tp)) if size > 1 else ParallelContext.create()
    found = lead(context, Generator.open(folder, context=context, batch=3), lambda leader: _evaluate(leader, asked))
    context.close()
    return found


def _evaluate(leader: Leader, asked: dict[str, Any]) -> Any:
    from megapoly.evaluate import run

    options = run.Options(**asked)
    figures, samples = run.evaluate(leader, "own", run.prepare(options), options, lambda *_: None)
    by_task: dict[str, list[dict[str, Any]]] = {}
    for sample in samples:
        by_task.setdefault(sample["task"], []).append(sample)
    return answers(by_task), figures
