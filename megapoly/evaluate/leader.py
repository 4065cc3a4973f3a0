"""One rank evaluates, and all compute: the first has tasks, data and results, the others follow its calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from megapoly import comm
from megapoly.comm import PeerLost
from megapoly.context import ParallelContext
from megapoly.errors import MegapolyError, everywhere
from megapoly.generate import Completion, Generator, Likelihood, Sampling

T = TypeVar("T")
Told = Callable[[float], object]


class Leader:
    """The generator as the first rank uses it; see its methods."""

    def __init__(self, generator: Generator) -> None:
        self.generator = generator

    def score(self, rows: Sequence[tuple[Sequence[int], int]], told: Told = lambda share: None) -> list[Likelihood]:
        self._call("score", rows)
        return self.generator.score(rows, told)

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, told: Told = lambda share: None
    ) -> list[Completion]:
        self._call("generate", prompts, sampling)
        return self.generator.generate(prompts, sampling, told=told)

    def _call(self, *call: Any) -> None:
        comm.broadcast_object(call, self.generator.context.control)


def lead(context: ParallelContext, generator: Generator, work: Callable[[Leader], T]) -> T | None:
    """``work`` on the first rank, and its result there; the others compute with it until it ends, and give None.

    Raises:
        MegapolyError: that of ``work``, on every rank.
    """
    if context.rank:
        _follow(context, generator)
        return None
    try:
        result = work(Leader(generator))
    except MegapolyError as error:
        if not error.everywhere and not isinstance(error, PeerLost):
            comm.broadcast_object(("raise", error), context.control)
            raise everywhere(error) from error.__cause__
        raise
    comm.broadcast_object(("end",), context.control)
    return result


def _follow(context: ParallelContext, generator: Generator) -> None:
    while True:
        name, *arguments = comm.broadcast_object(None, context.control)
        if name == "end":
            return
        if name == "raise":
            raise everywhere(arguments[0])
        getattr(generator, name)(*arguments)
