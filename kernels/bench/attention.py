"""Causal attention, beside each back end of scaled_dot_product_attention, and FlexAttention."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from common import SWEEP, Bench, Case, Function, passes
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megapoly_kernels import attention


def sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)


def _only(backend: SDPBackend) -> Function:
    def call(*inputs: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return sdpa(*inputs)

    return call


def _flex(sequence: int) -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, sequence, sequence)
    compiled = torch.compile(flex_attention)
    return lambda *inputs: compiled(*inputs, block_mask=mask)


def _slopes(heads: int, device: torch.device) -> Tensor:
    """Of ALiBi (Press et al., arXiv 2108.12409), for a power of two of heads."""
    return torch.tensor([2.0 ** (-8 * (head + 1) / heads) for head in range(heads)], device=device)


def cases(bench: Bench) -> Iterator[Case]:
    """Operations are 2 S^2 D a head forward, since causal, and 2.5 times as many backward."""
    lengths = [bench.sequence] + ([4 * bench.sequence] if bench.gpu and not bench.quick else [])
    shapes = [
        (model.name, model.heads, model.head_dim, model.alibi, s)
        for model in bench.models
        if model not in SWEEP
        for s in lengths
    ]
    if bench.sweep:
        shapes += [
            (f"head {d}, sequence {s}", 2048 // d, d, False, s)
            for d in (64, 128, 256)
            for s in ((512, 1024, 2048, 4096, 8192, 16384) if bench.gpu else (128, 256, 512, 1024))
        ]
    for name, heads, dim, alibi, s in shapes:
        batch = max(1, bench.tokens // s)
        inputs = [bench.normal(batch, heads, s, dim).requires_grad_() for _ in range(3)]
        operations = 2.0 * batch * heads * s**2 * dim
        shape = f"{name}: {batch} x {heads} x {s} x {dim}"
        if alibi:
            slopes = _slopes(heads, bench.device)
            distance = torch.arange(s, device=bench.device)
            bias = slopes.view(-1, 1, 1) * (distance - distance.view(-1, 1)).float()
            bias = bias.masked_fill(distance > distance.view(-1, 1), -math.inf).to(bench.dtype)

            def run(*inputs: Tensor, slopes: Tensor = slopes) -> Tensor:
                return attention(*inputs, slopes=slopes)

            def with_bias(*inputs: Tensor, bias: Tensor = bias) -> Tensor:
                return torch.nn.functional.scaled_dot_product_attention(*inputs, attn_mask=bias)

            peers: dict[str, Function] = {"sdpa, bias": with_bias}
        else:
            run, peers = attention, {"sdpa": sdpa}
            if bench.gpu:
                peers = {
                    "sdpa flash": _only(SDPBackend.FLASH_ATTENTION),
                    "sdpa cudnn": _only(SDPBackend.CUDNN_ATTENTION),
                }
                peers["flex"] = _flex(s)
        kind = "attention, alibi" if alibi else "attention"
        yield from passes(bench, kind, shape, run, peers, inputs, (operations, 2.5 * operations), bench.flops)
