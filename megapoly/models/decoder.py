"""The decoder, as a range of layers: one pipeline stage holds one :class:`DecoderStage`.

PolyLM / GPT-2: learned positions, pre-LayerNorm and a final norm, tanh GELU, biases, tied embeddings. Initialisation is
the release's: normal with ``init_std``, the outputs into the residual stream with ``init_std / sqrt(2 layers)``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megapoly import rng
from megapoly.config import Layout, Model
from megapoly.layers.attention import Attention, document_mask
from megapoly.layers.call import Call, Place, accumulation_dtype, spec_of
from megapoly.layers.dropout import Dropout
from megapoly.layers.embedding import PositionEmbedding, VocabularyEmbedding
from megapoly.layers.feedforward import FeedForward
from megapoly.layers.linear import column_linear
from megapoly.layers.loss import cross_entropy
from megapoly.layers.norm import LayerNorm


class DecoderLayer(nn.Module):
    """``x + dropout(attention(norm(x)))``, then ``x + dropout(feedforward(norm(x)))``."""

    def __init__(self, index: int, model: Model, *, place: Place, selective: bool = False) -> None:
        super().__init__()
        name, hidden, epsilon = f"layers.{index}", model.hidden, model.norm_epsilon
        output_std = model.init_std / math.sqrt(2 * model.layers)
        self.attention_norm = LayerNorm(f"{name}.attention_norm", hidden, epsilon=epsilon, place=place)
        self.attention = Attention(f"{name}.attention", model, output_std=output_std, place=place, recompute=selective)
        self.attention_dropout = Dropout(f"{name}.attention", model.dropout, place)
        self.feedforward_norm = LayerNorm(f"{name}.feedforward_norm", hidden, epsilon=epsilon, place=place)
        self.feedforward = FeedForward(
            f"{name}.feedforward", model, output_std=output_std, place=place, recompute=selective
        )
        self.feedforward_dropout = Dropout(f"{name}.feedforward", model.dropout, place)

    def forward(self, x_sBH: Tensor, call: Call) -> Tensor:
        y_sBH = self.attention(self.attention_norm(x_sBH, call), call)
        x_sBH = x_sBH + self.attention_dropout.hidden(y_sBH, call)
        y_sBH = self.feedforward(self.feedforward_norm(x_sBH, call), call)
        return x_sBH + self.feedforward_dropout.hidden(y_sBH, call)


class DecoderStage(nn.Module):
    """Some layers of the model; the embeddings where it is the first stage, final norm and output where the last.

    Args:
        layers: range of its layers; all of them where not given.
        first, last: which ends of the model it holds.
        embedding: the tied weight, where an earlier stage of this rank holds it already.
        tied: which copy of the tied weight this is, where another rank holds the other.
        layout: how layers are computed again in the backward pass.
    """

    def __init__(
        self,
        model: Model,
        *,
        layers: tuple[int, int] | None = None,
        first: bool = True,
        last: bool = True,
        embedding: VocabularyEmbedding | None = None,
        tied: str | None = None,
        layout: Layout | None = None,
        place: Place = Place(),
    ) -> None:
        super().__init__()
        self.first, self.last, self.tp = first, last, place.tp
        self.residual_dtype = accumulation_dtype(place.dtype) if model.fp32_residual else place.dtype
        self.embedding = embedding
        if (first or last) and embedding is None:
            self.embedding = VocabularyEmbedding(
                "embedding", model.vocabulary, model.hidden, std=model.init_std, copy=tied, place=place
            )
        if first:
            self.positions = PositionEmbedding(
                "positions", model.positions, model.hidden, std=model.init_std, place=place
            )
            self.dropout = Dropout("embedding", model.dropout, place)
        begin, end = layers or (0, model.layers)
        recompute = "none" if layout is None else layout.recompute
        self.layers = nn.ModuleDict(
            {str(i): DecoderLayer(i, model, place=place, selective=recompute == "selective") for i in range(begin, end)}
        )
        every = layout.recompute_every if layout is not None and recompute == "full" else 0
        self.recomputed = frozenset(str(i) for i in range(begin, end) if every and i % every == 0)
        if last:
            self.final_norm = LayerNorm("final_norm", model.hidden, epsilon=model.norm_epsilon, place=place)

    def initialise(self, seed: int) -> None:
        """Fill every parameter with this rank's slice of the logical initial values."""
        for parameter in self.parameters():
            rng.fill(parameter, spec_of(parameter), seed)

    def contributions(self) -> Iterator[tuple[nn.Parameter, int]]:
        """Every parameter, with the number of gradients that one backward pass hands over for it."""
        for parameter in self.parameters():
            tied = self.embedding is not None and parameter is self.embedding.weight
            yield parameter, self.first + self.last if tied else 1

    def forward(self, x_sBH: Tensor | None, call: Call) -> Tensor:
        """Activations ``[s, B, H]``; on the last stage the token losses ``[S, B]``.

        Without labels the last stage returns the logits ``[S, B, vocabulary of this rank]`` of the vocabulary that is
        not padding.
        """
        if call.documents_BS is not None:
            call = replace(call, mask_BSS=document_mask(call.documents_BS))
        if self.first:
            x_sBH = self._embed(call)
        assert x_sBH is not None
        for name, layer in self.layers.items():
            _wait_for(layer, call)
            if name in self.recomputed and torch.is_grad_enabled():
                x_sBH = checkpoint(layer, x_sBH, call, use_reentrant=False, preserve_rng_state=False)
            else:
                x_sBH = layer(x_sBH, call)
        return self._losses(x_sBH, call) if self.last else x_sBH

    def _embed(self, call: Call) -> Tensor:
        assert self.embedding is not None
        assert call.tokens_SB is not None
        _wait_for(self.embedding, call)
        _wait_for(self.positions, call)
        x_sBH = self.embedding(call.tokens_SB, call).to(self.residual_dtype)
        return self.dropout.hidden(x_sBH + self.positions(call.positions_SB, call), call)

    def _losses(self, x_sBH: Tensor, call: Call) -> Tensor:
        assert self.embedding is not None
        _wait_for(self.embedding, call)
        _wait_for(self.final_norm, call)
        out_sBH = self.final_norm(x_sBH, call)
        logits_SBV = column_linear(out_sBH, self.embedding.weight, None, self.tp, call)
        if call.labels_SB is None:
            return logits_SBV[..., : self.embedding.count]
        return cross_entropy(logits_SBV, call.labels_SB, self.embedding.start, self.embedding.count, self.tp)


def _wait_for(module: nn.Module, call: Call) -> None:
    if call.sink is not None:
        call.sink.before_forward(module)
