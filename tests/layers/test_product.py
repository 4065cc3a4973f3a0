"""Matrix products against float64, in every dtype and order of factors."""

from __future__ import annotations

import pytest
import torch

from megapoly.layers.product import add_product, product

EPSILON = {torch.float64: 1e-15, torch.float32: 1e-6, torch.bfloat16: 8e-3}


def close(found: torch.Tensor, exact: torch.Tensor, epsilon: float) -> None:
    assert float((found.double() - exact).abs().max()) <= 4 * epsilon * float(exact.abs().max())


@pytest.mark.parametrize("dtype", EPSILON)
@pytest.mark.parametrize("with_bias", [False, True])
def test_product(dtype: torch.dtype, with_bias: bool) -> None:
    torch.manual_seed(0)
    a, b, bias = torch.randn(3, 5, 40).to(dtype), torch.randn(24, 40).to(dtype), torch.randn(24).to(dtype)
    exact = a.double() @ b.double().t() + (bias.double() if with_bias else 0)
    for second in (b, b.t().contiguous().t()):
        found = product(a, second, bias if with_bias else None)
        assert found.dtype == dtype
        close(found, exact, EPSILON[dtype])


@pytest.mark.parametrize("dtype", EPSILON)
@pytest.mark.parametrize(("n", "k"), [(24, 40), (40, 24), (1, 7)])
def test_add_product_rounds_no_more_than_its_sum(dtype: torch.dtype, n: int, k: int) -> None:
    torch.manual_seed(0)
    dy, x = torch.randn(30, n).to(dtype), torch.randn(30, k).to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    out = torch.randn(n, k, dtype=wide)
    exact = out.double() + dy.double().t() @ x.double()
    add_product(out, dy, x)
    close(out, exact, EPSILON[wide])
