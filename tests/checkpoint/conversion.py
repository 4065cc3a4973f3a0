"""``python conversion.py JSON``: conversions that are killed, or run out of disk, at random points, and gone on with.

In a process of its own, which imports once and forks a process for every attempt. After each there is nothing under the
final name, or all of it; in the end it is, byte for byte, what an undisturbed conversion writes. Prints, as JSON, what
became of every attempt.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

import torch

from megapoly.checkpoint import state, store
from megapoly.checkpoint.convert import convert
from megapoly.checkpoint.unfinished import Unfinished
from megapoly.checkpoint.weights import Options, open_weights
from megapoly.config import Model
from megapoly.errors import CheckpointError
from megapoly.spec import Box, Piece

MODEL = Model(layers=6, hidden=64, heads=4, ffn=256, vocabulary=99, positions=64)
OPTIONS = {
    "huggingface": Options(shard_bytes=50_000),
    "megapoly": Options(shard_bytes=50_000),
    "megatron": Options(tp=2, pp=3),
}
NOT_WRITTEN, OTHER = 3, 4  # exit codes


def make(folder, model=MODEL):
    """A checkpoint of random weights; its folder."""
    torch.manual_seed(0)
    entries = (
        store.Entry(f"{state.WEIGHTS}/{name}", shape, Piece.of(Box.whole(shape)), torch.randn(shape).reshape(-1))
        for name, shape in state.logical_shapes(model).items()
    )
    return store.save(folder, 1, entries, {"model": model.model_dump(mode="json"), "tokenizer": None})


def attempt(source, target, to, file_size=None):
    """Start a conversion in a process of its own; its id."""
    child = os.fork()
    if child:
        return child
    code = OTHER
    try:
        if file_size is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
        weights = open_weights(source)
        convert(weights, target, to, OPTIONS[to])
        code = 0
    except CheckpointError as error:
        code = NOT_WRITTEN if " be written (File too large)" in str(error) else OTHER
    finally:
        os._exit(code)


def end(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def content(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def partial(target):
    """Finished files of an attempt that has not come to its end."""
    hidden = target.with_name(f".{target.name}.partial")
    files = (path for path in hidden.rglob("*") if path.is_file() and not path.name.startswith("."))
    return [path.relative_to(hidden).as_posix() for path in files]


def kills(source, target, to, count, draw):
    """Attempts that are killed at a random moment, until ``count`` were; each goes on after the one before."""
    begun = time.monotonic()
    assert end(attempt(source, target, to)) == 0
    usual, whole = time.monotonic() - begun, content(target)
    shutil.rmtree(target)
    while count:
        pid = attempt(source, target, to)
        time.sleep(draw.uniform(0, usual))
        os.kill(pid, signal.SIGKILL)  # at worst a zombie
        code = end(pid)
        assert code in (0, -signal.SIGKILL), code
        if code:
            count -= 1
            yield {"files": len(partial(target)), "named": target.exists()}
        if target.exists():
            assert content(target) == whole
            assert not partial(target)
            shutil.rmtree(target)
    assert end(attempt(source, target, to)) == 0
    assert content(target) == whole
    assert [path for path in target.parent.iterdir() if path.name.startswith(f".{target.name}")] == []


def full_disks(source, target, to, count, draw):
    """Attempts that may write files of a random size at most, each followed by one without a bound."""
    assert end(attempt(source, target, to)) == 0
    whole = content(target)
    shutil.rmtree(target)
    sizes = sorted(map(len, whole.values()))
    for _ in range(count):
        assert end(attempt(source, target, to, draw.randrange(1, sizes[-1]))) == NOT_WRITTEN
        assert not target.exists()
        kept = partial(target)
        hidden = target.with_name(f".{target.name}.partial")
        assert not [path for path in hidden.rglob("*") if path.suffix == ".partial"], "a half file was left"
        times = {name: (hidden / name).stat().st_mtime_ns for name in kept if name.endswith((".safetensors", ".pt"))}
        assert end(attempt(source, target, to)) == 0
        assert content(target) == whole
        assert {name: (target / name).stat().st_mtime_ns for name in times} == times, "a finished file was made again"
        shutil.rmtree(target)
        yield {"files": len(kept)}


def main(given):
    torch.set_num_threads(1)
    root, draw, count = Path(given["folder"]), random.Random(given["seed"]), given["count"]
    own = make(root / "run")
    other = root / "hf"
    assert end(attempt(own, other, "huggingface")) == 0
    with Unfinished(root / "unused", {}):  # what a first use loads is loaded
        pass
    found = {}
    for source, to in ((own, "huggingface"), (other, "megapoly"), (own, "megatron")):
        found[to] = {
            "kill": list(kills(source, root / f"{to}-kill", to, count, draw)),
            "full": list(full_disks(source, root / f"{to}-full", to, count, draw)),
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
