"""Texts from a checkpoint of any format, under any layout: the Python interface of ``megapoly generate``.

    generator = Generator.open("runs/demo")
    for each in generator.generate(["Die Sprache", "Hello"], Sampling(tokens=40, temperature=0.8)):
        print(each.prompt, each.text, each.finish_reason)

With several ranks every rank calls the same methods with the same arguments, and gets the same results.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias, TypeVar

import torch

from megapoly import comm
from megapoly.checkpoint.weights import Weights, open_weights, template_of
from megapoly.context import ParallelContext
from megapoly.data.templates import Template
from megapoly.errors import ConfigError, MegapolyError, everywhere
from megapoly.generate.replica import Replica
from megapoly.generate.rows import Row, grow
from megapoly.generate.sampling import Sampling
from megapoly.generate.trees import PrefixTree, plant
from megapoly.generate.vocabulary import Vocabulary

T = TypeVar("T")
R = TypeVar("R")
Prompt: TypeAlias = "str | Sequence[int]"
Told: TypeAlias = "Callable[[float], object]"
BATCH = 16
_SCORED = 2048  # tokens of a pass that scores


@dataclass(frozen=True)
class Completion:
    """One text after a prompt.

    Attributes:
        index: number of the prompt.
        sample: number of the text among those of its prompt.
        prompt: the prompt as text.
        text: what follows it, without the stop string that ended it.
        tokens: all ids that were drawn, those of a stop string and the end token included.
        log_probabilities: of each of them, in nats, as the model gives them: before penalty, temperature and cuts.
        finish_reason: ``eod``, the model ended the text; ``stop``, a stop string came; ``length``, the text has
            ``Sampling.tokens`` tokens, or prompt and text have the model's positions.
    """

    index: int
    sample: int
    prompt: str
    text: str
    tokens: list[int]
    log_probabilities: list[float]
    finish_reason: Literal["eod", "stop", "length"]


@dataclass(frozen=True)
class Likelihood:
    """Of a continuation.

    Attributes:
        log_probability: sum over its tokens, in nats.
        greedy: whether each of them was the likeliest.
        tokens: how many they are.
    """

    log_probability: float
    greedy: bool
    tokens: int


class Generator:
    """A model and its tokenizer, ready to continue texts. :meth:`open` makes one.

    Attributes:
        positions: the most tokens of a prompt and its text together.
        notes: sentences for the user about what was assumed when it was opened.
        template: how the model is asked, where megapoly has trained it on instructions.
    """

    def __init__(self, replica: Replica, vocabulary: Vocabulary, batch: int = BATCH) -> None:
        if batch < 1:
            raise ConfigError(f"batch {batch} is out of range: it is at least 1 text at a time")
        self.replica, self.vocabulary, self.batch = replica, vocabulary, batch
        self.context, self.positions = replica.context, replica.model.positions
        self.notes: list[str] = []
        self.template: Template | None = None

    @classmethod
    def open(
        cls,
        path: str | Path,
        tokenizer: str | Path | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        context: ParallelContext | None = None,
        batch: int = BATCH,
    ) -> Generator:
        """Load a run folder (its newest whole checkpoint), a checkpoint, or a folder of Hugging Face or Megatron.

        Args:
            tokenizer: SentencePiece model or ``tokenizer.json``; what the weights come with where not given.
            dtype: of the weights here; that of most of the stored ones where not given.
            device: for one process; several have that of their ``context``.
            batch: texts that are generated at a time, by each replica of the model.

        Raises:
            CheckpointError, ConfigError, DataError: what cannot be loaded, or does not fit the layout.
        """
        weights = open_weights(Path(path))
        vocabulary = Vocabulary(weights, None if tokenizer is None else Path(tokenizer))
        context = context or ParallelContext.create(device=device)
        replica = Replica(weights, context, dtype or stored_dtype(weights))
        generator = cls(replica, vocabulary, batch)
        generator.notes = [*weights.notes, *vocabulary.notes]
        generator.template = template_of(weights)
        return generator

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, first: int = 0, told: Told = lambda share: None
    ) -> list[Completion]:
        """``sampling.samples`` texts for each prompt, in the order of the prompts.

        A text depends on its prompt, on the number of it and on ``sampling`` alone: not on the layout, nor on what else
        is in the batch, up to the rounding of the dtype.

        Args:
            prompts: texts, or their ids. An empty one begins a document.
            first: number of the first of them.
            told: of the share of this replica's texts that are done.

        Raises:
            ConfigError: a prompt that leaves no position for a token.
        """
        ids = [self._prompt_ids(number, prompt) for number, prompt in enumerate(prompts, first)]
        works = [(number, sample) for number in range(len(ids)) for sample in range(sampling.samples)]

        def work(mine: list[tuple[int, int]]) -> list[Completion]:
            rows = [self._row(ids[number], sampling, number + first, sample) for number, sample in mine]
            for _ in grow(self.replica, rows, sampling, self.vocabulary.size):
                pass
            return [_completion(row, self._text(prompts[number])) for row, (number, _) in zip(rows, mine)]

        return self._share_out(works, lambda each: len(ids[each[0]]), work, told=told)

    def stream(self, prompt: Prompt, sampling: Sampling) -> Iterator[str]:
        """The text after one prompt in parts, as they come: whole characters, and nothing of a stop string.

        Joined they are the text of :meth:`generate`. With several ranks all of them have to take all parts.

        Raises:
            ConfigError: a prompt that leaves no position for a token, or more than one sample.
        """
        if sampling.samples != 1:
            raise ConfigError(f"stream: samples {sampling.samples} cannot be streamed; ask for 1, or use generate")
        ids = self._prompt_ids(0, prompt)
        return self._parts(self._row(ids, sampling), sampling)

    def _parts(self, row: Row, sampling: Sampling) -> Iterator[str]:
        for added in grow(self.replica, [row], sampling, self.vocabulary.size):
            if added[0]:
                yield added[0]

    def log_likelihood(self, contexts: Sequence[Prompt], continuations: Sequence[Prompt]) -> list[Likelihood]:
        """How likely each continuation is after its context.

        Texts are encoded together, as a running text, where a token ends between them, else apart; spaces at the end of
        a context count to its continuation. What is longer than the model's positions loses its beginning. An empty
        context is the beginning of a document.

        Raises:
            ConfigError: another number of continuations, or one that is empty or longer than the model's positions.
        """
        if len(contexts) != len(continuations):
            raise ConfigError(f"log_likelihood: {len(contexts)} contexts, but {len(continuations)} continuations")
        return self.score([self._pair(number, *pair) for number, pair in enumerate(zip(contexts, continuations))])

    @torch.inference_mode()
    def score(self, rows: Sequence[tuple[Sequence[int], int]], told: Told = lambda share: None) -> list[Likelihood]:
        """How likely the last tokens of each row are after those before them; what rows share is computed once.

        Args:
            rows: ids, and how many of the last ones are scored. Each has at least one more, and at most one more than
                the model's positions.
            told: of the share of this replica's work that is done.
        """
        trees = plant([row for row, _ in rows], [count for _, count in rows])

        def work(mine: list[PrefixTree]) -> list[list[tuple[int, Likelihood]]]:
            values, hits = self.replica.score(mine).tolist()
            result, begin = [], 0
            for tree in mine:
                found = []
                for number, labels in tree.rows:
                    own = [begin + i for i in labels]
                    likely = Likelihood(sum(values[i] for i in own), all(hits[i] for i in own), len(own))
                    found.append((number, likely))
                result.append(found)
                begin += len(tree.labels)
            return result

        chains = [tree for tree in trees if tree.is_chain]  # apart: a pass over them alone has no mask
        others = [tree for tree in trees if not tree.is_chain]
        found: dict[int, Likelihood] = {}
        for part, done in ((others, 0.0), (chains, len(others) / max(1, len(trees)))):
            weight = len(part) / max(1, len(trees))
            for each in self._share_out(part, len, work, _SCORED, lambda share: told(done + weight * share)):  # noqa: B023
                found.update(each)
        return [found[i] for i in range(len(rows))]

    def _row(self, ids: list[int], sampling: Sampling, index: int = 0, sample: int = 0) -> Row:
        vocabulary = self.vocabulary
        return Row(ids, vocabulary, vocabulary.ends, sampling, limit=self.positions, index=index, sample=sample)

    def _pair(self, number: int, context: Prompt, continuation: Prompt) -> tuple[list[int], int]:
        """All ids of a pair, and how many of them are of the continuation."""
        if isinstance(context, str) and isinstance(continuation, str):
            kept = context.rstrip()
            before, whole = self._ids(number, kept), self._ids(number, context + continuation)
            after = whole[len(before) :]
            if whole[: len(before)] != before:
                after = self.vocabulary.encode(context[len(kept) :] + continuation, begins=False)
        else:
            before = self._ids(number, context)
            after = (
                self.vocabulary.encode(continuation, begins=False)
                if isinstance(continuation, str)
                else list(continuation)
            )
            self._check_ids(number, after)
        if not 0 < len(after) <= self.positions:
            raise ConfigError(
                f"log_likelihood: continuation {number} has {len(after)} tokens; expected 1 to {self.positions}, the"
                " positions of the model"
            )
        return [*before, *after][-self.positions - 1 :], len(after)

    def _ids(self, number: int, prompt: Prompt) -> list[int]:
        ids = self.vocabulary.encode(prompt) if isinstance(prompt, str) else list(prompt)
        self._check_ids(number, ids)
        return ids or self.vocabulary.beginning

    def _prompt_ids(self, number: int, prompt: Prompt) -> list[int]:
        """Those of a prompt that leaves a position for a token. All ranks have the same, and so the same errors."""
        try:
            ids = self._ids(number, prompt)
        except MegapolyError as error:
            raise everywhere(error) from None
        if len(ids) >= self.positions:
            raise everywhere(
                ConfigError(
                    f"prompt {number}: has {len(ids)} tokens, and the model {self.positions} positions for a prompt and"
                    f" its text together; shorten it to {self.positions - 1} tokens or less"
                )
            )
        return ids

    def _check_ids(self, number: int, ids: Sequence[int]) -> None:
        most = self.replica.model.vocabulary
        wrong = next((i for i in ids if not 0 <= i < most), None)
        if wrong is not None:
            raise ConfigError(
                f"prompt {number}: token {wrong} is outside the model's vocabulary of {most} ids; give the tokenizer of"
                f" the model (here {self.vocabulary.path})"
            )

    def _text(self, prompt: Prompt) -> str:
        return prompt if isinstance(prompt, str) else self.vocabulary.decode(prompt)

    def _share_out(
        self,
        works: Sequence[T],
        size: Callable[[T], int],
        work: Callable[[list[T]], list[R]],
        tokens: int | None = None,
        told: Told = lambda share: None,
    ) -> list[R]:
        """Results of ``work`` on all of ``works``, in their order. Batches are of neighbours in size.

        A batch has at most ``tokens``, filled up to its longest; without a number it is :attr:`batch` works. Replicas
        of the model take turns in the order of size, so that each has its share of the long ones.
        """
        dp = self.context.dp
        order = sorted(range(len(works)), key=lambda i: -size(works[i]))[dp.rank :: dp.size]
        mine: dict[int, R] = {}
        while len(mine) < len(order):
            longest = size(works[order[len(mine)]])
            count = self.batch if tokens is None else max(1, tokens // longest)
            part = order[len(mine) : len(mine) + count]
            mine.update(zip(part, work([works[i] for i in part])))
            told(len(mine) / len(order))
        found = comm.gather_objects(mine if self.context.model.rank == 0 else {}, self.context.control)
        merged = {i: result for each in found or [] for i, result in each.items()}
        return comm.broadcast_object([merged.get(i) for i in range(len(works))], self.context.control)


def _completion(row: Row, prompt: str) -> Completion:
    assert row.finish_reason
    return Completion(
        row.index, row.sample, prompt, row.text, row.tokens, row.log_probabilities, row.finish_reason
    )  # fmt: skip


def stored_dtype(weights: Weights) -> torch.dtype:
    """That of most elements."""
    counts: Counter[torch.dtype] = Counter()
    for shape, dtype in weights.tensors.values():
        counts[dtype] += math.prod(shape)
    return counts.most_common(1)[0][0]
