"""Random small models of transformers, saved as it saves them, and their logits: the oracle of conversions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers", reason="the oracle of these tests")

ROPE = {"rope_type": "default", "rope_theta": 10000.0}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip


@dataclass(frozen=True)
class Peer:
    """A configuration of transformers; ``keys`` are those of its config.json. ``groups``: of keys and values."""

    kind: str
    keys: dict[str, Any]
    groups: int

    def make(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        torch.manual_seed(0)
        config = getattr(transformers, f"{self.kind}Config")(bos_token_id=1, eos_token_id=2, **self.keys)
        name = "GPT2LMHeadModel" if self.kind == "GPT2" else f"{self.kind}ForCausalLM"
        model: nn.Module = getattr(transformers, name)(config).to(dtype).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn_like(parameter) * 0.2)
        return model


def _rotary(kind: str, hidden: int, heads: int, groups: int, ffn: int, vocabulary: int, **keys: Any) -> Peer:
    all_keys = {
        "hidden_size": hidden, "num_attention_heads": heads, "num_key_value_heads": groups, "intermediate_size": ffn,
        "vocab_size": vocabulary, "num_hidden_layers": 3, "max_position_embeddings": 24, "rope_parameters": ROPE,
        "rms_norm_eps": 1e-6, **keys,
    }  # fmt: skip
    return Peer(kind, all_keys, groups)


def _gpt2(hidden: int, heads: int, vocabulary: int, **keys: Any) -> Peer:
    dropouts = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    all_keys = {
        "n_embd": hidden, "n_head": heads, "vocab_size": vocabulary, "n_layer": 3, "n_positions": 24, **dropouts, **keys
    }  # fmt: skip
    return Peer("GPT2", all_keys, heads)


def _bloom(hidden: int, heads: int, vocabulary: int, **keys: Any) -> Peer:
    return Peer(
        "Bloom", {"hidden_size": hidden, "n_head": heads, "vocab_size": vocabulary, "n_layer": 3, **keys}, heads
    )


# Vocabularies are odd: no tp divides them.
PEERS: dict[str, Peer] = {
    "llama": _rotary("Llama", 24, 3, 3, 52, 61),
    "llama grouped": _rotary("Llama", 48, 12, 4, 40, 97),
    "llama tied, one group": _rotary("Llama", 40, 5, 1, 20, 53, tie_word_embeddings=True),
    "llama 3": _rotary("Llama", 64, 4, 2, 56, 61, rope_parameters=LLAMA3),
    "llama linear": _rotary("Llama", 32, 4, 4, 56, 61, rope_parameters={**ROPE, "rope_type": "linear", "factor": 4.0}),
    "mistral": _rotary("Mistral", 48, 6, 2, 64, 59, sliding_window=None),
    "qwen2": _rotary("Qwen2", 40, 10, 2, 72, 61, tie_word_embeddings=True),
    "qwen2 untied": _rotary("Qwen2", 32, 4, 4, 48, 67),
    "gpt2": _gpt2(24, 3, 61, activation_function="gelu_fast"),
    "gpt2 untied": _gpt2(40, 5, 97, n_inner=60, tie_word_embeddings=False),
    "gpt2 eight heads": _gpt2(32, 8, 53, n_inner=64),
    "bloom": _bloom(24, 3, 61),
    "bloom untied": _bloom(40, 5, 97, seq_length=32, tie_word_embeddings=False),
    "bloom eight heads": _bloom(32, 8, 53),
}


def save(name: str, folder: Path, dtype: torch.dtype = torch.float64, **how: Any) -> nn.Module:
    """Save a peer as transformers does; the model."""
    peer = PEERS[name].make(dtype)
    peer.save_pretrained(folder, **how)
    return peer


def tokens_of(name: str, length: int = 20, batch: int = 3) -> Tensor:
    draw = torch.Generator().manual_seed(len(name))
    return torch.randint(PEERS[name].keys["vocab_size"], (batch, length), generator=draw)


@torch.no_grad()
def logits(peer: nn.Module, tokens_BS: Tensor, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Of transformers, with what it computes in float32 whatever the dtype in the model's: RMSNorm, BLOOM's softmax."""
    dtype = next(peer.parameters()).dtype
    if dtype == torch.float64:
        for parent in list(peer.modules()):
            for name, child in parent.named_children():
                if type(child).__name__.endswith("RMSNorm"):
                    norm = nn.RMSNorm(len(child.weight), child.variance_epsilon, dtype=dtype)
                    norm.weight = child.weight
                    setattr(parent, name, norm)
                if type(child).__name__ == "BloomGelu":  # its constants have eight digits
                    setattr(parent, name, _Gelu())
        softmax = torch.nn.functional.softmax
        module = transformers.models.bloom.modeling_bloom
        monkeypatch.setattr(module.F, "softmax", lambda x, dim, dtype=None: softmax(x, dim=dim))
    result: Tensor = peer(tokens_BS).logits
    return result


class _Gelu(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.gelu(x, approximate="tanh")
