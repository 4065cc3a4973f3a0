"""GELU with a bias, and SwiGLU: kernels against references, references against PyTorch's own."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu as torch_gelu
from torch.nn.functional import silu

from megapoly_kernels.activation import gelu, gelu_reference, swiglu, swiglu_reference
from tests.kernels.rule import DEVICE, DTYPES, check, kernels, needs_triton


def normal(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE, dtype)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 1), (7, 127), (3, 2, 128), (2, 129), (40, 5), (2, 2047), (1, 2049), (0, 8), (4, 0)]
)
def test_kernels(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = 3 * normal(*shape, dtype=dtype)
    check(gelu, gelu_reference, [x])
    check(gelu, gelu_reference, [x, normal(shape[-1], dtype=dtype, seed=2)])
    check(swiglu, swiglu_reference, [3 * normal(*shape[:-1], 2 * shape[-1], dtype=dtype)])


@needs_triton
def test_float64_and_strides() -> None:
    x = normal(6, 5, 14).transpose(0, 1)[:, ::2]
    check(gelu, gelu_reference, [x, normal(28)[::2]])
    check(swiglu, swiglu_reference, [x])


def test_the_references_are_pytorch_s() -> None:
    x, bias = normal(5, 8), normal(8, seed=2)
    torch.testing.assert_close(gelu(x, bias), torch_gelu(x + bias, approximate="tanh"), rtol=1e-15, atol=1e-15)
    torch.testing.assert_close(swiglu(x), silu(x[:, :4]) * x[:, 4:], rtol=1e-15, atol=1e-15)
    inputs = (x.requires_grad_(), bias.requires_grad_())
    assert torch.autograd.gradcheck(gelu, inputs)
    assert torch.autograd.gradcheck(swiglu, inputs[:1])


@pytest.mark.parametrize("interpret", [False, pytest.param(True, marks=needs_triton)])
def test_operators_are_registered_as_torch_wants(interpret: bool) -> None:
    x, bias = normal(5, 8).requires_grad_(), normal(8, seed=2).requires_grad_()
    with kernels() if interpret else nullcontext():
        torch.library.opcheck(torch.ops.megapoly.gelu, (x, bias))
        torch.library.opcheck(torch.ops.megapoly.gelu, (x, None))
        torch.library.opcheck(torch.ops.megapoly.swiglu, (x,))


def test_compiled_without_a_break_and_under_autocast() -> None:
    x, bias = normal(5, 8, dtype=torch.float32), normal(8, dtype=torch.float32)
    whole = torch.compile(lambda x, bias: swiglu(gelu(x, bias)), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(whole(x, bias), swiglu(gelu(x, bias)))
    with torch.autocast(DEVICE, torch.bfloat16):
        assert gelu(x, bias).dtype == torch.float32


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match=r"bias has shape \(3,\), expected \[4\]"):
        gelu(normal(2, 4), normal(3))
    with pytest.raises(ValueError, match="the last dimension is 5, expected gate and up"):
        swiglu(normal(2, 5))
