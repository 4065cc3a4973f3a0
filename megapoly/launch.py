"""From torchrun's environment to a :class:`ParallelContext`. The only place that reads environment variables."""

from __future__ import annotations

import ctypes
import datetime
import json
import os
import signal
import sys
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist
from rich.console import Console

from megapoly import comm
from megapoly import config as configuration
from megapoly.comm import PeerLost
from megapoly.config import Config
from megapoly.context import ParallelContext
from megapoly.errors import ConfigError, MegapolyError, TrainingError, everywhere
from megapoly.mesh import Mesh
from megapoly.profiling import parse_steps
from megapoly.run import Resume, prepare
from megapoly.trainer import train
from megapoly.watchdog import Watchdog

RENDEZVOUS = datetime.timedelta(minutes=10)  # in which all ranks have to come
UNEVEN = datetime.timedelta(days=1)  # for ranks whose work takes very unequal time: texts end when they end


_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h


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
    store, rank, size = next(iter(dist.rendezvous("env://", timeout=RENDEZVOUS)))
    prefix = uuid.uuid4().hex
    if rank > 0:
        question = uuid.uuid4().hex
        store.set(f"megapoly/ask/{rank}", question)
        prefix = store.get(f"megapoly/answer/{question}").decode()
        store.add(f"megapoly/heard/{prefix}", 1)
        return dist.PrefixStore(prefix, store)
    deadline = time.monotonic() + RENDEZVOUS.total_seconds()
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
                f"not all of the {size} ranks came within {RENDEZVOUS}; start them with one torchrun command"
            )
        time.sleep(0.01)
    return dist.PrefixStore(prefix, store)


def choose_device(wanted: str, local_rank: int, key: str = "layout.device") -> torch.device:
    """The device of a rank, as ``key`` has it: ``auto``, ``cpu`` or ``cuda``.

    Raises:
        ConfigError: more ranks than GPUs on this machine, or no GPU where one was asked for.
    """
    count = torch.cuda.device_count()
    if wanted == "cpu" or (wanted == "auto" and count == 0):
        return torch.device("cpu")
    if count == 0:
        raise everywhere(
            ConfigError(
                f"{key} {wanted!r}: torch finds no GPU on this machine; set it to 'cpu' or 'auto', or install"
                " a build of torch for its GPUs"
            )
        )
    if local_rank >= count:
        raise ConfigError(
            f"{key} {wanted!r}: local rank {local_rank} was started on a machine with {count} GPUs; start at most"
            f" {count} ranks here (--nproc-per-node), or set {key} to 'cpu'"
        )
    return torch.device("cuda", local_rank)


def keep_freed_memory() -> None:
    """Have glibc keep what is freed, for the next step, on a CPU.

    It would give large blocks back to the system, and every step would take its activations' pages anew: a tenth of its
    time. The process grows to its peak, and by a quarter more.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


@contextmanager
def parallel(
    mesh: Mesh, rank: int, device: torch.device, store: dist.Store, timeout: datetime.timedelta
) -> Iterator[ParallelContext]:
    """Process groups for ``mesh`` while the block runs: NCCL on GPUs, gloo on CPUs.

    An error in the block leaves the groups as they are: to take them down in order would wait for the other ranks.
    """
    gpu = device.type == "cuda"
    if gpu:
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
    if mesh.world_size > 1:
        backend = "nccl" if gpu else "gloo"
        dist.init_process_group(
            backend,
            store=store,
            rank=rank,
            world_size=mesh.world_size,
            timeout=timeout,
            device_id=device if gpu else None,
        )
    context = ParallelContext.create(mesh, device, timeout)
    for axis in (context.pp, context.backward):
        comm.connect(axis, device)
    yield context
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def _listening(stop: StopRequest) -> Iterator[None]:
    """SIGTERM and Ctrl-C ask to stop. Before, where ranks wait for each other with no watchdog yet, they end.

    After an error they still do no more than ask, so that this rank can say what it has lost: torchrun sends SIGTERM.
    """
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(number, stop) for number in numbers]
    yield
    for number, handler in zip(numbers, before):
        signal.signal(number, handler)


def _tell_torchrun(text: str, *, lost_a_peer: bool) -> None:
    """Leave the message where torchrun looks for the cause of a failure, which it prints last.

    It takes the earliest one for the cause, and may see that a rank was killed after its peers did: they are dated 2 s
    later.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        content = {"message": text, "timestamp": int(time.time()) + 2 * lost_a_peer}
        with suppress(OSError):
            Path(path).write_text(json.dumps(content), encoding="utf-8")


def _say(text: str) -> None:
    sys.stderr.write(f"megapoly: {text}\n")  # in one piece: other ranks write too
    sys.stderr.flush()


def _abort(text: str) -> None:
    """End this process at once, as its watchdog asks while the main thread waits in vain."""
    _tell_torchrun(text, lost_a_peer=True)
    _say(text)
    os._exit(1)


def _watchdog(config: Config, rank: int, store: dist.Store) -> Watchdog:
    return Watchdog(
        dist.PrefixStore("watchdog", store.clone()),  # type: ignore[attr-defined]  # missing in torch's stubs
        config.mesh,
        rank,
        patience=config.log.hang_seconds,
        timeout=config.layout.timeout_seconds,
        say=_say,
        end=_abort,
    )


@contextmanager
def joined(path: Path, overrides: list[str]) -> Iterator[tuple[Config, ParallelContext]]:
    """Config and process groups of a command that does not train, alone or as one rank of a torchrun."""
    rank, size, local_rank = world()
    config = configuration.load(path, overrides).on(size)
    device = choose_device(config.layout.device, local_rank)
    timeout = datetime.timedelta(seconds=config.layout.timeout_seconds)
    store = _fresh_store() if size > 1 else dist.HashStore()
    with parallel(config.mesh, rank, device, store, timeout) as context:
        yield config, context


@contextmanager
def _meshed(tp: int, pp: int, wanted: str) -> Iterator[ParallelContext]:
    """Process groups of a command that has no config: tp and pp as given, and dp what they leave."""
    rank, size, local_rank = world()
    if size % (tp * pp):
        raise everywhere(
            ConfigError(
                f"{size} {'ranks were' if size > 1 else 'process was'} started, which --tp {tp} x --pp {pp} = {tp * pp}"
                f" does not divide; start a multiple of {tp * pp} (torchrun --nproc-per-node {tp * pp} -m megapoly"
                " generate ...), or change --tp or --pp"
            )
        )
    device = choose_device(wanted, local_rank, "--device")
    store = _fresh_store() if size > 1 else dist.HashStore()
    with parallel(Mesh(dp=size // (tp * pp), pp=pp, tp=tp), rank, device, store, UNEVEN) as context:
        yield context


def run_meshed(tp: int, pp: int, device: str, work: Callable[[ParallelContext], None]) -> int:
    """Run ``work`` alone or as one rank of a torchrun; the exit code. Errors are said as those of training are."""
    _, size, local_rank = world()
    try:
        with _meshed(tp, pp, device) as context:
            work(context)
    except MegapolyError as error:
        _tell_torchrun(str(error), lost_a_peer=isinstance(error, PeerLost))
        return _failed(error, str(error), size, local_rank)
    return 0


@contextmanager
def _faulty(rank: int, size: int) -> Iterator[None]:
    """Of several ranks one with a fault of the program says so and ends at once, as the cause, before its peers do."""
    try:
        yield
    except MegapolyError:
        raise
    except (Exception, KeyboardInterrupt) as error:
        if size == 1:
            raise
        _tell_torchrun(repr(error), lost_a_peer=False)
        _say(f"rank {rank}: {traceback.format_exc()}")
        sys.stdout.flush()
        os._exit(1)  # messages are under way that may never end


def _failed(error: MegapolyError, text: str, size: int, local_rank: int) -> int:
    """Say an error, once on each machine where all ranks share it; the exit code."""
    if local_rank == 0 or not error.everywhere:
        _say(text if error.everywhere or size == 1 else f"rank {world()[0]}: {text}")
    if size > 1 and not error.everywhere:
        sys.stdout.flush()
        os._exit(1)  # taking down groups that have lost a rank may wait for it
    return 1


def run_training(
    path: Path,
    overrides: list[str],
    resume: Resume,
    stop_step: int | None,
    profile: str | None = None,
    init_from: Path | None = None,
) -> int:
    """``megapoly train``; the exit code. An error that all ranks share is said once on each machine.

    After a restart by torchrun (``--max-restarts``) the run goes on from its newest whole checkpoint, if it has one.
    """
    if resume == "never" and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0:
        resume = "if-any"
    rank, size, local_rank = world()
    console = Console(quiet=rank != 0, highlight=False, soft_wrap=True)
    stop = StopRequest()
    watchdog: Watchdog | None = None
    try:
        try:
            profiled = parse_steps(profile) if profile else range(0)
            config = configuration.load(path, overrides).on(size)
        except ConfigError as error:
            raise everywhere(error) from None
        device = choose_device(config.layout.device, local_rank)  # a machine with few GPUs is one rank's error
        timeout = datetime.timedelta(seconds=config.layout.timeout_seconds)
        store = _fresh_store() if size > 1 else dist.HashStore()
        watchdog = _watchdog(config, rank, store)
        with (
            watchdog,
            parallel(config.mesh, rank, device, store, timeout) as context,
            _listening(stop),
            _faulty(rank, size),
        ):
            run = prepare(config, context, resume, init_from)
            watchdog.watch(run.standing)
            train(run, console, stop_step=stop_step, stopping=lambda: stop.asked, profile=profiled)
    except MegapolyError as error:
        text = str(error)
        if watchdog is not None and isinstance(error, PeerLost):
            who = watchdog.lost(wait=3.0)
            text = f"{f'{error.what} failed: {who}' if who else text}; {watchdog.standing()}"
        _tell_torchrun(text, lost_a_peer=isinstance(error, PeerLost))
        return _failed(error, text, size, local_rank)
    return 0
