"""A model large enough that what is fixed does not matter, small enough to train on a CPU."""

from __future__ import annotations

from typing import Any

from megapoly.config import Config, parse

_MODEL_KEYS = (
    "layers",
    "vocabulary",
    "dropout",
    "attention_dropout",
    "key_value_heads",
    "fp32_residual",
    "fp32_softmax",
)


FAMILIES: dict[str, dict[str, Any]] = {
    "polylm": {},
    "llama": {"norm": "rms", "position": "rope", "activation": "swiglu", "biases": False, "tied": False},
    "qwen": {"norm": "rms", "position": "rope", "activation": "swiglu", "biases": False, "qkv_biases": True},
    "bloom": {"position": "alibi", "embedding_norm": True},
}


def config(**changes: Any) -> Config:
    """Keys of the model, ``family``, ``precision``, ``global_batch`` and ``documents``; the rest goes to the layout."""
    model = {"layers": 4, "hidden": 128, "heads": 8, "ffn": 512, "vocabulary": 1500, "positions": 160}
    model |= {key: changes.pop(key) for key in _MODEL_KEYS if key in changes}
    model |= FAMILIES[changes.pop("family", "polylm")]
    batch = changes.pop("global_batch", 4)
    return parse(
        {
            "model": model,
            "data": {
                "tokenizer": "none",
                "separate_documents": changes.pop("documents", False),
                "sources": {"a": {"path": "a", "language": "en"}},
                "stages": [{"name": "only", "tokens": 10 * batch * 144, "weights": {"a": 1.0}}],
            },
            "train": {
                "directory": "none", "sequence": 144, "global_batch": batch,
                "precision": changes.pop("precision", "fp32"),
            },
            "optimizer": {"learning_rate": 0.01},
            "layout": {"device": "cpu", **changes},
        }
    )  # fmt: skip
