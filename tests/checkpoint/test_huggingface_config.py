"""config.json of public models: the decoder that it describes has as many parameters as the model is published with."""

from __future__ import annotations

import math
from typing import Any

import pytest

from megapoly.checkpoint.families import slots
from megapoly.checkpoint.huggingface_config import family_of, to_config, to_model
from megapoly.checkpoint.state import logical_shapes
from megapoly.config import Model, RopeScaling
from megapoly.errors import CheckpointError

LLAMA3 = {
    "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}  # fmt: skip
# The keys that matter of what the models' pages hold, old and new; and their parameters.
PUBLIC: dict[str, tuple[dict[str, Any], int]] = {
    "Llama-2-7b": (
        {
            "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 4096, "vocab_size": 32000,
            "rms_norm_eps": 1e-05, "hidden_act": "silu", "rope_scaling": None, "tie_word_embeddings": False,
            "pretraining_tp": 1,
        },
        6_738_415_616,
    ),
    "Llama-3.2-1B": (
        {
            "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
            "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "max_position_embeddings": 131072,
            "vocab_size": 128256, "rms_norm_eps": 1e-05, "hidden_act": "silu", "rope_theta": 500000.0,
            "rope_scaling": LLAMA3, "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": True,
        },
        1_235_814_400,
    ),
    "SmolLM2-135M": (
        {
            "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
            "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192, "vocab_size": 49152,
            "rms_norm_eps": 1e-05, "hidden_act": "silu", "rope_theta": 100000, "rope_interleaved": False,
            "rope_scaling": None, "attention_bias": False, "tie_word_embeddings": True, "is_llama_config": True,
        },
        134_515_008,
    ),
    "Mistral-7B-v0.3": (
        {
            "model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 32768, "vocab_size": 32768,
            "rms_norm_eps": 1e-05, "hidden_act": "silu", "rope_theta": 1000000.0, "sliding_window": None,
            "tie_word_embeddings": False, "attention_dropout": 0.0,
        },
        7_248_023_552,
    ),
    "Qwen2.5-0.5B": (
        {
            "model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
            "num_attention_heads": 14, "num_key_value_heads": 2, "max_position_embeddings": 32768,
            "vocab_size": 151936, "rms_norm_eps": 1e-06, "hidden_act": "silu", "rope_theta": 1000000.0,
            "sliding_window": 32768, "max_window_layers": 24, "use_sliding_window": False, "use_mrope": False,
            "tie_word_embeddings": True,
        },
        494_032_768,
    ),
    "gpt2": (
        {
            "model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024, "n_ctx": 1024,
            "vocab_size": 50257, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-05,
            "resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1, "initializer_range": 0.02,
        },
        124_439_808,
    ),
    "bloom-560m": (
        {
            "model_type": "bloom", "n_embed": 1024, "n_layer": 24, "num_attention_heads": 16, "seq_length": 2048,
            "vocab_size": 250880, "apply_residual_connection_post_layernorm": False, "attention_softmax_in_fp32": True,
            "bias_dropout_fusion": True, "masked_softmax_fusion": True, "offset_alibi": 100, "pretraining_tp": 1,
            "slow_but_exact": False, "skip_bias_add": True, "hidden_dropout": 0.0,
        },
        559_214_592,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLIC)
def test_public_models_have_their_number_of_parameters(name: str) -> None:
    config, parameters = PUBLIC[name]
    model, notes = to_model(config, "config.json")
    assert notes == []
    assert sum(math.prod(shape) for shape in logical_shapes(model).values()) == parameters


@pytest.mark.parametrize("name", PUBLIC)
def test_slots_tile_the_logical_tensors(name: str) -> None:
    """Every element of every tensor comes from one place in the files, and every element of the files goes there."""
    config, _ = PUBLIC[name]
    model, _ = to_model(config | {key: 2 for key in ("n_layer", "num_hidden_layers") if key in config}, "config.json")
    shapes, parts = logical_shapes(model), slots(config["model_type"], model)
    assert {slot.name for slot in parts} == shapes.keys()
    assert len({slot.source for slot in parts}) == len(parts)
    for tensor, shape in shapes.items():
        boxes = [slot.box for slot in parts if slot.name == tensor]
        assert sum(box.size for box in boxes) == math.prod(shape)
        assert not any(a.overlap(b) for i, a in enumerate(boxes) for b in boxes[i + 1 :])
    for slot in parts:
        assert math.prod(slot.shape) == math.prod(slot.factors) == slot.box.size
        assert tuple(slot.factors[each] for each in slot.order) == slot.box.shape


def test_scaling_of_llama_3_is_read() -> None:
    scaling = RopeScaling(
        kind="llama3", factor=32.0, original_positions=8192, low_frequency_factor=1.0, high_frequency_factor=4.0
    )
    assert to_model(PUBLIC["Llama-3.2-1B"][0], "")[0].rope_scaling == scaling


@pytest.mark.parametrize("name", PUBLIC)
def test_a_config_made_of_the_model_describes_it_again(name: str) -> None:
    model, _ = to_model(PUBLIC[name][0], "")
    made = to_config(model, None, "bfloat16", {"eos_token_id": 2})
    assert to_model(made, "")[0] == model
    assert (made["torch_dtype"], made["eos_token_id"], made["bos_token_id"]) == ("bfloat16", 2, None)


@pytest.mark.parametrize("name", PUBLIC)
def test_the_original_config_is_kept_but_for_the_dtype(name: str) -> None:
    config = PUBLIC[name][0]
    model, _ = to_model(config, "")
    assert to_config(model, config, "float16", {}) == {**config, "torch_dtype": "float16"}
    assert to_config(model, {**config, "dtype": "float32"}, "float16", {}) == {**config, "dtype": "float16"}
    other = model.model_copy(update={"norm_epsilon": 1e-3})
    assert to_config(other, config, "float16", {}) == to_config(other, None, "float16", {})


def test_a_number_that_is_text_is_refused() -> None:
    config = {**PUBLIC["Llama-3.2-1B"][0], "hidden_size": "2048"}
    with pytest.raises(CheckpointError, match=r"config\.json: hidden_size is '2048', expected a whole number"):
        to_model(config, "config.json")


def model(**keys: Any) -> Model:
    return Model(layers=2, hidden=32, heads=4, ffn=128, vocabulary=50, positions=16, **keys)


ROTARY: dict[str, Any] = {"position": "rope", "norm": "rms", "activation": "swiglu", "biases": False}


@pytest.mark.parametrize(
    ("keys", "family"),
    [
        ({}, "gpt2"),
        ({"tied": False}, "gpt2"),
        (ROTARY, "llama"),
        ({**ROTARY, "key_value_heads": 2, "tied": False}, "llama"),
        ({**ROTARY, "qkv_biases": True}, "qwen2"),
        ({"position": "alibi", "embedding_norm": True}, "bloom"),
    ],
)
def test_the_family_follows_from_the_model(keys: dict[str, Any], family: str) -> None:
    assert family_of(model(**keys)) == family


@pytest.mark.parametrize(
    ("keys", "key"),
    [
        ({"key_value_heads": 2}, "key_value_heads is 2"),
        ({"norm": "rms"}, "norm is 'rms'"),
        ({"biases": False}, "biases is False"),
        ({"qkv_biases": False}, "qkv_biases is False"),
        ({"activation": "swiglu"}, "activation is 'swiglu'"),
        ({"embedding_norm": True}, "embedding_norm is True"),
        ({"position": "alibi"}, "embedding_norm is False"),
        ({**ROTARY, "norm": "layer"}, "norm is 'layer'"),
        ({**ROTARY, "biases": True}, "biases is True"),
        ({**ROTARY, "activation": "gelu"}, "activation is 'gelu'"),
    ],
)
def test_a_model_of_no_family_is_refused_with_the_key(keys: dict[str, Any], key: str) -> None:
    with pytest.raises(CheckpointError, match=rf"model\.{key}, and .* there is no Hugging Face form of this model"):
        family_of(model(**keys))


def test_bloom_has_a_feed_forward_of_four_times_its_width() -> None:
    narrow = model(position="alibi", embedding_norm=True).model_copy(update={"ffn": 96})
    with pytest.raises(CheckpointError, match=r"model\.ffn is 96, and BLOOM"):
        family_of(narrow)
