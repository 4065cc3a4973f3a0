"""Small random models of transformers, saved with a tokenizer: what generation is compared with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.generate.tokenizers import VOCABULARY, byte_level

transformers: Any = pytest.importorskip("transformers", reason="the oracle of these tests")

POSITIONS = 48


def make(family: str, positions: int = POSITIONS) -> nn.Module:
    """In float64. Small embeddings and large layers, so that the likeliest token changes from step to step."""
    common: dict[str, Any] = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    rotary = {
        **common, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 4, "num_attention_heads": 8,
        "num_key_value_heads": 4, "max_position_embeddings": positions, "attn_implementation": "sdpa",
    }  # fmt: skip
    config = {
        "gpt2": lambda: transformers.GPT2Config(
            **common, n_positions=positions, n_embd=32, n_layer=4, n_head=4, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
        ),
        "llama": lambda: transformers.LlamaConfig(**rotary),
        "qwen2": lambda: transformers.Qwen2Config(**rotary, tie_word_embeddings=True),
        "bloom": lambda: transformers.BloomConfig(
            **common, hidden_size=32, n_layer=4, n_head=4, seq_length=positions, hidden_dropout=0, attention_dropout=0
        ),
    }[family]()
    torch.manual_seed(5)
    model = transformers.AutoModelForCausalLM.from_config(config).to(torch.float64).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.copy_(torch.randn_like(parameter) * 0.1 + (not name.endswith("bias")))
            else:
                size = 0.05 if any(part in name for part in ("embed", "wte", "lm_head")) else 0.6
                parameter.copy_(torch.randn_like(parameter) * size)
    return model


def save(family: str, folder: Path, positions: int = POSITIONS, begins: bool = False) -> nn.Module:
    """A folder of Hugging Face with the model and a tokenizer; the model."""
    model = make(family, positions)
    model.save_pretrained(folder)
    byte_level(folder, begins)
    return model
