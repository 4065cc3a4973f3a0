"""``python -m``: one rank of ``megapoly bench checkpoint``, which saves and loads in turns with torch's own.

The state is a list of matrices of float32, split by rows over the ranks that save. Element ``i`` of a matrix, counted
in row-major order, is ``i`` modulo 2^24, which float32 holds exactly: what was loaded is checked.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from megapoly import comm
from megapoly.bench.checkpoint import Job, converted_model
from megapoly.checkpoint import store
from megapoly.checkpoint.background import Writer
from megapoly.checkpoint.convert import convert
from megapoly.checkpoint.folders import folder as step_folder
from megapoly.checkpoint.state import WEIGHTS, logical_shapes
from megapoly.checkpoint.weights import Options, open_weights
from megapoly.context import Axis
from megapoly.errors import CheckpointError
from megapoly.spec import Box, Piece, shard

_CHUNK = 1 << 24  # bytes


@dataclass
class Rank:
    """One rank, the shards of its matrices, and how long its last turn took."""

    job: Job
    rank: int
    axis: Axis
    mesh: DeviceMesh
    seconds: float = 0.0

    @property
    def root(self) -> Path:
        return Path(self.job.folder)

    @contextmanager
    def timed(self) -> Iterator[None]:
        """From when all ranks are ready until all are done."""
        comm.barrier(self.axis)
        begin = time.perf_counter()
        yield
        comm.barrier(self.axis)
        self.seconds = time.perf_counter() - begin

    def box(self, dim: int) -> Box:
        return shard((self.job.rows, self.job.columns), dim, self.rank, self.job.ranks)[0]

    def state(self, dim: int, fill: bool) -> dict[str, Tensor]:
        """This rank's shards along ``dim``; filled with what the matrices hold, or touched by -1."""
        box = self.box(dim)
        shards = {}
        for number in range(self.job.matrices):
            if fill:
                rows = torch.arange(box.start[0], box.stop[0]).unsqueeze(1) * self.job.columns
                at = rows + torch.arange(box.start[1], box.stop[1])
                shards[f"m{number}"] = (at % 2**24).float()
            else:
                shards[f"m{number}"] = torch.full(box.shape, -1.0)
        return shards

    def distributed(self, shards: dict[str, Tensor], dim: int) -> dict[str, Any]:
        return {
            name: DTensor.from_local(part, self.mesh, [Shard(dim)], run_check=False) for name, part in shards.items()
        }

    def entries(self, shards: dict[str, Tensor]) -> list[store.Entry]:
        shape, piece = (self.job.rows, self.job.columns), Piece.of(self.box(0))
        return [store.Entry(name, shape, piece, part) for name, part in shards.items()]

    def save(self, entries: list[store.Entry], axis: Axis) -> Path:
        return store.save(
            self.root / "megapoly",
            1,
            entries,
            {},
            rank=axis.rank,
            size=axis.size,
            gather=lambda value: comm.gather_objects(value, axis),
            broadcast=lambda value: comm.broadcast_object(value, axis),
        )

    def check(self, shards: dict[str, Tensor], dim: int) -> None:
        for name, wanted in self.state(dim, fill=True).items():
            if not torch.equal(shards[name], wanted):
                raise CheckpointError(f"benchmark: {name} was not loaded as it was saved")

    def remove(self, name: str) -> None:
        comm.barrier(self.axis)
        if self.rank == 0:
            shutil.rmtree(self.root / name, ignore_errors=True)
        comm.barrier(self.axis)


def disk_write(rank: Rank) -> None:
    """Plain bytes, synced: what the disk allows a save."""
    (rank.root / "plain").mkdir(exist_ok=True)
    data = memoryview(os.urandom(_CHUNK))
    size = rank.box(0).size * 4 * rank.job.matrices
    with rank.timed(), open(rank.root / "plain" / str(rank.rank), "wb", buffering=0) as file:
        for at in range(0, size, _CHUNK):
            file.write(data[: min(_CHUNK, size - at)])
        os.fsync(file.fileno())
    rank.remove("plain")


def save(rank: Rank) -> None:
    rank.remove("megapoly")
    entries = rank.entries(rank.state(0, fill=True))
    with rank.timed():
        rank.save(entries, rank.axis)


def peer_save(rank: Rank) -> None:
    rank.remove("dcp")
    state = rank.distributed(rank.state(0, fill=True), 0)
    with rank.timed():
        dcp.save(state, checkpoint_id=rank.root / "dcp")


def stall(rank: Rank) -> None:
    """How long training waits, the second time: the memory is there then."""
    writer, state = Writer(rank.axis), rank.state(0, fill=True)
    for _ in range(2):
        rank.remove("stall")
        with rank.timed():
            writer.write(rank.entries(state), lambda entries: rank.root / "stall")
        writer.wait()


def peer_stall(rank: Rank) -> None:
    state = rank.distributed(rank.state(0, fill=True), 0)
    for _ in range(2):
        rank.remove("stall")
        comm.barrier(rank.axis)
        begin = time.perf_counter()
        future = dcp.async_save(state, checkpoint_id=rank.root / "stall")
        seconds = time.perf_counter() - begin
        future.result()  # type: ignore[union-attr]
        rank.seconds = max(comm.broadcast_object(comm.gather_objects(seconds, rank.axis), rank.axis))
    rank.remove("stall")


def copy(rank: Rank) -> None:
    """Into memory that is there: what the machine allows a copy."""
    state = rank.state(0, fill=True)
    copies = {name: torch.full_like(part, -1.0) for name, part in state.items()}
    with rank.timed():
        for name, part in state.items():
            copies[name].copy_(part)


def _load(dim: int, cold: bool = False) -> Callable[[Rank], None]:
    def load(rank: Rank) -> None:
        shards = rank.state(dim, fill=False)
        path = step_folder(rank.root / "megapoly", 1)
        _prepare_cache(rank, path, cold)
        with rank.timed():
            reader = store.Reader(path)
            for name, part in shards.items():
                reader.read(name, Piece.of(rank.box(dim)), part.view(-1))
        rank.check(shards, dim)

    return load


def _peer_load(dim: int, cold: bool = False) -> Callable[[Rank], None]:
    def load(rank: Rank) -> None:
        shards = rank.state(dim, fill=False)
        state = rank.distributed(shards, dim)
        _prepare_cache(rank, rank.root / "dcp", cold)
        with rank.timed():
            dcp.load(state, checkpoint_id=rank.root / "dcp")
        rank.check({name: tensor.to_local() for name, tensor in state.items()}, dim)

    return load


def disk_read(rank: Rank) -> None:
    """The files of a checkpoint, each by one rank, not from memory: what the disk allows a load."""
    path = step_folder(rank.root / "megapoly", 1)
    _prepare_cache(rank, path, cold=True)
    space = memoryview(bytearray(_CHUNK))
    with rank.timed():
        for number, file in enumerate(sorted(path.iterdir())):
            if number % rank.job.ranks == rank.rank:
                with open(file, "rb", buffering=0) as opened:
                    while opened.readinto(space):
                        pass


def _prepare_cache(rank: Rank, path: Path, cold: bool) -> None:
    """Have the system's cache hold the files, or not."""
    for file in path.iterdir():
        with open(file, "rb", buffering=0) as opened:
            if cold:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                while opened.read(_CHUNK):
                    pass


def _model_entries(rank: Rank) -> Iterator[store.Entry]:
    job = rank.job
    model = converted_model(job.matrices, job.rows * job.columns * job.matrices)
    for name, shape in logical_shapes(model).items():
        values = (torch.arange(math.prod(shape)) % 2**24).float()
        yield store.Entry(f"{WEIGHTS}/{name}", shape, Piece.of(Box.whole(shape)), values)


def _model_checkpoint(rank: Rank) -> Path:
    """Made by the first turn that needs it."""
    path = step_folder(rank.root / "model", 1)
    if not path.exists():
        job = rank.job
        model = converted_model(job.matrices, job.rows * job.columns * job.matrices)
        meta = {"model": model.model_dump(mode="json"), "tokenizer": None}
        store.save(rank.root / "model", 1, _model_entries(rank), meta)
    return path


def convert_cold(rank: Rank) -> None:
    """To safetensors of Hugging Face, from the disk to the disk."""
    path = _model_checkpoint(rank)
    rank.remove("converted")
    _prepare_cache(rank, path, cold=True)
    with rank.timed():
        convert(open_weights(path), rank.root / "converted", "huggingface", Options())
    written = open_weights(rank.root / "converted")
    for entry in _model_entries(rank):
        found = torch.empty_like(entry.data)
        written.read(entry.name.removeprefix(f"{WEIGHTS}/"), entry.piece, found)
        if not torch.equal(found, entry.data):
            raise CheckpointError(f"benchmark: {entry.name} was not converted as it was saved")


def peer_convert(rank: Rank) -> None:
    """To one file of torch.save, which is synced here, as ours is."""
    path, target = rank.root / "dcp-model", rank.root / "dcp-model.pt"
    if not path.exists():
        dcp.save({entry.name: entry.data.view(entry.shape) for entry in _model_entries(rank)}, checkpoint_id=path)
    _prepare_cache(rank, path, cold=True)
    with rank.timed():
        dcp_to_torch_save(path, target)
        with open(target, "rb") as file:
            os.fsync(file.fileno())
    target.unlink()


def disk_copy(rank: Rank) -> None:
    """The bytes of a checkpoint read and written again, synced: what the disk allows a conversion."""
    path = _model_checkpoint(rank)
    _prepare_cache(rank, path, cold=True)
    space = memoryview(bytearray(_CHUNK))
    with rank.timed(), open(rank.root / "copied", "wb", buffering=0) as target:
        for file in sorted(path.iterdir()):
            with open(file, "rb", buffering=0) as opened:
                while count := opened.readinto(space):
                    target.write(space[:count])
        os.fsync(target.fileno())
    (rank.root / "copied").unlink()


TURNS: dict[str, Callable[[Rank], None]] = {
    "disk_write": disk_write,
    "save": save,
    "peer save": peer_save,
    "copy": copy,
    "async_stall": stall,
    "peer async_stall": peer_stall,
    "disk_read": disk_read,
    "load_rows": _load(0),
    "peer load_rows": _peer_load(0),
    "load_columns": _load(1),
    "peer load_columns": _peer_load(1),
    "load_cold": _load(0, cold=True),
    "peer load_cold": _peer_load(0, cold=True),
    "disk_copy": disk_copy,
    "convert": convert_cold,
    "peer convert": peer_convert,
}


def main() -> None:
    job, number = Job(**json.loads(sys.argv[1])), int(sys.argv[2])
    torch.set_num_threads(1)
    meeting = dist.FileStore(job.store, job.ranks)
    dist.init_process_group("gloo", store=meeting, rank=number, world_size=job.ranks)
    axis = Axis("ranks", tuple(range(job.ranks)), number, dist.new_group(list(range(job.ranks)), backend="gloo"))
    rank = Rank(job, number, axis, init_device_mesh("cpu", (job.ranks,)))
    for turn in job.turns:
        TURNS[turn](rank)
        if number == 0:
            print(json.dumps({"turn": turn, "seconds": rank.seconds}), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
