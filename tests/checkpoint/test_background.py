"""Checkpoints that are written while training goes on: of the state as it was, with every error told in the end."""

import threading
from pathlib import Path

import pytest
import torch

from megapoly.checkpoint.background import Writer
from megapoly.checkpoint.folders import steps
from megapoly.checkpoint.store import Entry, Reader, save
from megapoly.context import ALONE
from megapoly.errors import CheckpointError
from megapoly.spec import Box, Piece

DTYPES = (torch.float64, torch.bfloat16, torch.uint8, torch.float32, torch.bool)


def entries(fill):
    """Tensors of odd sizes, one of them not contiguous, one empty."""
    tensors = {str(dtype): torch.full((7, 3), fill).to(dtype) for dtype in DTYPES}
    tensors["turned"] = torch.arange(6.0).view(2, 3).t() + fill
    tensors["none"] = torch.zeros(0)
    return [Entry(n, tuple(t.shape), Piece.of(Box.whole(tuple(t.shape))), t) for n, t in tensors.items()]


def read(path, name):
    reader = Reader(path)
    shape, dtype = reader.tensors[name]
    out = torch.zeros(torch.Size(shape).numel(), dtype=dtype)
    reader.read(name, Piece.of(Box.whole(shape)), out)
    return out.view(shape)


def test_what_changes_meanwhile_is_not_in_it(tmp_path):
    writer, go = Writer(ALONE), threading.Event()
    for step in (1, 2):  # the second time in the same memory
        state = entries(step)
        go.clear()

        def write(copies, step=step):
            assert go.wait(60)
            return save(tmp_path, step, copies, {})

        writer.write(state, write)
        assert steps(tmp_path) == list(range(1, step))  # it has returned, and nothing is written yet
        for entry in state:
            entry.data.zero_()
        go.set()
        path = writer.wait()
        assert path == tmp_path / f"step-0000000{step}"
        for entry in entries(step):
            assert torch.equal(read(path, entry.name), entry.data)
    assert writer.wait() is None


def test_an_error_is_raised_once_by_the_next_wait_or_write(tmp_path):
    writer = Writer(ALONE)

    def fail(copies):
        raise CheckpointError("the disk is full")

    writer.write(entries(1), fail)
    with pytest.raises(CheckpointError, match="the disk is full"):
        writer.wait()
    assert writer.wait() is None
    writer.write(entries(1), fail)
    with pytest.raises(CheckpointError, match="the disk is full"):
        writer.write(entries(2), lambda copies: save(tmp_path, 2, copies, {}))
    assert steps(tmp_path) == []
    writer.write(entries(2), lambda copies: save(tmp_path, 2, copies, {}))
    assert writer.wait() == tmp_path / "step-00000002"


def test_the_next_checkpoint_waits_for_the_one_before(tmp_path):
    writer, order = Writer(ALONE), []

    def write(step, copies) -> Path:
        order.append(("begin", step))
        path = save(tmp_path, step, copies, {})
        order.append(("end", step))
        return path

    for step in (1, 2, 3):
        writer.write(entries(step), lambda copies, step=step: write(step, copies))
    assert writer.wait() == tmp_path / "step-00000003"
    assert order == [(what, step) for step in (1, 2, 3) for what in ("begin", "end")]
