"""Peak memory of every pipeline rank, predicted from a config. No torch, nothing is allocated.

Weights, gradients and optimizer state are counted. For the rest a rank's actions are walked through, one after another,
with what each of them makes and frees (:mod:`megapoly.plan.activations`). Sizes are in bytes.
"""

from __future__ import annotations

import dataclasses
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass

from megapoly.config import Config
from megapoly.models.cost import norm_size, position_size, stage_layers
from megapoly.pipeline.actions import Action, Kind, Schedule
from megapoly.pipeline.schedule import build
from megapoly.plan.activations import PARAMETER_BYTES, UPDATED, Device, Live, Sizes, StageMemory, stage_memory


@dataclass(frozen=True)
class Usage:
    """Peak bytes of one rank, each component by itself; ``total`` is the peak of their sum.

    ``workspace`` is what lives inside one action only: gradients on their way down a stage, and temporaries.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    workspace: int
    total: int


COMPONENTS = tuple(field.name for field in dataclasses.fields(Usage) if field.name != "total")


def predict(config: Config, device: Device = "cuda") -> list[Usage]:
    """Peaks of every pipeline rank; tensor- and data-parallel ranks are alike. ``config`` is settled for its ranks."""
    sizes, spans, layout = Sizes(config, device), stage_layers(config), config.layout
    schedule = build(layout.schedule, layout.pp, _steady(config), layout.stages_per_rank)
    last = len(spans) - 1
    stages = {i: stage_memory(sizes, span, i == 0, i == last) for i, span in enumerate(spans)}
    result = []
    for rank in range(layout.pp):
        mine = schedule.stages(rank)
        first_here, last_here = 0 in mine, last in mine
        parameters = sum(_parameters(config, spans[i][1] - spans[i][0]) for i in mine)
        parameters += _end_parameters(config, first_here, last_here)
        weights, gradients = parameters * sizes.parameter, parameters * sizes.wide
        optimizer = parameters * optimizer_bytes(config) // (config.mesh.dp if layout.shard_optimizer else 1)
        with_layers = sum(begin < end for begin, end in (spans[stage] for stage in mine))
        biases = 0 if config.data.separate_documents else sizes.biases * with_layers  # shared by all micro-batches
        always = Live(config.microbatches * _per_microbatch(sizes, first_here, last_here) + biases)
        lives = [always.plus(live) for live in walk(schedule, rank, stages, sizes.residual)]
        lives.append(always.plus(Live(0, 0, _update_workspace(config, gradients, first_here or last_here, device))))
        if device == "cpu" and layout.shard_optimizer and config.mesh.dp > 1:
            lives.append(always.plus(Live(0, 0, gradients)))  # gloo's reduce-scatter receives beside its input
        activations, logits, workspace = (max(live[i] for live in lives) for i in range(3))
        total = weights + gradients + optimizer + max(map(sum, lives))
        result.append(Usage(weights, gradients, optimizer, activations, logits, workspace, total))
    return result


def _per_microbatch(sizes: Sizes, first: bool, last: bool) -> int:
    """What is there of every micro-batch during the whole step: on a GPU ids and positions, and losses."""
    ids = 8 * (1 + first + last) if sizes.device == "cuda" else 0
    return sizes.tokens * (ids + (sizes.wide if last else 0))


def optimizer_bytes(config: Config) -> int:
    """Of a parameter: two moments and, where the parameter is narrower than they are, a master copy."""
    parameter = PARAMETER_BYTES[config.train.precision]
    wide = max(4, parameter)
    return wide * (2 if parameter == wide else 3)


def _update_workspace(config: Config, gradients: int, embedding: bool, device: Device) -> int:
    """Scaled gradients of the largest bucket: of a part at a time on a CPU, of none where the kernel is ours."""
    layout, model = config.layout, config.model
    if device == "cuda" and config.kernels.optimizer != "apex":
        return 0
    wide = max(4, PARAMETER_BYTES[config.train.precision])
    bucket = int(layout.bucket_mb * 1e6)
    largest = max(bucket, -(-model.vocabulary // layout.tp) * model.hidden * wide) if embedding else bucket
    mine = min(largest, gradients) // (config.mesh.dp if layout.shard_optimizer else 1)
    return mine if device == "cuda" else min(mine, UPDATED * wide)


def _steady(config: Config) -> int:
    """Micro-batches after which the peaks of a schedule do not grow; GPipe's always do."""
    count, layout = config.microbatches, config.layout
    if layout.schedule == "gpipe" or count <= 3 * layout.stages:
        return count
    return 3 * layout.stages + count % layout.pp


def _parameters(config: Config, layers: int) -> int:
    """Of so many layers, on one tensor-parallel rank."""
    model, tp = config.model, config.layout.tp
    qkv = model.hidden + 2 * model.groups * model.head_dim
    split = (qkv + model.inner + model.hidden + model.ffn) * model.hidden
    split += (qkv if model.has_qkv_biases else 0) + (model.inner if model.biases else 0)
    return layers * (split // tp + 2 * norm_size(model) + (2 * model.hidden if model.biases else 0))


def _end_parameters(config: Config, first: bool, last: bool) -> int:
    """Of the first and the last stage: embedding, of which a rank holds one copy where it is tied, output, positions
    and norms."""
    model = config.model
    copies = int(first or last) if model.tied else first + last
    parameters = copies * -(-model.vocabulary // config.layout.tp) * model.hidden
    if first:
        parameters += position_size(model) + (norm_size(model) if model.embedding_norm else 0)
    return parameters + (norm_size(model) if last else 0)


def walk(schedule: Schedule, rank: int, stages: dict[int, StageMemory], message: int) -> Iterator[Live]:
    """What is alive at every height of a rank's actions. ``message`` is the size of what stages hand each other.

    Activations and gradients between stages are counted as long as someone holds them: the stage that made them, the
    one that uses them, or the message that carries them.
    """
    live = Live()
    held: Counter[tuple[bool, int, int]] = Counter()  # (gradient, boundary before this stage, micro-batch)
    sent: deque[tuple[bool, int, int]] = deque()
    last = len(schedule.placement) - 1

    def now() -> Live:
        return live.plus(Live(message * len(+held)))

    for action in schedule.actions[rank]:
        kind, stage, microbatch = action
        into, out = (False, stage, microbatch), (False, stage + 1, microbatch)
        d_into, d_out = (True, stage, microbatch), (True, stage + 1, microbatch)
        if kind in (Kind.RECV_FORWARD, Kind.RECV_BACKWARD):
            held[into if kind is Kind.RECV_FORWARD else d_out] += 1
        elif kind in (Kind.SEND_FORWARD, Kind.SEND_BACKWARD):
            carried = out if kind is Kind.SEND_FORWARD else d_into
            sent.append(carried)
            if kind is Kind.SEND_FORWARD:
                held[carried] += 1  # the output is also held for its backward pass
        else:
            memory = stages[stage]
            local = _local_after(schedule, action)
            yield from (now().plus(moment) for moment in memory.moments[kind])
            if kind is Kind.FORWARD:
                live = live.plus(memory.kept)
                if stage < last:
                    held[out] += 1 + local
            elif kind is Kind.BACKWARD_WEIGHT:
                live = live.minus(memory.put_off)
            else:
                live = live.minus(memory.kept)
                if kind is Kind.BACKWARD_INPUT:
                    live = live.plus(memory.put_off)
                if stage > 0:
                    held[into] -= 1
                    held[d_into] += 1
                if stage < last:
                    held[out] -= 1
                    held[d_out] -= 1
        while len(sent) > schedule.sends_in_flight:
            held[sent.popleft()] -= 1
        yield now()


def _local_after(schedule: Schedule, action: Action) -> bool:
    """Whether the next stage is on this rank too, and takes the output as its input."""
    stage = action.stage
    return stage + 1 < len(schedule.placement) and schedule.placement[stage + 1] == schedule.placement[stage]
