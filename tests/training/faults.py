"""``megapoly`` with a fault: ``python -m tests.training.faults RANK POINT CALL FAULT train ...``.

At the CALL-th call of POINT on RANK, FAULT happens: kill, stop (SIGSTOP), sleep or fail. Under slow it sleeps a
little at every call from then on. After a restart by torchrun nothing happens.
"""

from __future__ import annotations

import functools
import itertools
import os
import signal
import sys
import time
from typing import Any

from megapoly import launch, run
from megapoly.checkpoint import store
from megapoly.cli import main
from megapoly.context import ParallelContext
from megapoly.data.loader import Loader
from megapoly.engine import Engine
from megapoly.models.decoder import DecoderStage
from megapoly.optim.adam import AdamW

POINTS: dict[str, tuple[Any, str]] = {
    "rendezvous": (launch, "_fresh_store"),
    "groups": (ParallelContext, "create"),
    "loading": (run, "_prepare"),
    "validation": (Engine, "evaluate"),
    "reading": (Loader, "__next__"),
    "forward": (DecoderStage, "forward"),
    "optimizer": (AdamW, "step"),
    "save": (store, "_write_rank"),
    "manifest": (store, "_finish"),  # on rank 0 only
}


def fail() -> None:
    raise ValueError("a fault of the program")


FAULTS = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "sleep": lambda: time.sleep(1000),
    "fail": fail,
    "slow": lambda: time.sleep(0.02),
}


def arm(point: str, at: int, fault: str) -> None:
    """Wrap the function of ``point``."""
    holder, attribute = POINTS[point]
    original = getattr(holder, attribute)
    calls = itertools.count(1)

    @functools.wraps(original)
    def faulty(*args: Any, **kwargs: Any) -> Any:
        call = next(calls)
        if call == at or (fault == "slow" and call > at):
            FAULTS[fault]()
        return original(*args, **kwargs)

    setattr(holder, attribute, faulty)


if __name__ == "__main__":
    rank, point, at, fault, *arguments = sys.argv[1:]
    if os.environ["RANK"] == rank and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        arm(point, int(at), fault)
    main(arguments)
