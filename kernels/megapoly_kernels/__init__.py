"""Kernels of megapoly, usable on their own. Imports nothing from megapoly."""

from megapoly_kernels.activation import gelu, swiglu
from megapoly_kernels.attention import attention, attention_with_lse

__all__ = ["attention", "attention_with_lse", "gelu", "swiglu"]
