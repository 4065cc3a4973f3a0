"""apex as a back end, by modules that stand for its own: what it is called with, and what is made of its results."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial

import pytest
import torch

from megapoly_kernels import apex_ops
from megapoly_kernels.adamw import adamw
from megapoly_kernels.norm import layer_norm, layer_norm_reference, rms_norm, rms_norm_reference
from tests.kernels.rule import GPU, check, kernels, needs_triton
from tests.kernels.stand_ins import Adam, Norms
from tests.kernels.test_norm import normal, parameters

pytestmark = [needs_triton, pytest.mark.skipif(GPU, reason="stand-ins are for machines without a GPU")]


@pytest.fixture
def apex(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Norms, Adam]]:
    found = Norms(), Adam()
    for each in found:
        monkeypatch.setitem(sys.modules, each.__name__, each)
    for each in (apex_ops.norms, apex_ops.adam):
        each.cache_clear()
    yield found
    for each in (apex_ops.norms, apex_ops.adam):
        each.cache_clear()


def test_norms(apex: tuple[Norms, Adam]) -> None:
    for dtype in (torch.float32, torch.float16, torch.float64):
        x, (weight, bias) = 2 + 3 * normal(3, 5, 33, dtype=dtype), parameters(33, dtype)
        stream = normal(3, 5, 33, dtype=torch.promote_types(dtype, torch.float32), seed=4)
        for residual in (None, stream):
            check(partial(layer_norm, backend="apex"), layer_norm_reference, [x, weight, bias, residual])
            check(partial(rms_norm, backend="apex"), rms_norm_reference, [x, weight, residual])
        check(partial(layer_norm, backend="apex"), layer_norm_reference, [x.mT.contiguous().mT, weight])
        check(partial(layer_norm, backend="apex"), layer_norm_reference, [x[:0], weight, bias])
    assert apex[0].calls == 3 * 5 * 2 * 2  # cases, forward and backward, and again


def test_adamw(apex: tuple[Norms, Adam]) -> None:
    torch.manual_seed(0)
    weights, gradient, second = torch.randn(37), torch.randn(37), torch.rand(37)
    values = weights.half()
    given = [weights, gradient, torch.randn(37), second, values]
    mine, wanted = ([each.clone() for each in given] for _ in range(2))
    numbers = {"rate": 0.01, "scale": 0.3, "step": 3, "beta1": 0.9, "beta2": 0.95, "weight_decay": 0.1}
    with kernels():
        adamw(*mine[:4], values=mine[4], backend="apex", **numbers)
    adamw(*wanted[:4], values=wanted[4], **numbers)
    torch.testing.assert_close(mine, wanted, rtol=1e-6, atol=1e-7)
    assert torch.equal(mine[1], gradient)
    assert not torch.equal(mine[4], values)
    assert apex[1].calls == 1


def test_what_is_missing_or_not_for_this_device(monkeypatch: pytest.MonkeyPatch) -> None:
    x, (weight, _) = normal(3, 8, dtype=torch.float32), parameters(8, torch.float32)
    buffers = [torch.zeros(8) for _ in range(4)]
    for name in ("fused_layer_norm_cuda", "amp_C"):
        monkeypatch.setitem(sys.modules, name, None)
    for each in (apex_ops.norms, apex_ops.adam):
        each.cache_clear()
    with kernels():
        with pytest.raises(ImportError, match=r"apex, or its CUDA extension for norms, is not installed: pip install"):
            rms_norm(x, weight, backend="apex")
        with pytest.raises(ImportError, match=r"apex, or its CUDA extension amp_C, is not installed: pip install"):
            adamw(*buffers, rate=0.1, step=1, backend="apex")
        with pytest.raises(ImportError, match=r"cuda is not built: pip install --no-build-isolation \. in megapoly's"):
            rms_norm(x, weight, backend="cuda")
        with pytest.raises(ValueError, match=r"apex is for GPUs and no float64, got torch\.float64"):
            adamw(*(each.double() for each in buffers), rate=0.1, step=1, backend="apex")
    for backend in ("triton", "cuda", "apex"):
        with pytest.raises(ValueError, match=f"norm: the back end {backend} is for GPUs, and x is on cpu; choose auto"):
            rms_norm(x, weight, backend=backend)
    with pytest.raises(ValueError, match=r"adamw: the back end triton is for GPUs, got torch\.float32 on cpu"):
        adamw(*buffers, rate=0.1, step=1, backend="triton")
    with pytest.raises(ValueError, match="norm: backend is 'quick', expected one of auto, triton, cuda, apex"):
        rms_norm(x, weight, backend="quick")
    with pytest.raises(ValueError, match="adamw: backend is 'cuda', expected one of auto, triton, apex"):
        adamw(*buffers, rate=0.1, step=1, backend="cuda")
