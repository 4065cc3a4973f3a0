"""Dropout, and dropout + add, as a function of (key, sample, token, channel): nothing is kept for the backward pass.

Maths: ``residual + x keep / (1 - rate)``. An element is kept where its random word is at least ``rate 2^32``; word
``channel % 4`` of the four of Philox 4x32-10 (see philox.py) at counter ``token ceil(N / 4) + channel // 4`` in the
stream ``sample``. The backward pass makes the same words again.

Shapes: ``x`` and ``residual`` [..., N]; ``samples`` and ``tokens`` int64, which broadcast to [...]. Any strides;
channels that are not next to each other are copied first.
Dtypes: any float; arithmetic is in promote(dtypes, fp32), and results are rounded once, to promote(x, residual).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from megapoly_kernels import philox
from megapoly_kernels.launch import (
    Launch,
    Table,
    Variant,
    architecture,
    cdiv,
    jit,
    on_device,
    runs_triton,
    settings,
    tl,
    two_leads,
    wide_dtype,
    widen,
)

# By elements of a row; the dtype is that of x.
LAUNCH: Table = {
    (80, 2, 1 << 30): Launch({"BLOCK": 1024}, warps=4),
    (80, 4, 1 << 30): Launch({"BLOCK": 512}, warps=4),
    (80, 8, 1 << 30): Launch({"BLOCK": 512}, warps=4),
}
_WORDS = 1 << 16  # at a time on a CPU; they and what makes them stay in a core's cache


def keep_reference(samples: Tensor, tokens: Tensor, channels: int, key: int, rate: float) -> Tensor:
    """Where elements are kept: bool [*broadcast(samples, tokens), channels], in PyTorch."""
    samples, tokens = torch.broadcast_tensors(samples, tokens)
    lead = samples.shape
    samples, tokens = samples.reshape(-1, 1), tokens.reshape(-1, 1)
    blocks = cdiv(channels, 4)
    counters = torch.arange(blocks, device=tokens.device)
    kept = torch.empty(tokens.shape[0], channels, dtype=torch.bool, device=tokens.device)
    rows = max(1, _WORDS // max(4 * blocks, 1)) if tokens.is_cpu else max(1, tokens.shape[0])
    for begin in range(0, tokens.shape[0], rows):
        part = slice(begin, begin + rows)
        index = tokens[part] * blocks + counters
        words = philox.words(index, key, samples[part].expand_as(index)).flatten(-2)
        torch.ge(words[:, :channels], _threshold(rate), out=kept[part])
    return kept.view(*lead, channels)


def dropout_add_reference(
    x: Tensor, residual: Tensor | None, samples: Tensor, tokens: Tensor, key: int, rate: float, dtype: torch.dtype
) -> Tensor:
    """``residual + x keep / (1 - rate)`` in PyTorch; without a residual the second term. In ``dtype``."""
    kept = keep_reference(samples.expand(x.shape[:-1]), tokens, x.shape[-1], key, rate)
    wide = wide_dtype(x)
    dropped = x.to(wide) * kept * (1.0 / (1.0 - rate))
    return (dropped if residual is None else residual + dropped).to(dtype)


def _threshold(rate: float) -> int:
    return round(rate * 2**32)


@jit
def random_words(key, stream, index):
    """Words [4 K] of K counters ``index`` in a stream; all are int64, inside of kernels."""
    key = tl.cast(key, tl.int64)  # a small one arrives as int32, and 1 as a constant
    high, zero = (index >> 32).to(tl.uint32), (index * 0).to(tl.uint32)
    stream_low, stream_high = zero + stream.to(tl.uint32), zero + (stream >> 32).to(tl.uint32)
    a, b, c, d = tl.philox(key, index.to(tl.uint32), high, stream_low, stream_high)
    return tl.interleave(tl.interleave(a, c), tl.interleave(b, d))


@jit
def _dropout_add(
    out_ptr, x_ptr, residual_ptr, samples_ptr, tokens_ptr, key, columns, channels,
    x_row, x_column, residual_row, residual_column, samples_row, samples_column, tokens_row, tokens_column,
    THRESHOLD: tl.constexpr, SCALE: tl.constexpr, HAS_RESIDUAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    row, column = token // columns, token % columns
    stream = tl.load(samples_ptr + row * samples_row + column * samples_column)
    number = tl.load(tokens_ptr + row * tokens_row + column * tokens_column)
    start = tl.program_id(1) * BLOCK
    index = number * ((channels + 3) // 4) + start // 4 + tl.arange(0, BLOCK // 4)
    words = random_words(key, stream, index)
    at = start + tl.arange(0, BLOCK)
    inside = at < channels
    x = widen(tl.load(x_ptr + row * x_row + column * x_column + at, mask=inside, other=0.0))
    # A dropped element counts 0 times, which leaves what is not finite in sight, as in PyTorch.
    y = x * tl.where(words.to(tl.int64) >= THRESHOLD, 1.0, 0.0).to(x.dtype) * SCALE
    if HAS_RESIDUAL:
        y += widen(tl.load(residual_ptr + row * residual_row + column * residual_column + at, mask=inside, other=0.0))
    tl.store(out_ptr + token * channels + at, y.to(out_ptr.dtype.element_ty), mask=inside)


def dropout_add_forward(
    x: Tensor, residual: Tensor | None, samples: Tensor, tokens: Tensor, key: int, rate: float, dtype: torch.dtype
) -> Tensor:
    """Like :func:`dropout_add_reference`, without a gradient; the backward pass is this without a residual."""
    if not runs_triton(x):
        return dropout_add_reference(x, residual, samples, tokens, key, rate, dtype)
    channels = x.shape[-1]
    out = x.new_empty(x.shape, dtype=dtype)
    if not out.numel():
        return out
    leads = x.ndim - 1
    rows = two_leads(_side_by_side(x), leads)
    plain = rows.shape[:2]
    add = None if residual is None else two_leads(_side_by_side(residual), leads)
    numbers = [two_leads(each.expand(x.shape[:-1]), leads) for each in (samples, tokens)]
    chosen = settings(LAUNCH, architecture(x.device), x.element_size(), channels)
    with on_device(x):
        _dropout_add[plain.numel(), cdiv(channels, chosen.constants["BLOCK"])](
            out, rows, add, *numbers, _signed(key), plain[1], channels, *rows.stride()[:2],
            *((0, 0) if add is None else add.stride()[:2]), *(stride for each in numbers for stride in each.stride()),
            THRESHOLD=_threshold(rate), SCALE=1.0 / (1.0 - rate), HAS_RESIDUAL=add is not None, **chosen.options,
        )  # fmt: skip
    return out


def _side_by_side(x: Tensor) -> Tensor:
    """With channels next to each other."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _signed(key: int) -> int:
    """The 64 bits of a key as a number that an int64 holds."""
    return (key & (1 << 64) - 1 ^ 1 << 63) - (1 << 63)


@custom_op("megapoly::dropout_add", mutates_args=())
def _dropout_op(
    x: Tensor, residual: Tensor | None, samples: Tensor, tokens: Tensor, key: int, rate: float, dtype: torch.dtype
) -> Tensor:
    return dropout_add_forward(x, residual, samples, tokens, key, rate, dtype)


@_dropout_op.register_fake
def _(
    x: Tensor, residual: Tensor | None, samples: Tensor, tokens: Tensor, key: int, rate: float, dtype: torch.dtype
) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, residual, samples, tokens, ctx.key, ctx.rate, _ = inputs
    ctx.save_for_backward(samples, tokens)
    ctx.dtypes = x.dtype, None if residual is None else residual.dtype


def _autograd(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    kind, residual = ctx.dtypes
    dx = _dropout_op(dy, None, *ctx.saved_tensors, ctx.key, ctx.rate, kind) if ctx.needs_input_grad[0] else None
    return dx, None if residual is None else dy.to(residual), None, None, None, None, None


_dropout_op.register_autograd(_autograd, setup_context=_keep)


def dropout_add(x: Tensor, residual: Tensor, key: int, rate: float, samples: Tensor, tokens: Tensor) -> Tensor:
    """``residual + x keep / (1 - rate)``, in promote(x, residual).

    Args:
        x, residual: [..., N], any strides.
        key: 64 bits, of the place in the model and the seed.
        rate: share of the elements that are dropped, in [0, 1); 0 is the plain sum.
        samples, tokens: int64, broadcast to [...]; an element is a function of key, sample, token and channel.

    Raises:
        ValueError: shapes that do not fit, another integer type, or a rate out of its range.
    """
    if residual.shape != x.shape:
        raise ValueError(
            f"dropout: residual has shape {list(residual.shape)}, expected {list(x.shape)}, that of x"
        )  # fmt: skip
    _check(x, rate, samples, tokens)
    if not rate:
        return residual + x
    dtype = torch.promote_types(x.dtype, residual.dtype)
    return _dropout_op(x, residual, samples, tokens, _signed(key), rate, dtype)


def dropout(x: Tensor, key: int, rate: float, samples: Tensor, tokens: Tensor) -> Tensor:
    """``x keep / (1 - rate)``, in the dtype of ``x``; see :func:`dropout_add`. A rate of 0 gives ``x`` itself."""
    _check(x, rate, samples, tokens)
    return _dropout_op(x, None, samples, tokens, _signed(key), rate, x.dtype) if rate else x


def _check(x: Tensor, rate: float, samples: Tensor, tokens: Tensor) -> None:
    if not 0 <= rate < 1:
        raise ValueError(f"dropout: rate is {rate}, expected 0 or more and less than 1")
    for name, each in (("samples", samples), ("tokens", tokens)):
        lead, shape = tuple(x.shape[:-1]), tuple(each.shape)
        if len(shape) > len(lead) or any(a not in (1, b) for a, b in zip(reversed(shape), reversed(lead))):
            raise ValueError(
                f"dropout: {name} have shape {list(shape)}, which does not broadcast to {list(lead)}, that of x"
                " without its channels"
            )
        if each.dtype != torch.int64 or each.device != x.device:
            raise ValueError(
                f"dropout: {name} are {each.dtype} on {each.device}, expected torch.int64 on {x.device}"
            )  # fmt: skip


def variants(arch: int) -> Iterator[Variant]:
    """What is compiled ahead of time."""
    strides = [f"{tensor}_{of}" for tensor in ("x", "residual", "samples", "tokens") for of in ("row", "column")]
    for itemsize, kind, other in ((2, "bf16", "bf16"), (2, "bf16", "fp32"), (4, "fp32", "fp32"), (2, "bf16", "")):
        pointers = {"out_ptr": f"*{other or kind}", "x_ptr": f"*{kind}"} | (
            {"residual_ptr": f"*{other}"} if other else {}
        )
        types = pointers | {"samples_ptr": "*i64", "tokens_ptr": "*i64", "key": "i64"}
        types |= {each: "i32" for each in ("columns", "channels", *strides)}
        constants: dict[str, Any] = {"THRESHOLD": _threshold(0.1), "SCALE": 1.0 / 0.9, "HAS_RESIDUAL": bool(other)}
        constants |= {} if other else {"residual_ptr": None}
        odd = frozenset({"key", "columns", *strides[4:]})
        name = f"dropout {kind}{f' + {other}' * bool(other)}"
        yield Variant(name, _dropout_add, types, constants, settings(LAUNCH, arch, itemsize, 8192), odd=odd)
