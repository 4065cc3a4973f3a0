"""LayerNorm and RMSNorm with a residual: kernels against PyTorch's functions, by the rule of errors."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from megapoly_kernels import norm, norm_triton
from megapoly_kernels.norm import layer_norm, layer_norm_reference, rms_norm, rms_norm_reference
from tests.kernels.rule import DEVICE, DTYPES, GPU, check, gradients, kernels, needs_triton

LAYER, RMS = (layer_norm, layer_norm_reference), (rms_norm, rms_norm_reference)


def normal(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE, dtype)


def parameters(columns: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return 1 + normal(columns, dtype=dtype, seed=2), normal(columns, dtype=dtype, seed=3)


def every_case(x: Tensor, residual: Tensor) -> None:
    weight, bias = parameters(x.shape[-1], x.dtype)
    check(*LAYER, [x, weight])
    check(*LAYER, [x, weight, bias, residual])
    check(*RMS, [x, weight])
    check(*RMS, [x, weight, residual])


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(7, 127), (3, 3, 128), (11, 257), (5, 1023), (2, 2049)])
def test_kernels(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = 2 + 3 * normal(*shape, dtype=dtype)
    every_case(x, normal(*shape, dtype=dtype, seed=4))


@needs_triton
@pytest.mark.parametrize(("columns", "dtype"), [(4097, torch.float64), (16385, torch.float16)])
def test_long_rows_go_in_blocks(columns: int, dtype: torch.dtype) -> None:
    """The mean is far from zero, where sums of squares would lose all digits in float32."""
    x, residual = 100 + normal(2, columns, dtype=dtype), normal(2, columns, dtype=dtype, seed=4).float()
    weight, bias = parameters(columns, dtype)
    residual = residual.to(torch.promote_types(dtype, torch.float32))
    check(*LAYER, [x, weight, bias, residual])
    check(*RMS, [x, weight])


@needs_triton
@pytest.mark.long
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [255, 256, 257, 1024, 4095, 4097, 8191, 8192, 8193, 16384, 16387, 65536])
def test_more_sizes(columns: int, dtype: torch.dtype) -> None:
    x = 2 + 3 * normal(3, columns, dtype=dtype)
    every_case(x, normal(3, columns, dtype=torch.float32, seed=4))


def within_ulps_of_the_terms(columns: int, dtype: torch.dtype) -> None:
    """For rows of a few elements, whose gradient is a small difference of large terms, in PyTorch as well.

    The rule of errors, relative to the result, says nothing there: the bound is of the terms.
    """
    x, (weight, bias) = normal(1, columns, dtype=dtype), parameters(columns, dtype)
    for function, reference, inputs in ((*LAYER, [x, weight, bias]), (*RMS, [x, weight])):
        with kernels():
            found = gradients(function, inputs)
        exact = gradients(reference, [each.double() for each in inputs])
        wide = x.double()
        centre = wide.mean() if function is layer_norm else 0.0
        rstd = float(((wide - centre).square().mean() + 1e-6).rsqrt())
        terms = max(1.0, rstd) * max(1.0, float(weight.abs().max())) * 3  # upstream values are below 3
        for kernel, true in zip(found, exact, strict=True):
            error = float((kernel.double() - true).abs().max())
            assert error <= 16 * torch.finfo(dtype).eps * terms, f"{function}: {error:.3g}, terms are {terms:.3g}"


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("columns", [2, 3, 5, 9])
def test_one_row_of_few_elements(columns: int, dtype: torch.dtype) -> None:
    within_ulps_of_the_terms(columns, dtype)


@needs_triton
@pytest.mark.parametrize("rows", [1, 2, 9, 300])
def test_numbers_of_rows(rows: int) -> None:
    x = normal(rows, 33, dtype=torch.float32)
    weight, bias = parameters(33, torch.float32)
    check(*LAYER, [x, weight, bias])


@needs_triton
def test_one_element_is_its_mean() -> None:
    x, (weight, bias) = normal(3, 1, dtype=torch.float32), parameters(1, torch.float32)
    with kernels():
        y, *found = gradients(layer_norm, [x, weight, bias])
    torch.testing.assert_close(y, bias.expand(3, 1), rtol=0, atol=0)
    for each in found[:2]:
        torch.testing.assert_close(each, torch.zeros_like(each), rtol=0, atol=1e-4)  # rstd is 316


@needs_triton
@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (3, 0)])
def test_nothing(shape: tuple[int, ...]) -> None:
    x, (weight, bias) = normal(*shape, dtype=torch.float32), parameters(shape[-1], torch.float32)
    for run in (kernels, nullcontext):
        with run():
            y, h, dx, dw, db, d_residual = gradients(layer_norm, [x, weight, bias, x])
            assert y.shape == h.shape == dx.shape == d_residual.shape == x.shape
            assert torch.equal(dw, torch.zeros_like(weight))
            assert torch.equal(db, torch.zeros_like(bias))
            _, _, dw = gradients(rms_norm, [x, weight])
            assert torch.equal(dw, torch.zeros_like(weight))


@needs_triton
@pytest.mark.parametrize(
    ("of_x", "of_residual", "of_weight"),
    [
        (torch.float16, torch.float32, torch.float16),  # a residual stream of fp32
        (torch.float32, torch.float16, torch.float16),
        (torch.float32, None, torch.float16),
        (torch.float16, None, torch.float32),  # under autocast
        (torch.float16, torch.float16, torch.float32),
        (torch.float32, torch.float64, torch.float32),
        (torch.float32, None, torch.float64),
    ],
    ids=str,
)
def test_mixed_dtypes(of_x: torch.dtype, of_residual: torch.dtype | None, of_weight: torch.dtype) -> None:
    x, (weight, bias) = normal(3, 70, dtype=of_x), parameters(70, of_weight)
    residual = None if of_residual is None else normal(3, 70, dtype=of_residual, seed=4)
    check(*LAYER, [x, weight, bias, residual])
    check(*RMS, [x, weight, residual])
    with kernels():
        _, h, mean, rstd = norm.layer_norm_forward(x, weight, bias, residual)
        dx, d_residual, dw, _ = norm.layer_norm_backward(h, h, weight, mean, rstd, dtype=of_x)
    wide = torch.promote_types(torch.promote_types(h.dtype, of_weight), torch.float32)
    assert h.dtype == torch.promote_types(of_x, of_residual or of_x) == d_residual.dtype
    assert (dx.dtype, dw.dtype, mean.dtype, rstd.dtype) == (of_x, wide, wide, wide)
    assert (dx is d_residual) == (of_x == h.dtype)


@needs_triton
def test_strides() -> None:
    weight, bias = normal(28)[::2], normal(14, 2)[:, 1]
    for x in (
        normal(6, 5, 14).transpose(0, 1),
        normal(6, 5, 28)[..., ::2],
        normal(3, 5, 3, 14)[:, :, 1],  # of fused queries, keys and values
        normal(1, 1, 14).expand(4, 5, 14),
    ):
        check(*LAYER, [x, weight, bias, x])
        check(*RMS, [x, weight, x])


@needs_triton
@pytest.mark.skipif(GPU, reason="takes 4 GiB, of which a CPU touches some pages")
@pytest.mark.parametrize("columns", [64, 16385])
def test_rows_beyond_2_to_the_31(columns: int) -> None:
    """The distance of rows has 32 bits, and that of the third from the first has not."""
    step = (1 << 30) + 64
    far = torch.empty(2 * step + columns, dtype=torch.float16).as_strided((3, columns), (step, 1))
    weight, bias = parameters(columns, torch.float16)
    far.copy_(normal(3, columns))
    near, found = far.clone(), []
    assert near.is_contiguous()
    with kernels():
        for x in (far, near):
            results = norm.layer_norm_forward(x, weight, bias, x)
            found.append([*results, *norm.layer_norm_backward(x, x, weight, *results[2:], dh=x)])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@needs_triton
def test_rows_of_sums_are_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU with 7 programs at a time."""
    monkeypatch.setattr(norm_triton, "_groups", lambda x, rows, at_once, warps: (3, norm_triton.cdiv(rows, 3)))
    for columns in (33, 2049):
        x, (weight, bias) = normal(20, columns), parameters(columns)
        check(*LAYER, [x, weight, bias])


def test_the_references_are_pytorch_s() -> None:
    """On a CPU the function takes another way than its reference."""
    x, residual, (weight, bias) = normal(5, 8), normal(5, 8, seed=4), parameters(8)
    cases: list[tuple[Any, Any, list[Any]]] = [
        (layer_norm, lambda x, w, b: torch.nn.functional.layer_norm(x, (8,), w, b, 1e-5), [x, weight, bias]),
        (layer_norm, lambda x, w: torch.nn.functional.layer_norm(x, (8,), w, None, 1e-5), [x, weight]),
        (rms_norm, lambda x, w: torch.nn.functional.rms_norm(x, (8,), w, 1e-6), [x, weight]),
        (*LAYER, [x, weight, bias, residual]),
        (*RMS, [x, weight, residual]),
        (*LAYER, [x.half(), weight.half(), bias.half(), residual.float()]),
        (*RMS, [x.half(), weight.half(), residual.float()]),
    ]
    for function, oracle, inputs in cases:
        for found, expected in zip(gradients(function, inputs), gradients(oracle, inputs), strict=True):
            loose = 1e-13 if found.dtype == torch.float64 else 2e-3
            torch.testing.assert_close(found, expected, rtol=loose, atol=loose)


def test_gradcheck() -> None:
    x, residual, (weight, bias) = normal(3, 5), normal(3, 5, seed=4), parameters(5)
    inputs = [each.requires_grad_() for each in (x, weight, bias, residual)]
    assert torch.autograd.gradcheck(layer_norm, inputs)
    assert torch.autograd.gradcheck(layer_norm, inputs[:2])
    assert torch.autograd.gradcheck(rms_norm, (x, weight, residual))
    assert torch.autograd.gradcheck(lambda *each: layer_norm(*each)[1], inputs)
    assert torch.autograd.gradcheck(partial(rms_norm, epsilon=0.5), (x, weight))


@pytest.mark.parametrize("interpret", [False, pytest.param(True, marks=needs_triton)])
def test_operators_are_registered_as_torch_wants(interpret: bool) -> None:
    weight, bias = (each.float().requires_grad_() for each in parameters(8))
    x, residual = normal(5, 8, dtype=torch.float16).requires_grad_(), normal(5, 8, seed=4).requires_grad_()
    turned = normal(8, 5, dtype=torch.float32).T.requires_grad_()
    with kernels() if interpret else nullcontext():
        torch.library.opcheck(torch.ops.megapoly.norm, (x, weight, bias, residual, 1e-5, True))
        torch.library.opcheck(torch.ops.megapoly.norm, (turned, weight, None, turned, 1e-5, False))
        torch.library.opcheck(torch.ops.megapoly.norm, (turned, weight, None, None, 1e-5, True))
        torch.library.opcheck(torch.ops.megapoly.norm, (turned, weight, None, None, 1e-5, False))


def test_compiled_without_a_break_and_under_autocast() -> None:
    x, (weight, bias) = normal(5, 8, dtype=torch.float32), parameters(8, torch.float32)

    def block(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y, h = layer_norm(x, weight, bias, residual=x)
        return rms_norm(y, weight, residual=h)[0]

    whole = torch.compile(block, fullgraph=True, backend="aot_eager")
    for found, expected in zip(gradients(whole, [x, weight, bias]), gradients(block, [x, weight, bias]), strict=True):
        torch.testing.assert_close(found, expected)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert layer_norm(x.bfloat16(), weight, bias).dtype == torch.float32


def test_only_the_residual_sum_is_used() -> None:
    x, (weight, bias) = normal(5, 8).requires_grad_(), parameters(8)
    dx, dw = torch.autograd.grad(layer_norm(x, weight.requires_grad_(), bias, x)[1].sum(), (x, weight))
    assert torch.equal(dx, torch.full_like(x, 2))
    assert not dw.any()


def test_what_is_refused() -> None:
    x, weight = normal(2, 4), normal(4)
    with pytest.raises(ValueError, match=r"layer_norm: weight has shape \(3,\), expected \[4\]"):
        layer_norm(x, normal(3))
    with pytest.raises(ValueError, match=r"layer_norm: bias has shape \(1, 4\), expected \[4\]"):
        layer_norm(x, weight, weight[None])
    with pytest.raises(ValueError, match=r"rms_norm: residual has shape \(4,\), expected \(2, 4\), as x has"):
        rms_norm(x, weight, weight)
