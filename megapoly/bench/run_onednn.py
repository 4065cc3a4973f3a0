"""``python -m``: the same product by oneDNN, which on a CPU without Intel's name is twice as fast as torch's MKL."""

from __future__ import annotations

import torch

from megapoly.bench.run_matmul import make_work
from megapoly.bench.task import Task
from megapoly.bench.worker import Work, serve


def build(task: Task, device: torch.device) -> Work:
    return make_work(task, device, lambda a, b: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], ""))


if __name__ == "__main__":
    serve(build)
