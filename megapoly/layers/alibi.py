"""Attention with linear biases (Press et al., arXiv 2108.12409): scores fall with the distance, at a slope per head.

Shapes: S sequence, B micro-batch, A heads of this rank, T keys so far.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megapoly.context import Axis


def slopes(heads: int) -> Tensor:
    """Slopes ``[heads]`` of all heads, in the fp32 roundings that BLOOM was trained with.

    A geometric sequence from ``2^(-8 / heads)`` where ``heads`` is a power of two. Else that of the power below, then
    every other one of the power above.
    """
    below = 1 << (heads.bit_length() - 1)
    result = _geometric(below, torch.arange(1, below + 1))
    if below < heads:
        result = torch.cat((result, _geometric(2 * below, torch.arange(1, 2 * (heads - below), 2))))
    return result


def _geometric(heads: int, powers: Tensor) -> Tensor:
    # Just these powers, not some of more: in a vector of another length torch rounds them otherwise.
    return torch.tensor(2.0 ** (-8 / heads), dtype=torch.float32) ** powers.int()


class Alibi:
    """The biases of this rank's heads. Without documents all micro-batches of a length share one tensor."""

    def __init__(self, heads: int, tp: Axis, dtype: torch.dtype, device: torch.device) -> None:
        self.slopes_A = slopes(heads).to(device).chunk(tp.size)[tp.rank]
        self.dtype = dtype
        self._causal = torch.empty(0, 0, 0, 0)
        self._last = torch.empty(0, 0, 0, 0)

    def scores(self, length: int, mask_BSS: Tensor | None) -> Tensor:
        """What is added to the scores: ``[B, A, S, S]``, -inf where a query does not see a key; B is 1 without a mask.

        Distances count tokens, so that documents change none.
        """
        if mask_BSS is not None:
            return self._biases(length).masked_fill(~mask_BSS.unsqueeze(1), -torch.inf)
        if self._causal.shape[-1] != length:
            visible = torch.ones(length, length, dtype=torch.bool, device=self.slopes_A.device).tril()
            self._causal = self._biases(length).masked_fill(~visible, -torch.inf)
        return self._causal

    def between(self, positions_SB: Tensor, mask_BSS: Tensor) -> Tensor:
        """The same ``[B, A, S, S]`` where tokens that are neighbours in the sequence are none in their text."""
        distances_BSS = positions_SB.t().unsqueeze(2) - positions_SB.t().unsqueeze(1)
        return self._sloping(distances_BSS.unsqueeze(1)).masked_fill(~mask_BSS.unsqueeze(1), -torch.inf)

    def cached(self, begin: int, count: int, capacity: int, mask: Tensor | None) -> Tensor:
        """Scores ``[B, A, S, T]`` of ``count`` tokens after ``begin`` others, and a mask, see
        :meth:`megapoly.layers.cache.KeyValueCache.mask`.

        Those of one token are a view of a table for ``capacity`` tokens.
        """
        if mask is None and count > 1:
            return self.scores(count, None)
        if count > 1:
            biases = self._biases(begin + count, begin)
        else:
            if self._last.shape[-1] < capacity:
                self._last = self._biases(capacity, capacity - 1)
            biases = self._last[..., self._last.shape[-1] - begin - 1 :]
        return biases if mask is None else biases + mask

    def _biases(self, length: int, begin: int = 0) -> Tensor:
        """Of all tokens from ``begin`` on to those of ``length``: ``[1, A, length - begin, length]``."""
        at = torch.arange(length, device=self.slopes_A.device)
        distances_SS = at[begin:].unsqueeze(1) - at
        return self._sloping(distances_SS).unsqueeze(0)

    def _sloping(self, distances: Tensor) -> Tensor:
        wide = torch.promote_types(self.dtype, torch.float32)
        return -(self.slopes_A.to(wide)[:, None, None] * distances).to(self.dtype)
