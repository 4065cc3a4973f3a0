"""The decoder, as a range of layers: one pipeline stage holds one :class:`DecoderStage`.

PolyLM / GPT-2: learned positions, pre-LayerNorm and a final norm, tanh GELU, biases, tied embeddings. Initialisation is
the release's: normal with ``init_std``, the outputs into the residual stream with ``init_std / sqrt(2 layers)``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import Tensor, nn

from megapoly import rng
from megapoly.config import Model
from megapoly.layers.attention import Attention
from megapoly.layers.call import Call, Place, accumulation_dtype, spec_of
from megapoly.layers.embedding import PositionEmbedding, VocabularyEmbedding
from megapoly.layers.feedforward import FeedForward
from megapoly.layers.linear import column_linear
from megapoly.layers.loss import cross_entropy
from megapoly.layers.norm import LayerNorm
from megapoly.mesh import spread


class DecoderLayer(nn.Module):
    """``x + attention(norm(x))``, then ``x + feedforward(norm(x))``."""

    def __init__(self, index: int, model: Model, *, place: Place) -> None:
        super().__init__()
        name = f"layers.{index}"
        output_std = model.init_std / math.sqrt(2 * model.layers)
        self.attention_norm = LayerNorm(f"{name}.attention_norm", model.hidden, epsilon=model.norm_epsilon, place=place)
        self.attention = Attention(f"{name}.attention", model, output_std=output_std, place=place)
        self.feedforward_norm = LayerNorm(
            f"{name}.feedforward_norm", model.hidden, epsilon=model.norm_epsilon, place=place
        )
        self.feedforward = FeedForward(f"{name}.feedforward", model, output_std=output_std, place=place)

    def forward(self, x_SBH: Tensor, call: Call) -> Tensor:
        x_SBH = x_SBH + self.attention(self.attention_norm(x_SBH, call.sink), call)
        return x_SBH + self.feedforward(self.feedforward_norm(x_SBH, call.sink), call.sink)


class DecoderStage(nn.Module):
    """Stage ``stage`` of ``stages``: its layers, the embeddings on the first, the final norm and output on the last."""

    def __init__(
        self,
        model: Model,
        *,
        stage: int = 0,
        stages: int = 1,
        place: Place = Place(),
    ) -> None:
        super().__init__()
        self.first, self.last, self.tp = stage == 0, stage == stages - 1, place.tp
        self.hidden = model.hidden
        self.residual_dtype = accumulation_dtype(place.dtype) if model.fp32_residual else place.dtype
        self.embedding: VocabularyEmbedding | None = None
        if self.first or self.last:
            copy = None if stages == 1 else "first" if self.first else "last"
            self.embedding = VocabularyEmbedding(
                "embedding", model.vocabulary, model.hidden, std=model.init_std, copy=copy, place=place
            )
        if self.first:
            self.positions = PositionEmbedding(
                "positions", model.positions, model.hidden, std=model.init_std, place=place
            )
        begin, end = spread(model.layers, stages)[stage]
        self.layers = nn.ModuleDict({str(i): DecoderLayer(i, model, place=place) for i in range(begin, end)})
        if self.last:
            self.final_norm = LayerNorm("final_norm", model.hidden, epsilon=model.norm_epsilon, place=place)

    def initialise(self, seed: int) -> None:
        """Fill every parameter with this rank's slice of the logical initial values."""
        for parameter in self.parameters():
            rng.fill(parameter, spec_of(parameter), seed)

    def contributions(self) -> Iterator[tuple[nn.Parameter, int]]:
        """Every parameter, with the number of gradients that one backward pass hands over for it."""
        for parameter in self.parameters():
            shared = self.embedding is not None and parameter is self.embedding.weight and self.first and self.last
            yield parameter, 2 if shared else 1

    def forward(self, x_SBH: Tensor | None, call: Call) -> Tensor:
        """Activations ``[S, B, H]``; on the last stage the token losses ``[S, B]``.

        Without labels the last stage returns the logits ``[S, B, vocabulary of this rank]`` of the vocabulary that is
        not padding.
        """
        if self.first:
            assert self.embedding is not None
            assert call.tokens_SB is not None
            x_SBH = self.embedding(call.tokens_SB, call.sink).to(self.residual_dtype)
            x_SBH = x_SBH + self.positions(call.positions_SB, call.sink)
        assert x_SBH is not None
        for layer in self.layers.values():
            x_SBH = layer(x_SBH, call)
        if not self.last:
            return x_SBH
        assert self.embedding is not None
        out_SBH = self.final_norm(x_SBH, call.sink)
        logits_SBV = column_linear(out_SBH, self.embedding.weight, None, self.tp, call.sink)
        if call.labels_SB is None:
            return logits_SBV[..., : self.embedding.count]
        return cross_entropy(logits_SBV, call.labels_SB, self.embedding.start, self.embedding.count, self.tp)
