"""Kernels of megapoly, usable on their own. Imports nothing from megapoly."""

from megapoly_kernels.activation import gelu, swiglu
from megapoly_kernels.adamw import adamw
from megapoly_kernels.attention import attention, attention_with_lse
from megapoly_kernels.dropout import dropout, dropout_add
from megapoly_kernels.norm import layer_norm, rms_norm
from megapoly_kernels.rotary import rotary, rotary_qkv

__all__ = [
    "adamw",
    "attention",
    "attention_with_lse",
    "dropout",
    "dropout_add",
    "gelu",
    "layer_norm",
    "rms_norm",
    "rotary",
    "rotary_qkv",
    "swiglu",
]
