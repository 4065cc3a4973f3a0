"""Keys and values of the tokens so far, so that a new token costs one token's work and not the whole text's.

Texts of a batch end at the same slot: the shorter ones begin later, and what stands before them is never seen. So every
token goes to one slot of all rows, in place, and the last position is that of every row.

Shapes: B rows, G groups of this rank, S new tokens, T slots filled with them, D head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class KeyValueCache:
    """Of the layers of one stage. A forward pass stores its tokens in slots ``length``, ``length + 1`` ...

    Args:
        starts: the slot of every row's first token.
        capacity: slots; memory for all of them is taken at the first pass.
        dtype: of the model.

    Attributes:
        length: slots filled before this pass; :meth:`advance` ends a pass.
    """

    def __init__(self, starts: Sequence[int], capacity: int, dtype: torch.dtype, device: torch.device) -> None:
        self.capacity, self.dtype, self.length = capacity, dtype, 0
        self.starts_B = torch.tensor(list(starts), device=device)
        self._padded = any(starts)
        slots = torch.arange(capacity, device=device)
        self._closed_B11T = self._minus_infinity((slots < self.starts_B.unsqueeze(1))[:, None, None])
        self._buffers: dict[str, tuple[Tensor, Tensor]] = {}

    @property
    def rows(self) -> int:
        return len(self.starts_B)

    def positions(self, count: int) -> Tensor:
        """Positions ``[S, B]`` of the next ``count`` tokens of every row; 0 before its first one."""
        slots = torch.arange(self.length, self.length + count, device=self.starts_B.device)
        return (slots.unsqueeze(1) - self.starts_B).clamp_(min=0)

    def mask(self, count: int) -> Tensor | None:
        """What the next ``count`` tokens add to their scores, ``[B or 1, 1, S, T]``: 0, or -inf at what is not seen.

        None where they see all slots so far, or where the first ones see each other causally.
        """
        begin, end = self.length, self.length + count
        if count == 1:
            return self._closed_B11T[..., :end] if self._padded else None
        if not begin and not self._padded:
            return None
        slots = torch.arange(end, device=self.starts_B.device)
        hidden_ST = slots[begin:].unsqueeze(1) < slots
        if not self._padded:
            return self._minus_infinity(hidden_ST[None, None])
        # What stands before a text sees itself: a softmax over nothing is no number, and would spread by its value.
        before_BST = (slots < self.starts_B.unsqueeze(1)).unsqueeze(1) & (slots[begin:].unsqueeze(1) != slots)
        return self._minus_infinity((hidden_ST | before_BST).unsqueeze(1))

    def store(self, layer: str, key_BGSD: Tensor, value_BGSD: Tensor) -> tuple[Tensor, Tensor]:
        """Keep the new keys and values of ``layer``; all of it so far, ``[B, G, T, D]`` each, as views."""
        if layer not in self._buffers:
            b, g, _, d = key_BGSD.shape
            self._buffers[layer] = (
                key_BGSD.new_empty(b, g, self.capacity, d), value_BGSD.new_empty(b, g, self.capacity, d)
            )  # fmt: skip
        keys, values = self._buffers[layer]
        end = self.length + key_BGSD.shape[2]
        keys[: self.rows, :, self.length : end] = key_BGSD
        values[: self.rows, :, self.length : end] = value_BGSD
        return keys[: self.rows, :, :end], values[: self.rows, :, :end]

    def advance(self, count: int) -> None:
        """Count the tokens of a pass that all layers have stored."""
        self.length += count

    def keep(self, rows: Sequence[int]) -> None:
        """Let go of all rows but these, in this order. Only a row that changes its place is copied.

        Every one that does goes to the place of a row that is not kept.
        """
        moves = [(to, source) for to, source in enumerate(rows) if to != source]
        for buffer in (each for pair in self._buffers.values() for each in pair):
            for to, source in moves:
                buffer[to, :, : self.length] = buffer[source, :, : self.length]
        index = torch.tensor(list(rows), device=self.starts_B.device)
        self.starts_B, self._closed_B11T = self.starts_B[index], self._closed_B11T[index]

    def _minus_infinity(self, where: Tensor) -> Tensor:
        return torch.zeros(where.shape, dtype=self.dtype, device=where.device).masked_fill_(where, -torch.inf)
