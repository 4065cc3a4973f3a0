"""Tensors of opened weights as streams of parts, so that one of any size passes through little memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from megapoly.checkpoint.families import Slot
from megapoly.checkpoint.weights import Weights
from megapoly.spec import Box, Piece

PART = 16 << 20  # bytes


def ahead(parts: Iterator[Tensor]) -> Iterator[Tensor]:
    """The same parts; a thread makes the next one while one is used."""
    with ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as pool:
        following = pool.submit(next, parts, None)
        while (part := following.result()) is not None:
            following = pool.submit(next, parts, None)
            yield part


class Stream:
    """Parts of boxes of tensors, one after another; ``progress`` hears of the bytes of each.

    A part is good until the one after the next is asked for.
    """

    def __init__(self, weights: Weights, progress: Callable[[int], object] = lambda done: None) -> None:
        self._weights, self._progress = weights, progress
        self._buffers = [torch.empty(0, dtype=torch.uint8) for _ in range(3)]
        self._turn = self._read = 0

    def box(self, name: str, box: Box, dtype: torch.dtype) -> Iterator[Tensor]:
        """The elements of a box in its row-major order, flat."""
        step = max(1, PART // dtype.itemsize)
        for start in range(0, box.size, step):
            piece = Piece(box, start, min(box.size, start + step))
            part = self._next_buffer(piece.size, dtype)
            self._fill(name, piece, part)
            yield part

    def slot(self, slot: Slot, dtype: torch.dtype) -> Iterator[Tensor]:
        """The elements of a tensor of a Hugging Face file in its own order, flat."""
        if slot.plain:
            yield from self.box(slot.name, slot.box, dtype)
            return
        rows, dim = slot.factors[0], slot.order.index(0)
        step = max(1, PART // (dtype.itemsize * slot.box.size // rows))
        back = [slot.order.index(each) for each in range(len(slot.order))]
        for first in range(0, rows, step):
            start, stop = list(slot.box.start), list(slot.box.stop)
            start[dim], stop[dim] = first, min(rows, first + step)
            box = Box(tuple(start), tuple(stop))
            read = self._buffer(2, box.size, dtype)
            self._fill(slot.name, Piece.of(box), read)
            part = self._next_buffer(box.size, dtype)
            turned = read.view(box.shape).permute(back)
            part.view(turned.shape).copy_(turned)
            yield part

    def _next_buffer(self, elements: int, dtype: torch.dtype) -> Tensor:
        self._turn = 1 - self._turn
        return self._buffer(self._turn, elements, dtype)

    def _buffer(self, number: int, elements: int, dtype: torch.dtype) -> Tensor:
        size = elements * dtype.itemsize
        if self._buffers[number].numel() < size:
            self._buffers[number] = torch.empty(size, dtype=torch.uint8)
        return self._buffers[number][:size].view(dtype)

    def _fill(self, name: str, piece: Piece, out: Tensor) -> None:
        self._weights.read(name, piece, out)
        self._progress(out.nbytes)
        self._read += piece.size * self._weights.tensors[name][1].itemsize
        if self._read >= 2 * PART:
            self._weights.release()
            self._read = 0
