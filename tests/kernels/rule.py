"""The error rule of kernels: no worse than PyTorch in the same dtype by more than a factor, against float64.

Kernels are run by Triton's interpreter where there is no GPU (``tests/conftest.py`` sets TRITON_INTERPRET). It gets
bf16 arithmetic and bf16 products wrong, so bf16 is for GPUs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, TypeAlias

import pytest
import torch
from torch import Tensor

from megapoly_kernels.launch import interpreted, triton

needs_triton = pytest.mark.skipif(triton is None, reason="triton is not installed")
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if GPU else [])]
FORWARD, BACKWARD = 2.0, 3.0  # factors
_LEAST = {torch.float64: 1e-14, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}  # of the largest value
_RMSE = 0.005
Function: TypeAlias = Callable[..., Any]


@contextmanager
def kernels() -> Iterator[None]:
    """Run Triton kernels, with NaN in all memory that they do not fill."""
    torch.use_deterministic_algorithms(True)  # which fills what torch.empty gives
    try:
        with nullcontext() if GPU else interpreted():
            yield
    finally:
        torch.use_deterministic_algorithms(False)


def gradients(function: Function, inputs: Sequence[Any], seed: int = 0) -> list[Tensor]:
    """Results, and the gradients of every floating input, for random gradients of the results that need one."""
    leaves = [x.detach().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs]
    results = function(*leaves)
    results = [each for each in (results if isinstance(results, tuple) else (results,)) if each is not None]
    random = torch.Generator().manual_seed(seed)
    wanted = [each for each in results if each.requires_grad]
    upstream = [torch.randn(each.shape, generator=random).to(each) for each in wanted]
    wrt = [each for each in leaves if isinstance(each, Tensor) and each.requires_grad]
    found = torch.autograd.grad(wanted, wrt, upstream) if wrt else ()
    return [*(each.detach() for each in results), *found]


def check(function: Function, reference: Function, inputs: Sequence[Any], *, least: float | None = None) -> None:
    """Compare results and gradients of a kernel with those of its reference, by the rule.

    ``inputs`` have the dtype to test; ``least`` is of the largest value, for sums of many terms.
    """
    with kernels():
        found = gradients(function, inputs)
        again = gradients(function, inputs)
    wide = [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs]
    same, exact = gradients(reference, inputs), gradients(reference, wide)
    assert len(found) == len(same)
    results = len(same) - sum(isinstance(x, Tensor) and x.is_floating_point() for x in inputs)
    for number, (kernel, repeated, torch_s, true) in enumerate(zip(found, again, same, exact, strict=True)):
        assert kernel.shape == true.shape
        assert torch.equal(kernel, repeated), f"value {number} differs from run to run"
        close(kernel, torch_s, true, FORWARD if number < results else BACKWARD, least, f"value {number}")


def close(kernel: Tensor, same: Tensor, exact: Tensor, factor: float, least: float | None, what: str) -> None:
    """``kernel`` is as near to ``exact`` as ``same`` is, within ``factor``."""
    assert kernel.dtype == same.dtype, f"{what}: {kernel.dtype}, expected {same.dtype}"
    if not kernel.numel():
        return
    largest = float(exact.abs().max())
    error, theirs = (float((each.double() - exact).abs().max()) for each in (kernel, same))
    allowed = factor * theirs + (_LEAST[kernel.dtype] if least is None else least) * largest
    assert error <= allowed, f"{what}: error {error:.3g}, PyTorch has {theirs:.3g}; allowed {allowed:.3g}"
    rmse, theirs = (float((each.double() - exact).square().mean().sqrt()) for each in (kernel, same))
    allowed = max(_RMSE * float(exact.square().mean().sqrt()), factor * theirs) + 1e-30
    assert rmse <= allowed, f"{what}: RMSE {rmse:.3g}, PyTorch has {theirs:.3g}; allowed {allowed:.3g}"
