"""Attention: kernels against the plain reference, the reference against PyTorch's own."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from megapoly_kernels import attention_tiles_backward, attention_tiles_forward
from megapoly_kernels.attention import (
    attention,
    attention_backward,
    attention_forward,
    attention_with_lse,
)
from megapoly_kernels.attention_libraries import flash_attn_library
from megapoly_kernels.attention_reference import attention_reference
from megapoly_kernels.launch import triton
from tests.kernels.rule import DEVICE, DTYPES, GPU, check, kernels, needs_triton
from tests.kernels.stand_ins import Flash


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE, dtype)


def inputs(
    b: int, g: int, q: int, s: int, d: int, *, t: int | None = None, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    t = s if t is None else t
    return [normal(b, g * q, s, d, dtype=dtype), *(normal(b, g, t, d, dtype=dtype, seed=n) for n in (2, 3))]


def ends(*lengths: int) -> Tensor:
    return torch.tensor([0, *lengths], device=DEVICE).cumsum(0, dtype=torch.int32)


def slopes(heads: int) -> Tensor:
    return torch.tensor([2.0 ** -(n + 1) for n in range(heads)], device=DEVICE)


def compare(given: list[Tensor], **options: Any) -> None:
    """Kernels and the reference: results, log-sum-exp, and gradients of both."""
    check(lambda *x: attention_with_lse(*x, **options), lambda *x: attention_reference(*x, **options), given)


M = attention_tiles_forward.LAUNCH_FORWARD[90, 4, 64].constants["BLOCK_M"]  # 32, as of all tiles of fp32 up to 64


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("s", [2, M - 1, M, M + 1, 2 * M + 3])
def test_lengths(s: int, dtype: torch.dtype) -> None:
    compare(inputs(1, 1, 1, s, 16, dtype=dtype))


@needs_triton
def test_a_single_token() -> None:
    """Its value is the result; no gradient comes to its query."""
    given = [x.requires_grad_() for x in inputs(1, 2, 1, 1, 16)]
    with kernels():
        out, lse = attention_with_lse(*given)
        dq, _, dv = torch.autograd.grad(out.sum(), given)
    torch.testing.assert_close(out, given[2])
    torch.testing.assert_close(lse, (given[0] * given[1]).sum(-1) / 4)
    torch.testing.assert_close(dq, torch.zeros_like(dq), rtol=0, atol=1e-6)
    torch.testing.assert_close(dv, torch.ones_like(dv))


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_more_than_one_tile_of_half_precision(dtype: torch.dtype) -> None:
    """Their tiles are 128 a side."""
    compare(inputs(1, 1, 2, 2 * 128 + 1, 64, dtype=dtype))
    compare(inputs(1, 1, 1, 259, 32, dtype=dtype), cu_seqlens=ends(1, 5, 130, 0, 123), slopes=slopes(1))


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [1, 8, 16, 32, 64, 80, 96, 128, 200, 256])
def test_head_dimensions(d: int, dtype: torch.dtype) -> None:
    compare(inputs(1, 1, 1, 37, d, dtype=dtype))


@needs_triton
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("alibi", [False, True], ids=["", "alibi"])
@pytest.mark.parametrize("documents", [False, True], ids=["", "documents"])
def test_options(documents: bool, alibi: bool, causal: bool) -> None:
    options = {
        "cu_seqlens": ends(0, 1, 15, 25, 0, 0, 20, 21, 0) if documents else None,
        "slopes": slopes(2) if alibi else None,
        "causal": causal,
    }
    compare(inputs(2, 1, 2, 41, 16), **options)


@needs_triton
@pytest.mark.parametrize(
    "lengths",
    [(97,), (1, 96), (96, 1), (32, 64, 1), (31, 33, 33), (1,) * 33 + (64,), (0, 0, 97, 0), (33, 2, 60, 2)],
    ids=str,
)
def test_documents(lengths: tuple[int, ...]) -> None:
    compare(inputs(1, 1, 1, 97, 16), cu_seqlens=ends(*lengths))


@needs_triton
@pytest.mark.parametrize(("s", "t"), [(1, 70), (5, 33), (33, 67)])
def test_other_numbers_of_keys_than_queries(s: int, t: int) -> None:
    compare(inputs(1, 1, 1, s, 16, t=t))
    compare(inputs(1, 1, 2, s, 16, t=t), slopes=slopes(2), scale=0.3)
    compare(inputs(1, 1, 1, s, 16, t=t), causal=False)
    compare(inputs(1, 1, 1, t, 16, t=s), slopes=slopes(1), causal=False)


@needs_triton
@pytest.mark.parametrize("shape", [(0, 1, 1, 3, 16), (2, 1, 1, 0, 16), (1, 0, 1, 3, 16)])
def test_nothing(shape: tuple[int, ...]) -> None:
    given = inputs(*shape)
    with kernels():
        leaves = [x.requires_grad_() for x in given]
        out = attention(leaves[0].unflatten(1, (shape[1], 1)), *leaves[1:])
        grads = torch.autograd.grad(out.sum(), leaves)
    assert out.numel() == 0
    assert [x.shape for x in grads] == [x.shape for x in given]


@needs_triton
def test_keys_that_no_query_is_there_for_have_gradients_of_zero() -> None:
    given = [x.requires_grad_() for x in inputs(1, 1, 1, 0, 16, t=40)]
    with kernels():
        dk, dv = torch.autograd.grad(attention(*given).sum(), given[1:])
    assert not dk.any()
    assert not dv.any()


@needs_triton
@pytest.mark.parametrize("q", [1, 3])
def test_views_of_one_packed_tensor(q: int) -> None:
    """As the model has them, [S, B, G, Q + 2, D], without a copy."""
    packed = normal(40, 2, 2, q + 2, 16).requires_grad_()

    def split(x: Tensor) -> list[Tensor]:
        query, key, value = x.permute(1, 2, 3, 0, 4).split([q, 1, 1], 2)
        return [query, key.squeeze(2), value.squeeze(2)]

    views = split(packed)
    assert all(x.untyped_storage().data_ptr() == packed.untyped_storage().data_ptr() for x in views)
    with kernels():
        out = attention(*views)
    assert out.shape == (2, 2, q, 40, 16)
    assert out.permute(3, 0, 1, 2, 4).is_contiguous()  # as the projection behind takes it
    copied = attention_reference(*(x.contiguous() for x in views))[0]
    torch.testing.assert_close(out, copied, rtol=1e-5, atol=1e-5)
    upstream = normal(40, 2, 2, q, 16, seed=4).permute(1, 2, 3, 0, 4)
    with kernels():
        (found,) = torch.autograd.grad(out, packed, upstream)
    (expected,) = torch.autograd.grad(copied, packed, upstream)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@needs_triton
def test_other_strides() -> None:
    query, key, value = inputs(2, 2, 1, 37, 32)
    wide = key.repeat_interleave(2, -1)[..., ::2]
    compare([query.mT.contiguous().mT, wide, value[:, :1].expand(-1, 2, -1, -1)])
    with kernels():
        leaf = query.clone().requires_grad_()
        attention(leaf, key, value).sum().backward()  # its gradient has strides of zero
    other = query.clone().requires_grad_()
    attention_reference(other, key, value)[0].sum().backward()
    torch.testing.assert_close(leaf.grad, other.grad, rtol=1e-4, atol=1e-5)


@needs_triton
def test_offsets_beyond_31_bits() -> None:
    """Rows almost 2^24 elements apart, in memory that is hardly touched; 2^31 is in the second tile."""
    apart = (1 << 24) - 16
    room = torch.empty(130 * apart, dtype=torch.float16, device=DEVICE)
    far = room.as_strided((1, 1, 1, 130, 16), (0, 0, 0, apart, 1))
    near = normal(1, 1, 1, 130, 16, dtype=torch.float16)
    far.copy_(near)
    with kernels():
        found = attention_tiles_forward.forward(far, far[0], far[0], None, None, 0.25, True)
        wanted = attention_tiles_forward.forward(near, near[0], near[0], None, None, 0.25, True)
        both = [
            attention_tiles_backward.backward(x, None, x, x[0], x[0], *wanted, None, None, 0.25, True)
            for x in (far, near)
        ]
    for one, other in zip((*found, *both[0]), (*wanted, *both[1]), strict=True):
        assert torch.equal(one, other)


@needs_triton
def test_tiles_of_other_documents_are_not_read() -> None:
    """They are skipped, not masked: NaN in them would reach the result."""
    query, key, value = inputs(1, 1, 1, 4 * M, 16)
    cut = ends(M, 2 * M, M)
    key[:, :, M : 3 * M] = value[:, :, M : 3 * M] = torch.nan
    with kernels():
        out, lse = attention_forward(query, key, value, cut, None, 0.25, True)
        dq, dk, dv = attention_backward(torch.ones_like(out), None, query, key, value, out, lse, cut, None, 0.25, True)
    for x in (out, dq, dk, dv):
        assert x[:, :, :M].isfinite().all()
        assert x[:, :, 3 * M :].isfinite().all()
        assert x[:, :, M : 3 * M].isnan().all()


@needs_triton
def test_large_scores() -> None:
    """Sums of exponentials would overflow, and rows that a whole tile masks come first."""
    query, key, value = inputs(1, 1, 1, 100, 16)
    compare([100 * query, 100 * key, value], cu_seqlens=ends(40, 60))


def test_the_reference_is_pytorch_s() -> None:
    query, key, value = inputs(2, 2, 3, 9, 4, dtype=torch.float64)
    out, lse = attention_reference(query, key, value)
    wanted = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(out, wanted, rtol=1e-12, atol=1e-12)
    scores = query @ key.repeat_interleave(3, 1).mT / 2
    at = torch.arange(9, device=DEVICE)
    scores = scores - slopes(6).double()[:, None, None] * (at[:, None] - at)
    scores = scores.masked_fill(at[:, None] < at, -torch.inf)
    scores[0, :, 4:, :4] = -torch.inf
    out, lse = attention_reference(query, key, value, cu_seqlens=ends(4, 5, 9), slopes=slopes(6))
    torch.testing.assert_close(lse, torch.logsumexp(scores, -1), rtol=1e-12, atol=1e-12)
    wanted = scores.softmax(-1) @ value.repeat_interleave(3, 1)
    torch.testing.assert_close(out, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("q", [1, 3])
@pytest.mark.parametrize(("s", "t"), [(1, 1), (1, 9), (3, 9), (9, 9)])
def test_pytorch_s_own_with_the_right_mask(s: int, t: int, q: int, causal: bool) -> None:
    """What runs on a CPU."""
    given = inputs(2, 2, q, s, 8, t=t, dtype=torch.float64)
    for alibi in (None, slopes(2 * q)):
        for cut in (None, ends(4, 5, 1, 8)) if s == 9 else (None,):
            options: dict[str, Any] = {"cu_seqlens": cut, "slopes": alibi, "causal": causal, "scale": 0.2}
            wanted = attention_reference(*given, **options)[0]
            torch.testing.assert_close(attention(*given, **options), wanted, rtol=1e-10, atol=1e-10)
            grouped = given[0].unflatten(1, (2, q))
            found = attention(grouped, *given[1:], **options, backend="sdpa")
            torch.testing.assert_close(found.flatten(1, 2), wanted, rtol=1e-10, atol=1e-10)


def test_gradients_of_the_references() -> None:
    given = [x.requires_grad_() for x in inputs(2, 1, 2, 4, 3, dtype=torch.float64)]
    for options in ({}, {"cu_seqlens": ends(1, 3, 4), "slopes": slopes(2)}, {"causal": False, "scale": 2.0}):
        assert torch.autograd.gradcheck(lambda *x, o=options: attention(*x, **o), given)
        assert torch.autograd.gradcheck(lambda *x, o=options: attention_with_lse(*x, **o), given)
        assert torch.autograd.gradcheck(
            lambda *x, o=options: attention_with_lse(*x, **o)[1], [*given[:2], given[2].detach()]
        )


@pytest.mark.parametrize("interpret", [False, pytest.param(True, marks=needs_triton)])
def test_operators_are_registered_as_torch_wants(interpret: bool) -> None:
    packed = normal(5, 2, 1, 4, 16).permute(1, 2, 3, 0, 4)
    parts = packed[:, :, :2], packed[:, :, 2], packed[:, :, 3]
    leaves = [x.detach().requires_grad_() for x in parts]
    with kernels() if interpret else nullcontext():
        torch.library.opcheck(torch.ops.megapoly.attention, (*leaves, ends(4, 6), slopes(2), 0.25, True))


def test_compiled_without_a_break() -> None:
    query, key, value = inputs(2, 2, 2, 9, 16)
    options: dict[str, Any] = {"cu_seqlens": ends(4, 14), "slopes": slopes(4)}

    def everything(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, lse = attention_with_lse(q, k, v, **options)
        return attention(out, k, v) + lse.unsqueeze(-1)

    leaf = query.clone().requires_grad_()
    found = torch.compile(everything, fullgraph=True, backend="aot_eager")(leaf, key, value)
    found.sum().backward()
    other = query.clone().requires_grad_()
    wanted = everything(other, key, value)
    wanted.sum().backward()
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(leaf.grad, other.grad)


@pytest.mark.parametrize("dynamic", [None, True])
def test_compiled_for_several_lengths(dynamic: bool | None) -> None:
    """From the second on they are symbols."""
    whole = torch.compile(attention, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for length in (5, 7, 9):
        given = inputs(1, 1, 2, length, 16)
        torch.testing.assert_close(whole(*given), attention(*given))


def test_autocast() -> None:
    given = [x.requires_grad_() for x in inputs(1, 1, 1, 5, 16)]
    wanted = attention(*(x.bfloat16() for x in given))
    with torch.autocast(DEVICE, torch.bfloat16):
        out = attention(given[0].bfloat16(), *given[1:])
        assert attention_with_lse(*given)[0].dtype == torch.bfloat16
        assert attention(*(x.double() for x in given)).dtype == torch.float64
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, wanted)
    out.float().sum().backward()
    assert given[1].grad is not None
    assert given[1].grad.dtype == torch.float32


def test_other_back_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    given = inputs(2, 2, 2, 9, 16)
    flash_attn_library.cache_clear()
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with pytest.raises(ImportError, match="pip install flash-attn"):
        attention(*given, backend="flash_attn")
    monkeypatch.setitem(sys.modules, "flash_attn", Flash())
    for cut in (None, ends(4, 5, 9)):
        for alibi in (None, slopes(4)):
            options: dict[str, Any] = {"cu_seqlens": cut, "slopes": alibi, "scale": 0.2}
            wanted = attention_reference(*given, **options)[0]
            for backend in ("sdpa", "flash_attn", "auto"):
                torch.testing.assert_close(attention(*given, **options, backend=backend), wanted, rtol=1e-4, atol=1e-5)
    flash_attn_library.cache_clear()
    if not GPU:
        with pytest.raises(ValueError, match="is for GPUs and no float64"):
            attention(*given, backend="triton")


def test_what_is_refused() -> None:
    query, key, value = inputs(1, 2, 2, 5, 16)
    long = inputs(1, 2, 2, 5, 16, t=6)
    for match, given, options in (
        ("backend is 'quick', expected one of auto", (query, key, value), {"backend": "quick"}),
        (r"query has shape \(4, 5, 16\)", (query[0], key, value), {}),
        ("as many keys as values", (query, key, value[:, :, 1:]), {}),
        ("expected one dtype", (query, key.half(), value), {}),
        ("3 query heads, .* do not divide into 2 groups", (query[:, :3], key, value), {}),
        ("5 queries and 4 keys, expected no fewer", (query, key[:, :, 1:], value[:, :, 1:]), {}),
        ("5 queries and 0 keys, expected a key", (query, key[:, :, :0], value[:, :, :0]), {"causal": False}),
        ("cu_seqlens has shape .* of torch.int64", (query, key, value), {"cu_seqlens": ends(5).long()}),
        ("cu_seqlens goes from 0 to 3, expected from 0 to 5", (query, key, value), {"cu_seqlens": ends(3)}),
        (
            "cu_seqlens goes from 0 to 5, .* never less",
            (query, key, value),
            {"cu_seqlens": torch.tensor([0, 4, 2, 5], dtype=torch.int32)},
        ),
        (r"as many queries \(5\) as keys \(6\)", long, {"cu_seqlens": ends(5)}),
        (r"slopes have shape \(2,\), expected \[4\]", (query, key, value), {"slopes": slopes(2)}),
        ("scale is -1.0", (query, key, value), {"scale": -1.0}),
    ):
        with pytest.raises(ValueError, match=match):
            attention(*given, **options)  # type: ignore[arg-type]
    if triton is not None:
        with kernels(), pytest.raises(ValueError, match="size 257 is above the largest, 256"):
            attention(*inputs(1, 1, 1, 5, 257))
