"""``python injection.py JSON``: saves by two ranks that are killed, or whose disk fills up, at random points.

Half of them are written in the background.

In a process of its own, which imports once and forks a process for every rank of every save. After each the newest
checkpoint has to be whole, with the values of its step, and the next save has to work. Prints, as JSON, what became of
every save. In a mount namespace of its own (``unshare -Urm``) the disk that fills up is a tmpfs; elsewhere a limit on
the size of a file stands in for it.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import torch

from megapoly.checkpoint.background import Writer
from megapoly.checkpoint.folders import Keep, folder, newest, steps
from megapoly.checkpoint.store import Entry, Reader, save
from megapoly.context import ALONE
from megapoly.errors import CheckpointError
from megapoly.spec import Box, Piece

RANKS = 2
SHAPES = {"w": (900, 700), "b": (1,), "moments": (300, 2, 1001)}
NOT_SAVED, LOST_A_PEER = 3, 4  # exit codes


def expected(name, step):
    return np.random.default_rng([step, zlib.crc32(name.encode())]).standard_normal(SHAPES[name], dtype=np.float32)


def entries(step, rank):
    """Of every tensor each rank holds a part of the rows; the first rank those that are left over."""
    for name, shape in SHAPES.items():
        values, rows = torch.from_numpy(expected(name, step)), shape[0] // RANKS
        start, stop = (0, shape[0] - rows) if rank == 0 else (shape[0] - rows, shape[0])
        whole = Box.whole(shape)
        box = Box((start, *whole.start[1:]), (stop, *whole.stop[1:]))
        yield Entry(name, shape, Piece.of(box), values[start:stop].reshape(-1))


def work(root, step, rank, links, file_size, background):
    """One rank's save; its exit code. ``links``: rank 0's pipes to the others, or the pipe of another to rank 0."""

    def gather(value):
        if rank == 0:
            return [value, *(link.recv() for link in links)]
        links[0].send(value)
        return None

    def broadcast(value):
        if rank > 0:
            return links[0].recv()
        for link in links:
            link.send(value)
        return value

    def write(given):
        return save(root, step, given, {}, rank=rank, size=RANKS, gather=gather, broadcast=broadcast, keep=Keep(2))

    if file_size is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    try:
        if not background:
            write(entries(step, rank))
        else:
            state, writer = list(entries(step, rank)), Writer(ALONE)
            writer.write(state, write)
            for entry in state:  # training goes on
                entry.data.fill_(-1)
            writer.wait()
    except CheckpointError as error:
        return NOT_SAVED if any(text in str(error) for text in ("Errno 28", "Errno 27")) else 1
    except (EOFError, ConnectionError):
        return LOST_A_PEER
    return 0


def start(root, step, file_size=None, background=False):
    """Processes of a save of every rank; their ids."""
    pipes = [multiprocessing.Pipe() for _ in range(RANKS - 1)]
    pids = []
    for rank in range(RANKS):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                mine = [end for end, _ in pipes] if rank == 0 else [pipes[rank - 1][1]]
                for end in (end for pipe in pipes for end in pipe if end not in mine):
                    end.close()
                code = work(root, step, rank, mine, file_size, background)
            finally:
                os._exit(code)
        pids.append(child)
    for pipe in pipes:
        for end in pipe:
            end.close()
    return pids


def ends(pids, seconds=60):
    """Exit codes by process, minus the signal for one that was killed."""
    codes, deadline = {}, time.monotonic() + seconds
    while len(codes) < len(pids):
        for pid in set(pids) - set(codes):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                codes[pid] = os.waitstatus_to_exitcode(status)
        time.sleep(0.001)
        if time.monotonic() > deadline:
            raise SystemExit(f"ranks {set(pids) - set(codes)} did not end")
    return [codes[pid] for pid in pids]


def check(root, last, saved):
    """Every checkpoint that has its name is whole and holds the values of its step; the newest step."""
    found = Reader(newest(root)).step
    assert found in ((last + 1,) if saved else (last, last + 1)), (found, last, saved)
    for step in steps(root):
        reader = Reader(folder(root, step))
        reader.verify()
        assert reader.step == step
        for name, shape in SHAPES.items():
            out = torch.zeros(int(np.prod(shape)))
            reader.read(name, Piece.of(Box.whole(shape)), out)
            assert np.array_equal(out.numpy().reshape(shape), expected(name, step)), (name, step)
    return found


def kills(root, count, draw):
    """Saves of which one rank, or all, are killed at a random moment."""
    begun = time.monotonic()
    assert ends(start(root, 1)) == [0] * RANKS
    usual, step = time.monotonic() - begun, check(root, 0, saved=True)
    while count:
        background = draw.random() < 0.5
        pids = start(root, step + 1, background=background)
        victims = draw.choice([pids, [draw.choice(pids)]])
        time.sleep(draw.uniform(0, usual))
        for pid in victims:
            os.kill(pid, signal.SIGKILL)  # at worst a zombie: none of them has been waited for
        codes = ends(pids)
        killed = codes.count(-signal.SIGKILL)
        assert set(codes) <= {0, -signal.SIGKILL, LOST_A_PEER}, codes
        left = sum(path.name.startswith(".") for path in root.iterdir())
        now = check(root, step, saved=not killed)
        if killed:  # else the save was done before
            count -= 1
            yield {"killed": killed, "new": now > step, "half": left, "background": background}
        step = now


def full_disks(root, count, draw, fill):
    """Saves for which the disk has room for a random part of a checkpoint."""
    fill(None, 0)
    assert ends(start(root, 1)) == [0] * RANKS
    step = check(root, 0, saved=True)
    files = [path.stat().st_size for path in newest(root).iterdir()]
    while count:
        background = draw.random() < 0.5
        codes = ends(start(root, step + 1, fill(draw, files), background))
        assert codes in ([0] * RANKS, [NOT_SAVED] * RANKS), codes
        now = check(root, step, saved=codes[0] == 0)
        if codes[0]:
            assert now == step
            assert [path.name for path in root.iterdir() if path.name.startswith(".")] == []
            count -= 1
            yield {"background": background}
            fill(None, 0)
            assert ends(start(root, step + 1)) == [0] * RANKS
            now = check(root, step, saved=True)
        step = now


def tmpfs(folder):
    """Mount a small one; a function that leaves room for a random part of a checkpoint in it, or all its room."""
    size = 4 * sum(4 * int(np.prod(shape)) for shape in SHAPES.values()) + (1 << 20)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=True)
    filler = folder / "filler"

    def fill(draw, files):
        filler.unlink(missing_ok=True)
        if draw is not None:
            free = os.statvfs(folder)
            rest = free.f_bavail * free.f_bsize - draw.randrange(sum(files))
            with open(filler, "wb") as file:
                os.posix_fallocate(file.fileno(), 0, rest)

    return fill


def small_files(draw, files):
    """The most bytes that a file may have."""
    return draw and draw.randrange(max(files))


def main(given):
    torch.set_num_threads(1)
    root, draw, count = Path(given["folder"]), random.Random(given["seed"]), given["count"]
    full, kill = root / "full", root / "kill"
    full.mkdir()
    fill = tmpfs(full) if given["tmpfs"] else small_files
    print(
        json.dumps(
            {"kill": list(kills(kill, count, draw)), "full": list(full_disks(full / "saves", count, draw, fill))}
        )
    )


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
