"""What a model costs to compute, and the layers of every pipeline stage that follow from it. No torch.

Costs are FLOPs of the forward pass per token. The backward pass takes twice those of every matrix product (Kaplan et
al., arXiv 2001.08361), and so changes no balance between stages.
"""

from __future__ import annotations

import itertools

from megapoly.config import Config, Layout, Model
from megapoly.pipeline.generators import GENERATORS

# Bytes of a micro-batch's logits and probabilities from which on no rank holds them: they are made in chunks.
WHOLE_LOGITS = 256 << 20


# Dense bf16 peaks of one device in TFLOP/s, from the vendors' data sheets.
# The first name that the device's name holds counts.
PEAK_TFLOPS = {
    "H100 PCIe": 756.0, "H100 NVL": 835.0, "H100": 989.0, "H200": 989.0, "A100": 312.0, "B200": 2250.0, "L40S": 362.0,
}  # fmt: skip


def peak_tflops(device: str) -> float | None:
    """Of a GPU of that name in dense bf16; None where it is not known."""
    return next((peak for key, peak in PEAK_TFLOPS.items() if key in device), None)


def in_chunks(tokens: int, vocabulary: int, itemsize: int) -> bool:
    """Whether the loss of so many tokens, over a rank's part of the vocabulary, is computed in chunks of tokens."""
    return tokens * vocabulary * (itemsize if itemsize >= 4 else itemsize + 4) > WHOLE_LOGITS


def parameter_count(model: Model) -> int:
    """Logical parameters, position table included; a tied embedding counts once."""
    h = model.hidden
    qkv_biases = h + _key_value_size(model) if model.has_qkv_biases else 0
    biases = qkv_biases + (h + model.inner + h if model.biases else 0)
    layer = _layer_weights(model) + biases + 2 * norm_size(model)
    vocabularies = model.vocabulary * h * (1 if model.tied else 2)
    norms = norm_size(model) * (2 if model.embedding_norm else 1)
    return model.layers * layer + vocabularies + position_size(model) + norms


def norm_size(model: Model) -> int:
    """Parameters of one norm."""
    return model.hidden if model.norm == "rms" else 2 * model.hidden


def position_size(model: Model) -> int:
    """Parameters of the position table."""
    return model.positions * model.hidden if model.position == "learned" else 0


def flops_per_token(model: Model, sequence: int) -> float:
    """Forward and backward, as 6 N + 12 layers x hidden x sequence (Chowdhery et al., arXiv 2204.02311, appendix B).

    N leaves out what is not multiplied: the position table, and an embedding that is not the output too. Causality is
    not discounted.
    """
    n = parameter_count(model) - position_size(model) - (0 if model.tied else model.vocabulary * model.hidden)
    return 6.0 * n + 12.0 * model.layers * model.hidden * sequence


def layer_flops(model: Model, sequence: int) -> int:
    """Forward FLOPs per token of one decoder layer: its matrices, and scores and sums over ``sequence`` values."""
    return 2 * _layer_weights(model) + 4 * model.hidden * sequence


def output_flops(model: Model) -> int:
    """Forward FLOPs per token of the output layer."""
    return 2 * model.hidden * model.vocabulary


def stage_flops(model: Model, sequence: int, counts: tuple[int, ...]) -> list[int]:
    """Forward FLOPs per token of stages of so many layers, the output included. The embedding multiplies nothing."""
    costs = [count * layer_flops(model, sequence) for count in counts]
    costs[-1] += output_flops(model)
    return costs


def stage_layers(config: Config) -> tuple[tuple[int, int], ...]:
    """Layers [begin, end) of every pipeline stage of a run, see :func:`layer_ranges`."""
    return layer_ranges(config.model, config.layout, config.train.sequence)


def layer_ranges(model: Model, layout: Layout, sequence: int) -> tuple[tuple[int, int], ...]:
    """Layers [begin, end) of every pipeline stage, first to last; ``sequence`` tokens are in a sample.

    As ``layout.stage_layers`` says, or balanced by cost. The slowest rank sets the pace of a full pipeline, and the
    slowest stage the time to fill and drain it: the largest cost of a rank, all its stages together, is least; among
    such splits the other ranks are as even as can be, then the stages within each rank. Of equals, later stages get
    more layers: they hold the activations of fewer micro-batches. The first and the last stage may have no layer.

    Layers cost the same, so that giving them out one by one, each to the rank that is lightest with it, minimises every
    convex function of the ranks' costs, the largest cost and the sum of squares among them.
    """
    stages = layout.stages
    given = layout.stage_layers
    if given is None:
        counts = [0 if stage in (0, stages - 1) else 1 for stage in range(stages)]
        rank_of = placement(layout)
        layer = layer_flops(model, sequence)
        stage_costs = stage_flops(model, sequence, tuple(counts))
        rank_costs = [0] * layout.pp
        for rank, cost in zip(rank_of, stage_costs):
            rank_costs[rank] += cost
        for _ in range(model.layers - sum(counts)):
            lightest = min(range(stages), key=lambda s: (rank_costs[rank_of[s]], -rank_of[s], stage_costs[s], -s))
            counts[lightest] += 1
            stage_costs[lightest] += layer
            rank_costs[rank_of[lightest]] += layer
        given = tuple(counts)
    return tuple(itertools.pairwise(itertools.accumulate(given, initial=0)))


def placement(layout: Layout) -> tuple[int, ...]:
    """Pipeline rank of every stage."""
    return GENERATORS[layout.schedule].placement(layout.pp, layout.stages_per_rank)


def _key_value_size(model: Model) -> int:
    return 2 * model.groups * model.head_dim


def _layer_weights(model: Model) -> int:
    """Elements of the matrices of one layer."""
    h = model.hidden
    return h * (h + _key_value_size(model)) + h * h + h * (model.inner + model.ffn)
