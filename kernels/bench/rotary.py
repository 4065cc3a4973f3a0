"""Rotary embedding of packed queries, keys and values, beside the usual formula in PyTorch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from common import Bench, Case, passes, peers_of
from torch import Tensor

from megapoly_kernels import rotary_qkv
from megapoly_kernels.rotary import rotary_qkv_forward


def cases(bench: Bench) -> Iterator[Case]:
    """Traffic is once all of queries, keys and values in and out; in place, twice queries and keys."""
    for model in bench.models:
        s, b, dim = bench.sequence, bench.batch, model.head_dim
        angles = torch.randn(s, b, 1, 1, dim // 2, device=bench.device)
        table = torch.stack((angles.cos(), angles.sin()))
        qkv = bench.normal(s, b, 3 * model.hidden).requires_grad_()
        shape = f"{model.name}: {s} x {b} x {model.heads} x 3 x {dim}"

        def eager(qkv: Tensor, table: Tensor = table, dim: int = dim) -> Tensor:
            heads = qkv.unflatten(-1, (-1, 3, dim))
            turned, value = heads[..., :2, :], heads[..., 2:, :]
            cos, sin = (torch.cat((each, each), -1).to(qkv.dtype) for each in table)
            a, b = turned.chunk(2, -1)
            return torch.cat((turned * cos + torch.cat((-b, a), -1) * sin, value), -2).flatten(-3)

        def run(qkv: Tensor, table: Tensor = table) -> Tensor:
            return rotary_qkv(qkv, table, 3)

        size = qkv.numel() * qkv.element_size()
        yield from passes(bench, "rotary", shape, run, peers_of(bench, eager), [qkv], (2 * size, 2 * size))
        memory = qkv.detach().clone()
        yield Case(
            "rotary in place", shape, qkv.dtype, 4 * size / 3,
            lambda memory=memory, table=table: rotary_qkv_forward(memory, table, 3, in_place=True),
        )  # fmt: skip
