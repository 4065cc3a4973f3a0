"""The arguments in a Megatron file, an ``argparse.Namespace``, and our Model: either from the other.

An argument that asks for something that the decoder does not do is refused, never dropped. What is a choice of a run
and no property of weights, such as dropout, is not taken over.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from typing import Any

import pydantic
import torch

from megapoly.checkpoint.megatron_layout import DIVISOR, padded_vocabulary
from megapoly.config import Model, RopeScaling
from megapoly.config_checks import check_model
from megapoly.errors import CheckpointError, ConfigError

LLAMA3 = RopeScaling(kind="llama3", factor=8.0, original_positions=8192)  # Megatron knows others by their factor only
# Arguments with the values under which Megatron does what our decoder does; the first is the default.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "activation_func_clamp_value": (None,),
    "apply_layernorm_1p": (False,),
    "apply_residual_connection_post_layernorm": (False,),
    "attention_output_gate": (False,),
    "embed_layernorm": (False,),
    "glu_linear_offset": (0.0,),
    "heterogeneous_layers_config_encoded_json": (None,),
    "heterogeneous_layers_config_path": (None,),
    "mtp_num_layers": (None, 0),
    "multi_latent_attention": (False,),
    "no_rope_freq": (None,),
    "normalization": ("LayerNorm", "RMSNorm"),
    "num_experts": (None, 0),
    "qk_l2_norm": (False,),
    "qk_layernorm": (False,),
    "quick_geglu": (False,),
    "retro_add_retriever": (False,),
    "rotary_interleaved": (False,),
    "rotary_percent": (1.0,),
    "softmax_type": ("vanilla",),
    "squared_relu": (False,),
    "window_size": (None,),
}


class Arguments:
    """The arguments of a file by name; ``where`` is the file, for messages."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self._values, self.where = values, where

    def get(self, name: str, default: Any = None) -> Any:
        """A number, text, or None; ``default`` where it is not given, or None."""
        value = self._values.get(name)
        if value is None:
            return default
        if not isinstance(value, (bool, int, float, str)):
            raise self.refusal(name, "a number or text")
        return value

    def count(self, name: str, default: int | None = None) -> int:
        """A positive whole number."""
        value = self.get(name, default)
        if value is None:
            raise CheckpointError(
                f"{self.where}: its arguments have no {name}; take a file that Megatron's training saved"
            )
        if type(value) is not int or value < 1:
            raise self.refusal(name, "a positive whole number")
        return value

    def refusal(self, name: str, expected: str) -> CheckpointError:
        value = self._values.get(name)
        plain = isinstance(value, (bool, int, float, str, type(None)))
        return CheckpointError(
            f"{self.where}: argument {name} is {repr(value) if plain else type(value).__name__}, expected {expected}:"
            " megapoly's decoder does not do that, so its results would be wrong; convert another model"
        )


def to_model(args: Arguments, naming: str, vocabulary: int) -> Model:
    """The decoder that the arguments describe.

    Raises:
        CheckpointError: an argument that is missing, or asks for what the decoder does not do.
    """
    for name, allowed in _PLAIN.items():
        if args.get(name, allowed[0]) not in allowed:
            raise args.refusal(name, " or ".join(map(repr, allowed)))
    hidden, heads = args.count("hidden_size"), args.count("num_attention_heads")
    if args.count("kv_channels", hidden // heads or 1) * heads != hidden:
        raise args.refusal("kv_channels", f"hidden_size / num_attention_heads = {hidden}/{heads}")
    groups = args.count("num_query_groups", heads) if args.get("group_query_attention", False) else heads
    biases = bool(args.get("add_bias_linear", True))
    swiglu = bool(args.get("swiglu", False))
    if not swiglu and not _is_tanh(args, naming, biases):
        raise args.refusal("bias_gelu_fusion", "true, since without it Megatron computes the exact GELU")
    values = {
        "layers": args.count("num_layers"),
        "hidden": hidden,
        "heads": heads,
        "ffn": args.count("ffn_hidden_size", int(4 * hidden * 2 / 3) // 64 * 64 or None if swiglu else 4 * hidden),
        "vocabulary": vocabulary,
        "positions": args.count("max_position_embeddings"),
        "key_value_heads": None if groups == heads else groups,
        "norm": "rms" if args.get("normalization") == "RMSNorm" else "layer",
        "norm_epsilon": args.get("norm_epsilon", args.get("layernorm_epsilon", 1e-5)),
        "activation": "swiglu" if swiglu else "gelu",
        "biases": biases,
        "qkv_biases": True if args.get("add_qkv_bias", False) and not biases else None,
        "tied": not args.get("untie_embeddings_and_output_weights", False),
        "init_std": args.get("init_method_std", 0.02),
        **_position(args),
    }
    try:
        model = Model.model_validate(values)
        check_model(model)
    except (pydantic.ValidationError, ConfigError) as error:
        raise CheckpointError(f"{args.where}: its arguments do not describe a model: {error}") from error
    return model


def _is_tanh(args: Arguments, naming: str, biases: bool) -> bool:
    """Megatron's GELU is the tanh approximation where it is fused with a bias, or asked for in the old models."""
    fused = biases and bool(args.get("bias_gelu_fusion", True))
    return fused or (naming == "legacy" and bool(args.get("openai_gelu", False)))


def _position(args: Arguments) -> dict[str, Any]:
    rotary = bool(args.get("use_rotary_position_embeddings", False))
    kind = args.get("position_embedding_type", "rope" if rotary else "learned_absolute")
    if kind == "learned_absolute" and not rotary:
        return {"position": "learned"}
    if kind != "rope" and not rotary:
        raise args.refusal("position_embedding_type", "'learned_absolute' or 'rope'")
    base, scaling = args.get("rotary_base", args.get("rotary_theta", 10000)), None
    stretch = args.get("rotary_seq_len_interpolation_factor", 1)
    if args.get("use_rope_scaling", False):
        if stretch != 1:
            raise args.refusal("rotary_seq_len_interpolation_factor", "none beside use_rope_scaling")
        scaling = LLAMA3.model_dump() | {"factor": args.get("rope_scaling_factor", LLAMA3.factor)}
    elif stretch != 1:
        scaling = {"kind": "linear", "factor": stretch}
    return {"position": "rope", "rope_base": None if base == 10000 else base, "rope_scaling": scaling}


def check_exportable(model: Model, naming: str, tp: int, pp: int) -> None:
    """Refuse a model or layout that Megatron has no form for.

    Raises:
        CheckpointError: naming the key.
    """
    scaling = model.rope_scaling
    reasons = {
        f"model.position is {model.position!r}": model.position == "alibi",
        "model.embedding_norm is true": model.embedding_norm,
        "model.qkv_biases is false beside model.biases": model.biases and not model.has_qkv_biases,
        "model.activation is 'gelu' without model.biases, where megatron-core computes the exact GELU":
            model.activation == "gelu" and not model.biases and naming != "legacy",
        f"model.rope_scaling is of original_positions {scaling and scaling.original_positions}, factors"
        f" {scaling and scaling.low} and {scaling and scaling.high}, and Megatron's of {LLAMA3.original_positions},"
        f" {LLAMA3.low} and {LLAMA3.high}": scaling is not None and scaling.kind == "llama3" and
            (scaling.original_positions, scaling.low, scaling.high)
            != (LLAMA3.original_positions, LLAMA3.low, LLAMA3.high),
    }  # fmt: skip
    for reason, holds in reasons.items():
        if holds:
            raise CheckpointError(
                f"megatron: has no form of this model: {reason}; convert it to huggingface or megapoly"
            )
    for key, number, flag, size in (
        ("model.key_value_heads" if model.key_value_heads else "model.heads", model.groups, "--tp", tp),
        ("model.ffn", model.ffn, "--tp", tp),
        ("model.layers", model.layers, "--pp", pp),
    ):
        if number % size:
            fits = [str(n) for n in range(1, number + 1) if number % n == 0]
            raise CheckpointError(f"{key} {number} does not divide by {flag} {size}; choose it from {', '.join(fits)}")


def to_arguments(
    model: Model, naming: str, *, tp: int, pp: int, dtype: torch.dtype, tokenizer: str | None = None
) -> Namespace:
    """What Megatron-LM reads of a checkpoint's arguments (``--use-checkpoint-args``), and compares with its own."""
    scaling, rope = model.rope_scaling, model.position == "rope"
    base, swiglu = model.wavelength_base, model.activation == "swiglu"
    return Namespace(
        num_layers=model.layers,
        hidden_size=model.hidden,
        ffn_hidden_size=model.ffn,
        num_attention_heads=model.heads,
        kv_channels=model.head_dim,
        group_query_attention=model.groups != model.heads,
        num_query_groups=model.groups,
        seq_length=model.positions,
        encoder_seq_length=model.positions,
        max_position_embeddings=model.positions,
        position_embedding_type="rope" if rope else "learned_absolute",
        add_position_embedding=not rope,
        use_rotary_position_embeddings=rope,
        rotary_base=int(base) if base == int(base) else base,
        rotary_percent=1.0,
        rotary_interleaved=False,
        rotary_seq_len_interpolation_factor=scaling.factor if scaling and scaling.kind == "linear" else None,
        use_rope_scaling=scaling is not None and scaling.kind == "llama3",
        rope_scaling_factor=scaling.factor if scaling and scaling.kind == "llama3" else LLAMA3.factor,
        normalization="RMSNorm" if model.norm == "rms" else "LayerNorm",
        norm_epsilon=model.norm_epsilon,
        layernorm_epsilon=model.norm_epsilon,
        apply_layernorm_1p=False,
        apply_residual_connection_post_layernorm=False,
        qk_layernorm=False,
        swiglu=swiglu,
        squared_relu=False,
        openai_gelu=not swiglu and not model.biases,
        bias_gelu_fusion=not swiglu and model.biases,
        bias_swiglu_fusion=swiglu,
        add_bias_linear=model.biases,
        add_qkv_bias=model.has_qkv_biases and not model.biases,
        untie_embeddings_and_output_weights=not model.tied,
        vocab_size=model.vocabulary,
        padded_vocab_size=padded_vocabulary(model.vocabulary, tp),
        make_vocab_size_divisible_by=DIVISOR,
        tokenizer_type=tokenizer,
        tokenizer_model=None,
        init_method_std=model.init_std,
        hidden_dropout=model.dropout,
        attention_dropout=model.attention_dropout,
        fp32_residual_connection=model.fp32_residual,
        attention_softmax_in_fp32=model.fp32_softmax,
        apply_query_key_layer_scaling=False,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=None,
        context_parallel_size=1,
        expert_model_parallel_size=1,
        num_experts=None,
        world_size=tp * pp,
        data_parallel_size=1,
        data_parallel_random_init=False,
        consumed_train_samples=0,
        consumed_valid_samples=0,
        transformer_impl="transformer_engine" if naming == "core-te" else "local",
        use_legacy_models=naming == "legacy",
        use_mcore_models=naming != "legacy",
        ckpt_format="torch",
    )
