"""The decoder, as a range of layers: one pipeline stage holds one :class:`DecoderStage`.

The families PolyLM / GPT-2, LLaMA and BLOOM are configurations of it, see :class:`megapoly.config.Model`; all have
norms before the blocks and at the end. Initialisation is that of PolyLM's release: normal with ``init_std``, the
outputs into the residual stream with ``init_std / sqrt(2 layers)``.
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
from megapoly.data.samples import document_numbers
from megapoly.layers.alibi import Alibi
from megapoly.layers.attention import Attention, document_mask
from megapoly.layers.cache import KeyValueCache
from megapoly.layers.call import Call, Place, accumulation_dtype, spec_of
from megapoly.layers.dropout import Dropout
from megapoly.layers.embedding import PositionEmbedding, VocabularyEmbedding
from megapoly.layers.feedforward import FeedForward
from megapoly.layers.linear import column_linear
from megapoly.layers.loss import cross_entropy, output_cross_entropy
from megapoly.layers.norm import make_norm
from megapoly.layers.rotary import Rotary
from megapoly.models.cost import in_chunks
from megapoly_kernels.launch import runs_triton


class DecoderLayer(nn.Module):
    """``x + dropout(attention(norm(x)))``, then ``x + dropout(feedforward(norm(x)))``."""

    def __init__(self, index: int, model: Model, *, place: Place, selective: bool = False) -> None:
        super().__init__()
        name = f"layers.{index}"
        output_std = model.init_std / math.sqrt(2 * model.layers)
        self.attention_norm = make_norm(f"{name}.attention_norm", model, place)
        self.attention = Attention(f"{name}.attention", model, output_std=output_std, place=place, recompute=selective)
        self.attention_dropout = Dropout(f"{name}.attention", model.dropout, place)
        self.feedforward_norm = make_norm(f"{name}.feedforward_norm", model, place)
        self.feedforward = FeedForward(
            f"{name}.feedforward", model, output_std=output_std, place=place, recompute=selective
        )
        self.feedforward_dropout = Dropout(f"{name}.feedforward", model.dropout, place)

    def forward(self, x_sBH: Tensor, call: Call) -> Tensor:
        y_sBH = self.attention(self.attention_norm(x_sBH, call), call)
        y_sBH, x_sBH = self.feedforward_norm.add(self.attention_dropout.hidden(y_sBH, call), x_sBH, call)
        y_sBH = self.feedforward(y_sBH, call)
        return self.feedforward_dropout.hidden(y_sBH, call, x_sBH)


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
        if embedding is None and (first or (last and model.tied)):
            self.embedding = _vocabulary_embedding("embedding", model, tied, place)
        self.positions = self.embedding_norm = self.output = None
        if first:
            if model.position == "learned":
                self.positions = PositionEmbedding(
                    "positions", model.positions, model.hidden, std=model.init_std, place=place
                )
            if model.embedding_norm:
                self.embedding_norm = make_norm("embedding_norm", model, place)
            self.dropout = Dropout("embedding", model.dropout, place)
        if last and not model.tied:
            self.output = _vocabulary_embedding("output", model, None, place)
        self.rotary = Rotary(model, place.device) if model.position == "rope" else None
        # Dropout on probabilities, or a narrow softmax, has all of them in memory; these and PyTorch need the mask.
        wide = model.fp32_softmax or place.dtype == accumulation_dtype(place.dtype)
        self.fused = model.attention_dropout == 0 and wide and place.kernels.attention != "sdpa"
        self.alibi = Alibi(model.heads, place.tp, place.dtype, place.device) if model.position == "alibi" else None
        begin, end = layers or (0, model.layers)
        recompute = "none" if layout is None else layout.recompute
        self.layers = nn.ModuleDict(
            {str(i): DecoderLayer(i, model, place=place, selective=recompute == "selective") for i in range(begin, end)}
        )
        every = layout.recompute_every if layout is not None and recompute == "full" else 0
        self.recomputed = frozenset(str(i) for i in range(begin, end) if every and i % every == 0)
        if last:
            self.final_norm = make_norm("final_norm", model, place)

    def initialise(self, seed: int) -> None:
        """Fill every parameter with this rank's slice of the logical initial values."""
        for parameter in self.parameters():
            rng.fill(parameter, spec_of(parameter), seed)

    def contributions(self) -> Iterator[tuple[nn.Parameter, int]]:
        """Every parameter, with the number of gradients that one backward pass hands over for it."""
        for parameter in self.parameters():
            shared = self.output is None and self.embedding is not None and parameter is self.embedding.weight
            yield parameter, self.first + self.last if shared else 1

    def forward(self, x_sBH: Tensor | None, call: Call) -> Tensor:
        """Activations ``[s, B, H]``; on the last stage the token losses ``[S, B]``.

        Without labels the last stage returns the logits ``[S, B, vocabulary of this rank]`` of the vocabulary that is
        not padding.
        """
        x_sBH = self.run_layers(x_sBH, call)
        return self._losses(x_sBH, call) if self.last else x_sBH

    def run_layers(self, x_sBH: Tensor | None, call: Call) -> Tensor:
        """The residual stream ``[s, B, H]`` after the last layer of this stage."""
        call = self._with_positions(call)
        if self.first:
            x_sBH = self._embed(call)
        assert x_sBH is not None
        for name, layer in self.layers.items():
            _wait_for(layer, call)
            if name in self.recomputed and torch.is_grad_enabled():
                x_sBH = checkpoint(layer, x_sBH, call, use_reentrant=False, preserve_rng_state=False)
            else:
                x_sBH = layer(x_sBH, call)
        return x_sBH

    def logits(self, x_sBH: Tensor, call: Call) -> Tensor:
        """On the last stage, ``[..., vocabulary of this rank]`` of what :meth:`run_layers` gave, padding included."""
        output = self._output()
        _wait_for(output, call)
        _wait_for(self.final_norm, call)
        return column_linear(self.final_norm(x_sBH, call), output.weight, None, self.tp, call)

    def _with_positions(self, call: Call) -> Call:
        """What all layers of the stage need of documents and positions, made once."""
        if not self.layers:
            return call
        if call.cache is not None:
            return self._with_cache(call, call.cache)
        rotary = None if self.rotary is None else self.rotary.table(call.positions_SB)
        if self.fused and call.mask_BSS is None and runs_triton(call.positions_SB):
            return replace(call, slopes_A=None if self.alibi is None else self.alibi.slopes_A, rotary=rotary)
        mask_BSS = call.mask_BSS
        if call.cu_seqlens is not None:
            mask_BSS = document_mask(document_numbers(call.cu_seqlens, *call.positions_SB.t().shape))
        if self.alibi is not None and call.mask_BSS is not None:
            return replace(call, scores_BASS=self.alibi.between(call.positions_SB, call.mask_BSS))
        if self.alibi is not None:
            return replace(call, scores_BASS=self.alibi.scores(call.positions_SB.shape[0], mask_BSS))
        return replace(call, mask_BSS=mask_BSS, rotary=rotary)

    def _with_cache(self, call: Call, cache: KeyValueCache) -> Call:
        """The same for tokens after those of a cache."""
        count = call.positions_SB.shape[0]
        scores = cache.mask(count)
        if self.alibi is not None:
            scores = self.alibi.cached(cache.length, count, cache.capacity, scores)
        rotary = None if self.rotary is None else self.rotary.table(call.positions_SB)
        return replace(call, scores_BASS=scores, rotary=rotary)

    def _embed(self, call: Call) -> Tensor:
        assert self.embedding is not None
        assert call.tokens_SB is not None
        _wait_for(self.embedding, call)
        x_sBH = self.embedding(call.tokens_SB, call).to(self.residual_dtype)
        if self.positions is not None:
            _wait_for(self.positions, call)
            x_sBH = x_sBH + self.positions(call.positions_SB, call)
        if self.embedding_norm is not None:
            _wait_for(self.embedding_norm, call)
            x_sBH = self.embedding_norm(x_sBH, call).to(self.residual_dtype)
        return self.dropout.hidden(x_sBH, call)

    def _losses(self, x_sBH: Tensor, call: Call) -> Tensor:
        output, labels_SB = self._output(), call.labels_SB
        if labels_SB is not None and in_chunks(labels_SB.numel(), len(output.weight), output.weight.itemsize):
            _wait_for(output, call)
            _wait_for(self.final_norm, call)
            x_sBH = self.final_norm(x_sBH, call)
            return output_cross_entropy(x_sBH, output.weight, output.start, output.count, self.tp, call)
        logits_SBV = self.logits(x_sBH, call)
        if labels_SB is None:
            return logits_SBV[..., : output.count]
        return cross_entropy(logits_SBV, labels_SB, output.start, output.count, self.tp)

    def _output(self) -> VocabularyEmbedding:
        output = self.embedding if self.output is None else self.output
        assert output is not None
        return output


def _vocabulary_embedding(name: str, model: Model, copy: str | None, place: Place) -> VocabularyEmbedding:
    return VocabularyEmbedding(name, model.vocabulary, model.hidden, std=model.init_std, copy=copy, place=place)


def _wait_for(module: nn.Module, call: Call) -> None:
    if call.sink is not None:
        call.sink.before_forward(module)
