"""Philox 4x32-10: random numbers as a pure function of (key, counter).

Maths: ten rounds of two 32 x 32 -> 64 bit products on a 128-bit counter under a 64-bit key (Salmon et al., "Parallel
random numbers: as easy as 1, 2, 3", SC 2011). Counter layout of megapoly: words (index low, index high, stream low,
stream high); the four output words of index ``i`` serve the elements ``4 i .. 4 i + 3`` of a stream.

Shapes: ``index`` is int64 of any shape; the result has a new last dimension of 4.
Dtypes: words are int64 tensors holding values below 2^32 (torch has no uint32 arithmetic on all devices).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
# Blocks below torch's parallel grain and a whole number of vectors: every element then takes the same vector code
# whatever the slice that is asked for, which makes log and cos reproducible bit for bit.
_CPU_BLOCK = 8192
_GPU_BLOCK = 1 << 24


def philox_reference(words: tuple[Tensor, Tensor, Tensor, Tensor], key: int) -> tuple[Tensor, ...]:
    """Four output words for four counter words under a 64-bit ``key``. Shapes are equal and kept."""
    c0, c1, c2, c3 = words
    k0, k1 = key & _MASK, (key >> 32) & _MASK
    for _ in range(10):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = ((p1 >> 32) & _MASK) ^ c1 ^ k0, p1 & _MASK, ((p0 >> 32) & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def words(index: Tensor, key: int, stream: int | Tensor = 0) -> Tensor:
    """Four 32-bit words for every counter in ``index`` (int64) of ``stream`` (64 bits): shape ``[*index.shape, 4]``.

    ``stream`` may be int64 of the same shape: one for each counter.
    """
    streams = stream if isinstance(stream, Tensor) else torch.full_like(index, stream)
    counters = (index & _MASK, (index >> 32) & _MASK, streams & _MASK, (streams >> 32) & _MASK)
    return torch.stack(philox_reference(counters, key), dim=-1)


def normal(index: Tensor, key: int, stream: int = 0) -> Tensor:
    """Standard normal float64 values of elements ``index`` (1-D int64): element i does not depend on the others.

    Box-Muller on 32-bit uniforms in (0, 1); the largest magnitude is sqrt(2 ln 2^33) = 6.76.
    """
    out = torch.empty(index.numel(), dtype=torch.float64, device=index.device)
    block = _CPU_BLOCK if index.device.type == "cpu" else _GPU_BLOCK
    for begin in range(0, index.numel(), block):
        part = index[begin : begin + block]
        padded = torch.zeros(min(block, -(-index.numel() // 64) * 64), dtype=torch.int64, device=index.device)
        padded[: part.numel()] = part
        out[begin : begin + block] = _normal_block(padded, key, stream)[: part.numel()]
    return out


def _normal_block(index: Tensor, key: int, stream: int) -> Tensor:
    # Elements 2j and 2j + 1 of a counter are the cosine and the sine of pair j.
    four = words(index >> 2, key, stream)
    lane = index & 3
    radius_word = torch.where(lane < 2, four[:, 0], four[:, 2])
    angle_word = torch.where(lane < 2, four[:, 1], four[:, 3])
    radius = torch.sqrt(-2.0 * torch.log((radius_word.double() + 0.5) * 2.0**-32))
    angle = (angle_word.double() + 0.5) * (2.0**-32 * 2.0 * math.pi)
    return radius * torch.where(lane % 2 == 0, torch.cos(angle), torch.sin(angle))
