"""Kernels of megapoly, usable on their own. Imports nothing from megapoly."""

from megapoly_kernels.activation import gelu, swiglu
from megapoly_kernels.adamw import adamw
from megapoly_kernels.attention import attention, attention_with_lse
from megapoly_kernels.cross_entropy import cross_entropy
from megapoly_kernels.dropout import dropout, dropout_add
from megapoly_kernels.linear_cross_entropy import linear_cross_entropy
from megapoly_kernels.norm import layer_norm, rms_norm
from megapoly_kernels.rotary import rotary, rotary_qkv

__all__ = [
    "adamw",
    "attention",
    "attention_with_lse",
    "cross_entropy",
    "dropout",
    "dropout_add",
    "gelu",
    "layer_norm",
    "linear_cross_entropy",
    "rms_norm",
    "rotary",
    "rotary_qkv",
    "swiglu",
]
