"""One rank's share of a training step: stage, pipeline, buckets and optimizer, put together from a config."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from megapoly import comm
from megapoly.backends import detect
from megapoly.config import Config
from megapoly.context import ParallelContext
from megapoly.data.samples import Batch
from megapoly.errors import TrainingError, everywhere
from megapoly.layers.call import Call, Deferred, Place
from megapoly.models.cost import placement, stage_layers
from megapoly.models.decoder import DecoderStage
from megapoly.optim.adam import AdamW
from megapoly.optim.buffers import Buffers
from megapoly.optim.scaler import LossScaler
from megapoly.pipeline import schedule
from megapoly.pipeline.runtime import Pipeline

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


@dataclass(frozen=True)
class StepResult:
    """What every rank knows after a step.

    Attributes:
        samples: of the global batch.
        loss: mean over the counted tokens of the global batch, in nats.
        source_loss, source_tokens: sum of the losses and counted tokens by source number.
        gradient_norm: of the whole logical model, before clipping.
        zero_gradients: elements of the model whose gradient is exactly zero.
        parameter_norm: of the whole logical model, before the update.
        loss_scale: None where the loss is not scaled.
        skipped: why the weights were not updated: ``overflow``, which the loss scaling is there for, or ``nonfinite``,
            a loss or gradient that is not finite. Empty where they were.
        stop: whether some rank asked to end the run.
        seconds: time of this rank by part of the step.
    """

    samples: int
    loss: float
    source_loss: list[float]
    source_tokens: list[int]
    gradient_norm: float
    zero_gradients: int
    parameter_norm: float
    loss_scale: float | None
    skipped: Literal["", "overflow", "nonfinite"]
    stop: bool
    seconds: dict[str, float]


class Engine:
    """The model, its gradients and its optimizer on one rank; ``backends`` says what computes every op.

    ``step`` and ``evaluate`` are collective: every rank of the context calls them with its own micro-batches.
    """

    def __init__(self, config: Config, context: ParallelContext) -> None:
        self.config, self.context = config, context
        self.dtype = DTYPES[config.train.precision]
        layout, model = config.layout, config.model
        self.backends = detect(config, context.device, self.dtype)
        self.stages = _stages(config, context, self.dtype)
        contributions: dict[nn.Parameter, int] = {}
        for stage in self.stages.values():
            for parameter, count in stage.contributions():
                contributions[parameter] = contributions.get(parameter, 0) + count
        self.buffers = Buffers(contributions.items(), context, layout.bucket_mb, layout.shard_optimizer)
        self.optimizer = AdamW(self.buffers, config.optimizer, config.kernels.optimizer)
        self.scaler = LossScaler() if config.train.precision == "fp16" else None
        self.pipeline = Pipeline(
            self.stages,
            context,
            shape=lambda call: _activation_shape(call, layout.sequence_shards, model.hidden),
            dtype=next(iter(self.stages.values())).residual_dtype,
            put_off=_put_off,
        )

    def initialise(self) -> None:
        """Fill the weights from the config's seed."""
        for stage in self.stages.values():
            stage.initialise(self.config.train.seed)
        self.optimizer.refresh_master()

    @property
    def needs_tokens(self) -> bool:
        """Whether a stage of this rank reads tokens or labels; others need positions only."""
        return any(stage.first or stage.last for stage in self.stages.values())

    def call(self, batch: Batch) -> Call:
        """A micro-batch as the stages take it in training, on the device, sequence first, int64."""
        device, model = self.context.device, self.config.model

        def by_sequence(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.to(device, non_blocking=True).long().t()

        positions = by_sequence(batch.positions)
        assert positions is not None
        drops = model.dropout > 0 or model.attention_dropout > 0
        return Call(
            positions,
            cu_seqlens=None if batch.cu_seqlens is None else batch.cu_seqlens.to(device, non_blocking=True),
            tokens_SB=by_sequence(batch.tokens) if any(stage.first for stage in self.stages.values()) else None,
            labels_SB=by_sequence(batch.labels) if any(stage.last for stage in self.stages.values()) else None,
            samples_B=batch.samples.to(device) if drops else None,
            sequence_parallel=self.config.layout.sequence_shards > 1,
            sink=self.buffers,
        )

    def gradients(
        self, batches: Sequence[Batch], sources: int = 1, stop: bool = False, scale: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Run the schedule and reduce: afterwards ``buffers`` holds gradients of ``scale`` x (sum of losses) / (batch x
        sequence).

        Returns:
            On the CPU, in float64, the same on every rank: ``[4]``, squared norm of the gradients, how many of them are
            zero, squared norm of the parameters, and the number of ranks that said ``stop``; ``[2, sources]``, loss
            sums and counted tokens by source.
        """
        layout, context = self.config.layout, self.context
        tokens = sum(batch.positions.numel() for batch in batches) * context.dp.size
        self.buffers.begin(len(batches))
        losses = self.pipeline.run(
            schedule.build(layout.schedule, context.pp.size, len(batches), layout.stages_per_rank),
            [replace(self.call(batch), loss_gradient=scale / tokens) for batch in batches],
            scale / tokens,
        )
        self.buffers.finish()
        statistics = self.buffers.statistics()  # begun before the device is waited for
        sums = _by_source(losses, batches, sources)
        if context.tp.rank > 0:  # every tp rank of the last stage knows the same losses
            sums.zero_()
        stops = torch.tensor([float(stop)], dtype=torch.float64)
        total = torch.cat((statistics, torch.cat((stops, sums.flatten())).to(context.device)))
        for axis in (context.dp, context.model):
            comm.all_reduce(total, axis)
        total = total.cpu()
        return total[:4], total[4:].view(2, sources)

    def step(self, batches: Sequence[Batch], rate: float, sources: int = 1, stop: bool = False) -> StepResult:
        """One optimizer step on this rank's micro-batches of a global batch.

        A step whose loss or gradient is not finite leaves weights, moments and the optimizer's count of steps as they
        were, and says so in its result.

        Raises:
            TrainingError: no counted token.
        """
        begin = time.perf_counter()
        scale = 1.0 if self.scaler is None else self.scaler.scale
        head, sums = self.gradients(batches, sources, stop, scale)
        middle = time.perf_counter()
        squared, zeros, squared_parameters, stops = head.tolist()
        loss_sum, counted = sums.sum(1).tolist()
        if counted == 0:
            raise everywhere(
                TrainingError("no token of this global batch is counted in the loss: every label is -1; check the data")
            )
        samples = sum(len(batch.samples) for batch in batches) * self.context.dp.size
        # The backward pass divided by all tokens of the batch; the loss is the mean over the counted ones.
        correction = samples * self.config.train.sequence / counted / scale
        norm = math.sqrt(squared) * correction if math.isfinite(squared) else math.nan
        skipped = self._problem(loss_sum, norm)
        if not skipped:
            self.optimizer.step(rate, correction * min(1.0, self.config.optimizer.clip / (norm + 1e-6)))
        if self.scaler is not None and skipped != "nonfinite":
            self.scaler.update(skipped == "overflow")
        end = time.perf_counter()
        return StepResult(
            samples=samples,
            loss=loss_sum / counted,
            source_loss=sums[0].tolist(),
            source_tokens=[int(n) for n in sums[1].tolist()],
            gradient_norm=norm,
            zero_gradients=int(zeros),
            parameter_norm=math.sqrt(squared_parameters),
            loss_scale=None if self.scaler is None else scale,
            skipped=skipped,
            stop=stops > 0,
            seconds={"forward_backward": middle - begin, "optimizer": end - middle},
        )

    def _problem(self, loss: float, norm: float) -> Literal["", "overflow", "nonfinite"]:
        """Why a step with this loss and gradient norm is skipped."""
        if math.isfinite(loss) and math.isfinite(norm):
            return ""
        if self.scaler is not None and self.scaler.can_shrink and math.isfinite(loss):
            return "overflow"
        return "nonfinite"

    def evaluate(self, batches: Sequence[Batch]) -> list[Tensor]:
        """Token losses ``[S, B]`` of each batch on the last stage, an empty list elsewhere. No gradient, no dropout."""
        if not batches:
            return []
        self.buffers.settle()
        layout = self.config.layout
        forward_only = schedule.build_forward(
            layout.schedule, self.context.pp.size, len(batches), layout.stages_per_rank
        )
        calls = [replace(self.call(batch), sink=None, samples_B=None) for batch in batches]
        return self.pipeline.run(forward_only, calls)


def _stages(config: Config, context: ParallelContext, dtype: torch.dtype) -> dict[int, DecoderStage]:
    """This rank's stages by number. Of a tied weight a rank holds one copy."""
    layout, pp = config.layout, context.pp
    place = Place(context.tp, dtype, context.device, layout.sequence_shards > 1, config.train.seed, config.kernels)
    ranges = stage_layers(config)
    last = len(ranges) - 1
    rank_of = placement(layout)
    tied = config.model.tied
    apart = tied and rank_of[0] != rank_of[last]
    stages: dict[int, DecoderStage] = {}
    for number, layers in enumerate(ranges):
        if rank_of[number] == pp.rank:
            stages[number] = DecoderStage(
                config.model,
                layers=layers,
                first=number == 0,
                last=number == last,
                embedding=stages[0].embedding if tied and number == last and 0 in stages else None,
                tied={0: "first", last: "last"}.get(number) if apart else None,
                layout=layout,
                place=place,
            )
    return stages


def _activation_shape(call: Call, shards: int, hidden: int) -> tuple[int, ...]:
    sequence, batch = call.positions_SB.shape
    return sequence // shards, batch, hidden


def _put_off(call: Call) -> tuple[Call, Callable[[], None]]:
    assert call.sink is not None
    sink = Deferred(call.sink)
    return replace(call, sink=sink), sink.flush


def _by_source(losses: Sequence[Tensor], batches: Sequence[Batch], sources: int) -> Tensor:
    """Loss sums and counted tokens ``[2, sources]`` of the last stage's micro-batches; zeros elsewhere."""
    sums = torch.zeros(2, sources, dtype=torch.float64)
    if losses:
        totals = torch.stack([loss_SB.double().sum(0) for loss_SB in losses]).cpu()  # one wait for a GPU
        for total_B, batch in zip(totals, batches):
            assert batch.labels is not None
            sums[0].index_add_(0, batch.source.long(), total_B)
            sums[1].index_add_(0, batch.source.long(), (batch.labels >= 0).sum(1).double())
    return sums
