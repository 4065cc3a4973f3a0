"""NVIDIA's apex as a back end: the kernels of its FusedLayerNorm, FusedRMSNorm and FusedAdam, for GPUs.

Its compiled modules are called as apex itself calls them (https://github.com/NVIDIA/apex). Dtypes are theirs: gradients
of norm weights come in the weight's dtype, not in fp32, and AdamW takes rate and scale in fp32.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

INSTALL = (
    'pip install -v --no-build-isolation --config-settings "--build-option=--cpp_ext" --config-settings'
    ' "--build-option=--cuda_ext" git+https://github.com/NVIDIA/apex'
)
_CHUNK = 2048 * 32  # elements of a block of threads, as in apex
_ADAMW, _CORRECTED = 1, 1  # weight decay apart from the gradient; moments with bias correction


@cache
def norms() -> Any:
    """The compiled module of its norms.

    Raises:
        ImportError: apex is not installed, or without its CUDA extensions.
    """
    try:
        import fused_layer_norm_cuda
    except ImportError as error:
        raise ImportError(f"norm: apex, or its CUDA extension for norms, is not installed: {INSTALL}") from error
    return fused_layer_norm_cuda


@cache
def adam() -> Any:
    """The compiled module of its optimizers; raises as :func:`norms`."""
    try:
        import amp_C
    except ImportError as error:
        raise ImportError(f"adamw: apex, or its CUDA extension amp_C, is not installed: {INSTALL}") from error
    return amp_C


def norm_forward(
    h: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float, centred: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    """``y`` in the weight's dtype, mean (of LayerNorm) and rstd [..., 1]."""
    of_rows, sizes = (*h.shape[:-1], 1), list(weight.shape)
    h, weight = h.contiguous(), weight.contiguous()
    if not centred:
        y, rstd = norms().rms_forward_affine_mixed_dtypes(h, sizes, weight, epsilon)
        return y, None, rstd.view(of_rows)
    bias = torch.zeros_like(weight) if bias is None else bias.contiguous()
    y, mean, rstd = norms().forward_affine_mixed_dtypes(h, sizes, weight, bias, epsilon)
    return y, mean.view(of_rows), rstd.view(of_rows)


def norm_backward(
    dy: Tensor, h: Tensor, weight: Tensor, mean: Tensor | None, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of ``h``, the weight and (of LayerNorm) the bias."""
    dy, h, weight, sizes = dy.contiguous(), h.contiguous(), weight.contiguous(), list(weight.shape)
    # Epsilon and the bias are read where outputs were kept in place of inputs, which is False here.
    if mean is None:
        dh, dw = norms().rms_backward_affine(dy, rstd.flatten(), h, sizes, weight, 0.0, False)
        return dh, dw, None
    dh, dw, db = norms().backward_affine(
        dy, mean.flatten(), rstd.flatten(), h, sizes, weight, weight, 0.0, False
    )  # fmt: skip
    return dh, dw, db


def adamw(
    weights: Tensor, gradient: Tensor, moments: tuple[Tensor, Tensor], now: tuple[Tensor, Tensor, Tensor],
    beta1: float, beta2: float, epsilon: float, weight_decay: float,
) -> None:  # fmt: skip
    """The update of :func:`megapoly_kernels.adamw.adamw` without ``values``; ``now`` is (rate, scale, step).

    Its kernel writes what it was given as gradient, which is therefore a copy.
    """
    rate, scale, step = now
    own = gradient.to(weights.dtype, copy=True)
    adam().multi_tensor_adam_capturable(
        _CHUNK, torch.zeros(1, dtype=torch.int32, device=weights.device), [[own], [weights], *([m] for m in moments)],
        rate.float(), beta1, beta2, epsilon, step.int(), _ADAMW, _CORRECTED, weight_decay, scale.float(),
    )  # fmt: skip
