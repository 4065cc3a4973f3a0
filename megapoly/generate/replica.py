"""The model on the ranks of one replica: passes with a cache over all its stages, and likelihoods of whole texts.

Every rank of a replica calls the same methods with the same tokens. Activations go down the pipeline; logits are whole
on the ranks of the last stage.

Shapes: S sequence, B rows, H hidden, V vocabulary, N positions whose logits are wanted.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from megapoly import comm
from megapoly.checkpoint.weights import Weights, fill
from megapoly.config import Layout, Model
from megapoly.config_checks import check_shares
from megapoly.context import ParallelContext
from megapoly.errors import ConfigError
from megapoly.generate.trees import PrefixTree
from megapoly.layers.cache import KeyValueCache
from megapoly.layers.call import Call, Place, accumulation_dtype
from megapoly.models.cost import layer_ranges
from megapoly.models.decoder import DecoderStage

_TOKENS = 8192  # of one pass over prompts: what a pass needs beside the cache does not grow with their length
_LOGITS = 1 << 24  # elements of whole logits at a time, for likelihoods


class Replica:
    """This rank's stage of the model, filled from ``weights``.

    Raises:
        ConfigError: the model does not divide by the context's tp, or has fewer layers than stages.
    """

    def __init__(self, weights: Weights, context: ParallelContext, dtype: torch.dtype) -> None:
        model, pp = weights.model, context.pp
        check_layout(model, context)
        layers = layer_ranges(model, Layout(pp=pp.size, tp=context.tp.size), model.positions)[pp.rank]
        place = Place(context.tp, dtype, context.device)
        self.model, self.context, self.dtype = model, context, dtype
        self.first, self.last = pp.rank == 0, pp.rank == pp.size - 1
        self.stage = DecoderStage(model, layers=layers, first=self.first, last=self.last, place=place)
        self.stage.requires_grad_(False)
        fill(weights, self.stage.parameters())
        weights.release()
        self._sent: list[comm.Pending] = []

    def prefill(self, prompts: Sequence[Sequence[int]], room: int) -> tuple[KeyValueCache, Tensor | None]:
        """A cache that holds ``prompts``, with ``room`` for as many tokens more.

        Returns:
            The cache, and on the last stage the logits ``[B, V]`` of the token after each prompt.
        """
        longest = max(map(len, prompts))
        starts = [longest - len(prompt) for prompt in prompts]
        tokens = torch.tensor([[0] * start + list(prompt) for start, prompt in zip(starts, prompts)])
        tokens_SB = tokens.t().to(self.context.device)
        cache = KeyValueCache(starts, longest + room, self.dtype, self.context.device)
        step = max(1, _TOKENS // len(prompts))
        x_SBH = None
        for begin in range(0, longest, step):
            x_SBH = self._advance(cache, tokens_SB[begin : begin + step])
        assert x_SBH is not None
        return cache, self._logits(x_SBH[-1]) if self.last else None

    def step(self, cache: KeyValueCache, tokens: Sequence[int]) -> Tensor | None:
        """Add a token to every row; on the last stage the logits ``[B, V]`` of the next."""
        x_1BH = self._advance(cache, torch.tensor([tokens], device=self.context.device))
        return self._logits(x_1BH[0]) if self.last else None

    def agree(self, values: Tensor | None, shape: tuple[int, ...]) -> Tensor:
        """Float64 ``values`` of the last stage, on the CPU of all ranks of the replica; None on the others."""
        model = self.context.model
        if values is None or model.rank < model.size - 1:
            values = torch.zeros(shape, dtype=torch.float64, device=self.context.device)
        return comm.all_reduce(values, model).cpu()

    def score(self, trees: Sequence[PrefixTree]) -> Tensor:
        """Of all labels of the trees, one tree after another: ``[2, N]``, float64, on the CPU of all ranks.

        Log-probabilities, and 1 where a label is the likeliest.
        """
        device, length = self.context.device, max(map(len, trees))
        tokens_SB = _filled_up([tree.tokens for tree in trees], length).to(device)
        mask_BSS = None
        if not all(tree.is_chain for tree in trees):
            mask_BSS = torch.from_numpy(np.stack([tree.mask(length) for tree in trees])).to(device)
            positions_SB = _filled_up([tree.positions for tree in trees], length).to(device)
        else:  # of all rows, also behind their ends: what comes after changes nothing before it
            positions_SB = torch.arange(length, device=device).unsqueeze(1).expand_as(tokens_SB)
        x_SBH = self._pass(Call(positions_SB, mask_BSS=mask_BSS, tokens_SB=tokens_SB if self.first else None))
        self._settle()
        found = None
        labels = [(at, b, label) for b, tree in enumerate(trees) for at, label in tree.labels]
        if self.last:
            at_N, row_N, label_N = torch.tensor(labels, device=device).t()
            found = self._likelihoods(x_SBH, at_N, row_N, label_N)
        return self.agree(found, (2, len(labels)))

    def _likelihoods(self, x_SBH: Tensor, at_N: Tensor, row_N: Tensor, label_N: Tensor) -> Tensor:
        """``[2, N]``, float64. Of a place that has several labels the logits are made once."""
        width = x_SBH.shape[1]
        places_M, of_N = torch.unique(at_N * width + row_N, return_inverse=True)
        order_N = of_N.argsort(stable=True)
        step = max(1, _LOGITS // self.model.vocabulary)
        bounds = torch.searchsorted(of_N[order_N], torch.arange(0, len(places_M) + step, step, device=of_N.device))
        result = torch.empty(2, len(label_N), dtype=torch.float64, device=x_SBH.device)
        x_MH = x_SBH.flatten(0, 1)
        for i, (begin, end) in enumerate(pairwise(bounds.tolist())):
            mine_K = order_N[begin:end]
            logits_MV = self._logits(x_MH[places_M[i * step : (i + 1) * step]])
            own_K, labels_K = of_N[mine_K] - i * step, label_N[mine_K]
            sums_M = logits_MV.logsumexp(-1).double()
            result[0, mine_K] = logits_MV[own_K, labels_K].double() - sums_M[own_K]
            result[1, mine_K] = (logits_MV.argmax(-1)[own_K] == labels_K).double()
        return result

    def _advance(self, cache: KeyValueCache, tokens_SB: Tensor) -> Tensor:
        count = len(tokens_SB)
        tokens = tokens_SB if self.first else None
        x_SBH = self._pass(Call(cache.positions(count), tokens_SB=tokens, cache=cache))
        cache.advance(count)
        return x_SBH

    def _pass(self, call: Call) -> Tensor:
        """The residual stream after this stage, which is on its way to the next."""
        pp, x_SBH = self.context.pp, None
        if not self.first:
            shape = (*call.positions_SB.shape, self.model.hidden)
            x_SBH = torch.empty(shape, dtype=self.stage.residual_dtype, device=self.context.device)
            comm.receive(x_SBH, pp, pp.rank - 1).wait()
        x_SBH = self.stage.run_layers(x_SBH, call)
        self._settle()
        if not self.last:
            self._sent.append(comm.send(x_SBH.contiguous(), pp, pp.rank + 1))
        return x_SBH

    def _settle(self) -> None:
        """Wait until what was sent has arrived."""
        while self._sent:
            self._sent.pop().wait()

    def _logits(self, x_NH: Tensor) -> Tensor:
        """Whole logits ``[N, V]``, in promote(model dtype, fp32), on all ranks of the last stage."""
        call = Call(torch.empty(0))
        logits_1NV = self.stage.logits(x_NH.unsqueeze(0), call)
        whole_VN = comm.all_gather(logits_1NV[0].t(), self.context.tp) if self.context.tp.size > 1 else None
        logits_NV = logits_1NV[0] if whole_VN is None else whole_VN.t()
        return logits_NV[:, : self.model.vocabulary].to(accumulation_dtype(self.dtype))


def _filled_up(rows: Sequence[Sequence[int]], length: int) -> Tensor:
    """``[length, B]``, int64, with zeros behind the rows."""
    return torch.tensor([[*row, *[0] * (length - len(row))] for row in rows]).t()


def log_probabilities(logits_NV: Tensor, ids_N: Tensor) -> Tensor:
    """Of the ids ``[N]``, float64."""
    own = logits_NV.gather(-1, ids_N.unsqueeze(-1)).squeeze(-1)
    return own.double() - logits_NV.logsumexp(-1).double()


def check_layout(model: Model, context: ParallelContext) -> None:
    check_shares(model, context.tp.size, "--tp")
    if context.pp.size > model.layers:
        raise ConfigError(
            f"--pp {context.pp.size} is more than the {model.layers} layers of the model: a stage would have none; set"
            f" --pp to {model.layers} or less"
        )
