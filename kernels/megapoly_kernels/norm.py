"""LayerNorm and RMSNorm over the last dimension, with the residual added in the same pass.

Maths: ``h = x + residual``; LayerNorm is ``y = (h - mean) rstd weight + bias`` with ``rstd = 1 / sqrt(variance +
epsilon)`` (Ba et al., arXiv 1607.06450), RMSNorm ``y = h rstd weight`` with ``rstd = 1 / sqrt(mean(h^2) + epsilon)``
(Zhang and Sennrich, arXiv 1910.07467). With ``n = (h - mean) rstd``, or ``h rstd``, and ``g = dy weight`` the gradients
are ``dweight = sum(dy n)``, ``dbias = sum(dy)`` over rows, and of h ``rstd (g - n mean(g n) - mean(g))``, of whose
terms RMSNorm lacks the last, plus the gradient that comes into h from elsewhere.

Shapes: ``x`` and ``residual`` are [..., N], any N, any strides: rows whose elements lie side by side are read where
they are, all else is copied. ``weight`` and ``bias`` are [N]. Statistics are [..., 1].
Dtypes: any floats, also mixed. ``h`` has promote(x, residual) and is rounded before it is normed; ``y`` has the
weight's, so that an fp32 residual stream enters a lower-precision layer here. Arithmetic, statistics and gradients of
weight and bias are in promote(h, weight, fp32).
Gradients: kept are ``h`` (or ``x``), the weight and the statistics. Weight gradients are summed over groups of rows,
then over groups, in a fixed order: the same bits every time on one kind of device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from megapoly_kernels import apex_ops, norm_cuda, norm_triton
from megapoly_kernels.launch import architecture, known_backend, runs_triton

BACKENDS = ("auto", "triton", "cuda", "apex")


def layer_norm_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None, epsilon: float = 1e-5
) -> Any:
    """:func:`layer_norm` in PyTorch."""
    h = x if residual is None else x + residual
    wide = _wide(h, weight)
    b = None if bias is None else bias.to(wide)
    y = torch.nn.functional.layer_norm(h.to(wide), weight.shape, weight.to(wide), b, epsilon).to(weight.dtype)
    return y if residual is None else (y, h)


def rms_norm_reference(x: Tensor, weight: Tensor, residual: Tensor | None = None, epsilon: float = 1e-6) -> Any:
    """:func:`rms_norm` in PyTorch."""
    h = x if residual is None else x + residual
    wide = _wide(h, weight)
    y = torch.nn.functional.rms_norm(h.to(wide), weight.shape, weight.to(wide), epsilon).to(weight.dtype)
    return y if residual is None else (y, h)


def _wide(h: Tensor, weight: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(h.dtype, weight.dtype), torch.float32)


def resolve(backend: str, x: Tensor, columns: int, itemsize: int, backward: bool = False) -> str:
    """What computes a norm on the device of ``x``: ``torch``, ``triton``, ``cuda`` or ``apex``.

    Args:
        backend: as for :func:`layer_norm`.
        columns: of a row.
        itemsize: bytes of an element of ``h``.

    Raises:
        ValueError: no such back end, or one for GPUs where ``x`` is on a CPU.
        ImportError: a back end that is not installed.
    """
    known_backend("norm", backend, BACKENDS)
    if not runs_triton(x):
        if backend != "auto":
            raise ValueError(f"norm: the back end {backend} is for GPUs, and x is on {x.device}; choose auto")
        return "torch"
    if backend == "cuda" and norm_cuda._cuda is None:
        raise ImportError(f"norm: the back end cuda is not built: {norm_cuda.INSTALL}")
    if backend == "apex":
        apex_ops.norms()
    if backend == "auto":
        table = norm_cuda.BACKWARD if backward else norm_cuda.FORWARD
        return "cuda" if norm_cuda.takes(table, architecture(x.device), itemsize, columns) else "triton"
    return backend


def layer_norm_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    epsilon: float = 1e-5,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``y``, ``h`` (which is ``x`` where there is no residual), mean and rstd, without a gradient."""
    kind = _resolve_forward(backend, x, residual)
    if kind != "torch":
        y, h, mean, rstd = _forward(kind, x, weight, bias, residual, epsilon, True)
        assert mean is not None
        return y, h, mean, rstd
    h = x if residual is None else (x + residual).contiguous()
    wide = _wide(h, weight)
    b = None if bias is None else bias.to(wide)
    y, mean, rstd = torch.native_layer_norm(h.to(wide), weight.shape, weight.to(wide), b, epsilon)
    return y.to(weight.dtype), h, mean, rstd


def layer_norm_backward(
    dy: Tensor,
    h: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    dh: Tensor | None = None,
    has_bias: bool = True,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of ``x``, the residual, the weight and the bias, the last two in promote(h, weight, fp32).

    Args:
        dy: gradient of ``y``, any float.
        h, mean, rstd: of :func:`layer_norm_forward`.
        dh: gradient of ``h`` from elsewhere, which is added.
        dtype: of ``x``; h's where not given. Where it is h's, the first two results are one tensor.
    """
    kind = resolve(backend, h, h.shape[-1], h.element_size(), backward=True)
    if kind != "torch":
        return _backward(kind, dy, h, weight, mean, rstd, dh, has_bias, dtype)
    wide = rstd.dtype
    w = weight.to(wide)
    # Of the bias, PyTorch takes the shape alone.
    d_wide, dw, db = torch.ops.aten.native_layer_norm_backward(
        dy.to(wide), h.to(wide), w.shape, mean, rstd, w, w, [True, True, has_bias]
    )
    return *_rounded(d_wide, h, dh, dtype), dw, db if has_bias else None


def rms_norm_forward(
    x: Tensor, weight: Tensor, residual: Tensor | None = None, epsilon: float = 1e-6, backend: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """``y``, ``h`` (which is ``x`` where there is no residual) and rstd, without a gradient."""
    kind = _resolve_forward(backend, x, residual)
    if kind != "torch":
        y, h, _, rstd = _forward(kind, x, weight, None, residual, epsilon, False)
        return y, h, rstd
    h = x if residual is None else (x + residual).contiguous()
    wide = h.contiguous().to(_wide(h, weight))
    rstd = wide.square().mean(-1, keepdim=True).add_(epsilon).rsqrt_()
    return (wide * rstd).mul_(weight).to(weight.dtype), h, rstd


def rms_norm_backward(
    dy: Tensor,
    h: Tensor,
    weight: Tensor,
    rstd: Tensor,
    dh: Tensor | None = None,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``x``, the residual and the weight; see :func:`layer_norm_backward`."""
    kind = resolve(backend, h, h.shape[-1], h.element_size(), backward=True)
    if kind != "torch":
        return _backward(kind, dy, h, weight, None, rstd, dh, False, dtype)[:3]
    g, normed = dy.contiguous().to(rstd.dtype), h.contiguous().to(rstd.dtype) * rstd
    dw = (g * normed).flatten(0, -2).sum(0)
    g = g * weight
    d_wide = (g - normed * (g * normed).mean(-1, keepdim=True)).mul_(rstd)
    return *_rounded(d_wide, h, dh, dtype), dw


def _rounded(d_wide: Tensor, h: Tensor, dh: Tensor | None, dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the residual, each rounded once."""
    if dh is not None:
        d_wide = d_wide + dh
    d_residual = d_wide.to(h.dtype)
    return d_residual if dtype in (None, h.dtype) else d_wide.to(dtype), d_residual


def _sum_dtype(x: Tensor, residual: Tensor | None) -> torch.dtype:
    return x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)


def _resolve_forward(backend: str, x: Tensor, residual: Tensor | None) -> str:
    return resolve(backend, x, x.shape[-1], _sum_dtype(x, residual).itemsize)


def _rows(x: Tensor) -> Tensor:
    """[rows, N], a view where rows lie at equal distances and their elements side by side."""
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _forward(
    kind: str, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, epsilon: float, centred: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """By a kernel of the kind. Of no rows there is nothing to compute."""
    if kind == "apex" and x.numel():
        h = x if residual is None else x + residual
        y, mean, rstd = apex_ops.norm_forward(h, weight, bias, epsilon, centred)
        return y, h, mean, rstd
    h = x if residual is None else x.new_empty(x.shape, dtype=_sum_dtype(x, residual))
    y = x.new_empty(x.shape, dtype=weight.dtype)
    rstd = x.new_empty(*x.shape[:-1], 1, dtype=_wide(h, weight))
    mean = torch.empty_like(rstd) if centred else None
    if y.numel():
        kernel = norm_cuda.forward if kind == "cuda" else norm_triton.forward
        outputs = (y, None if residual is None else h, mean, rstd)
        kernel(_rows(x), weight, bias, None if residual is None else _rows(residual), outputs, epsilon)
    return y, h, mean, rstd


def _backward(
    kind: str, dy: Tensor, h: Tensor, weight: Tensor, mean: Tensor | None, rstd: Tensor, into: Tensor | None,
    has_bias: bool, dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    if kind == "apex" and h.numel():
        d_wide, dw, db = apex_ops.norm_backward(dy, h, weight, mean, rstd)
        d_bias = db.to(rstd.dtype) if has_bias and db is not None else None
        return *_rounded(d_wide, h, into, dtype), dw.to(rstd.dtype), d_bias
    d_residual = torch.empty_like(h, memory_format=torch.contiguous_format)
    dx = d_residual if dtype in (None, h.dtype) else torch.empty_like(d_residual, dtype=dtype)
    if not h.numel():
        none = rstd.new_zeros(h.shape[-1])
        return dx, d_residual, none, none.clone() if has_bias else None
    kernel = norm_cuda.backward if kind == "cuda" else norm_triton.backward
    inputs = (_rows(dy), _rows(h), None if into is None else _rows(into))
    return dx, d_residual, *kernel(inputs, weight, mean, rstd, (dx, d_residual), has_bias)


@custom_op("megapoly::norm", mutates_args=())
def _norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    epsilon: float,
    centred: bool,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, h, mean and rstd; h and the mean are empty where there are none."""
    if centred:
        y, h, mean, rstd = layer_norm_forward(x, weight, bias, residual, epsilon, backend)
    else:
        y, h, rstd = rms_norm_forward(x, weight, residual, epsilon, backend)
        mean = rstd.new_empty(0)
    return y, x.new_empty(0) if residual is None else h, mean, rstd


@_norm.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    epsilon: float,
    centred: bool,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    h = x.new_empty(0 if residual is None else x.shape, dtype=_sum_dtype(x, residual))
    rstd = x.new_empty(*x.shape[:-1], 1, dtype=_wide(h, weight))
    return x.new_empty(x.shape, dtype=weight.dtype), h, rstd.new_empty(rstd.shape if centred else 0), rstd


@custom_op("megapoly::norm_backward", mutates_args=())
def _norm_gradient(
    dy: Tensor,
    h: Tensor,
    weight: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    dh: Tensor | None,
    has_bias: bool,
    dtype: torch.dtype,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the residual, x, the weight and the bias; empty is x's that is the residual's, or a bias's."""
    d_bias: Tensor | None = None
    if mean is not None:
        dx, d_residual, d_weight, d_bias = layer_norm_backward(dy, h, weight, mean, rstd, dh, has_bias, dtype, backend)
    else:
        dx, d_residual, d_weight = rms_norm_backward(dy, h, weight, rstd, dh, dtype, backend)
    return (
        d_residual,
        h.new_empty(0, dtype=dtype) if dx is d_residual else dx,
        d_weight,
        rstd.new_empty(0) if d_bias is None else d_bias,
    )


@_norm_gradient.register_fake
def _(
    dy: Tensor,
    h: Tensor,
    weight: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    dh: Tensor | None,
    has_bias: bool,
    dtype: torch.dtype,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        h.new_empty(h.shape),
        h.new_empty(0 if dtype == h.dtype else h.shape, dtype=dtype),
        rstd.new_empty(weight.shape),
        rstd.new_empty(weight.shape if has_bias else 0),
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, residual, _, centred, ctx.backend = inputs
    _, h, mean, rstd = output
    ctx.save_for_backward(x if residual is None else h, weight, mean if centred else None, rstd)
    ctx.dtype = x.dtype
    ctx.residual = None if residual is None else residual.dtype
    ctx.bias = None if bias is None else bias.dtype
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)


def _norm_autograd(ctx: Any, dy: Tensor | None, dh: Tensor | None, *statistics: None) -> tuple[Tensor | None, ...]:
    h, weight, mean, rstd = ctx.saved_tensors
    if dy is None:
        dy = h.new_zeros(h.shape, dtype=weight.dtype)
    dh = None if ctx.residual is None else dh
    d_residual, dx, d_weight, d_bias = _norm_gradient(
        dy, h, weight, mean, rstd, dh, ctx.bias is not None, ctx.dtype, ctx.backend
    )
    return (
        d_residual if ctx.dtype == h.dtype else dx,
        d_weight.to(weight.dtype),
        None if ctx.bias is None else d_bias.to(ctx.bias),
        None if ctx.residual is None else d_residual.to(ctx.residual),
        None,
        None,
        None,
    )


_norm.register_autograd(_norm_autograd, setup_context=_keep)


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    epsilon: float = 1e-5,
    backend: str = "auto",
) -> Any:
    """LayerNorm of ``h = x + residual``, or of ``x``, over the last dimension; in the weight's dtype.

    Args:
        x: [..., N], any strides.
        weight, bias: [N].
        residual: as ``x``; may have another dtype, such as fp32.
        backend: ``triton``; ``cuda``, of csrc/cuda; ``apex``, the package. ``auto`` is Triton on a GPU, or CUDA
            from the lengths of rows on for which a table says so, and PyTorch's own elsewhere.

    Returns:
        ``y``; with a residual ``(y, h)``, h in promote(x, residual).

    Raises:
        ValueError: a shape that does not fit, or a back end that is not for this device.
        ImportError: a back end that is not installed.
    """
    _fits("layer_norm", x, weight, bias, residual)
    y, h, _, _ = _norm(x, weight, bias, residual, epsilon, True, backend)
    return y if residual is None else (y, h)


def rms_norm(
    x: Tensor, weight: Tensor, residual: Tensor | None = None, epsilon: float = 1e-6, backend: str = "auto"
) -> Any:
    """RMSNorm of ``h = x + residual``, or of ``x``; otherwise as :func:`layer_norm`."""
    _fits("rms_norm", x, weight, None, residual)
    y, h, _, _ = _norm(x, weight, None, residual, epsilon, False, backend)
    return y if residual is None else (y, h)


def _fits(name: str, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> None:
    for what, each in (("weight", weight), ("bias", bias)):
        if each is not None and each.shape != x.shape[-1:]:
            found = f"{what} has shape {tuple(each.shape)}"
            raise ValueError(f"{name}: {found}, expected [{x.shape[-1]}], the last dimension of x")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"{name}: residual has shape {tuple(residual.shape)}, expected {tuple(x.shape)}, as x has")
