"""How the next token is chosen from the logits of a row.

In this order, as in transformers: repetition penalty, temperature, top-k, top-p. What is drawn is a function of (seed,
number of the prompt, number of the sample, number of the token), so that a text is the same under every layout and in
every batch.

Shapes: B rows, V vocabulary, K candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megapoly import rng
from megapoly.errors import ConfigError
from megapoly_kernels import philox

_FEW = 1024  # likeliest tokens that are sorted first, when top_p asks for as many as it takes


@dataclass(frozen=True)
class Sampling:
    """What to generate for a prompt.

    Attributes:
        tokens: the most that one text gets.
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: keeps so many of the likeliest tokens, and what is as likely as the last of them; 0 keeps all.
        top_p: keeps the likeliest tokens that together reach this probability, always one.
        repetition_penalty: divides the positive logits of tokens that the row has had, prompt included, and multiplies
            the negative ones (Keskar et al., arXiv 1909.05858).
        stop: strings that end a text; what comes before the first of them is returned.
        samples: texts for one prompt.
        seed: of the draws.

    Raises:
        ConfigError: a value out of its range, or several samples under temperature 0.
    """

    tokens: int = 64
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    stop: Sequence[str] = ()
    samples: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name, fits, expected in (
            ("tokens", self.tokens >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature < float("inf"), "0 or more"),
            ("top_k", self.top_k >= 0, "0, which keeps all, or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < float("inf"), "above 0; 1 changes nothing"),
            ("samples", self.samples >= 1, "at least 1"),
            ("stop", not isinstance(self.stop, str) and all(self.stop), "a list of strings, none of them empty"),
        ):
            if not fits:
                raise ConfigError(f"sampling: {name} {getattr(self, name)!r} is out of range: it is {expected}")
        if self.temperature == 0 and self.samples > 1:
            raise ConfigError(
                f"sampling: samples {self.samples} of a prompt would be the same text, as temperature 0 takes the"
                " likeliest tokens; set samples to 1, or temperature above 0"
            )


def penalise(logits_BV: Tensor, seen_BV: Tensor, penalty: float) -> Tensor:
    """CTRL's repetition penalty: logits of tokens that a row has had lose, whatever their sign."""
    lowered_BV = torch.where(logits_BV < 0, logits_BV * penalty, logits_BV / penalty)
    return torch.where(seen_BV, lowered_BV, logits_BV)


def candidates(logits_BV: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor | None]:
    """Probabilities ``[B, K]`` of the tokens that may be drawn, float64, and their ids, None where all may.

    They need not sum to 1; those that are cut off are 0. With ids they fall from left to right.
    """
    scores_BV = logits_BV.double()
    scores_BV = (scores_BV - scores_BV.amax(-1, keepdim=True)) / sampling.temperature  # of which none is too large
    vocabulary = scores_BV.shape[-1]
    if 0 < sampling.top_k < vocabulary:
        least_B1 = scores_BV.topk(sampling.top_k).values[:, -1:]
        scores_BV = scores_BV.masked_fill(scores_BV < least_B1, -torch.inf)
    if sampling.top_p == 1:
        return scores_BV.softmax(-1), None
    total_B1 = scores_BV.logsumexp(-1, keepdim=True)
    few = min(_FEW, vocabulary)
    ordered_BK, ids_BK = scores_BV.topk(few)
    probabilities_BK = (ordered_BK - total_B1).exp()
    if few < vocabulary and bool((probabilities_BK.sum(-1) < sampling.top_p).any()):
        ordered_BK, ids_BK = scores_BV.sort(descending=True, stable=True)
        probabilities_BK = (ordered_BK - total_B1).exp()
    before_BK = probabilities_BK.cumsum(-1) - probabilities_BK
    cut_BK = before_BK >= sampling.top_p
    cut_BK[:, 0] = False
    return probabilities_BK.masked_fill_(cut_BK, 0.0), ids_BK


def choose(logits_BV: Tensor, sampling: Sampling, seen_BV: Tensor | None, uniforms_B: Tensor) -> Tensor:
    """One token id for each row, ``[B]`` int64.

    Args:
        seen_BV: which tokens a row has had; None where there is no penalty.
        uniforms_B: float64 in (0, 1), which decide: the token at which the sum of the probabilities passes that share.
    """
    if seen_BV is not None:
        logits_BV = penalise(logits_BV, seen_BV, sampling.repetition_penalty)
    if sampling.temperature == 0:
        return logits_BV.argmax(-1)
    probabilities_BK, ids_BK = candidates(logits_BV, sampling)
    sums_BK = probabilities_BK.cumsum(-1)
    wanted_B1 = uniforms_B.to(sums_BK.device).unsqueeze(1) * sums_BK[:, -1:]
    place_B1 = torch.searchsorted(sums_BK, wanted_B1, right=True).clamp_(max=sums_BK.shape[-1] - 1)
    return (place_B1 if ids_BK is None else ids_BK.gather(-1, place_B1)).squeeze(1)


def uniforms(seed: int, prompt: int, sample: int, begin: int, count: int) -> list[float]:
    """The numbers in (0, 1) that decide on tokens ``begin`` to ``begin + count`` of a text."""
    index = torch.arange(begin, begin + count) + (sample << 32)
    high, low = philox.words(index, rng.key(seed, "sampling"), prompt)[:, :2].double().t()
    return ((high * 2**20 + (low / 2**12).floor() + 0.5) * 2.0**-52).tolist()


class Draws:
    """The uniform numbers of one text, made in blocks: a few cost as much as one."""

    _BLOCK = 64

    def __init__(self, seed: int, prompt: int, sample: int) -> None:
        self._of = (seed, prompt, sample)
        self._block: list[float] = []

    def __getitem__(self, token: int) -> float:
        """That of a token, which come one after another."""
        place = token % self._BLOCK
        if place == 0 or not self._block:
            self._block = uniforms(*self._of, token - place, self._BLOCK)
        return self._block[place]
