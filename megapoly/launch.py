"""From torchrun's environment to a :class:`ParallelContext`. The only place that reads environment variables."""

from __future__ import annotations

import datetime
import json
import os
import signal
import socket
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist
from rich.console import Console

from megapoly import comm
from megapoly import config as configuration
from megapoly.context import ParallelContext
from megapoly.errors import ConfigError, MegapolyError, TrainingError, everywhere
from megapoly.mesh import Mesh
from megapoly.trainer import Resume, prepare, train

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


def _fresh_store() -> dist.Store:
    """torchrun's store under a prefix of this start alone.

    torchrun keeps one store over its restarts, and a new rank that finds the address of a dead one waits for it in
    vain. The ranks cannot count starts, since agents that restart together count apart. So rank 0 makes up a prefix and
    answers with it to what each rank asks under a name that it made up too, until all have it.
    """
    store, rank, size = next(iter(dist.rendezvous("env://", timeout=TIMEOUT)))
    prefix = uuid.uuid4().hex
    if rank > 0:
        question = uuid.uuid4().hex
        store.set(f"megapoly/ask/{rank}", question)
        prefix = store.get(f"megapoly/answer/{question}").decode()
        store.add(f"megapoly/heard/{prefix}", 1)
        return dist.PrefixStore(prefix, store)
    deadline = time.monotonic() + TIMEOUT.total_seconds()
    answered: set[bytes] = set()
    while store.add(f"megapoly/heard/{prefix}", 0) < size - 1:
        for other in range(1, size):
            if store.check([f"megapoly/ask/{other}"]):
                question = store.get(f"megapoly/ask/{other}")
                if question not in answered:
                    answered.add(question)
                    store.set(f"megapoly/answer/{question.decode()}", prefix)
        if time.monotonic() > deadline:
            raise TrainingError(
                f"not all of the {size} ranks came within {TIMEOUT}; start them with one torchrun command"
            )
        time.sleep(0.01)
    return dist.PrefixStore(prefix, store)


def choose_device(wanted: str, local_rank: int) -> torch.device:
    """The device of a rank, from ``layout.device``.

    Raises:
        ConfigError: more ranks than GPUs on this machine, or no GPU where one was asked for.
    """
    count = torch.cuda.device_count()
    if wanted == "cpu" or (wanted == "auto" and count == 0):
        return torch.device("cpu")
    if local_rank >= count:
        raise ConfigError(
            f"layout.device {wanted!r}: local rank {local_rank} was started on a machine with {count} GPUs; start"
            f" at most {count} ranks here (--nproc-per-node), or set layout.device to 'cpu'"
        )
    return torch.device("cuda", local_rank)


@contextmanager
def parallel(mesh: Mesh, rank: int, device: torch.device) -> Iterator[ParallelContext]:
    """Process groups for ``mesh`` while the block runs: NCCL on GPUs, gloo on CPUs.

    An error in the block leaves the groups as they are: to take them down in order would wait for the other ranks.
    """
    gpu = device.type == "cuda"
    if gpu:
        torch.cuda.set_device(device)
    if mesh.world_size > 1:
        backend = "nccl" if gpu else "gloo"
        # With its device NCCL connects all ranks here. Else the first message of each pair of ranks would block both
        # until they are connected, which the order of a schedule's messages does not allow for.
        dist.init_process_group(
            backend,
            store=_fresh_store(),
            rank=rank,
            world_size=mesh.world_size,
            timeout=TIMEOUT,
            device_id=device if gpu else None,
        )
    yield ParallelContext.create(mesh, device, TIMEOUT)
    if dist.is_initialized():
        dist.destroy_process_group()


def _neighbours(context: ParallelContext) -> dict[int, int]:
    """Process id of every rank on this machine. Collective."""
    mine = (socket.gethostname(), os.getpid())
    everyone = comm.broadcast_object(comm.gather_objects(mine, context.control), context.control)
    return {rank: pid for rank, (host, pid) in enumerate(everyone) if host == mine[0]}


def _is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        # A killed process stays in the table until its parent has asked for its end.
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[-1].split()[0] == "Z"
    except ProcessLookupError:
        return True
    except OSError:  # no /proc
        return False


def _explain(error: MegapolyError, neighbours: dict[int, int]) -> str:
    """The message; of a lost peer, which one it was, if it ran on this machine."""
    if isinstance(error, comm.PeerLost):
        gone = [str(rank) for rank, pid in neighbours.items() if _is_gone(pid)]
        if gone:
            return f"{error.what} failed: rank {', '.join(gone)} is gone"
    return str(error)


def _tell_torchrun(text: str) -> None:
    """Leave the message where torchrun looks for the cause of a failure, which it prints last."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        with suppress(OSError):
            Path(path).write_text(json.dumps({"message": text, "timestamp": int(time.time())}), encoding="utf-8")


def run_training(path: Path, overrides: list[str], resume: Resume, stop_step: int | None) -> int:
    """``megapoly train``; the exit code. An error that all ranks share is said once on each machine.

    After a restart by torchrun (``--max-restarts``) the run goes on from its newest whole checkpoint, if it has one.
    """
    if resume == "never" and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0:
        resume = "if-any"
    rank, size, local_rank = world()
    console = Console(quiet=rank != 0, highlight=False, soft_wrap=True)
    stop = StopRequest()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    neighbours: dict[int, int] = {}
    try:
        try:
            config = configuration.load(path, overrides).on(size)
            device = choose_device(config.layout.device, local_rank)
        except ConfigError as error:
            raise everywhere(error) from None
        with parallel(config.mesh, rank, device) as context:
            neighbours = _neighbours(context)
            run = prepare(config, context, resume)
            train(run, console, stop_step=stop_step, stopping=lambda: stop.asked)
    except MegapolyError as error:
        text = _explain(error, neighbours)
        _tell_torchrun(text)
        if local_rank == 0 or not error.everywhere:
            who = "megapoly" if error.everywhere or size == 1 else f"megapoly: rank {rank}"
            print(f"{who}: {text}", file=sys.stderr, flush=True)
        return 1
    return 0
