"""Kernels of megapoly, usable on their own. Imports nothing from megapoly."""

from megapoly_kernels.activation import gelu, swiglu
from megapoly_kernels.adamw import adamw

__all__ = ["adamw", "gelu", "swiglu"]
