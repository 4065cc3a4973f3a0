"""``python killing.py JSON``: builds that are killed at random moments and started again until they are done.

In a process of its own, which imports once and forks for every attempt. Prints, as JSON, the number of kills and the
files that are there at the end with their digests, for every round.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

from megapoly.data import encode, pieces
from megapoly.data.builder import Assembly, Options, build
from megapoly.data.indexed import IndexedDataset
from megapoly.data.load_tokenizer import load_tokenizer


def start(inputs, prefix, tokenizer, options):
    """Build in a process that leads a group; its id."""
    child = os.fork()
    if child:
        return child
    try:
        os.setpgid(0, 0)
        build(inputs, prefix, tokenizer, language="xx", options=options)
    except BaseException as error:
        print(f"attempt failed: {error!r}", file=sys.stderr)
        os._exit(1)
    os._exit(0)


def end(child, seconds):
    """Kill a build after so many seconds; whether it was done before, or a failure's code."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    try:
        os.killpg(child, signal.SIGKILL)
    except ProcessLookupError:  # it has not become a group yet
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def rounds(inputs, folder, tokenizer, count, seed):
    """What became of ``count`` builds of three kinds; the first of each kind is not disturbed."""
    draw = random.Random(seed)
    plain = Options(document="line", validation_fraction=0.1)
    kinds = (
        replace(plain, processes=1, threads=1),
        replace(plain, processes=1, assembly=Assembly(deduplicate=True, shuffle=7)),
        replace(plain, processes=2),
    )
    spent, number = {}, -len(kinds)
    while number < count:
        options = kinds[number % len(kinds)]
        begun, kills = time.monotonic(), 0
        while True:
            child = start(inputs, folder / "d", tokenizer, options)
            after = draw.uniform(0, (0.8 + 0.2 * kills) * spent[options]) if number >= 0 else 600
            code = end(child, after)
            if code == 0:
                break
            if code != -signal.SIGKILL:
                raise SystemExit(f"an attempt ended with {code} after {kills} kills")
            kills += 1
            if (folder / "d.idx").exists():
                IndexedDataset(folder / "d")  # whole, if there at all
                if not (folder / "d.build" / "job.json").exists():
                    shutil.rmtree(folder / "d.build", ignore_errors=True)
                    break  # killed when all was done
        if not kills:
            spent[options] = time.monotonic() - begun
        if kills or number < 0:  # else it was too quick, and is done once more
            yield {"kind": number % len(kinds), "kills": kills, "files": digests(folder)}
            number += 1
        shutil.rmtree(folder)
        folder.mkdir()


def main(given):
    pieces.PIECE_BYTES, encode._BATCH_BYTES = given["piece"], given["piece"] // 3
    folder = Path(given["folder"])
    folder.mkdir()
    found = rounds([given["inputs"]], folder, load_tokenizer(given["model"]), given["rounds"], given["seed"])
    print(json.dumps(list(found)))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
