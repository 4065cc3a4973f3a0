"""The checkpoint on disk, against numpy (values), safetensors (files), zlib (checksums) and brute force (tiling)."""

import errno
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
import threading
import zlib
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megapoly.checkpoint import files, store
from megapoly.checkpoint.folders import Keep, newest, retire, steps
from megapoly.checkpoint.pieces import check_tiling
from megapoly.checkpoint.store import Entry, Reader, save
from megapoly.errors import CheckpointError
from megapoly.spec import Box, Piece

DTYPES = [
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
]
shapes = st.lists(st.integers(1, 5), max_size=4).map(tuple)


def whole(name, tensor):
    return Entry(name, tuple(tensor.shape), Piece.of(Box.whole(tuple(tensor.shape))), tensor)


def part(array, piece):
    """The elements of a piece, by numpy."""
    return array[piece.box.slices((0,) * array.ndim)].reshape(-1)[piece.start : piece.stop]


def read(reader, name, piece=None, dtype=None):
    shape, stored = reader.tensors[name]
    piece = piece or Piece.of(Box.whole(shape))
    out = torch.zeros(piece.size, dtype=dtype or stored)
    reader.read(name, piece, out)
    return out


def flip(path, at):
    with open(path, "r+b") as file:
        file.seek(at)
        (value,) = file.read(1)
        file.seek(at)
        file.write(bytes([value ^ 0x10]))


def rewrite(path, **changes):
    """Change a manifest and give it a right checksum again."""
    document = {**json.loads((path / "manifest.json").read_bytes()), **changes}
    document.pop("crc32")
    rest = json.dumps(document)[1:].encode()
    (path / "manifest.json").write_bytes(b'{"crc32":"%08x",\n' % zlib.crc32(rest) + rest)


@st.composite
def tilings(draw, shape):
    """Pieces that tile a tensor: the box cut again and again, then ranges of each box."""
    boxes = [Box.whole(shape)]
    for _ in range(draw(st.integers(0, 4))):
        box = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        wide = [d for d, n in enumerate(box.shape) if n > 1]
        if not wide:
            boxes.append(box)
            continue
        d = draw(st.sampled_from(wide))
        at = draw(st.integers(box.start[d] + 1, box.stop[d] - 1))
        boxes.append(Box(box.start, (*box.stop[:d], at, *box.stop[d + 1 :])))
        boxes.append(Box((*box.start[:d], at, *box.start[d + 1 :]), box.stop))
    pieces = []
    for box in boxes:
        cuts = sorted(draw(st.lists(st.integers(0, box.size), max_size=3)))
        pieces += [Piece(box, a, b) for a, b in itertools.pairwise([0, *cuts, box.size])]
    return draw(st.permutations(pieces))


class Ranks:
    """Threads as ranks."""

    def __init__(self, size):
        self.size = size
        self.barrier = threading.Barrier(size, timeout=60)
        self.box = [None] * size

    def gather(self, rank, value):
        self.box[rank] = value
        self.barrier.wait()
        everything = list(self.box)
        self.barrier.wait()
        return everything if rank == 0 else None

    def broadcast(self, rank, value):
        if rank == 0:
            self.box[0] = value
        self.barrier.wait()
        told = self.box[0]
        self.barrier.wait()
        return told

    def save(self, root, step, entries, meta=None, keep=None):
        """``entries[rank]`` saved by each rank: every rank's result, or its exception."""
        results = [None] * self.size

        def work(rank):
            try:
                results[rank] = save(
                    root, step, entries[rank], meta or {}, rank=rank, size=self.size,
                    gather=lambda value: self.gather(rank, value),
                    broadcast=lambda value: self.broadcast(rank, value), keep=keep,
                )  # fmt: skip
            except Exception as error:
                results[rank] = error

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


@given(st.data(), st.sampled_from([24, 64, 1 << 20]))
@settings(max_examples=60, deadline=None)
def test_any_tiling_reads_back_under_any_other(data, block):
    size = 3
    arrays, entries = {}, [[] for _ in range(size)]
    for name in ("a", "b.weight"):
        shape = data.draw(shapes)
        arrays[name] = np.random.default_rng(len(arrays)).standard_normal(shape)
        for piece in data.draw(tilings(shape)):
            values = torch.from_numpy(part(arrays[name], piece).copy())
            entries[data.draw(st.integers(0, size - 1))].append(Entry(name, shape, piece, values))
    patched = mock.patch.object(files, "BLOCK", block), mock.patch.object(os, "fsync")
    with tempfile.TemporaryDirectory() as folder, patched[0], patched[1]:
        paths = Ranks(size).save(Path(folder), 7, entries)
        assert paths == [Path(folder) / "step-00000007"] * size
        reader = Reader(paths[0])
        for name, array in arrays.items():
            for piece in data.draw(tilings(array.shape)):
                assert np.array_equal(read(reader, name, piece).numpy(), part(array, piece))
        reader.verify()


@pytest.mark.parametrize("block", [16, 20])
def test_only_touched_blocks_are_checked(tmp_path, monkeypatch, block):
    """A read needs the header and the blocks of its elements, and no other: for every box and two ranges of it."""
    monkeypatch.setattr(files, "BLOCK", block)
    shape = (2, 3, 4)
    values = torch.arange(24, dtype=torch.float64).reshape(shape)
    path = save(tmp_path, 1, [whole("w", values)], {})
    file = path / "rank-00000.safetensors"
    raw = file.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    everything = set(range(-(-len(raw) // block)))
    header = {at // block for at in range(start)}
    spans = [list(itertools.combinations(range(n + 1), 2)) for n in shape]
    for span in itertools.product(*spans):
        box = Box(tuple(a for a, _ in span), tuple(b for _, b in span))
        for piece in (Piece.of(box), Piece(box, box.size // 3, box.size - box.size // 4)):
            expected = part(values.numpy(), piece)
            elements = [start + 8 * int(index) for index in expected]
            touched = header | {(at + i) // block for at in elements for i in range(8)}
            damaged = bytearray(raw)
            for untouched in everything - touched:
                damaged[untouched * block] ^= 1
            file.write_bytes(damaged)
            assert np.array_equal(read(Reader(path), "w", piece).numpy(), expected)
            bad = max(touched)
            damaged[bad * block] ^= 1
            file.write_bytes(damaged)
            with pytest.raises(
                CheckpointError, match=rf"rank-00000\.safetensors: bytes {bad * block} to .*'w', are dam"
            ):
                read(Reader(path), "w", piece)


def test_files_are_safetensors(tmp_path):
    """The safetensors library reads every file: a whole box in its shape, another piece flat."""
    generator = torch.Generator().manual_seed(1)
    tensors = {str(d): torch.randint(0, 2, (4, 6), generator=generator).to(d) for d in DTYPES}
    left, right = Box((0, 0), (4, 2)), Box((0, 2), (4, 6))
    pieces = [[Piece.of(left), Piece(right, 0, 5)], [Piece(right, 5, 16)]]
    entries = [[], []]
    for rank in range(2):
        for name, tensor in tensors.items():
            for piece in pieces[rank]:
                flat = tensor[piece.box.slices((0, 0))].reshape(-1)[piece.start : piece.stop]
                entries[rank].append(Entry(name, (4, 6), piece, flat))
    entries[0].append(whole("scalar", torch.tensor(2.5)))
    (path, _) = Ranks(2).save(tmp_path, 3, entries)
    loaded = [safetensors.torch.load_file(path / f"rank-0000{rank}.safetensors") for rank in range(2)]
    assert loaded[0]["scalar"].shape == ()
    assert loaded[0]["scalar"] == 2.5
    document = json.loads((path / "manifest.json").read_text())
    for name, tensor in tensors.items():
        assert document["tensors"][name]["dtype"] == name.removeprefix("torch.")
        rows = document["tensors"][name]["pieces"]
        found = [loaded[int(row["file"][5:10])][row["key"]] for row in rows]
        assert [value.shape for value in found] == [(4, 2), (5,), (11,)]
        assert torch.equal(found[0], tensor[:, :2])
        assert torch.equal(torch.cat([found[1], found[2]]), tensor[:, 2:].reshape(-1))
        assert torch.equal(read(Reader(path), name).view(4, 6), tensor)


def test_manifest_fields_and_block_checksums(tmp_path):
    tensor = torch.randn(700_000, generator=torch.Generator().manual_seed(0))
    meta = {"tokens": 10**15, "config": {"layers": [1, 2.5, None, "ы"]}}
    path = save(tmp_path / "new" / "root", 123456789, [whole("w", tensor)], meta)
    assert path == tmp_path / "new" / "root" / "step-123456789"
    document = json.loads((path / "manifest.json").read_text())
    raw = (path / "rank-00000.safetensors").read_bytes()
    crc32 = [zlib.crc32(raw[at : at + 2**20]) for at in range(0, len(raw), 2**20)]
    assert len(crc32) == 3
    del document["crc32"]
    piece = {"file": "rank-00000.safetensors", "key": "w", "start": [0], "stop": [700_000], "range": [0, 700_000]}
    assert document == {
        "format": "megapoly-checkpoint", "version": 1, "step": 123456789, "meta": meta,
        "tensors": {"w": {"shape": [700_000], "dtype": "float32", "pieces": [piece]}},
        "files": {"rank-00000.safetensors": {"bytes": len(raw), "crc32": crc32}},
    }  # fmt: skip
    reader = Reader(path)
    assert (reader.path, reader.step, reader.meta) == (path, 123456789, meta)
    assert reader.tensors == {"w": ((700_000,), torch.float32)}
    assert torch.equal(read(reader, "w"), tensor)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_convert_as_torch_does(tmp_path, dtype):
    values = torch.randn(65, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 100
    values = values.abs().to(dtype)
    reader = Reader(save(tmp_path, 1, [whole("w", values)], {}))
    for other in DTYPES:
        if not torch.can_cast(dtype, other):
            with pytest.raises(CheckpointError, match=f"'w' is {dtype} and cannot be read as {other}"):
                read(reader, "w", dtype=other)
        else:
            assert torch.equal(read(reader, "w", dtype=other), values.to(other))


def test_writes_into_views_and_parameters(tmp_path):
    values = torch.arange(6.0).view(2, 3)
    reader = Reader(save(tmp_path, 1, [whole("w", values.t().contiguous().t())], {}))
    buffer = torch.full((12,), -1.0)
    reader.read("w", Piece.of(Box.whole((2, 3))), buffer[::2])
    assert buffer.tolist() == [0, -1, 1, -1, 2, -1, 3, -1, 4, -1, 5, -1]
    parameter = torch.nn.Parameter(torch.zeros(3))
    reader.read("w", Piece.of(Box((1, 0), (2, 3))), parameter)
    assert parameter.tolist() == [3, 4, 5]
    with pytest.raises(ValueError, match=r"out has shape \(5,\) for a piece of 6"):
        reader.read("w", Piece.of(Box.whole((2, 3))), torch.zeros(5))


def test_empty_pieces_empty_tensors_and_ranks_that_own_nothing(tmp_path):
    padding = Entry("w", (3, 2), Piece.of(Box((3, 0), (3, 2))), torch.zeros(0))
    entries = [[whole("w", torch.arange(6.0).view(3, 2))], [padding], [whole("none", torch.zeros(0, 4))], []]
    path, *_ = Ranks(4).save(tmp_path, 1, entries)
    assert sorted(p.name for p in path.iterdir()) == ["manifest.json", "rank-00000.safetensors"]
    reader = Reader(path)
    assert reader.tensors == {"w": ((3, 2), torch.float32), "none": ((0, 4), torch.float32)}
    assert read(reader, "none").shape == (0,)
    assert read(reader, "w", Piece.of(Box((3, 0), (3, 2)))).shape == (0,)
    assert read(reader, "w", Piece(Box.whole((3, 2)), 4, 4)).shape == (0,)
    empty = Reader(save(tmp_path, 2, [], {"only": "meta"}))
    assert empty.tensors == {}
    assert empty.meta == {"only": "meta"}
    empty.verify()


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_tiling_check_agrees_with_counting(data):
    """From a tiling with perhaps a piece changed: accepted exactly if every element is counted once."""
    shape = data.draw(shapes)
    pieces = [piece for piece in data.draw(tilings(shape)) if piece.size]
    change = data.draw(st.sampled_from(["none", "drop", "twice", "range", "other"]))
    at = data.draw(st.integers(0, len(pieces) - 1))
    if change == "drop":
        pieces.pop(at)
    elif change == "twice":
        pieces.append(pieces[at])
    elif change == "range":
        box = pieces[at].box
        start, stop = sorted(data.draw(st.tuples(*[st.integers(0, box.size)] * 2)))
        pieces[at] = Piece(box, start, stop)
    elif change == "other":
        pieces[at] = data.draw(st.sampled_from(data.draw(tilings(shape))))
    pieces = [piece for piece in pieces if piece.size]
    counts = np.zeros(math.prod(shape), dtype=int)
    for piece in pieces:
        counts[part(np.arange(counts.size).reshape(shape), piece)] += 1
    named = [("f", piece) for piece in pieces]
    if (counts == 1).all():
        check_tiling("t", shape, named)
    elif (counts > 1).any():
        with pytest.raises(CheckpointError, match=r"tensor 't': elements .* of f and elements .* of f overlap"):
            check_tiling("t", shape, named)
    else:
        hole = rf"tensor 't' of shape .*: {(counts == 0).sum()} of its {counts.size} elements are in no piece"
        with pytest.raises(CheckpointError, match=hole):
            check_tiling("t", shape, named)


def bad_entries():
    values, box = torch.arange(6.0), Box.whole((6,))
    half = Entry("w", (6,), Piece(box, 0, 3), values[:3])
    rest = Entry("w", (6,), Piece(box, 3, 6), values[3:])
    more = Entry("w", (6,), Piece(box, 2, 6), values[2:])
    yield "hole", [half], [], "tensor 'w' of shape [6]: 3 of its 6 elements are in no piece"
    yield (
        "overlap",
        [half],
        [more],
        "elements 0 to 3 of [0:6] of rank-00000.safetensors and elements 2 to 6 of [0:6] of",
    )
    yield "twice", [whole("w", values)], [whole("w", values)], "overlap"
    yield "twice by one rank", [whole("w", values)] * 2, [], "rank 0: ValueError: tensor 'w' is given twice"
    yield "shape", [half], [Entry("w", (7,), rest.piece, rest.data)], "'w' has shape [7] on rank 1, [6] on a rank"
    yield "dtype", [half], [Entry("w", (6,), rest.piece, rest.data.long())], "'w' has dtype int64 on rank 1, float32"
    outside = Entry("w", (6,), Piece(Box((4,), (7,)), 0, 3), values[3:])
    yield "outside", [half], [outside], "tensor 'w': elements 0 to 3 of [4:7] is outside of shape [6]"
    yield "elements", [half], [Entry("w", (6,), rest.piece, values)], "rank 1: ValueError: tensor 'w': 6 elements for"
    yield "name", [], [whole("w@0", values)], "rank 1: ValueError: 'w@0' cannot name a tensor"
    yield "complex", [whole("w", values.to(torch.complex64))], [], "complex64 cannot be stored; known: float64"


@pytest.mark.parametrize(
    ("first", "second", "message"), [pytest.param(*rest, id=name) for name, *rest in bad_entries()]
)
def test_pieces_that_do_not_fit_are_refused_on_every_rank(tmp_path, first, second, message):
    errors = Ranks(2).save(tmp_path, 1, [first, second])
    assert all(isinstance(error, CheckpointError) and message in str(error) for error in errors), errors
    assert list(tmp_path.iterdir()) == []


def test_what_the_caller_got_wrong(tmp_path):
    with pytest.raises(ValueError, match="0 checkpoints to keep"):
        Keep(0)
    with pytest.raises(ValueError, match="several ranks need gather and broadcast"):
        save(tmp_path, 1, [], {}, size=2)
    for meta in ({"path": Path("x")}, {"loss": float("nan")}):
        with pytest.raises(CheckpointError, match=r"step-00000001: not saved; rank 0: (TypeError|ValueError)"):
            save(tmp_path, 1, [], meta)
    reader = Reader(save(tmp_path, 1, [whole("w", torch.zeros(3))], {}))
    with pytest.raises(CheckpointError, match="has no tensor 'v'"):
        reader.read("v", Piece.of(Box.whole((3,))), torch.zeros(3))
    with pytest.raises(CheckpointError, match=r"elements 0 to 3 of \[1:4\] is outside of shape \[3\]"):
        reader.read("w", Piece.of(Box((1,), (4,))), torch.zeros(3))


def test_a_step_that_is_there_is_refused(tmp_path):
    Ranks(2).save(tmp_path, 1, [[whole("w", torch.tensor([1.0]))], []])
    errors = Ranks(2).save(tmp_path, 1, [[whole("w", torch.tensor([2.0]))], []])
    assert all("there is a checkpoint of this step already" in str(error) for error in errors)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    assert read(Reader(newest(tmp_path)), "w").item() == 1


def test_the_newest_checkpoint_from_before_a_step_is_kept_too(tmp_path):
    for step in (10, 20, 30, 40):
        save(tmp_path, step, [], {})
    save(tmp_path, 50, [], {}, keep=Keep(2, before=30))
    assert steps(tmp_path) == [20, 40, 50]
    save(tmp_path, 60, [], {}, keep=Keep(1, before=15))
    assert steps(tmp_path) == [60]


def test_keep_removes_older_checkpoints_only(tmp_path):
    for step in (30, 10, 20):
        save(tmp_path, step, [], {})
    (tmp_path / "notes").mkdir()
    save(tmp_path, 25, [], {}, keep=Keep(2))
    assert steps(tmp_path) == [20, 25, 30]  # a later one is another branch: not this function's to judge
    save(tmp_path, 40, [], {}, keep=Keep(1))
    assert steps(tmp_path) == [40]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes", "step-00000040"]


def test_an_old_checkpoint_that_cannot_be_removed_is_no_failure(tmp_path, monkeypatch):
    save(tmp_path, 1, [], {})
    rename = os.rename

    def refuse(source, target):
        if Path(source).name == "step-00000001":
            raise PermissionError(errno.EACCES, "Permission denied", str(source))
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.warns(UserWarning, match="step-00000001: an old checkpoint could not be removed .*Permission denied"):
        save(tmp_path, 2, [], {}, keep=Keep(1))
    assert steps(tmp_path) == [1, 2]


def test_a_branch_that_is_left_moves_into_a_folder_of_its_own(tmp_path):
    for step in (10, 20, 30, 40):
        save(tmp_path, step, [whole("w", torch.tensor([float(step)]))], {})
    assert retire(tmp_path, 40, "left-branch-0") == []
    assert not (tmp_path / "left-branch-0").exists()
    assert retire(tmp_path, 20, "left-branch-0") == [40, 30]
    assert steps(tmp_path) == [10, 20]
    assert steps(tmp_path / "left-branch-0") == [30, 40]
    assert read(Reader(tmp_path / "left-branch-0/step-00000030"), "w").item() == 30
    save(tmp_path, 30, [whole("w", torch.tensor([3.0]))], {})  # the new branch's own
    assert retire(tmp_path, 20, "left-branch-0") == [30]  # an interrupted start had left one there: it is replaced
    assert read(Reader(tmp_path / "left-branch-0/step-00000030"), "w").item() == 3
    assert steps(tmp_path / "left-branch-0") == [30, 40]


@pytest.mark.parametrize("moved", [0, 1, 2])
def test_an_interrupted_retirement_leaves_whole_checkpoints_without_a_gap(tmp_path, monkeypatch, moved):
    for step in (10, 20, 30, 40):
        save(tmp_path, step, [whole("w", torch.tensor([float(step)]))], {})
    rename, done = os.rename, []

    def few(source, target):
        if len(done) == moved:
            raise OSError(errno.EIO, "Input/output error", str(source))
        done.append(rename(source, target))

    with monkeypatch.context() as patched:
        patched.setattr(os, "rename", few)
        with pytest.raises(
            CheckpointError, match=rf"checkpoint {40 - 10 * moved} of a branch .* \(Input/output error\)"
        ):
            retire(tmp_path, 10, "left-branch-0")
    assert steps(tmp_path) == [10, 20, 30, 40][: 4 - moved]
    assert steps(tmp_path / "left-branch-0") == [20, 30, 40][3 - moved :]
    assert retire(tmp_path, 10, "left-branch-0") == [40, 30, 20][moved:]
    assert [read(Reader(tmp_path / f"left-branch-0/step-000000{n}"), "w").item() for n in (20, 30, 40)] == [20, 30, 40]


def test_steps_and_newest(tmp_path):
    assert steps(tmp_path / "nowhere") == []
    with pytest.raises(CheckpointError, match=r"nowhere: no whole checkpoint .*check the path, or start a new run"):
        newest(tmp_path / "nowhere")
    for step in (5, 100_000_000, 70):
        save(tmp_path, step, [], {})
    (tmp_path / "step-99999999999").mkdir()  # no manifest
    (tmp_path / ".step-00000080").mkdir()
    (tmp_path / "step-00000090").touch()
    (tmp_path / "step-7").mkdir()
    assert steps(tmp_path) == [5, 70, 100_000_000]
    assert newest(tmp_path) == tmp_path / "step-100000000"


@pytest.fixture
def saved(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "BLOCK", 64)
    entries = [whole("a", torch.arange(20.0)), whole("b", torch.arange(30, dtype=torch.int64))]
    return save(tmp_path, 1, entries, {"step": 1})


def test_a_flipped_byte_anywhere_is_found_and_located(saved):
    file = saved / "rank-00000.safetensors"
    raw = file.read_bytes()
    header = 8 + int.from_bytes(raw[:8], "little")
    where = {"b": (header, header + 240), "a": (header + 240, header + 320)}
    assert len(raw) == header + 320
    for at in range(len(raw)):
        flip(file, at)
        start, stop = at // 64 * 64, min(len(raw), at // 64 * 64 + 64)
        with pytest.raises(CheckpointError) as error:
            Reader(saved).verify()
        assert f"rank-00000.safetensors bytes {start} to {stop} (" in str(error.value)
        names = [name for name in "ba" if where[name][0] < stop and start < where[name][1]]
        if at >= header:
            told = ", ".join([*names, "or the file's header"] if start < header else names)
            assert f"({told})" in str(error.value)
        else:
            assert "the file's header" in str(error.value)
        flip(file, at)
    Reader(saved).verify()


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="the system has no posix_fadvise")
def test_the_disk_begins_before_the_file_is_whole(tmp_path, monkeypatch):
    """Ranges without a gap or an overlap, each when its bytes have left the process."""
    monkeypatch.setattr(files, "BLOCK", 64)
    monkeypatch.setattr(files, "_EARLY", 200)
    begun = []

    def advise(descriptor, start, size, advice):
        assert advice == os.POSIX_FADV_DONTNEED
        assert os.fstat(descriptor).st_size == start + size
        begun.append((start, start + size))

    monkeypatch.setattr(os, "posix_fadvise", advise)
    data = os.urandom(1000)
    with files.BlockFile(tmp_path / "file") as file:
        file.write(data[:150])
        file.write(data[150:])
    assert (tmp_path / "file").read_bytes() == data
    assert [stop for _, stop in begun] == [start for start, _ in begun[1:]] + [begun[-1][1]]
    assert begun[0][0] == 0
    assert 1000 - begun[-1][1] < 200
    assert file.crc32 == [zlib.crc32(data[at : at + 64]) for at in range(0, 1000, 64)]


def test_verify_lists_every_damaged_block(saved):
    file = saved / "rank-00000.safetensors"
    size = file.stat().st_size
    flip(file, size - 1)
    flip(file, size - 200)
    with pytest.raises(CheckpointError) as error:
        Reader(saved).verify()
    assert str(error.value).count("rank-00000.safetensors bytes") == 2


def test_a_checked_block_is_not_checked_again(saved):
    reader = Reader(saved)
    with mock.patch.object(files._index, "crc32", wraps=files._index.crc32) as crc32:
        read(reader, "a")
        first = crc32.call_count
        read(reader, "a")
        assert first > 0
        assert crc32.call_count == first


def test_a_damaged_manifest(saved):
    manifest = saved / "manifest.json"
    raw = manifest.read_bytes()
    for at in range(len(raw)):
        flip(manifest, at)
        with pytest.raises(CheckpointError, match=r"manifest\.json: "):
            Reader(saved)
        flip(manifest, at)
        manifest.write_bytes(raw[:at])
        with pytest.raises(CheckpointError, match=r"manifest\.json: damaged"):
            Reader(saved)
        manifest.write_bytes(raw)
    Reader(saved)
    manifest.unlink()
    with pytest.raises(CheckpointError, match=r"manifest\.json: cannot be read \(No such file.*step-N"):
        Reader(saved)


def test_a_manifest_of_another_kind(saved):
    rewrite(saved, version=2)
    with pytest.raises(CheckpointError, match="has version 2; this megapoly reads version 1"):
        Reader(saved)
    rewrite(saved, version=1, format="other")
    with pytest.raises(CheckpointError, match="is not the manifest of a megapoly checkpoint"):
        Reader(saved)
    rewrite(saved, format="megapoly-checkpoint", tensors={"a": {"shape": [1]}})
    with pytest.raises(CheckpointError, match="is not a checkpoint's manifest"):
        Reader(saved)
    (saved / "manifest.json").write_text("[1]")
    with pytest.raises(CheckpointError, match="is not the manifest of a megapoly checkpoint"):
        Reader(saved)


def test_an_element_that_is_stored_nowhere(saved):
    tensors = json.loads((saved / "manifest.json").read_bytes())["tensors"]
    tensors["a"]["pieces"][0]["range"] = [0, 15]
    rewrite(saved, tensors=tensors)
    reader = Reader(saved)
    assert read(reader, "a", Piece(Box.whole((20,)), 2, 15)).tolist() == list(range(2, 15))
    with pytest.raises(
        CheckpointError, match=r"'a': 5 of the 18 elements of elements 2 to 20 of \[0:20\] are stored no"
    ):
        read(reader, "a", Piece(Box.whole((20,)), 2, 20))


def test_a_missing_or_truncated_file(saved):
    file = saved / "rank-00000.safetensors"
    size = file.stat().st_size
    os.truncate(file, size - 1)
    with pytest.raises(CheckpointError, match=f"rank-00000.safetensors: has {size - 1} bytes, {size} were written"):
        Reader(saved)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"rank-00000\.safetensors: is missing"):
        Reader(saved)


def test_expect_lists_what_differs(saved):
    reader = Reader(saved)
    reader.expect({"b": (30,), "a": [20]})
    with pytest.raises(CheckpointError) as error:
        reader.expect({"a": (20, 1), "c": (3,), "d": (4,)})
    assert "a checkpoint of another model" in str(error.value)
    assert "2 missing: c, d; 1 unexpected: b; 1 of another shape: a [20], expected [20, 1]." in str(error.value)
    with pytest.raises(CheckpointError, match=r"92 missing: x0, .*, x7 and 84 more"):
        reader.expect({"a": (20,), "b": (30,), **{f"x{i}": (1,) for i in range(92)}})


def full_disk(monkeypatch, file):
    """The second write to a file of this name finds the disk full."""
    write, seen = files.BlockFile.write, {}

    def fail(self, data):
        if Path(self._file.name).name == file:
            seen[file] = seen.get(file, 0) + 1
            if seen[file] == 2 or file == "manifest.json":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, data)

    monkeypatch.setattr(files.BlockFile, "write", fail)


@pytest.mark.parametrize("file", ["rank-00000.safetensors", "rank-00001.safetensors", "manifest.json"])
def test_full_disk_on_one_rank_fails_the_save_on_all(tmp_path, monkeypatch, file):
    entries = [[whole(f"w{rank}", torch.full((5,), float(rank)))] for rank in range(2)] + [[]]
    Ranks(3).save(tmp_path, 1, entries)
    with monkeypatch.context() as patched:
        full_disk(patched, file)
        errors = Ranks(3).save(tmp_path, 2, entries, keep=Keep(1))
    rank = 1 if "1" in file else 0
    for error in errors:
        assert isinstance(error, CheckpointError)
        assert f"step-00000002: not saved; rank {rank}: OSError: [Errno 28] No space left on device" in str(error)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    assert read(Reader(newest(tmp_path)), "w1").tolist() == [1] * 5
    assert Ranks(3).save(tmp_path, 2, entries, keep=Keep(1)) == [tmp_path / "step-00000002"] * 3
    assert steps(tmp_path) == [2]


def test_a_folder_that_cannot_be_made(tmp_path):
    """Every rank ends with rank 0's cause."""
    (tmp_path / "file").touch()
    errors = Ranks(2).save(tmp_path / "file", 1, [[], []])
    assert all(isinstance(error, CheckpointError) for error in errors)
    assert all("rank 0: FileExistsError" in str(error) for error in errors)


def test_ranks_that_see_different_folders(tmp_path):
    """As on two machines without a common file system."""
    here, there = tmp_path / "here", tmp_path / "there"
    ranks = Ranks(2)
    errors = [None, None]

    def work(rank, root):
        gather, broadcast = partial(ranks.gather, rank), partial(ranks.broadcast, rank)
        with pytest.raises(CheckpointError) as error:
            save(root, 1, [], {}, rank=rank, size=2, gather=gather, broadcast=broadcast)
        errors[rank] = str(error.value)

    threads = [threading.Thread(target=work, args=args) for args in ((0, here), (1, there))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all("which rank 0 made, is not there; all ranks need one shared folder" in error for error in errors)
    assert steps(here) == []


KILLED = """
import os, shutil, signal, sys
from pathlib import Path
import torch
from megapoly.checkpoint import files, folders, store
from megapoly.spec import Box, Piece

torch.set_num_threads(1)
left = 0

def tick():
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)

def counted(owner, name):
    function = getattr(owner, name)
    def wrapper(*args, **keywords):
        tick()
        result = function(*args, **keywords)
        tick()
        return result
    setattr(owner, name, wrapper)

def half(self, data):
    tick()
    write(self, data[: len(data) // 2])
    self._file.flush()
    tick()
    write(self, data[len(data) // 2 :])

def save(root, step):
    entry = store.Entry("w", (100,), Piece.of(Box.whole((100,))), torch.full((100,), float(step)))
    store.save(root, step, [entry], {"step": step}, keep=folders.Keep(2))

write = files.BlockFile.write
before = Path(sys.argv[1]) / "before"
save(before, 1)
save(before, 2)
for point in range(1, 1000):
    root = shutil.copytree(before, before.with_name(str(point)))
    child = os.fork()
    if child == 0:
        for owner, name in ((os, "fsync"), (os, "rename"), (os, "mkdir"), (os, "unlink"), (os, "rmdir")):
            counted(owner, name)
        files.BlockFile.write = half
        left = point
        save(root, 3)
        os._exit(0)
    if os.waitpid(child, 0)[1] == 0:
        shutil.rmtree(root)
        shutil.rmtree(before)
        break
"""


def test_a_killed_save_loses_nothing(tmp_path):
    """Killed before and after every change of the disk: the newest checkpoint is whole, the next save cleans up."""
    environment = {**os.environ, "PYTHONPATH": str(Path(store.__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=True, env=environment, timeout=120)
    roots = list(tmp_path.iterdir())
    found = []
    for root in roots:
        path = newest(root)
        reader = Reader(path)
        reader.verify()
        assert reader.step in (2, 3)
        assert reader.meta == {"step": reader.step}
        assert torch.equal(read(reader, "w"), torch.full((100,), float(reader.step)))
        for step in steps(root):
            Reader(root / f"step-{step:08d}").verify()
        found.append((reader.step, any(p.name.startswith(".") for p in root.iterdir())))
        save(root, 4, [whole("w", torch.zeros(1))], {}, keep=Keep(2))
        assert steps(root) == [reader.step, 4]
        assert sorted(p.name for p in root.iterdir()) == [f"step-{step:08d}" for step in (reader.step, 4)]
    assert set(found) == {(2, False), (2, True), (3, False), (3, True)}
    assert len(roots) > 20
