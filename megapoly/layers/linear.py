"""Tensor-parallel linear layers (Shoeybi et al., arXiv 1909.08053) with sequence parallelism (arXiv 2205.05198).

A column-parallel layer holds a slice of the outputs and a row-parallel one a slice of the inputs. In a pair of them the
activation between the two is never whole: one sum over tp ends the pair forward, one begins it backward. Under sequence
parallelism what is outside of the pair is a slice of the sequence: the pair begins with an all-gather and ends with a
reduce-scatter, which together carry what the sum did.

Shapes: S sequence, s the slice of it outside of a pair (S where there is no sequence parallelism), B micro-batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from megapoly import comm
from megapoly.context import Axis
from megapoly.layers.activation import Activation
from megapoly.layers.call import Call, GradSink, Place, apply, hand_over, parameter, whole_spec
from megapoly.layers.product import add_product, product
from megapoly.spec import Index, ParamSpec, shard


def _matrix(weight: Tensor) -> Tensor:
    return weight.reshape(-1, weight.shape[-1])


class _Column(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, tp: Axis, split: bool, sink: GradSink | None
    ) -> Tensor:
        ctx.tp, ctx.split, ctx.sink, ctx.weight, ctx.bias = tp, split, sink, weight, bias
        ctx.save_for_backward(x)
        whole = comm.all_gather(x, tp) if split else x
        return product(whole, _matrix(weight), None if bias is None else bias.reshape(-1))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        weight, bias, tp, sink = ctx.weight, ctx.bias, ctx.tp, ctx.sink
        matrix = _matrix(weight)
        dy = grads[0].reshape(-1, matrix.shape[0])
        # The gather travels behind the first product, the sum behind the second. A gradient that is put off gathers
        # when its time comes: the whole input would else be kept until then.
        gathered = comm.all_gather_async(x, tp) if ctx.split and not (sink and sink.defers) else None
        reduce = comm.reduce_scatter_async if ctx.split else comm.all_reduce_async
        pending = (
            reduce(product(dy, matrix.t()).view(*grads[0].shape[:-1], -1), tp) if ctx.needs_input_grad[0] else None
        )

        def add_weight(out: Tensor) -> None:
            whole = x if not ctx.split else (gathered or comm.all_gather_async(x, tp)).wait()
            add_product(_matrix(out), dy, whole.reshape(-1, matrix.shape[1]))

        d_weight = hand_over(sink, weight, add_weight)
        d_bias = hand_over(sink, bias, lambda out: out.view(-1).add_(dy.sum(0, dtype=out.dtype)))
        return pending.wait() if pending else None, d_weight, d_bias, None, None, None


class _Row(torch.autograd.Function):
    """With ``activation`` the input is that of the activation, which the backward pass computes again."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        tp: Axis,
        split: bool,
        activation: Activation | None,
        sink: GradSink | None,
    ) -> Tensor:
        ctx.tp, ctx.split, ctx.activation, ctx.sink, ctx.weight, ctx.bias = tp, split, activation, sink, weight, bias
        ctx.save_for_backward(x)
        if activation is not None:
            x = activation.forward(x)
        if tp.size == 1:
            return product(x, weight, bias)
        y = product(x, weight)
        y = comm.reduce_scatter(y, tp) if split else comm.all_reduce(y, tp)
        return y if bias is None else y.add_(bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        weight, sink, slice_dy = ctx.weight, ctx.sink, grads[0]
        gathered = comm.all_gather_async(slice_dy, ctx.tp) if ctx.split else None
        d_bias = hand_over(
            sink, ctx.bias, lambda out: out.add_(slice_dy.reshape(-1, out.numel()).sum(0, dtype=out.dtype))
        )
        before = x
        if ctx.activation is not None:
            x = ctx.activation.forward(x)
        dy = (gathered.wait() if gathered else slice_dy).reshape(-1, weight.shape[0])
        d_input = None
        if ctx.needs_input_grad[0]:
            d_input = product(dy, weight.t()).view(x.shape)
            if ctx.activation is not None:
                d_input = ctx.activation.backward(d_input, before)
        d_weight = hand_over(sink, weight, lambda out: add_product(out, dy, x.reshape(-1, weight.shape[1])))
        return d_input, d_weight, d_bias, None, None, None, None


def column_linear(x: Tensor, weight: Tensor, bias: Tensor | None, tp: Axis, call: Call) -> Tensor:
    """``x`` [s, B, inputs] -> [S, B, outputs of this rank]. The gradient of ``x`` is summed over ``tp``."""
    return apply(_Column, x, weight, bias, tp, call.sequence_parallel, call.sink)


class ColumnParallelLinear(nn.Module):
    """Weight ``[*outputs, inputs]``, split along dimension ``split`` of ``outputs``; bias ``outputs``, split likewise.

    Raises:
        ValueError: if ``tp`` does not divide that dimension.
    """

    def __init__(
        self, name: str, inputs: int, outputs: Index, *, std: float, place: Place, bias: bool = True, split: int = 0
    ) -> None:
        super().__init__()
        self.tp = place.tp
        shape = (*outputs, inputs)
        box, local = shard(shape, split, place.tp.rank, place.tp.size)
        self.weight = parameter(ParamSpec(f"{name}.weight", shape, box, local, std=std), place)
        self.bias = None
        if bias:
            box, local = shard(outputs, split, place.tp.rank, place.tp.size)
            self.bias = parameter(ParamSpec(f"{name}.bias", outputs, box, local, decay=False), place)

    def forward(self, x_sBH: Tensor, call: Call) -> Tensor:
        return column_linear(x_sBH, self.weight, self.bias, self.tp, call)


class RowParallelLinear(nn.Module):
    """Weight ``[outputs, inputs]``, split along the inputs; bias ``[outputs]``, whole on every rank.

    Raises:
        ValueError: if ``tp`` does not divide ``inputs``.
    """

    def __init__(self, name: str, inputs: int, outputs: int, *, std: float, place: Place, bias: bool = True) -> None:
        super().__init__()
        self.tp = place.tp
        box, local = shard((outputs, inputs), 1, place.tp.rank, place.tp.size)
        self.weight = parameter(ParamSpec(f"{name}.weight", (outputs, inputs), box, local, std=std), place)
        self.bias = parameter(whole_spec(f"{name}.bias", (outputs,), place, decay=False), place) if bias else None

    def forward(self, x_SBI: Tensor, call: Call, *, activation: Activation | None = None) -> Tensor:
        """``[S, B, inputs of this rank]`` -> ``[s, B, outputs]``, summed over tp; the bias is added once.

        With ``activation`` the input goes through it, which is computed again in the backward pass, not kept.
        """
        return apply(_Row, x_SBI, self.weight, self.bias, self.tp, call.sequence_parallel, activation, call.sink)
