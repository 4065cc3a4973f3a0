"""Runs any schedule: one rank's list of actions, one after another."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megapoly import comm
from megapoly.context import ALONE, Axis, ParallelContext
from megapoly.pipeline.schedule import Action, Kind, Schedule

StageFunction = Callable[[Tensor | None, Any], Tensor]
_Key = tuple[int, int]  # stage, micro-batch


@dataclass
class _Run:
    """What is alive during one run of a schedule."""

    inputs: dict[_Key, Tensor | None] = field(default_factory=dict)
    outputs: dict[_Key, Tensor] = field(default_factory=dict)
    activations: dict[_Key, comm.Pending] = field(default_factory=dict)  # arriving at a stage
    gradients: dict[_Key, comm.Pending] = field(default_factory=dict)
    returned: dict[_Key, Tensor] = field(default_factory=dict)  # gradients of inputs, to be sent
    sent: deque[comm.Pending] = field(default_factory=deque)
    losses: dict[int, Tensor] = field(default_factory=dict)


class Pipeline:
    """The stages of one rank and their neighbours.

    Args:
        stages: this rank's stages by number; ``stage(input or None, call)`` returns activations, or on the last stage
            token losses.
        shape: of the activations between stages, ``[S, B, H]``, for a call.
        dtype: of these activations.
    """

    def __init__(
        self,
        stages: Mapping[int, StageFunction],
        context: ParallelContext,
        shape: Callable[[Any], tuple[int, ...]],
        dtype: torch.dtype,
    ) -> None:
        self.stages, self.context, self.shape, self.dtype = stages, context, shape, dtype

    def run(self, schedule: Schedule, calls: Sequence[Any], loss_gradient: float | None = None) -> list[Tensor]:
        """Run every action of this rank; the token losses of each micro-batch on the last stage, else an empty list.

        Args:
            calls: what the stages need beside their input, by micro-batch.
            loss_gradient: the gradient of every token loss; None where ``schedule`` has no backward actions.
        """
        run = _Run()
        last = len(schedule.placement) - 1
        with torch.set_grad_enabled(loss_gradient is not None):
            for action in schedule.actions[self.context.pp.rank]:
                kind, stage, microbatch = action
                key = (stage, microbatch)
                if kind is Kind.FORWARD:
                    out = self._forward(run, key, calls[microbatch])
                    if stage == last:
                        run.losses[microbatch] = out.detach()
                    elif schedule.placement[stage + 1] == self.context.pp.rank:
                        run.activations[stage + 1, microbatch] = _local(out.detach())
                    if loss_gradient is None and stage == last:
                        del run.outputs[key]
                elif kind is Kind.BACKWARD:
                    gradient = self._backward(run, key, loss_gradient if stage == last else None)
                    if gradient is None:
                        continue
                    if schedule.placement[stage - 1] == self.context.pp.rank:
                        run.gradients[stage - 1, microbatch] = _local(gradient)
                    else:
                        run.returned[key] = gradient
                else:
                    self._transfer(run, action, schedule.placement, calls[microbatch])
                    while len(run.sent) > schedule.sends_in_flight:
                        run.sent.popleft().wait()
            for pending in run.sent:
                pending.wait()
        return [run.losses[m] for m in sorted(run.losses)]

    def _forward(self, run: _Run, key: _Key, call: Any) -> Tensor:
        x = None
        if key in run.activations:
            x = run.activations.pop(key).wait()
            x.requires_grad_(torch.is_grad_enabled())
        out = self.stages[key[0]](x, call)
        if torch.is_grad_enabled():
            run.inputs[key] = x
        run.outputs[key] = out
        return out

    def _backward(self, run: _Run, key: _Key, loss_gradient: float | None) -> Tensor | None:
        x, out = run.inputs.pop(key), run.outputs.pop(key)
        seed = None if loss_gradient is None else torch.full_like(out, loss_gradient)
        torch.autograd.backward(out, run.gradients.pop(key).wait() if seed is None else seed)
        return None if x is None else x.grad

    def _transfer(self, run: _Run, action: Action, placement: Sequence[int], call: Any) -> None:
        kind, stage, microbatch = action
        key = (stage, microbatch)
        forward, backward = self.context.pp, self.context.backward
        if kind is Kind.RECV_FORWARD:
            run.activations[key] = self._receive(forward, placement[stage - 1], call)
        elif kind is Kind.RECV_BACKWARD:
            run.gradients[key] = self._receive(backward, placement[stage + 1], call)
        elif kind is Kind.SEND_FORWARD:
            out = run.outputs[key] if torch.is_grad_enabled() else run.outputs.pop(key)
            run.sent.append(comm.send(out.detach().contiguous(), forward, placement[stage + 1]))
        elif kind is Kind.SEND_BACKWARD:
            run.sent.append(comm.send(run.returned.pop(key).contiguous(), backward, placement[stage - 1]))

    def _receive(self, axis: Axis, source: int, call: Any) -> comm.Pending:
        buffer = torch.empty(self.shape(call), dtype=self.dtype, device=self.context.device)
        return comm.receive(buffer, axis, source)


def _local(tensor: Tensor) -> comm.Pending:
    return comm.Pending(tensor, None, ALONE, "hand-over")
