"""``python -m``: training steps of megapoly's engine, on one rank or several."""

from __future__ import annotations

import torch
import torch.distributed as dist

from megapoly import launch
from megapoly.bench.task import RATE, Task
from megapoly.bench.worker import Work, random_rows, serve
from megapoly.context import ParallelContext
from megapoly.data.samples import Batch
from megapoly.engine import Engine


def build(task: Task, device: torch.device) -> Work:
    config = task.config
    if device.type == "cpu":
        launch.keep_freed_memory()  # as in training
    if config.mesh.world_size > 1:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=dist.FileStore(task.store, config.mesh.world_size),
            rank=task.rank,
            world_size=config.mesh.world_size,
            device_id=device if device.type == "cuda" else None,
        )
    engine = Engine(config, ParallelContext.create(config.mesh, device))
    engine.initialise()
    return make_work(engine)


def make_work(engine: Engine) -> Work:
    """Steps on this rank's micro-batches of the global batch."""
    config, dp = engine.config, engine.context.dp
    tokens, labels = random_rows(config)
    rows, length = tokens.shape
    positions = torch.arange(length).expand(rows, length)
    batch = Batch(torch.arange(rows), torch.zeros(rows, dtype=torch.int32), tokens, labels, positions, None)
    part = rows // dp.size
    batches = batch.rows(dp.rank * part, (dp.rank + 1) * part).split(config.layout.micro_batch)
    parameters = sum(parameter.numel() for parameter in engine.buffers.parameters)
    return Work(lambda: engine.step(batches, RATE).loss, parameters)


if __name__ == "__main__":
    serve(build)
