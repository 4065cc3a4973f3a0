"""``config.json`` of transformers and our :class:`megapoly.config.Model`: either from the other. No torch.

A key that asks for something that the decoder does not do is refused, never dropped. Dropout is not taken over: it is a
choice of a training run, not a property of weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pydantic

from megapoly.config import Model
from megapoly.config_checks import check_model
from megapoly.errors import CheckpointError, ConfigError

BLOOM_POSITIONS = 2048
_TANH = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_python_tanh")  # names of one formula
_ROPE_KEYS = {
    "rope_theta", "rope_type", "type", "factor", "low_freq_factor", "high_freq_factor", "partial_rotary_factor",
    "original_max_position_embeddings",
}  # fmt: skip
_DTYPE_KEYS = {"torch_dtype", "dtype"}  # the name before transformers 5, which reads it too, and the one since then
_ARCHITECTURES = {
    "gpt2": "GPT2LMHeadModel", "bloom": "BloomForCausalLM", "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM",
}  # fmt: skip


class _Keys:
    """The keys of a config.json, and how they are asked for; ``where`` is the file, for messages."""

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        self._config, self.where = config, where

    def need(self, *names: str) -> int:
        """The whole number under the first of these names that is there."""
        for name in names:
            value = self._config.get(name)
            if type(value) is not int and value is not None:
                raise CheckpointError(f"{self.where}: {name} is {value!r}, expected a whole number; correct it")
            if value is not None:
                return value
        raise CheckpointError(f"{self.where}: has no key {names[0]!r}; take a config.json that transformers has saved")

    def get(self, name: str, default: Any) -> Any:
        value = self._config.get(name)
        return default if value is None else value

    def raw(self, name: str, default: Any) -> Any:
        """As :meth:`get`, but null is a value."""
        return self._config.get(name, default)

    def expect(self, name: str, default: Any, *wanted: Any) -> None:
        """Refuse another value than these; a key that is not there has its ``default``."""
        found = self.raw(name, default)
        if found not in wanted:
            raise self.refusal(name, found, " or ".join(map(repr, wanted)))

    def refusal(self, name: str, found: Any, expected: str) -> CheckpointError:
        return CheckpointError(
            f"{self.where}: {name} is {found!r}, expected {expected}: megapoly's decoder does not do that, so its"
            " results would be wrong; convert another model"
        )


def to_model(config: Mapping[str, Any], where: str) -> tuple[Model, list[str]]:
    """The decoder that a config.json describes, and sentences about what was assumed.

    Raises:
        CheckpointError: another kind of model, a key that is missing, or one that asks for what the decoder does not.
    """
    keys = _Keys(config, where)
    kind = config.get("model_type")
    read = _READERS.get(str(kind))
    if read is None:
        raise CheckpointError(
            f"{where}: model_type is {kind!r}, expected one of {', '.join(_READERS)}: other models are not"
            " configurations of megapoly's decoder"
        )
    keys.expect("quantization_config", None, None)
    values, notes = read(keys)
    try:
        model = Model.model_validate(values)
        check_model(model)
    except (pydantic.ValidationError, ConfigError) as error:
        raise CheckpointError(f"{where}: does not describe a model: {error}") from error
    return model, notes


def _llama(keys: _Keys) -> tuple[dict[str, Any], list[str]]:
    keys.expect("attention_bias", False, False)
    keys.expect("mlp_bias", False, False)
    return _rotary(keys, keys.get("num_key_value_heads", keys.need("num_attention_heads"))), []


def _mistral(keys: _Keys) -> tuple[dict[str, Any], list[str]]:
    window, positions = keys.raw("sliding_window", 4096), keys.need("max_position_embeddings")
    if window is not None and window < positions:
        raise CheckpointError(
            f"{keys.where}: sliding_window is {window}, expected null or at least max_position_embeddings {positions}:"
            f" megapoly attends to all positions. Set max_position_embeddings to {window} in it, within which they are"
            " the same"
        )
    return _rotary(keys, keys.need("num_key_value_heads")), []


def _qwen2(keys: _Keys) -> tuple[dict[str, Any], list[str]]:
    keys.expect("use_sliding_window", False, False)
    others = set(keys.get("layer_types", ())) - {"full_attention"}
    if others:
        raise keys.refusal("layer_types", sorted(others), "'full_attention' only")
    return _rotary(keys, keys.need("num_key_value_heads")) | {"qkv_biases": True}, []


def _rotary(keys: _Keys, groups: int) -> dict[str, Any]:
    hidden, heads = keys.need("hidden_size"), keys.need("num_attention_heads")
    if heads < 1 or keys.get("head_dim", hidden // heads) * heads != hidden:
        raise keys.refusal(
            "head_dim", keys.get("head_dim", None), f"hidden_size / num_attention_heads = {hidden}/{heads}"
        )
    keys.expect("hidden_act", "silu", "silu", "swish")
    return {
        "layers": keys.need("num_hidden_layers"),
        "hidden": hidden,
        "heads": heads,
        "ffn": keys.need("intermediate_size"),
        "vocabulary": keys.need("vocab_size"),
        "positions": keys.need("max_position_embeddings"),
        "key_value_heads": None if groups == heads else groups,
        "norm": "rms",
        "norm_epsilon": keys.get("rms_norm_eps", 1e-6),
        "position": "rope",
        "activation": "swiglu",
        "biases": False,
        "tied": keys.get("tie_word_embeddings", False),
        "init_std": keys.get("initializer_range", 0.02),
        **_rope(keys),
    }


def _rope(keys: _Keys) -> dict[str, Any]:
    """Both forms: ``rope_parameters`` of transformers 5, ``rope_theta`` and ``rope_scaling`` of those before."""
    given: dict[str, Any] = dict(keys.get("rope_parameters", None) or keys.get("rope_scaling", None) or {})
    unknown = sorted(given.keys() - _ROPE_KEYS)
    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in ("default", "linear", "llama3"):
        raise keys.refusal("rope_type", kind, "'default', 'linear' or 'llama3'")
    if unknown:
        raise keys.refusal(f"rope parameter {unknown[0]}", given[unknown[0]], "none of this name")
    for each in (given.get("partial_rotary_factor"), keys.get("partial_rotary_factor", None)):
        if each not in (None, 1, 1.0):
            raise keys.refusal("partial_rotary_factor", each, "1")
    result: dict[str, Any] = {"rope_base": given.get("rope_theta") or keys.get("rope_theta", 10000.0)}
    names = {"factor": "factor"}
    if kind == "llama3":
        names |= {
            "original_positions": "original_max_position_embeddings",
            "low_frequency_factor": "low_freq_factor",
            "high_frequency_factor": "high_freq_factor",
        }
    missing = [name for name in names.values() if kind != "default" and given.get(name) is None]
    if missing:
        raise CheckpointError(f"{keys.where}: rope_type {kind!r} needs {missing[0]}, and it is not there; add it")
    if kind != "default":
        result["rope_scaling"] = {"kind": kind, **{own: given[name] for own, name in names.items()}}
    return result


def _gpt2(keys: _Keys) -> tuple[dict[str, Any], list[str]]:
    keys.expect("activation_function", "gelu_new", *_TANH)
    keys.expect("scale_attn_weights", True, True)
    keys.expect("scale_attn_by_inverse_layer_idx", False, False)
    keys.expect("add_cross_attention", False, False)
    hidden = keys.need("n_embd")
    return {
        "layers": keys.need("n_layer"),
        "hidden": hidden,
        "heads": keys.need("n_head"),
        "ffn": keys.get("n_inner", 4 * hidden),
        "vocabulary": keys.need("vocab_size"),
        "positions": keys.need("n_positions", "n_ctx"),
        "norm_epsilon": keys.get("layer_norm_epsilon", 1e-5),
        "tied": keys.get("tie_word_embeddings", True),
        "init_std": keys.get("initializer_range", 0.02),
    }, []


def _bloom(keys: _Keys) -> tuple[dict[str, Any], list[str]]:
    keys.expect("apply_residual_connection_post_layernorm", False, False)
    hidden = keys.need("n_embed", "hidden_size")
    positions, notes = keys.get("seq_length", None), []
    if positions is None:
        positions = BLOOM_POSITIONS
        notes = [f"{keys.where}: has no seq_length, and ALiBi no longest sequence; taken as {positions} positions"]
    return {
        "layers": keys.need("n_layer", "num_hidden_layers"),
        "hidden": hidden,
        "heads": keys.need("n_head", "num_attention_heads"),
        "ffn": 4 * hidden,
        "vocabulary": keys.need("vocab_size"),
        "positions": positions,
        "norm_epsilon": keys.get("layer_norm_epsilon", 1e-5),
        "embedding_norm": True,
        "position": "alibi",
        "tied": keys.get("tie_word_embeddings", True),
        "init_std": keys.get("initializer_range", 0.02),
    }, notes


_READERS: dict[str, Callable[[_Keys], tuple[dict[str, Any], list[str]]]] = {
    "llama": _llama, "mistral": _mistral, "qwen2": _qwen2, "gpt2": _gpt2, "bloom": _bloom,
}  # fmt: skip

# What each family has of the keys of Model; others may have any value.
_LAYER_NORMS: dict[str, Any] = {"norm": "layer", "activation": "gelu", "biases": True, "qkv_biases": True}
_REQUIRED: dict[str, dict[str, Any]] = {
    "learned": {**_LAYER_NORMS, "embedding_norm": False},
    "alibi": {**_LAYER_NORMS, "embedding_norm": True},
    "rope": {"norm": "rms", "activation": "swiglu", "biases": False, "embedding_norm": False},
}
_NAMES = {"learned": "GPT-2", "alibi": "BLOOM", "rope": "LLaMA, Mistral and Qwen2"}


def family_of(model: Model) -> str:
    """The ``model_type`` that a decoder is exported as.

    Raises:
        CheckpointError: it is of no family; names the key.
    """
    wanted = dict(_REQUIRED[model.position])
    if model.position != "rope":
        wanted["key_value_heads"] = model.heads
    if model.position == "alibi":
        wanted["ffn"] = 4 * model.hidden
    found = {**model.model_dump(), "qkv_biases": model.has_qkv_biases, "key_value_heads": model.groups}
    for key, value in wanted.items():
        if found[key] != value:
            raise CheckpointError(
                f"model.{key} is {found[key]!r}, and {_NAMES[model.position]}, the models in transformers with position"
                f" {model.position!r}, have {value!r}: there is no Hugging Face form of this model"
            )
    if model.position == "rope":
        return "qwen2" if model.has_qkv_biases else "llama"
    return "gpt2" if model.position == "learned" else "bloom"


def to_config(model: Model, origin: Mapping[str, Any] | None, dtype: str, ends: Mapping[str, int]) -> dict[str, Any]:
    """A config.json that transformers, from 4.40 on, reads as this model.

    Args:
        origin: the config.json that the weights came with. It is kept where it describes the same model.
        dtype: of the tensors, such as ``bfloat16``.
        ends: ``bos_token_id`` and ``eos_token_id``, as far as they are known.
    """
    if origin is not None and _describes(origin, model):
        kept = {key: dtype if key in _DTYPE_KEYS else value for key, value in origin.items() if key != "_name_or_path"}
        if model.position == "rope" and "rope_parameters" in kept:  # which transformers before 5 passes over in silence
            kept |= _write_rope(model)
        return kept if kept.keys() & _DTYPE_KEYS else {**kept, "torch_dtype": dtype}
    kind = family_of(model)
    write = {"gpt2": _write_gpt2, "bloom": _write_bloom}.get(kind, _write_rotary)
    return {
        "architectures": [_ARCHITECTURES[kind]],
        "model_type": kind,
        **write(model),
        "vocab_size": model.vocabulary,
        "initializer_range": model.init_std,
        "tie_word_embeddings": model.tied,
        "bos_token_id": ends.get("bos_token_id"),
        "eos_token_id": ends.get("eos_token_id"),
        "torch_dtype": dtype,
        "use_cache": True,
    }


def _describes(origin: Mapping[str, Any], model: Model) -> bool:
    try:
        described, _ = to_model(origin, "")
    except CheckpointError:
        return False
    return described == model


def _write_rotary(model: Model) -> dict[str, Any]:
    result: dict[str, Any] = {
        "num_hidden_layers": model.layers,
        "hidden_size": model.hidden,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.groups,
        "intermediate_size": model.ffn,
        "hidden_act": "silu",
        "max_position_embeddings": model.positions,
        "rms_norm_eps": model.norm_epsilon,
        "attention_dropout": model.attention_dropout,
        **_write_rope(model),
    }
    if model.has_qkv_biases:
        return {**result, "use_sliding_window": False}
    return {**result, "attention_bias": False, "mlp_bias": False}


def _write_rope(model: Model) -> dict[str, Any]:
    """The form of transformers 4, which 5 reads too. Before 4.43 it has linear scaling alone, and of two keys."""
    scaling = model.rope_scaling
    keys: dict[str, Any] | None = None
    if scaling is not None and scaling.kind == "linear":
        keys = {"type": "linear", "factor": scaling.factor}
    elif scaling is not None:
        keys = {
            "rope_type": scaling.kind,
            "factor": scaling.factor,
            "original_max_position_embeddings": scaling.original_positions,
            "low_freq_factor": scaling.low,
            "high_freq_factor": scaling.high,
        }
    return {"rope_theta": model.wavelength_base, "rope_scaling": keys}


def _write_gpt2(model: Model) -> dict[str, Any]:
    return {
        "n_layer": model.layers,
        "n_embd": model.hidden,
        "n_head": model.heads,
        "n_inner": model.ffn,
        "n_positions": model.positions,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": model.norm_epsilon,
        "embd_pdrop": model.dropout,
        "resid_pdrop": model.dropout,
        "attn_pdrop": model.attention_dropout,
    }


def _write_bloom(model: Model) -> dict[str, Any]:
    return {
        "n_layer": model.layers,
        "hidden_size": model.hidden,
        "n_head": model.heads,
        "seq_length": model.positions,
        "layer_norm_epsilon": model.norm_epsilon,
        "apply_residual_connection_post_layernorm": False,
        "hidden_dropout": model.dropout,
        "attention_dropout": model.attention_dropout,
    }
