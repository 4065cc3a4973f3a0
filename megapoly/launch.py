"""From torchrun's environment to a :class:`ParallelContext`. The only place that reads environment variables."""

from __future__ import annotations

import datetime
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist
from rich.console import Console

from megapoly import config as configuration
from megapoly.context import ParallelContext
from megapoly.errors import ConfigError, MegapolyError
from megapoly.mesh import Mesh
from megapoly.trainer import prepare, train

TIMEOUT = datetime.timedelta(minutes=10)


class StopRequest:
    """Set by SIGTERM or Ctrl-C; the ranks agree on it at the next step boundary. A second Ctrl-C ends at once."""

    def __init__(self) -> None:
        self.asked = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True


def world() -> tuple[int, int, int]:
    """Rank, number of ranks and rank on this machine, as torchrun set them; (0, 1, 0) without torchrun.

    Raises:
        ConfigError: an environment that holds some of torchrun's variables only.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    found = {name: os.environ[name] for name in names if name in os.environ}
    if not found:
        return 0, 1, 0
    if len(found) < len(names):
        missing = ", ".join(name for name in names if name not in found)
        raise ConfigError(
            f"environment: {', '.join(found)} are set but {missing} not; start with torchrun"
            " (torchrun --nproc-per-node N -m megapoly train CONFIG), or unset them"
        )
    rank, size, local = (int(found[name]) for name in names)
    return rank, size, local


@contextmanager
def parallel(mesh: Mesh, local_rank: int) -> Iterator[ParallelContext]:
    """Process groups for ``mesh`` while the block runs: NCCL on GPUs, gloo on CPUs."""
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    if mesh.world_size > 1:
        dist.init_process_group("nccl" if gpu else "gloo", timeout=TIMEOUT)
    try:
        yield ParallelContext.create(mesh, device, TIMEOUT)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def run_training(path: Path, overrides: list[str], resume: bool, stop_step: int | None) -> int:
    """``megapoly train``; the exit code. Rank 0 speaks for all in set-up, each rank for itself once training."""
    rank, size, local_rank = world()
    console = Console(quiet=rank != 0, highlight=False, soft_wrap=True)
    stop = StopRequest()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    alike = True  # set-up fails on every rank alike
    try:
        config = configuration.load(path, overrides).on(size)
        with parallel(config.mesh, local_rank) as context:
            run = prepare(config, context, resume)
            alike = False
            train(run, console, stop_step=stop_step, stopping=lambda: stop.asked)
    except MegapolyError as error:
        if rank == 0 or not alike:
            who = "megapoly" if alike or size == 1 else f"megapoly: rank {rank}"
            print(f"{who}: {error}", file=sys.stderr, flush=True)
        return 1
    return 0
