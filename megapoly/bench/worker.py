"""The process of a contender: it builds its model, then takes training steps whenever it is told to.

Each has a process of its own (one for each rank), so that contenders share no allocator, threads or settings. The
program reads numbers of steps, one a line, and answers with JSON lines; see :class:`megapoly.bench.process.Contender`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megapoly.bench.task import Task
from megapoly.config import Config


@dataclass(frozen=True)
class Work:
    """What a contender does.

    Attributes:
        step: one training step of a global batch; returns its loss in nats.
        parameters: that this process holds.
        flops: of a step; of a matmul only.
    """

    step: Callable[[], float]
    parameters: int = 0
    flops: float = 0.0


def serve(build: Callable[[Task, torch.device], Work]) -> None:
    """Build what the command line asks for, and take steps until standard input ends."""
    task = Task.of(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    torch.set_num_threads(task.threads)
    device = torch.device(task.device, task.rank) if task.device == "cuda" else torch.device(task.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)

    def answer(**values: Any) -> None:
        print(json.dumps(values), file=answers, flush=True)

    work = build(task, device)
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    answer(parameters=work.parameters, flops=work.flops, gpu=gpu)
    for line in sys.stdin:
        loss = 0.0
        begin, begin_cpu = _now(device), time.process_time()
        for _ in range(int(line)):
            loss = work.step()
        seconds, cpu_seconds = _now(device) - begin, time.process_time() - begin_cpu
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
        answer(seconds=seconds, cpu_seconds=cpu_seconds, loss=loss, peak_bytes=peak)
    if dist.is_initialized():
        dist.destroy_process_group()


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def random_rows(config: Config) -> tuple[Tensor, Tensor]:
    """Tokens and labels ``[global batch, sequence]``, int64, the same for every contender.

    A label is the next token; the last of a row has none, -1.
    """
    shape = (config.train.global_batch, config.train.sequence)
    tokens = torch.randint(config.model.vocabulary, shape, generator=torch.Generator().manual_seed(config.train.seed))
    labels = tokens.roll(-1, 1)
    labels[:, -1] = -1
    return tokens, labels
