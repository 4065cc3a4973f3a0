"""Runs any schedule: one rank's list of actions, one after another."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megapoly import comm
from megapoly.context import Axis, ParallelContext
from megapoly.pipeline.schedule import Action, Kind, Schedule

StageFunction = Callable[[Tensor | None, Any], Tensor]
PutOff = Callable[[Any], tuple[Any, Callable[[], object]]]
_Key = tuple[int, int]  # stage, micro-batch


@dataclass
class _Run:
    """What is alive during one run of a schedule."""

    schedule: Schedule
    calls: Sequence[Any]
    loss_gradient: float | None
    inputs: dict[_Key, Tensor | None] = field(default_factory=dict)
    outputs: dict[_Key, Tensor] = field(default_factory=dict)
    activations: dict[_Key, comm.Pending] = field(default_factory=dict)  # arriving at a stage
    gradients: dict[_Key, comm.Pending] = field(default_factory=dict)
    returned: dict[_Key, Tensor] = field(default_factory=dict)  # gradients of inputs, to be sent
    weights: dict[_Key, Callable[[], object]] = field(default_factory=dict)  # parts of backward passes put off
    sent: deque[comm.Pending] = field(default_factory=deque)
    losses: dict[int, Tensor] = field(default_factory=dict)


class Pipeline:
    """The stages of one rank and their neighbours.

    Args:
        stages: this rank's stages by number; ``stage(input or None, call)`` returns activations, or on the last stage
            token losses.
        shape: of the activations between stages, ``[s, B, H]``, for a call.
        dtype: of these activations.
        put_off: for schedules with split backward passes: gives for a call the one to use in its place, and the
            function that computes the weights' gradients, after the backward pass.
    """

    def __init__(
        self,
        stages: Mapping[int, StageFunction],
        context: ParallelContext,
        shape: Callable[[Any], tuple[int, ...]],
        dtype: torch.dtype,
        put_off: PutOff | None = None,
    ) -> None:
        self.stages, self.context, self.shape, self.dtype, self.put_off = stages, context, shape, dtype, put_off
        self._place = ""
        self._busy: dict[int, float] = {}
        self._spans: list[tuple[Action, torch.cuda.Event, torch.cuda.Event]] = []  # of this run, on a GPU
        self.reset_busy()

    @property
    def place(self) -> str:
        """Where this rank stands in its schedule, for messages; empty outside of a run.

        On a GPU, which works through what the host has long handed over, the first action that has not ended.
        """
        unfinished = next((action for action, _, end in list(self._spans) if not end.query()), None)
        return self._place if unfinished is None else str(unfinished)

    @property
    def busy(self) -> dict[int, float]:
        """Seconds of computing by stage since :meth:`reset_busy`.

        On a CPU without the waiting for other ranks; on a GPU the device's time, with collectives inside of a stage.
        """
        self._add_up()
        return self._busy

    def _add_up(self) -> None:
        for action, begin, end in self._spans:
            end.synchronize()
            self._busy[action.stage] += begin.elapsed_time(end) / 1e3
        self._spans = []

    def reset_busy(self) -> None:
        self._busy, self._spans = dict.fromkeys(self.stages, 0.0), []

    def run(self, schedule: Schedule, calls: Sequence[Any], loss_gradient: float | None = None) -> list[Tensor]:
        """Run every action of this rank; the token losses of each micro-batch on the last stage, else an empty list.

        Args:
            calls: what the stages need beside their input, by micro-batch.
            loss_gradient: the gradient of every token loss; None where ``schedule`` has no backward actions.
        """
        run = _Run(schedule, calls, loss_gradient)
        self._add_up()  # the actions of the run before have ended
        compute = {
            Kind.FORWARD: self._forward,
            Kind.BACKWARD: self._backward,
            Kind.BACKWARD_INPUT: self._backward,
            Kind.BACKWARD_WEIGHT: self._backward_weight,
        }
        actions = schedule.actions[self.context.pp.rank]
        with torch.set_grad_enabled(loss_gradient is not None):
            for number, action in enumerate(actions):
                self._place = f"action {number + 1} of {len(actions)}: {action}"
                if action.kind in compute:
                    arriving = run.activations if action.kind is Kind.FORWARD else run.gradients
                    if action[1:] in arriving:
                        arriving[action[1:]].wait()  # before the clock of the action starts
                    with comm.named(action.__str__):
                        self._timed(compute[action.kind], run, action)
                else:
                    self._transfer(run, action)
                    while len(run.sent) > schedule.sends_in_flight:
                        run.sent.popleft().wait()
            self._place = "after its last action: waiting for what it sent"
            for pending in run.sent:
                pending.wait()
        self._place = ""
        return [run.losses[m] for m in sorted(run.losses)]

    def _timed(self, work: Callable[[_Run, Action], None], run: _Run, action: Action) -> None:
        if self.context.device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            work(run, action)
            end.record()
            self._spans.append((action, begin, end))
            return
        axes = (self.context.tp, self.context.dp)
        waited, started = sum(axis.traffic.seconds for axis in axes), time.perf_counter()
        work(run, action)
        waited = sum(axis.traffic.seconds for axis in axes) - waited
        self._busy[action.stage] += time.perf_counter() - started - waited

    def _forward(self, run: _Run, action: Action) -> None:
        stage, microbatch = key = action[1:]
        x, call = None, run.calls[microbatch]
        if key in run.activations:
            x = run.activations.pop(key).wait()
            x.requires_grad_(torch.is_grad_enabled())
        if run.schedule.splits:
            assert self.put_off is not None
            call, run.weights[key] = self.put_off(call)
        out = self.stages[stage](x, call)
        last = stage == len(run.schedule.placement) - 1
        if last:
            run.losses[microbatch] = out.detach()
        elif run.schedule.placement[stage + 1] == self.context.pp.rank:
            run.activations[stage + 1, microbatch] = comm.Pending(out.detach())
        else:
            run.outputs[key] = out
        if torch.is_grad_enabled():
            run.inputs[key], run.outputs[key] = x, out

    def _backward(self, run: _Run, action: Action) -> None:
        stage, microbatch = key = action[1:]
        x, out = run.inputs.pop(key), run.outputs.pop(key)
        if stage == len(run.schedule.placement) - 1:
            assert run.loss_gradient is not None
            gradient = torch.full_like(out, run.loss_gradient)
        else:
            gradient = run.gradients.pop(key).wait()
        torch.autograd.backward(out, gradient)
        if x is None:
            return
        assert x.grad is not None
        if run.schedule.placement[stage - 1] == self.context.pp.rank:
            run.gradients[stage - 1, microbatch] = comm.Pending(x.grad)
        else:
            run.returned[key] = x.grad

    def _backward_weight(self, run: _Run, action: Action) -> None:
        run.weights.pop(action[1:])()

    def _transfer(self, run: _Run, action: Action) -> None:
        kind, stage, microbatch = action
        key, placement, call = (stage, microbatch), run.schedule.placement, run.calls[microbatch]
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
