"""megatron-core's GPTModel on CPUs: it loads a rank's file, strictly, saves it again and computes logits.

Imported in ranks only, whose processes it changes.
"""

from __future__ import annotations

from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig
from torch import Tensor
from torch.nn import functional

torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment, return-value]
Tensor.cuda = lambda self, *args, **keys: self  # type: ignore[method-assign] # its tied weights go over a GPU


def logits(folder: Path, again: Path, tokens_BS: Tensor) -> Tensor | None:
    """Of this rank's share of the vocabulary, in the dtype of the files; None but on the last stage."""
    args = _load(next((folder / "release").glob("mp_rank_*")))["args"]
    tp, pp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    parallel_state.initialize_model_parallel(tp, pp)
    try:
        model_parallel_cuda_manual_seed(1, inference_rng_tracker=True)
        name = f"mp_rank_{parallel_state.get_tensor_model_parallel_rank():02d}"
        if pp > 1:
            name += f"_{parallel_state.get_pipeline_model_parallel_rank():03d}"
        model = build(args).to(args.params_dtype)  # its norms are made in float32
        model.load_state_dict(_load(folder / "release" / name)["model"], strict=True)
        if parallel_state.get_data_parallel_rank() == 0:
            value = {"args": args, "checkpoint_version": 3.0, "iteration": 0, "model": model.state_dict()}
            torch.save(value, again / "release" / name / "model_optim_rng.pt")
        return forward(model.eval(), args, tokens_BS)
    finally:
        parallel_state.destroy_model_parallel()


def te_names() -> dict[str, str]:
    """Beginnings of names in a layer, and what they are where a norm is part of TransformerEngine's linear layer."""
    layer = get_gpt_layer_local_spec().submodules
    found: dict[str, str] = layer.sharded_state_dict_keys_map
    return found


def _load(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(folder / "model_optim_rng.pt", weights_only=False)
    return found


def build(args: Namespace) -> GPTModel:
    """As Megatron-LM makes it of the arguments of a checkpoint."""
    config = TransformerConfig(
        num_layers=args.num_layers, hidden_size=args.hidden_size, num_attention_heads=args.num_attention_heads,
        num_query_groups=args.num_query_groups, kv_channels=args.kv_channels, ffn_hidden_size=args.ffn_hidden_size,
        normalization=args.normalization, layernorm_epsilon=args.norm_epsilon, add_bias_linear=args.add_bias_linear,
        add_qkv_bias=args.add_qkv_bias, gated_linear_unit=args.swiglu,
        # Not fused, since the fused ones are compiled; fused with a bias, its GELU is the tanh approximation.
        activation_func=functional.silu if args.swiglu else partial(functional.gelu, approximate="tanh"),
        bias_activation_fusion=False, masked_softmax_fusion=False, hidden_dropout=0.0, attention_dropout=0.0,
        params_dtype=args.params_dtype, pipeline_dtype=args.params_dtype, use_cpu_initialization=True,
        tensor_model_parallel_size=args.tensor_model_parallel_size,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
    )  # fmt: skip
    assert args.swiglu or args.bias_gelu_fusion
    return GPTModel(
        config,
        get_gpt_layer_local_spec(normalization=args.normalization),
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        parallel_output=True,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_base=args.rotary_base,
        rope_scaling=args.use_rope_scaling,
        rope_scaling_factor=args.rope_scaling_factor,
        seq_len_interpolation_factor=args.rotary_seq_len_interpolation_factor,
    )


@torch.no_grad()
def forward(model: GPTModel, args: Namespace, tokens_BS: Tensor) -> Tensor | None:
    batch, length = tokens_BS.shape
    positions_BS = torch.arange(length).expand(batch, length)
    hidden = torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)
    if not model.pre_process:
        received = torch.empty(length, batch, args.hidden_size, dtype=args.params_dtype)
        dist.recv(received, parallel_state.get_pipeline_model_parallel_prev_rank())
        model.set_input_tensor(received)
    result: Tensor = model(tokens_BS, positions_BS, hidden)
    if model.post_process:
        return result
    dist.send(result.contiguous(), parallel_state.get_pipeline_model_parallel_next_rank())
    return None
