"""What a layer needs beside its input, for one micro-batch. Legend of shapes: S sequence, B micro-batch, H hidden."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from megapoly.config import Kernels
from megapoly.context import ALONE, Axis
from megapoly.layers.cache import KeyValueCache
from megapoly.spec import Index, ParamSpec, shard


class GradSink(Protocol):
    """Takes weight gradients in place of ``parameter.grad``.

    Attributes:
        defers: whether ``accumulate`` is called after the backward pass that handed it over, not in it.
    """

    defers: bool

    def add(self, parameter: Tensor, accumulate: Callable[[Tensor], object]) -> None:
        """Call ``accumulate(buffer)``, now or later; it adds the gradient to ``buffer``, of the parameter's shape.

        The buffer's dtype is promote(parameter dtype, fp32).
        """

    def before_forward(self, module: nn.Module) -> None:
        """Wait until the parameters of ``module`` are whole: a sharded optimizer gathers them meanwhile."""


class Deferred:
    """A sink that puts off every gradient to :meth:`flush`: the weight part of a split backward pass."""

    defers = True

    def __init__(self, sink: GradSink) -> None:
        self._sink = sink
        self._later: list[tuple[Tensor, Callable[[Tensor], object]]] = []

    def add(self, parameter: Tensor, accumulate: Callable[[Tensor], object]) -> None:
        self._later.append((parameter, accumulate))

    def before_forward(self, module: nn.Module) -> None:
        self._sink.before_forward(module)

    @torch.no_grad()
    def flush(self) -> None:
        """Hand on what came, in its order, and let go of what each gradient needed."""
        later, self._later = self._later, []
        later.reverse()
        while later:
            self._sink.add(*later.pop())


@dataclass(frozen=True)
class Call:
    """One micro-batch.

    Attributes:
        positions_SB: position of every token, in its document or in the window; int64.
        mask_BSS: True where a query (second dimension) sees a key; None is the causal mask.
        scores_BASS: what is added to the scores of this rank's A heads, -inf where a query does not see a key; takes
            the place of the mask. B and A may be 1; with a cache the last dimension is of all tokens so far.
        rotary: cosines and sines of the positions, see :meth:`megapoly.layers.rotary.Rotary.table`.
        cu_seqlens: where documents end, int32, counted over the micro-batch sample by sample, where attention keeps to
            them. Where no kernel does, a stage makes the mask of them, which then is not there before its time.
        slopes_A: of ALiBi, of this rank's A heads, where a kernel adds what takes the place of ``scores_BASS``.
        tokens_SB: on the first stage.
        labels_SB: on the last stage, -1 where a token is not counted; None asks for logits.
        loss_gradient: of every counted token's loss, in training, so that a loss in chunks has its gradients at once.
        samples_B: sample numbers, on which dropout depends; None switches dropout off.
        sequence_parallel: whether activations outside of attention and feed-forward are slices of the sequence.
        sink: where weight gradients go; None leaves them to autograd.
        cache: of the tokens before these, which the pass adds its own to; no gradients.
    """

    positions_SB: Tensor
    mask_BSS: Tensor | None = None
    scores_BASS: Tensor | None = None
    rotary: Tensor | None = None
    cu_seqlens: Tensor | None = None
    slopes_A: Tensor | None = None
    tokens_SB: Tensor | None = None
    labels_SB: Tensor | None = None
    loss_gradient: float | None = None
    samples_B: Tensor | None = None
    sequence_parallel: bool = False
    sink: GradSink | None = None
    cache: KeyValueCache | None = None

    def slice(self, x_S: Tensor, tp: Axis) -> Tensor:
        """This rank's part of a tensor whose first dimension is the sequence."""
        return x_S.chunk(tp.size)[tp.rank] if self.sequence_parallel else x_S


@dataclass(frozen=True)
class Place:
    """Where a layer's parameters live.

    Attributes:
        sequence_parallel: whether parameters that every tensor-parallel rank holds whole see a slice of the sequence
            only, so that their gradients are partial over tp.
        seed: of dropout.
        kernels: what computes attention and norms.
    """

    tp: Axis = ALONE
    dtype: torch.dtype = torch.float32
    device: torch.device = torch.device("cpu")
    sequence_parallel: bool = False
    seed: int = 0
    kernels: Kernels = Kernels()


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Sums over many values of ``dtype`` are held in this one."""
    return torch.promote_types(dtype, torch.float32)


def parameter(spec: ParamSpec, place: Place) -> nn.Parameter:
    """An unfilled parameter of ``spec.local_shape`` that carries its spec."""
    result = nn.Parameter(torch.empty(spec.local_shape, dtype=place.dtype, device=place.device))
    result.spec = spec  # type: ignore[attr-defined]
    return result


def whole_spec(name: str, shape: Index, place: Place, *, decay: bool, mean: float = 0.0, std: float = 0.0) -> ParamSpec:
    """Spec of a parameter that every tensor-parallel rank holds whole; the first of them owns it."""
    box, local = shard(shape, 0, 0, 1)
    partial = ("tp",) if place.sequence_parallel and place.tp.size > 1 else ()
    owner = place.tp.rank == 0
    return ParamSpec(name, shape, box, local, partial=partial, owner=owner, decay=decay, mean=mean, std=std)


def spec_of(tensor: Tensor) -> ParamSpec:
    return tensor.spec  # type: ignore[attr-defined]


class _Forgotten:
    """In place of autograd's context, where there is no backward pass to keep anything for."""

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        pass


def apply(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """``function.apply``, or under inference mode its forward pass alone: the rest costs as much as a small product."""
    if torch.is_inference_mode_enabled():
        return function.forward(_Forgotten(), *arguments)
    return function.apply(*arguments)


def hand_over(sink: GradSink | None, target: Tensor | None, accumulate: Callable[[Tensor], object]) -> Tensor | None:
    """Give a weight's gradient to ``sink``, or return it for autograd where there is none."""
    if target is None or not target.requires_grad:
        return None
    if sink is not None:
        sink.add(target, accumulate)
        return None
    gradient = torch.zeros_like(target)
    accumulate(gradient)
    return gradient
