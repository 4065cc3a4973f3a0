"""``python -m``: the limit, a product of square matrices as torch makes it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megapoly.bench.task import Task
from megapoly.bench.worker import Work, serve
from megapoly.engine import DTYPES

_PRODUCTS = 8
_SIZES = {"cpu": 2048, "cuda": 8192}


def build(task: Task, device: torch.device) -> Work:
    return make_work(task, device, torch.mm)


def make_work(task: Task, device: torch.device, multiply: Callable[[Tensor, Tensor], Tensor]) -> Work:
    size = _SIZES[device.type]
    left, right = torch.randn(2, size, size, device=device, dtype=DTYPES[task.config.train.precision])

    def step() -> float:
        for _ in range(_PRODUCTS):
            multiply(left, right)
        return 0.0

    return Work(step, flops=2.0 * size**3 * _PRODUCTS)


if __name__ == "__main__":
    serve(build)
