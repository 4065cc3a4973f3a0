"""``python -m``: greedy texts by megapoly and by transformers in turns, from one folder of Hugging Face."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from megapoly.bench.generate import Options, Turn
from megapoly.checkpoint.weights import open_weights
from megapoly.config import Model
from megapoly.context import ParallelContext
from megapoly.generate.replica import Replica
from megapoly.generate.rows import Row, grow
from megapoly.generate.sampling import Sampling
from megapoly.layers.product import product
from megapoly.models.cost import layer_flops, parameter_count, position_size

_SQUARE = 1536
_READ = 64  # thousand rows of a thousand float32: more than any cache


class _NoText:
    """Of this benchmark tokens are all: neither side makes text of them."""

    def decode(self, ids: Sequence[int]) -> str:
        return ""


class _Clock(transformers.StoppingCriteria):
    """Notes when each token is there."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Tensor, **rest: Any) -> Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool)


def make_peer(options: Options) -> transformers.PreTrainedModel:
    common: dict[str, Any] = {"vocab_size": options.vocabulary, "bos_token_id": None, "eos_token_id": None}
    positions, inner = options.prompt + options.tokens, 4 * options.hidden
    config = {
        "llama": lambda: transformers.LlamaConfig(
            **common, hidden_size=options.hidden, intermediate_size=inner * 2 // 3, num_hidden_layers=options.layers,
            num_attention_heads=options.heads, num_key_value_heads=options.groups, max_position_embeddings=positions,
            tie_word_embeddings=True,
        ),
        "gpt2": lambda: transformers.GPT2Config(
            **common, n_embd=options.hidden, n_layer=options.layers, n_head=options.heads, n_positions=positions,
            activation_function="gelu_pytorch_tanh",
        ),
        "bloom": lambda: transformers.BloomConfig(
            **common, hidden_size=options.hidden, n_layer=options.layers, n_head=options.heads, seq_length=positions
        ),
    }[options.family]()  # fmt: skip
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()


def peer_times(peer: Any, prompts: Tensor, tokens: int) -> tuple[list[float], list[list[int]]]:
    """Seconds from the start to each token, and the tokens."""
    clock = _Clock()
    begin = time.perf_counter()
    out = peer.generate(
        prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=tokens, do_sample=False, pad_token_id=0,
        stopping_criteria=transformers.StoppingCriteriaList([clock]),
    )  # fmt: skip
    return [at - begin for at in clock.times], out[:, prompts.shape[1] :].tolist()


def own_times(replica: Replica, prompts: Tensor, tokens: int) -> tuple[list[float], list[list[int]]]:
    """The same of megapoly."""
    sampling = Sampling(tokens=tokens, temperature=0)
    limit = replica.model.positions
    rows = [Row(ids, _NoText(), frozenset(), sampling, limit=limit) for ids in prompts.tolist()]
    begin = time.perf_counter()
    times = [time.perf_counter() - begin for _ in grow(replica, rows, sampling, replica.model.vocabulary)]
    return times, [row.tokens for row in rows]


def bandwidth() -> float:
    """Bytes per second of a product of a matrix with a vector, which reads each of its elements once."""
    matrix = torch.ones(_READ * 1000, 1000)
    vector = torch.ones(1000)
    begin = time.perf_counter()
    torch.mv(matrix, vector)
    return matrix.numel() * 4 / (time.perf_counter() - begin)


def operations() -> float:
    """FLOP per second of a product of matrices, by what the layers use."""
    left, right = torch.randn(2, _SQUARE, _SQUARE)
    product(left, right)
    begin = time.perf_counter()
    for _ in range(4):
        product(left, right)
    return 4 * 2 * _SQUARE**3 / (time.perf_counter() - begin)


def step_bytes(model: Model, batch: int, length: float) -> float:
    """What one step has to read: every weight that is multiplied, and keys and values of ``length`` tokens."""
    unread = position_size(model) + (0 if model.tied else model.vocabulary * model.hidden)
    cached = batch * length * model.layers * 2 * model.groups * model.head_dim
    return 4.0 * (parameter_count(model) - unread + cached)


def prefill_flops(model: Model, batch: int, prompt: int) -> float:
    """Products of the layers, for all tokens, and of the output, for the last ones; a token sees half of the others."""
    return batch * (prompt * model.layers * layer_flops(model, prompt // 2) + 2 * model.hidden * model.vocabulary)


def main(options: Options, folder: Path) -> None:
    torch.set_num_threads(options.threads)
    peer = make_peer(options)
    peer.save_pretrained(folder / "model")
    replica = Replica(open_weights(folder / "model"), ParallelContext.create(), torch.float32)
    model = replica.model
    for batch in options.batches:
        prompts = torch.randint(options.vocabulary, (batch, options.prompt), generator=torch.Generator().manual_seed(1))
        for warm in (True, *[False] * options.repeats):
            tokens = 3 if warm else options.tokens
            own, texts = own_times(replica, prompts, tokens)
            theirs, peer_texts = peer_times(peer, prompts, tokens)
            if warm:
                continue
            turn = Turn(
                batch=batch,
                prefill=(own[0], theirs[0]),
                steps=(own[-1] - own[0], theirs[-1] - theirs[0]),
                bandwidth=bandwidth(),
                operations=operations(),
                step_bytes=step_bytes(model, batch, options.prompt + options.tokens / 2),
                prefill_flops=prefill_flops(model, batch, options.prompt),
                same=sum(a == b for a, b in zip(texts, peer_texts)) / batch,
            )
            sys.stdout.write(json.dumps(dataclasses.asdict(turn)) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main(Options(**json.loads(sys.argv[1])), Path(sys.argv[2]))
