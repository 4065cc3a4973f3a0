"""Tensor-parallel linear layers (Shoeybi et al., arXiv 1909.08053).

A column-parallel layer holds a slice of the outputs and a row-parallel one a slice of the inputs. In a pair of them the
activation between the two is never whole: one sum over tp ends the pair forward, one begins it backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from megapoly import comm
from megapoly.context import ALONE, Axis
from megapoly.layers.call import GradSink, Place, hand_over, parameter
from megapoly.spec import Index, ParamSpec, shard


class _Linear(torch.autograd.Function):
    """``y = x W^T + b`` with W ``[..., inputs]`` seen as a matrix; sums over an axis forward and another backward."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, forward: Axis, backward: Axis, sink: Any
    ) -> Tensor:
        ctx.axis, ctx.sink, ctx.weight, ctx.bias = backward, sink, weight, bias
        ctx.save_for_backward(x)
        matrix = weight.reshape(-1, weight.shape[-1])
        flat_bias = None if bias is None else bias.reshape(-1)
        if forward.size == 1:
            return torch.nn.functional.linear(x, matrix, flat_bias)
        y = comm.all_reduce(x @ matrix.t(), forward)
        return y if flat_bias is None else y.add_(flat_bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        weight, bias = ctx.weight, ctx.bias
        outputs, inputs = weight.numel() // weight.shape[-1], weight.shape[-1]
        dy = grads[0].reshape(-1, outputs)
        pending = None
        if ctx.needs_input_grad[0]:
            dx = dy @ weight.reshape(outputs, inputs)
            pending = comm.all_reduce_async(dx, ctx.axis)
        x_flat = x.reshape(-1, inputs)

        d_weight = hand_over(ctx.sink, weight, lambda out: _add_product(out.view(outputs, inputs), dy.t(), x_flat))
        d_bias = hand_over(ctx.sink, bias, lambda out: out.view(-1).add_(dy.sum(0, dtype=out.dtype)))
        d_input = pending.wait().view(x.shape) if pending else None
        return d_input, d_weight, d_bias, None, None, None


def _add_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """``out += a @ b`` without rounding the product to a dtype narrower than that of ``out``."""
    if out.dtype == a.dtype:
        out.addmm_(a, b)
    elif out.is_cuda:
        out.add_(torch.mm(a, b, out_dtype=out.dtype))
    else:
        out.addmm_(a.to(out.dtype), b.to(out.dtype))


def column_linear(x: Tensor, weight: Tensor, bias: Tensor | None, tp: Axis, sink: GradSink | None) -> Tensor:
    """``x`` [S, B, inputs] whole -> [S, B, outputs of this rank]. The gradient of ``x`` is summed over ``tp``."""
    return _Linear.apply(x, weight, bias, ALONE, tp, sink)


def row_linear(x: Tensor, weight: Tensor, bias: Tensor | None, tp: Axis, sink: GradSink | None) -> Tensor:
    """``x`` [S, B, inputs of this rank] -> [S, B, outputs] whole, summed over ``tp``; the bias is added once."""
    return _Linear.apply(x, weight, bias, tp, ALONE, sink)


class ColumnParallelLinear(nn.Module):
    """Weight ``[*outputs, inputs]``, split along the first of ``outputs``; bias ``outputs``, split likewise.

    Raises:
        ValueError: if ``tp`` does not divide the first of ``outputs``.
    """

    def __init__(self, name: str, inputs: int, outputs: Index, *, std: float, place: Place) -> None:
        super().__init__()
        self.tp = place.tp
        shape = (*outputs, inputs)
        weight_box, weight_local = shard(shape, 0, place.tp.rank, place.tp.size)
        bias_box, bias_local = shard(outputs, 0, place.tp.rank, place.tp.size)
        self.weight = parameter(ParamSpec(f"{name}.weight", shape, weight_box, weight_local, std=std), place)
        self.bias = parameter(ParamSpec(f"{name}.bias", outputs, bias_box, bias_local, decay=False), place)

    def forward(self, x: Tensor, sink: GradSink | None = None) -> Tensor:
        return column_linear(x, self.weight, self.bias, self.tp, sink)


class RowParallelLinear(nn.Module):
    """Weight ``[outputs, inputs]``, split along the inputs; bias ``[outputs]``, whole on every rank.

    Raises:
        ValueError: if ``tp`` does not divide ``inputs``.
    """

    def __init__(self, name: str, inputs: int, outputs: int, *, std: float, place: Place) -> None:
        super().__init__()
        self.tp = place.tp
        box, local = shard((outputs, inputs), 1, place.tp.rank, place.tp.size)
        self.weight = parameter(ParamSpec(f"{name}.weight", (outputs, inputs), box, local, std=std), place)
        self.bias = parameter(whole_spec(f"{name}.bias", (outputs,), place.tp, decay=False), place)

    def forward(self, x: Tensor, sink: GradSink | None = None) -> Tensor:
        return row_linear(x, self.weight, self.bias, self.tp, sink)


def whole_spec(name: str, shape: Index, tp: Axis, *, decay: bool, mean: float = 0.0, std: float = 0.0) -> ParamSpec:
    """Spec of a parameter that every tensor-parallel rank holds whole; the first of them owns it."""
    shard_box, local = shard(shape, 0, 0, 1)
    return ParamSpec(name, shape, shard_box, local, owner=tp.rank == 0, decay=decay, mean=mean, std=std)
