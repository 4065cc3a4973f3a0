"""``python -m``: training steps of megatron-core's GPTModel in one process, with its local layers."""

from __future__ import annotations

from functools import partial

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig
from torch import Tensor
from torch.nn.functional import gelu

from megapoly.bench.task import Task
from megapoly.bench.torch_step import torch_work
from megapoly.bench.worker import Work, serve
from megapoly.config import Config, Model


def make_model(model: Model, device: torch.device, seed: int) -> GPTModel:
    """Also makes megatron's groups, of a torch.distributed of one rank."""
    on_gpu = device.type == "cuda"
    parallel_state.initialize_model_parallel()
    # The other tracker of random numbers forks the state of a GPU, dropout or not.
    model_parallel_cuda_manual_seed(seed, inference_rng_tracker=not on_gpu)
    if not on_gpu:
        # Its attention takes a buffer on the current GPU: the one place of its layers that needs one.
        torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment, return-value]
    config = TransformerConfig(
        num_layers=model.layers, hidden_size=model.hidden, num_attention_heads=model.heads,
        ffn_hidden_size=model.ffn, layernorm_epsilon=model.norm_epsilon, init_method_std=model.init_std,
        hidden_dropout=0.0, attention_dropout=0.0, activation_func=partial(gelu, approximate="tanh"),
        use_cpu_initialization=True, bias_activation_fusion=False, masked_softmax_fusion=False,
    )  # fmt: skip
    return GPTModel(
        config,
        get_gpt_layer_local_spec(),
        vocab_size=model.vocabulary,
        max_sequence_length=model.positions,
        share_embeddings_and_output_weights=True,
        position_embedding_type="learned_absolute",
    )


def build(task: Task, device: torch.device) -> Work:
    config = task.config
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    torch.manual_seed(config.train.seed)
    return make_work(make_model(config.model, device, config.train.seed), config, device)


def make_work(model: GPTModel, config: Config, device: torch.device) -> Work:
    length = config.train.sequence
    positions = torch.arange(length, device=device).expand(config.train.global_batch, length)
    hidden = torch.ones(1, 1, length, length, dtype=torch.bool, device=device).triu(1)

    def mean_loss(tokens: Tensor, labels: Tensor) -> Tensor:
        counted = labels >= 0
        return (model(tokens, positions, hidden, labels=labels * counted) * counted).sum() / counted.sum()

    return torch_work(model, mean_loss, config, device)


if __name__ == "__main__":
    serve(build)
