"""Modules that stand for packages of kernels that are not here: their functions and arguments, by PyTorch."""

from __future__ import annotations

import types
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megapoly_kernels.attention_reference import attention_reference


class Norms(types.ModuleType):
    """apex's ``fused_layer_norm_cuda``, https://github.com/NVIDIA/apex, csrc/layer_norm_cuda.cpp.

    Statistics are flat; results and weight gradients have the weight's dtype.
    """

    def __init__(self) -> None:
        super().__init__("fused_layer_norm_cuda")
        self.calls = 0

    def _normed(self, x: Tensor, centred: bool, epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
        assert x.is_contiguous()
        self.calls += 1
        wide = x.to(torch.promote_types(x.dtype, torch.float32)).flatten(0, -2)
        mean = wide.mean(-1) if centred else torch.zeros_like(wide[:, 0])
        rstd = ((wide - mean.unsqueeze(1)).square().mean(-1) + epsilon).rsqrt()
        return (wide - mean.unsqueeze(1)) * rstd.unsqueeze(1), mean, rstd

    def forward_affine_mixed_dtypes(
        self, x: Tensor, sizes: Sequence[int], weight: Tensor, bias: Tensor, epsilon: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        assert list(sizes) == list(weight.shape) == list(bias.shape)
        normed, mean, rstd = self._normed(x, True, epsilon)
        return (normed * weight + bias).to(weight.dtype).view(x.shape), mean, rstd

    def rms_forward_affine_mixed_dtypes(
        self, x: Tensor, sizes: Sequence[int], weight: Tensor, epsilon: float
    ) -> tuple[Tensor, Tensor]:
        assert list(sizes) == list(weight.shape)
        normed, _, rstd = self._normed(x, False, epsilon)
        return (normed * weight).to(weight.dtype).view(x.shape), rstd

    def backward_affine(
        self, dy: Tensor, mean: Tensor, rstd: Tensor, x: Tensor, sizes: Sequence[int], weight: Tensor, bias: Tensor,
        epsilon: float, memory_efficient: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        assert not memory_efficient
        assert bias.shape == weight.shape
        dx, dw, g = self._gradients(dy, mean, rstd, x, weight)
        dx = dx - rstd.unsqueeze(1) * g.mean(-1, True)
        return dx.to(x.dtype).view(x.shape), dw, dy.flatten(0, -2).sum(0).to(dw)

    def rms_backward_affine(
        self, dy: Tensor, rstd: Tensor, x: Tensor, sizes: Sequence[int], weight: Tensor, epsilon: float,
        memory_efficient: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        assert not memory_efficient
        dx, dw, _ = self._gradients(dy, torch.zeros_like(rstd), rstd, x, weight)
        return dx.to(x.dtype).view(x.shape), dw

    def _gradients(
        self, dy: Tensor, mean: Tensor, rstd: Tensor, x: Tensor, weight: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        assert dy.is_contiguous()
        assert mean.shape == rstd.shape == (x.shape[:-1].numel(),)
        self.calls += 1
        normed = (x.flatten(0, -2).to(rstd.dtype) - mean.unsqueeze(1)) * rstd.unsqueeze(1)
        dy = dy.flatten(0, -2).to(rstd.dtype)
        g = dy * weight
        dx = rstd.unsqueeze(1) * (g - normed * (g * normed).mean(-1, True))
        return dx, (dy * normed).sum(0).to(weight.dtype), g


class Adam(types.ModuleType):
    """apex's ``amp_C``, csrc/multi_tensor_adam.cu: the gradient is overwritten with what it is unscaled."""

    def __init__(self) -> None:
        super().__init__("amp_C")
        self.calls = 0

    def multi_tensor_adam_capturable(
        self, chunk: int, no_op: Tensor, lists: Sequence[Sequence[Tensor]], rate: Tensor, beta1: float, beta2: float,
        epsilon: float, step: Tensor, mode: int, bias_correction: int, weight_decay: float, inverse_scale: Tensor,
    ) -> None:  # fmt: skip
        assert (mode, bias_correction, int(no_op)) == (1, 1, 0)
        assert (rate.dtype, inverse_scale.dtype, step.dtype) == (torch.float32, torch.float32, torch.int32)
        self.calls += 1
        for g, p, m, v in zip(*lists, strict=True):
            g.mul_(inverse_scale)
            own = torch.nn.Parameter(p)
            own.grad = g
            reference = torch.optim.AdamW(
                [own], lr=float(rate), betas=(beta1, beta2), eps=epsilon, weight_decay=weight_decay
            )
            reference.state[own] = {"step": step.float() - 1, "exp_avg": m, "exp_avg_sq": v}
            reference.step()


class Flash(types.ModuleType):
    """flash-attn, by the plain reference."""

    def __init__(self) -> None:
        super().__init__("flash_attn")
        self.calls = 0

    def flash_attn_func(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        softmax_scale: float,
        causal: bool,
        deterministic: bool,
        alibi_slopes: Tensor | None,
    ) -> Tensor:
        assert deterministic
        self.calls += 1
        given = [x.transpose(1, 2) for x in (q, k, v)]
        return attention_reference(*given, slopes=alibi_slopes, scale=softmax_scale, causal=causal)[0].transpose(1, 2)

    def flash_attn_varlen_func(
        self, q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, most_q: int, most_k: int, **options: Any
    ) -> Tensor:
        assert torch.equal(cu_q, cu_k)
        parts = cu_q.diff().tolist()
        assert max(parts) <= most_q == most_k
        each = zip(*(x.split(parts) for x in (q, k, v)), strict=True)
        return torch.cat([self.flash_attn_func(*(x.unsqueeze(0) for x in one), **options)[0] for one in each])
