"""Kernels of megapoly, usable on their own. Imports nothing from megapoly."""

from megapoly_kernels.activation import gelu, swiglu
from megapoly_kernels.cross_entropy import cross_entropy
from megapoly_kernels.linear_cross_entropy import linear_cross_entropy

__all__ = ["cross_entropy", "gelu", "linear_cross_entropy", "swiglu"]
