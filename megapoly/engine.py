"""One rank's share of a training step: stage, pipeline, buckets and optimizer, put together from a config."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megapoly import comm
from megapoly.config import Config
from megapoly.context import ParallelContext
from megapoly.data.samples import Batch
from megapoly.errors import TrainingError, everywhere
from megapoly.layers.attention import document_mask
from megapoly.layers.call import Call, Place
from megapoly.models.decoder import DecoderStage
from megapoly.optim.adam import AdamW
from megapoly.optim.buffers import Buffers
from megapoly.pipeline import schedule
from megapoly.pipeline.runtime import Pipeline

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


@dataclass(frozen=True)
class StepResult:
    """What every rank knows after a step.

    Attributes:
        loss: mean over the counted tokens of the global batch, in nats.
        source_loss, source_tokens: sum of the losses and counted tokens by source number.
        gradient_norm: of the whole logical model, before clipping.
        stop: whether some rank asked to end the run.
        seconds: time of this rank by part of the step.
    """

    loss: float
    source_loss: list[float]
    source_tokens: list[int]
    gradient_norm: float
    stop: bool
    seconds: dict[str, float]


class Engine:
    """The model, its gradients and its optimizer on one rank.

    ``step`` and ``evaluate`` are collective: every rank of the context calls them with its own micro-batches.
    """

    def __init__(self, config: Config, context: ParallelContext) -> None:
        self.config, self.context = config, context
        self.dtype = DTYPES[config.train.precision]
        self.stage = DecoderStage(
            config.model,
            stage=context.pp.rank,
            stages=context.pp.size,
            place=Place(context.tp, self.dtype, context.device),
        )
        self.buffers = Buffers(self.stage.contributions(), context, config.layout.bucket_mb)
        self.optimizer = AdamW(self.buffers, config.optimizer)
        hidden = config.model.hidden
        self.pipeline = Pipeline(
            {context.pp.rank: self.stage},
            context,
            shape=lambda call: (*call.positions_SB.shape, hidden),
            dtype=self.stage.residual_dtype,
        )
        self.schedule = schedule.build(config.layout.schedule, context.pp.size, config.microbatches)

    def initialise(self) -> None:
        """Fill the weights from the config's seed."""
        self.stage.initialise(self.config.train.seed)
        self.optimizer.refresh_master()

    @property
    def needs_tokens(self) -> bool:
        """Whether this rank's stage reads tokens or labels; others need positions only."""
        return self.stage.first or self.stage.last

    def call(self, batch: Batch) -> Call:
        """A micro-batch as the stages take it, on the device, sequence first."""
        device = self.context.device

        def by_sequence(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.to(device, non_blocking=True).t()

        positions = by_sequence(batch.positions)
        assert positions is not None
        return Call(
            positions,
            None if batch.documents is None else document_mask(batch.documents.to(device)),
            by_sequence(batch.tokens) if self.stage.first else None,
            by_sequence(batch.labels) if self.stage.last else None,
            self.buffers,
        )

    def gradients(self, batches: Sequence[Batch], sources: int = 1, stop: bool = False) -> tuple[Tensor, Tensor]:
        """Run the schedule and reduce: afterwards ``buffers`` holds gradients of (sum of losses) / (batch x sequence).

        Returns:
            On the CPU, in float64, the same on every rank: ``[2]``, the squared gradient norm and the number of ranks
            that said ``stop``; ``[2, sources]``, loss sums and counted tokens by source.
        """
        self.buffers.begin(len(batches))
        losses = self.pipeline.run(
            self.schedule, [self.call(batch) for batch in batches], 1.0 / self.config.step_tokens
        )
        self.buffers.finish()
        sums = _by_source(losses, batches, sources)
        head = torch.tensor([0.0, float(stop)], dtype=torch.float64)
        squared = self.buffers.squared_norm().cpu()
        total = comm.all_reduce(torch.cat((head, sums.reshape(-1))).to(self.context.device), self.context.dp).cpu()
        total[0] = squared
        if self.context.tp.rank > 0:  # every tp rank of the last stage knows the same losses
            total[2:] = 0
        total = comm.all_reduce(total.to(self.context.device), self.context.model).cpu()
        return total[:2], total[2:].view(2, sources)

    def step(self, batches: Sequence[Batch], rate: float, sources: int = 1, stop: bool = False) -> StepResult:
        """One optimizer step on this rank's micro-batches of a global batch.

        Raises:
            TrainingError: a loss or gradient that is not finite, or no counted token; the weights are then untouched.
        """
        begin = time.perf_counter()
        head, sums = self.gradients(batches, sources, stop)
        middle = time.perf_counter()
        counted, loss_sum = float(sums[1].sum()), float(sums[0].sum())
        if counted == 0:
            raise everywhere(
                TrainingError("no token of this global batch is counted in the loss: every label is -1; check the data")
            )
        # The backward pass divided by all tokens of the batch; the loss is the mean over the counted ones.
        correction = self.config.step_tokens / counted
        norm = math.sqrt(float(head[0])) * correction if math.isfinite(float(head[0])) else math.nan
        if not math.isfinite(loss_sum) or not math.isfinite(norm):
            raise everywhere(
                TrainingError(
                    f"step {self.optimizer.steps + 1}: the loss ({loss_sum / counted}) or the gradient norm ({norm}) is"
                    " not finite; the weights keep their last finite values. Lower optimizer.learning_rate, or look at"
                    " the data"
                )
            )
        self.optimizer.step(rate, correction * min(1.0, self.config.optimizer.clip / (norm + 1e-6)))
        end = time.perf_counter()
        return StepResult(
            loss=loss_sum / counted,
            source_loss=sums[0].tolist(),
            source_tokens=[int(n) for n in sums[1].tolist()],
            gradient_norm=norm,
            stop=bool(head[1] > 0),
            seconds={"forward_backward": middle - begin, "optimizer": end - middle},
        )

    def evaluate(self, batches: Sequence[Batch]) -> list[Tensor]:
        """Token losses ``[S, B]`` of each batch on the last stage, an empty list elsewhere. No gradient."""
        if not batches:
            return []
        forward_only = schedule.build("gpipe", self.context.pp.size, len(batches)).forward_only()
        calls = [replace(self.call(batch), sink=None) for batch in batches]
        return self.pipeline.run(forward_only, calls)


def _by_source(losses: Sequence[Tensor], batches: Sequence[Batch], sources: int) -> Tensor:
    """Loss sums and counted tokens ``[2, sources]`` of the last stage's micro-batches; zeros elsewhere."""
    sums = torch.zeros(2, sources, dtype=torch.float64)
    for loss_SB, batch in zip(losses, batches):
        assert batch.labels is not None
        sums[0].index_add_(0, batch.source.long(), loss_SB.double().sum(0).cpu())
        sums[1].index_add_(0, batch.source.long(), (batch.labels >= 0).sum(1).double())
    return sums
