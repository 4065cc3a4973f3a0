"""AdamW over flat buffers: unscaling, clipping, update and rounding to narrow parameters in one pass, in place.

Maths (Loshchilov and Hutter, arXiv 1711.05101), with ``g = scale * gradient`` in step ``t``, which counts from 1::

    first  = beta1 first + (1 - beta1) g              second = beta2 second + (1 - beta2) g^2
    weight = (1 - rate weight_decay) weight
             - rate / (1 - beta1^t) * first / (sqrt(second / (1 - beta2^t)) + epsilon)

Shapes: all buffers are flat, of the same length; rate, scale and step are numbers, or tensors [] on the same device,
which a captured graph reads anew and which need no synchronisation.
Dtypes: weights and moments are fp32 or float64, in which the arithmetic is; coefficients are computed in float64.
``values``, narrow parameters of which ``weights`` are the master weights, get these rounded.
Traffic of an element in bf16 with master weights and fp32 gradients: 16 bytes read, 14 written.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.library import custom_op

from megapoly_kernels import apex_ops
from megapoly_kernels.launch import (
    Launch,
    Table,
    Variant,
    architecture,
    cdiv,
    jit,
    known_backend,
    on_device,
    runs_triton,
    settings,
    tl,
)

# By elements; the dtype is that of the weights.
LAUNCH: Table = {
    (80, 4, 1 << 62): Launch({"BLOCK": 1024}, warps=4),
    (80, 8, 1 << 62): Launch({"BLOCK": 512}, warps=4),
}
BACKENDS = ("auto", "triton", "apex")
_CHUNK = 1 << 22  # elements on a CPU: few starts of its threads, and little memory for scaled gradients
# Elements of which a CPU's thread takes whole multiples. What is left at the end is rounded in another way, one by one:
# it is filled up, so that numbers do not depend on where a shard ends.
_UNIT = 64


def adamw_reference(
    weights: Tensor, gradient: Tensor, moments: tuple[Tensor, Tensor], values: Tensor | None,
    now: tuple[float, float, float], beta1: float, beta2: float, epsilon: float, weight_decay: float,
) -> None:  # fmt: skip
    """The update by the kernel of ``torch.optim.AdamW(fused=True)``, where ``now`` is (rate, scale, step).

    It takes scaled gradients, since the kernel would overwrite others.
    """
    rate, scale, step = now
    steps, length = [torch.tensor(float(step), dtype=torch.float64)], weights.numel()
    scaled = torch.empty(min(_CHUNK, length), dtype=weights.dtype)
    whole = length // _UNIT * _UNIT
    for begin, end in (*((i, min(i + _CHUNK, whole)) for i in range(0, whole, _CHUNK)), (whole, length)):
        g = scaled[: end - begin]
        if gradient.dtype == g.dtype:
            torch.mul(gradient[begin:end], scale, out=g)
        else:
            g.copy_(gradient[begin:end]).mul_(scale)
        own = [each[begin:end] for each in (weights, *moments)]
        rest = -len(g) % _UNIT
        w, first, second, g = (torch.nn.functional.pad(each, (0, rest)) if rest else each for each in (*own, g))
        torch._fused_adamw_(
            [w], [g], [first], [second], [], steps, lr=rate, beta1=beta1, beta2=beta2, weight_decay=weight_decay,
            eps=epsilon, amsgrad=False, maximize=False,
        )  # fmt: skip
        if rest:
            for each, padded in zip(own, (w, first, second)):
                each.copy_(padded[: end - begin])
        if values is not None:
            values[begin:end].copy_(weights[begin:end])


@jit
def _adamw(
    weights_ptr, values_ptr, gradient_ptr, first_ptr, second_ptr, rate_ptr, scale_ptr, step_ptr, length,
    BETA1: tl.constexpr, BETA2: tl.constexpr, LOG2_BETA1: tl.constexpr, LOG2_BETA2: tl.constexpr,
    EPSILON: tl.constexpr, DECAY: tl.constexpr, HAS_VALUES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    wide: tl.constexpr = weights_ptr.dtype.element_ty
    # In float64: 1 - beta^t is a small difference of large numbers in the first steps.
    rate = tl.load(rate_ptr).to(tl.float64)
    step = tl.load(step_ptr).to(tl.float64)
    one = tl.full((), 1.0, tl.float64)
    correction1 = one - (tl.exp2(step * LOG2_BETA1) if BETA1 > 0 else 0.0)
    correction2 = one - (tl.exp2(step * LOG2_BETA2) if BETA2 > 0 else 0.0)
    scale = tl.load(scale_ptr).to(wide)
    keep = (one - rate * DECAY).to(wide)
    stride = (rate / correction1).to(wide)
    inverse = (one / correction2).to(wide)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < length
    g = tl.load(gradient_ptr + at, mask=inside, other=0.0).to(wide) * scale
    first = tl.load(first_ptr + at, mask=inside, other=0.0)
    second = tl.load(second_ptr + at, mask=inside, other=0.0)
    weight = tl.load(weights_ptr + at, mask=inside, other=0.0)
    first += (g - first) * (one - BETA1).to(wide)
    second = second * BETA2 + g * g * (one - BETA2).to(wide)
    weight = weight * keep - stride * (first / (tl.sqrt(second * inverse) + EPSILON))
    tl.store(first_ptr + at, first, mask=inside)
    tl.store(second_ptr + at, second, mask=inside)
    tl.store(weights_ptr + at, weight, mask=inside)
    if HAS_VALUES:
        tl.store(values_ptr + at, weight.to(values_ptr.dtype.element_ty), mask=inside)


def resolve(backend: str, weights: Tensor) -> str:
    """What updates on the device and in the dtype of ``weights``: ``torch``, ``triton`` or ``apex``.

    Raises:
        ValueError: no such back end, or one that is not for this device or dtype.
        ImportError: a back end that is not installed.
    """
    known_backend("adamw", backend, BACKENDS)
    on_gpu = runs_triton(weights)
    if backend == "auto":
        return "triton" if on_gpu else "torch"
    if not on_gpu or (backend == "apex" and weights.dtype == torch.float64):
        expected = "GPUs and no float64" if backend == "apex" else "GPUs"
        raise ValueError(
            f"adamw: the back end {backend} is for {expected}, got {weights.dtype} on {weights.device}; choose auto"
        )
    if backend == "apex":
        apex_ops.adam()
    return backend


def adamw_update(
    weights: Tensor, gradient: Tensor, moments: tuple[Tensor, Tensor], values: Tensor | None,
    now: tuple[Tensor, Tensor, Tensor], beta1: float, beta2: float, epsilon: float, weight_decay: float,
    backend: str = "auto",
) -> None:  # fmt: skip
    """The update, where ``now`` is (rate, scale, step), tensors [] on the device of the weights."""
    kind = resolve(backend, weights)
    if kind == "apex":
        apex_ops.adamw(weights, gradient, moments, now, beta1, beta2, epsilon, weight_decay)
        if values is not None:
            values.copy_(weights)
        return
    if kind == "torch":
        rate, scale, step = (float(each) for each in now)
        adamw_reference(
            weights, gradient, moments, values, (rate, scale, step), beta1, beta2, epsilon, weight_decay
        )  # fmt: skip
        return
    length = weights.numel()
    chosen = settings(LAUNCH, architecture(weights.device), weights.element_size(), length)
    if length:
        with on_device(weights):
            _adamw[(cdiv(length, chosen.constants["BLOCK"]),)](
                weights, values, gradient.contiguous(), *moments, *now, length,
                **_constants(beta1, beta2, epsilon, weight_decay), HAS_VALUES=values is not None, **chosen.options,
            )  # fmt: skip


def _constants(beta1: float, beta2: float, epsilon: float, weight_decay: float) -> dict[str, float]:
    """Numbers that stay the same in a run: as constants they keep their 64 bits, which arguments of Triton do not."""
    log1, log2 = (math.log2(beta) if beta else 0.0 for beta in (beta1, beta2))
    return {
        "BETA1": beta1, "BETA2": beta2, "LOG2_BETA1": log1, "LOG2_BETA2": log2,
        "EPSILON": epsilon, "DECAY": weight_decay,
    }  # fmt: skip


@custom_op("megapoly::adamw", mutates_args=("weights", "first", "second", "values"))
def _adamw_op(
    weights: Tensor, gradient: Tensor, first: Tensor, second: Tensor, values: Tensor | None,
    rate: Tensor, scale: Tensor, step: Tensor, beta1: float, beta2: float, epsilon: float, weight_decay: float,
    backend: str = "auto",
) -> None:  # fmt: skip
    adamw_update(
        weights, gradient, (first, second), values, (rate, scale, step), beta1, beta2, epsilon, weight_decay, backend
    )  # fmt: skip


@_adamw_op.register_fake
def _(
    weights: Tensor, gradient: Tensor, first: Tensor, second: Tensor, values: Tensor | None,
    rate: Tensor, scale: Tensor, step: Tensor, beta1: float, beta2: float, epsilon: float, weight_decay: float,
    backend: str = "auto",
) -> None:  # fmt: skip
    return None


@torch.no_grad()
def adamw(
    weights: Tensor,
    gradient: Tensor,
    first: Tensor,
    second: Tensor,
    *,
    values: Tensor | None = None,
    rate: float | Tensor,
    scale: float | Tensor = 1.0,
    step: int | Tensor,
    beta1: float = 0.9,
    beta2: float = 0.999,
    epsilon: float = 1e-8,
    weight_decay: float = 0.0,
    backend: str = "auto",
) -> None:
    """One step of AdamW, in place, from ``scale * gradient``.

    Args:
        weights: [N], fp32 or float64: the parameters, or the master weights of ``values``.
        gradient: [N], any float and any stride; is not written.
        first, second: [N], moments in the dtype of the weights; zero before the first step.
        values: [N], parameters in another dtype, which get the weights rounded.
        rate, scale, step: numbers, or tensors [] on the device of the weights. A number is written to the GPU by a
            small kernel of its own: who updates many buffers makes the tensors once. ``step`` is 1 in the first.
        weight_decay: decoupled from the gradient; 0 for none.
        backend: ``triton``, or ``apex``, the package. ``auto`` is Triton on a GPU and PyTorch elsewhere.

    Raises:
        ValueError: a shape, a dtype, a device, a buffer in pieces, or a number that is out of its range.
        ImportError: a back end that is not installed.
    """
    if weights.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"adamw: weights are {weights.dtype}, expected float32 or float64; keep float32 master weights and give"
            " narrow parameters as values"
        )
    written = {"weights": weights, "first": first, "second": second} | ({} if values is None else {"values": values})
    for name, tensor in (written | {"gradient": gradient}).items():
        if tensor.shape != weights.shape or tensor.ndim != 1 or tensor.device != weights.device:
            raise ValueError(
                f"adamw: {name} has shape {list(tensor.shape)} on {tensor.device}, expected a flat tensor like the"
                f" weights, [{weights.numel()}] on {weights.device}"
            )
        if name in written and not tensor.is_contiguous():
            raise ValueError(f"adamw: {name} has stride {tensor.stride(0)}, expected elements one after another")
        if name in ("first", "second") and tensor.dtype != weights.dtype:
            raise ValueError(f"adamw: {name} is {tensor.dtype}, expected {weights.dtype} as of the weights")
    if not (0 <= beta1 < 1 and 0 <= beta2 < 1 and epsilon >= 0):
        raise ValueError(
            f"adamw: beta1 {beta1}, beta2 {beta2}, epsilon {epsilon}; expected betas in [0, 1) and epsilon of 0 or more"
        )
    now = [_scalar(name, value, weights) for name, value in (("rate", rate), ("scale", scale), ("step", step))]
    _adamw_op(weights, gradient, first, second, values, *now, beta1, beta2, epsilon, weight_decay, backend)


def _scalar(name: str, value: float | Tensor, like: Tensor) -> Tensor:
    if not isinstance(value, Tensor):
        return torch.full((), value, dtype=torch.float64, device=like.device)
    if value.ndim or value.device != like.device:
        raise ValueError(
            f"adamw: {name} has shape {list(value.shape)} on {value.device}, expected a number or a tensor [] on"
            f" {like.device}"
        )
    return value


def variants(arch: int) -> Iterator[Variant]:
    """What is compiled ahead of time."""
    constants = _constants(0.9, 0.95, 1e-8, 0.1)
    for kind in ("bf16", "fp32"):
        narrow = kind == "bf16"
        types = {each: "*fp32" for each in ("weights_ptr", "gradient_ptr", "first_ptr", "second_ptr")}
        types |= {each: "*fp64" for each in ("rate_ptr", "scale_ptr", "step_ptr")} | {"length": "i32"}
        types |= {"values_ptr": "*bf16"} if narrow else {}
        rest = {"HAS_VALUES": narrow} | ({} if narrow else {"values_ptr": None})
        yield Variant(f"adamw {kind}", _adamw, types, constants | rest, settings(LAUNCH, arch, 4, 1 << 30))
