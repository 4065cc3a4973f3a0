"""Kernels of megapoly, usable on their own. Imports nothing from megapoly."""

from megapoly_kernels.activation import gelu, swiglu
from megapoly_kernels.norm import layer_norm, rms_norm

__all__ = ["gelu", "layer_norm", "rms_norm", "swiglu"]
