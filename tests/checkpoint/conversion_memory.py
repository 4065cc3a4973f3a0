"""``python conversion_memory.py JSON``: prints, in MB, what a conversion adds to the memory of its process."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import torch

from megapoly.checkpoint.convert import convert, natural_format, size
from megapoly.checkpoint.weights import Options, open_weights
from megapoly.config import Model
from tests.checkpoint.conversion import MODEL, make

LARGE = Model(layers=6, hidden=1024, heads=8, ffn=4096, vocabulary=32000, positions=512)
OPTIONS = Options(shard_bytes=400_000_000)


def memory(what):
    """Resident pages, the highest number of them (VmHWM) or those of now (VmRSS), of files that are mapped too."""
    return int(re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024 / 1e6


def run(source, target):
    weights = open_weights(source)
    convert(weights, target, natural_format(weights), OPTIONS)
    return size(weights, OPTIONS) / 1e6


def in_another_process(work):
    """Whose memory is not counted here."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0


def main(given):
    torch.set_num_threads(1)
    root, direction = Path(given["folder"]), given["direction"]

    def prepare():
        for model, name in ((MODEL, "small"), (LARGE, "large")):
            make(root / name, model)
            if direction == "to-own":
                run(root / name, root / f"{name}-hf")

    in_another_process(prepare)
    end = "-hf" if direction == "to-own" else ""
    run(root / f"small{end}", root / "first")  # what a first use loads is loaded
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = memory("VmRSS")
    written = run(root / f"large{end}", root / "second")
    print(json.dumps({"model": written, "before": before, "peak": memory("VmHWM")}))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
