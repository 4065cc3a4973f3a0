"""Kernels of megapoly, usable on their own. Imports nothing from megapoly."""

from megapoly_kernels.activation import gelu, swiglu

__all__ = ["gelu", "swiglu"]
