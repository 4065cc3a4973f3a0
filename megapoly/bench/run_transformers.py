"""``python -m``: training steps of transformers' GPT2LMHeadModel, with torch's fused attention and no dropout."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from megapoly.bench.task import Task
from megapoly.bench.torch_step import torch_work
from megapoly.bench.worker import Work, serve
from megapoly.config import Config, Model


def make_model(model: Model) -> GPT2LMHeadModel:
    """Its fastest form: ``gelu_pytorch_tanh`` is one kernel, the ``gelu_new`` of its GPT-2 the same in several."""
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=model.vocabulary, n_positions=model.positions, n_embd=model.hidden, n_layer=model.layers,
            n_head=model.heads, n_inner=model.ffn, activation_function="gelu_pytorch_tanh", resid_pdrop=0.0,
            embd_pdrop=0.0, attn_pdrop=0.0, layer_norm_epsilon=model.norm_epsilon, initializer_range=model.init_std,
            use_cache=False, bos_token_id=0, eos_token_id=0, attn_implementation="sdpa",
        )
    )  # fmt: skip


def build(task: Task, device: torch.device) -> Work:
    config = task.config
    torch.manual_seed(config.train.seed)
    return make_work(make_model(config.model), config, device)


def make_work(model: GPT2LMHeadModel, config: Config, device: torch.device) -> Work:
    def mean_loss(tokens: Tensor, labels: Tensor) -> Tensor:
        return model(input_ids=tokens, labels=tokens).loss  # it moves the labels by one itself

    return torch_work(model, mean_loss, config, device)


if __name__ == "__main__":
    serve(build)
