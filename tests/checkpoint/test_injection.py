"""Saves by processes that are killed, or whose disk fills up, at random points; bits that flip; what is synced."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megapoly.checkpoint.folders import newest
from megapoly.checkpoint.store import Entry, Reader, save
from megapoly.errors import CheckpointError
from megapoly.spec import Box, Piece

NAMESPACE = ["unshare", "--user", "--map-root-user", "--mount"]


def inject(folder, count, seed):
    """``count`` injections of each kind, in a process of its own; what became of each save."""
    script = Path(__file__).with_name("injection.py")
    root = script.parents[2]
    own = shutil.which("unshare") and not subprocess.run([*NAMESPACE, "true"], check=False).returncode
    given = {"count": count, "seed": seed, "folder": str(folder), "tmpfs": bool(own)}
    environment = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{root / 'kernels'}", "OMP_NUM_THREADS": "1"}
    command = [*(NAMESPACE if own else []), sys.executable, str(script), json.dumps(given)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60 + 9 * count, check=False)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert {kind: len(rounds) for kind, rounds in found.items()} == {"kill": count, "full": count}
    return found


def test_killed_and_on_a_full_disk_at_random_points(tmp_path):
    found = inject(tmp_path, 10, seed=1)
    assert all({each["background"] for each in rounds} == {True, False} for rounds in found.values())


@pytest.mark.long
def test_killed_and_on_a_full_disk_at_a_hundred_random_points(tmp_path):
    found = inject(tmp_path, 100, seed=2)
    assert {each["half"] for each in found["kill"]} == {0, 1}  # in the middle of the files, and before or after them
    assert {each["killed"] for each in found["kill"]} == {1, 2}


def saved(root, step=1):
    generator = torch.Generator().manual_seed(step)
    shapes = {"weights/a": (700, 500), "adam.first/a": (700, 500), "weights/b": (3,)}
    return save(
        root,
        step,
        [Entry(n, s, Piece.of(Box.whole(s)), torch.randn(s, generator=generator)) for n, s in shapes.items()],
        {"note": "x" * 1000},
    )


def read_all(path):
    reader = Reader(path)
    for name, (shape, dtype) in reader.tensors.items():
        reader.read(name, Piece.of(Box.whole(shape)), torch.zeros(torch.Size(shape).numel(), dtype=dtype))
    return reader


def test_a_flipped_bit_anywhere_in_any_file_is_found(tmp_path):
    """By a load of all tensors, and by ``verify``; both name the file, and in a file of tensors the block."""
    path = saved(tmp_path)
    draw = random.Random(0)
    read_all(path).verify()
    for file in sorted(path.iterdir()):
        raw = file.read_bytes()
        for bit in draw.sample(range(8 * len(raw)), 40):
            damaged = bytearray(raw)
            damaged[bit // 8] ^= 1 << bit % 8
            file.write_bytes(damaged)
            at = bit // 8 // 2**20 * 2**20
            where = "manifest.json: " if file.name == "manifest.json" else rf"{file.name}:? bytes {at} to "
            with pytest.raises(CheckpointError, match=where):
                read_all(path)
            with pytest.raises(CheckpointError, match=where):
                Reader(path).verify()
        file.write_bytes(raw)
    read_all(path).verify()


def test_all_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """Every file after its last write, then the folder of them, the rename, and the folder with the new name."""
    events = []
    fsync, rename = os.fsync, os.rename

    def synced(descriptor):
        fsync(descriptor)
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        events.append(
            ("sync", path, {p.name: p.stat().st_size for p in path.iterdir()} if path.is_dir() else path.stat().st_size)
        )

    def renamed(source, target):
        rename(source, target)
        events.append(("rename", Path(source), Path(target)))

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "rename", renamed)
    root = tmp_path / "run" / "checkpoints"
    final = saved(root)
    hidden = root / ".step-00000001"
    at = events.index(("rename", hidden, final))
    sizes = {path.name: path.stat().st_size for path in final.iterdir()}
    assert sorted(sizes) == ["manifest.json", "rank-00000.safetensors"]
    assert events[at - 1] == ("sync", hidden, sizes)
    for name, size in sizes.items():
        assert ("sync", hidden / name, size) in events[: at - 1]
    assert [path for what, path, _ in events[at + 1 :] if what == "sync"] == [root]
    # A new folder is there after a power cut only if the one that names it was synced.
    assert {tmp_path, tmp_path / "run"} <= {path for what, path, _ in events if what == "sync"}
    assert newest(root) == final
