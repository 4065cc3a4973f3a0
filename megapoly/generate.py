"""Sampled continuations from a checkpoint of any layout, in one process.

Every new token is one forward pass over the whole text so far, at most the model's positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megapoly.checkpoint import state, store
from megapoly.data.tokenizer import Tokenizer
from megapoly.engine import DTYPES
from megapoly.errors import ConfigError
from megapoly.layers.call import Call, Place
from megapoly.models.decoder import DecoderStage


@dataclass(frozen=True)
class Sampling:
    """``temperature`` 0 is greedy; ``top_p`` keeps the likeliest tokens that together reach this probability."""

    tokens: int = 64
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value, fits in (
            ("tokens", self.tokens, self.tokens >= 1),
            ("temperature", self.temperature, self.temperature >= 0),
            ("top_p", self.top_p, 0 < self.top_p <= 1),
        ):
            if not fits:
                raise ConfigError(
                    f"sampling: {name} {value} is out of range: tokens >= 1, temperature >= 0, 0 < top_p <= 1"
                )


class Generator:
    """A model and its tokenizer from a run folder or a checkpoint.

    Args:
        path: a run folder (its newest whole checkpoint is taken) or a checkpoint folder.
        tokenizer: model file; the one of the run's config where not given.

    Raises:
        CheckpointError, DataError: what cannot be loaded.
    """

    def __init__(self, path: Path, tokenizer: Path | None = None) -> None:
        reader = store.Reader(state.find(path))
        config = state.saved_config(reader)
        self.step = reader.step
        self.tokenizer = Tokenizer.load(tokenizer or config.data.tokenizer)
        state.check_tokenizer(reader, self.tokenizer)
        self.model = DecoderStage(config.model, place=Place(dtype=DTYPES[config.train.precision]))
        state.load_weights(reader, self.model)
        self.positions = config.model.positions

    def continue_text(self, prompt: str, sampling: Sampling) -> str:
        """The text that follows ``prompt``, up to ``</s>`` or ``sampling.tokens`` tokens."""
        # An empty prompt begins a document, as after the </s> of the one before.
        ids = self.tokenizer.encode(prompt) or [self.tokenizer.eod]
        begin = len(ids)
        random = torch.Generator().manual_seed(sampling.seed)
        for _ in range(sampling.tokens):
            token = choose(self._next_logits(ids), sampling, random)
            if token == self.tokenizer.eod:
                break
            ids.append(token)
        return self.tokenizer.decode(ids[begin:])

    @torch.no_grad()
    def _next_logits(self, ids: list[int]) -> Tensor:
        window = torch.tensor(ids[-self.positions :]).unsqueeze(1)
        positions = torch.arange(len(window)).unsqueeze(1)
        logits_SBV = self.model(None, Call(positions, tokens_SB=window))
        return logits_SBV[-1, 0, : self.tokenizer.vocabulary]


def choose(logits: Tensor, sampling: Sampling, random: torch.Generator) -> int:
    """One token id from ``logits`` [vocabulary]."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    probabilities = torch.softmax(logits.double() / sampling.temperature, 0)
    ordered, ids = probabilities.sort(descending=True, stable=True)
    # The first token is kept always: the sum before it is zero.
    ordered[(ordered.cumsum(0) - ordered) >= sampling.top_p] = 0
    return int(ids[torch.multinomial(ordered, 1, generator=random)])
