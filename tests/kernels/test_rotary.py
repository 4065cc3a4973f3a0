"""Rotary embedding: kernels against references, the reference against the engine's and against complex numbers."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from megapoly.layers.rotary import rotate
from megapoly_kernels.rotary import rotary, rotary_forward, rotary_qkv, rotary_qkv_forward, rotary_reference
from tests.kernels.rule import DEVICE, DTYPES, check, kernels, needs_triton


def normal(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE, dtype)


def angles(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A table [2, *shape]."""
    found = 40 * normal(*shape, seed=9)
    return torch.stack((found.cos(), found.sin())).to(dtype)


def reference_qkv(qkv: Tensor, table: Tensor, per_group: int) -> Tensor:
    s, b, _ = qkv.shape
    half = table.shape[-1]
    cos, sin = (each.reshape(*each.shape[:2], half).expand(s, b, half) for each in table)
    return rotary_reference(qkv.unflatten(-1, (-1, 2 * half)), cos, sin, per_group).view(qkv.shape)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("s", "b", "groups", "per_group", "dim"),
    [(3, 2, 2, 3, 64), (1, 1, 1, 2, 2), (5, 1, 7, 3, 14), (2, 3, 1, 34, 80), (1, 2, 2, 3, 256), (0, 2, 1, 3, 8)],
)
def test_kernel_of_packed_heads(s: int, b: int, groups: int, per_group: int, dim: int, dtype: torch.dtype) -> None:
    table = angles(s, b, 1, 1, dim // 2)
    qkv = normal(s, b, groups * per_group * dim, dtype=dtype)
    check(lambda x: rotary_qkv(x, table, per_group), lambda x: reference_qkv(x, table, per_group), [qkv])
    with kernels():
        turned = rotary_qkv(qkv, table, per_group).view(s, b, groups, per_group, dim)
    assert torch.equal(turned[..., -1, :], qkv.view(turned.shape)[..., -1, :])


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lead", [(), (5,), (2, 3), (2, 2, 3), (2, 0, 3)])
def test_kernel_of_plain_heads(lead: tuple[int, ...], dtype: torch.dtype) -> None:
    x, (cos, sin) = normal(*lead, 3, 10, dtype=dtype), angles(*lead[-1:], 5)

    def reference(x: Tensor) -> Tensor:
        whole = x.reshape(1, -1, *x.shape[-2:])
        tables = (each.expand(*lead, 5).reshape(1, -1, 5) for each in (cos, sin))
        return rotary_reference(whole, *tables).view(x.shape)

    check(lambda x: rotary(x, cos, sin), reference, [x])


@needs_triton
def test_float64_strides_and_broadcast_tables() -> None:
    table = angles(1, 3, 1, 1, 8, dtype=torch.float64)[..., ::2]
    qkv = normal(3, 5, 96).transpose(0, 1)[..., ::2]
    check(lambda x: rotary_qkv(x, table, 3), lambda x: reference_qkv(x, table, 3), [qkv])
    sliced = normal(5, 3, 100)[..., :48]
    check(lambda x: rotary_qkv(x, table, 3), lambda x: reference_qkv(x, table, 3), [sliced])
    heads = normal(5, 6, 3, 8).transpose(1, 2)
    check(
        lambda x: rotary(x, *table[:, 0, :, 0, 0]),
        lambda x: rotary_reference(x, *table[:, :, :, 0, 0].expand(2, 5, 3, 4)),
        [heads],
    )


@needs_triton
def test_rows_beyond_two_to_the_31() -> None:
    memory = torch.empty((1 << 31) + 512, dtype=torch.float16, device=DEVICE)  # on a CPU, of pages never touched
    x = memory.as_strided((2, 1, 2, 16), (1 << 31, 0, 16, 1))
    x.copy_(normal(2, 1, 2, 16))
    cos, sin = angles(2, 1, 8)
    with kernels():
        assert torch.equal(rotary_forward(x, cos, sin), rotary_forward(x.contiguous(), cos, sin))


@needs_triton
@pytest.mark.parametrize("interpret", [False, True])
def test_in_place(interpret: bool) -> None:
    table = angles(4, 2, 1, 1, 5)
    memory = normal(4, 2, 70, dtype=torch.float32)
    qkv = memory[..., 5:65]
    with kernels() if interpret else nullcontext():
        wanted = rotary_qkv(qkv.clone(), table, 3)
        copy = memory.clone()
        given = copy[..., 5:65]
        assert rotary_qkv_forward(given, table, 3, in_place=True) is given
        assert torch.equal(given, wanted)
        assert torch.equal(copy[..., :5], memory[..., :5])
        assert torch.equal(copy[..., 65:], memory[..., 65:])
        rotary_qkv_forward(given, table, 3, -1, in_place=True)
        torch.testing.assert_close(given, qkv)
        with pytest.raises(ValueError, match="stride 2, expected 1 for the result to be in place"):
            rotary_qkv_forward(normal(4, 2, 120)[..., ::2], table, 3, in_place=True)


def test_the_reference_is_a_product_of_complex_numbers() -> None:
    x, (cos, sin) = normal(2, 3, 4, 6), angles(2, 3, 3, dtype=torch.float64)
    turned = torch.complex(x[..., :3], x[..., 3:]) * torch.complex(cos, sin).unsqueeze(2)
    wanted = torch.cat((turned.real, turned.imag), -1)
    torch.testing.assert_close(rotary(x, cos, sin), wanted, rtol=1e-14, atol=1e-14)
    table = torch.stack((cos, sin)).view(2, 2, 3, 1, 1, 3)
    assert torch.autograd.gradcheck(lambda x: rotary(x, cos, sin), (x.requires_grad_(),))
    qkv = normal(2, 3, 24).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: rotary_qkv(x, table, 2), (qkv,))
    assert torch.autograd.gradcheck(lambda x: rotary_qkv(x, table, 2, -1), (qkv,))
    torch.testing.assert_close(rotary_qkv(rotary_qkv(qkv, table, 2), table, 2, -1), qkv)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_engine_s_is_this_one(dtype: torch.dtype) -> None:
    qkv, table = normal(7, 2, 120, dtype=dtype), angles(7, 2, 1, 1, 5)
    (found, back), (wanted, wanted_back) = (
        (turned, *torch.autograd.grad(turned, leaf, normal(7, 2, 120, dtype=dtype, seed=2)))
        for function in (rotary_qkv, rotate)
        for leaf in [qkv.clone().requires_grad_()]
        for turned in [function(leaf, table, 4)]
    )
    assert torch.equal(found, wanted)
    assert torch.equal(back, wanted_back)
    with torch.inference_mode():
        assert rotate(qkv, table, 4) is qkv
    assert torch.equal(qkv, wanted)


@pytest.mark.parametrize("interpret", [False, pytest.param(True, marks=needs_triton)])
def test_operator_is_registered_as_torch_wants(interpret: bool) -> None:
    x, (cos, sin) = normal(2, 3, 4, 6).requires_grad_(), angles(2, 3, 3)
    with kernels() if interpret else nullcontext():
        torch.library.opcheck(torch.ops.megapoly.rotary, (x, cos, sin, 2, 1))
        torch.library.opcheck(
            torch.ops.megapoly.rotary, (x.transpose(0, 1), cos.transpose(0, 1), sin.transpose(0, 1), 9, -1)
        )


def test_compiled_without_a_break_and_under_autocast() -> None:
    qkv, table = normal(4, 2, 60, dtype=torch.float32), angles(4, 2, 1, 1, 5)

    def function(qkv: Tensor, table: Tensor) -> Tensor:
        return rotary(rotary_qkv(qkv, table, 3).unflatten(-1, (6, 10)), *table[:, :, :, 0, 0])

    whole = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(whole(qkv, table), function(qkv, table))
    with torch.autocast(DEVICE, torch.bfloat16):
        assert function(qkv, table).dtype == torch.float32


def test_what_is_refused() -> None:
    qkv, table = normal(4, 2, 60), angles(4, 2, 1, 1, 5)
    with pytest.raises(ValueError, match=r"table has shape \[2, 4, 2, 1, 1, 5\], expected \[2, 3, 2, 1, 1, D / 2\]"):
        rotary_qkv(qkv[:3], table, 3)
    with pytest.raises(ValueError, match="60 channels, expected whole groups of 4 heads"):
        rotary_qkv(qkv, table, 4)
    with pytest.raises(ValueError, match="sign is 2"):
        rotary_qkv(qkv, table, 3, 2)
    with pytest.raises(ValueError, match=r"table is torch\.float16, expected float32 or float64"):
        rotary_qkv(qkv, table.half(), 3)
    cos, sin = angles(4, 5)
    with pytest.raises(ValueError, match=r"expected \[..., heads, D\] with an even D"):
        rotary(normal(4, 3, 5), cos, sin)
    with pytest.raises(ValueError, match=r"sin has shape \[3, 5\], which does not broadcast to \[4, 5\]"):
        rotary(normal(4, 3, 10), cos, sin[:3])
    with pytest.raises(ValueError, match="cos needs a gradient"):
        rotary(normal(4, 3, 10), cos.requires_grad_(), sin)
