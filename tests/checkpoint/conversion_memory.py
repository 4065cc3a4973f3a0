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
OPTIONS = Options(shard_bytes=400_000_000, tp=2, pp=2)


def memory(what):
    """Resident pages, the highest number of them (VmHWM) or those of now (VmRSS), of files that are mapped too."""
    return int(re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024 / 1e6


def run(source, target, to=None):
    weights = open_weights(source)
    convert(weights, target, to or natural_format(weights), OPTIONS)
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
    root, source, to = Path(given["folder"]), given["source"], given["to"]

    def prepare():
        for model, name in ((MODEL, "small"), (LARGE, "large")):
            make(root / name, model)
            if source:
                run(root / name, root / f"{name}-{source}", source)

    in_another_process(prepare)
    end = f"-{source}" if source else ""
    run(root / f"small{end}", root / "first", to)  # what a first use loads is loaded
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = memory("VmRSS")
    written = run(root / f"large{end}", root / "second", to)
    print(json.dumps({"model": written, "before": before, "peak": memory("VmHWM")}))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
