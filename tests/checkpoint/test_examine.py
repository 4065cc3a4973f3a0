"""``megapoly checkpoint inspect``, ``verify`` and ``diff``, against numpy."""

import json
import math
import tracemalloc

import numpy as np
import pytest
import torch

from megapoly.checkpoint import examine
from megapoly.checkpoint.store import Entry, Reader, save
from megapoly.cli import main
from megapoly.errors import CheckpointError
from megapoly.spec import Box, Piece


def entries(arrays):
    """Each tensor in two pieces, where it has two elements: a range, and the rest."""
    for name, values in arrays.items():
        flat, whole = values.reshape(-1), Box.whole(tuple(values.shape))
        cut = len(flat) // 3
        for start, stop in ((0, cut), (cut, len(flat))):
            yield Entry(name, tuple(values.shape), Piece(whole, start, stop), flat[start:stop])


def make(seed=0):
    draw = torch.Generator().manual_seed(seed)
    return {
        "weights/a": torch.randn(70, 50, generator=draw),
        "weights/half": torch.randn(33, generator=draw).bfloat16(),
        "adam.first/a": torch.randn(70, 50, generator=draw, dtype=torch.float64),
        "count": torch.tensor(7),
        "empty": torch.zeros(0, 3),
    }


def run(capsys, *words):
    with pytest.raises(SystemExit) as ended:
        main(["checkpoint", *map(str, words)])
    out, err = capsys.readouterr()
    return ended.value.code, out, err


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(examine, "_PART", 1000)


def test_inspect_against_numpy(tmp_path, capsys):
    arrays = make()
    arrays["weights/a"][3, 4], arrays["weights/a"][69, 49] = math.nan, -math.inf
    save(tmp_path / "checkpoints", 12, entries(arrays), {"counters": {"sample": 96, "tokens": 768}, "layout": "dp 2"})
    code, out, _ = run(capsys, "inspect", tmp_path, "--json", tmp_path / "rows.json")
    assert code == 0
    assert f"{tmp_path}/checkpoints/step-00000012: step 12, sample 96, tokens 768; 1 file of tensors" in out
    rows = {row["name"]: row for row in json.loads((tmp_path / "rows.json").read_text())["rows"]}
    assert sorted(rows) == sorted(arrays)
    for name, tensor in arrays.items():
        values = tensor.double().numpy().ravel()
        finite = values[np.isfinite(values)]
        row = rows[name]
        assert row["value"] == pytest.approx(np.linalg.norm(finite), rel=1e-12)
        assert row["largest"] == np.abs(finite).max(initial=0)
        assert row["not_finite"] == len(values) - len(finite)
        assert row["shape"] == list(tensor.shape)
        assert row["dtype"] == str(tensor.dtype).removeprefix("torch.")
        (line,) = [line for line in out.splitlines() if line.split()[:1] == [name]]
        assert f"{np.linalg.norm(finite):.6g}" in line
    code, out, _ = run(capsys, "inspect", tmp_path, "--no-norms", "--only", "weights/*")
    assert code == 0
    assert "2 tensors with 3,533 elements" in out
    assert "adam.first" not in out
    code, _, err = run(capsys, "inspect", tmp_path, "--only", "weight/*")
    assert code == 1
    assert "no tensor's name matches 'weight/*'; names are such as 'adam.first/a'" in err


def test_verify_names_file_bytes_and_tensors(tmp_path, capsys):
    good = save(tmp_path / "good", 1, entries(make()), {})
    bad = save(tmp_path / "bad", 1, entries(make()), {})
    short = save(tmp_path / "short", 1, entries(make()), {})
    file = bad / "rank-00000.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 4
    file.write_bytes(raw)
    assert run(capsys, "verify", good)[:2] == (0, f"{good}: whole, {len(raw) / 1e6:.2f} MB\n")
    (short / "rank-00000.safetensors").write_bytes(raw[:-1])
    code, out, err = run(capsys, "verify", bad, short, good, "--json", tmp_path / "rows.json")
    assert code == 1
    assert f"{bad}: 1 damaged place, " in out
    assert f"rank-00000.safetensors bytes 0 to {len(raw)} (" in out
    assert f"has {len(raw) - 1} bytes, {len(raw)} were written" in out
    assert f"{good}: whole" in out
    assert "2 of 3 paths are damaged; move the folder of a run's checkpoint away" in err
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [row["value"] for row in rows] == [1, 1, 0]
    assert rows[0]["places"][0]["file"] == "rank-00000.safetensors"


def test_verify_tells_what_is_no_checkpoint_from_what_is_damaged(tmp_path, capsys):
    good = save(tmp_path / "good", 1, entries(make()), {})
    other, empty, megatron = tmp_path / "llama", tmp_path / "run", tmp_path / "gpt"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "llama"}')
    (empty / "checkpoints").mkdir(parents=True)
    (megatron / "mp_rank_00").mkdir(parents=True)
    paths = (good, other, megatron, empty, tmp_path / "nowhere")
    code, out, err = run(capsys, "verify", *paths, "--json", tmp_path / "rows.json")
    assert code == 1
    assert f"{other}: is no checkpoint of megapoly but a folder of Hugging Face; convert it first" in out
    assert f"{megatron}: is no checkpoint of megapoly but a folder of Megatron; convert it first" in out
    assert f"{empty / 'checkpoints'}: no whole checkpoint" in out
    assert f"{tmp_path / 'nowhere'}: does not exist" in out
    assert "4 of 5 paths hold no checkpoint of megapoly" in err
    assert "damaged" not in out + err
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [row["value"] for row in rows] == [0, None, None, None, None]


def test_diff_against_numpy(tmp_path, capsys):
    arrays, other = make(), make()
    other["weights/a"] = other["weights/a"] + 0
    other["weights/a"][5, 7] += 0.5
    other["weights/a"][69, 49] -= 0.25
    other["weights/half"] = other["weights/half"].float()
    del other["count"]
    other["new"], other["empty"] = torch.ones(2), torch.zeros(0, 4)
    first = save(tmp_path / "a", 1, entries(arrays), {})
    second = save(tmp_path / "b", 2, entries(other), {})
    code, out, _ = run(capsys, "diff", first, second, "--json", tmp_path / "rows.json")
    assert code == 1
    assert "5 of 6 tensors differ" in out
    rows = {row["name"]: row for row in json.loads((tmp_path / "rows.json").read_text())["rows"]}
    a, b = (each["weights/a"].double().numpy() for each in (arrays, other))
    assert rows["weights/a"]["value"] == np.abs(a - b).max()
    assert rows["weights/a"]["different"] == 2
    assert rows["weights/a"]["relative"] == pytest.approx(np.linalg.norm(a - b) / np.linalg.norm(a), rel=1e-12)
    assert rows["weights/half"]["dtypes"] == ["bfloat16", "float32"]
    assert (rows["weights/half"]["value"], rows["weights/half"]["same"]) == (0, False)
    assert rows["adam.first/a"]["same"]
    assert rows["count"]["problem"] == "in the first only"
    assert rows["new"]["problem"] == "in the second only"
    assert rows["empty"]["problem"] == "shape [0, 3] and [0, 4]"
    assert "adam.first" not in out
    code, out, _ = run(capsys, "diff", first, tmp_path / "a", "--all")
    assert code == 0
    assert "all 5 tensors are the same" in out
    assert "adam.first/a" in out
    assert run(capsys, "diff", first, second, "--only", "adam*")[0] == 0
    assert "no tensor's name matches" in run(capsys, "diff", first, second, "--only", "x*")[2]


def test_what_is_not_finite_is_compared_too(tmp_path):
    inf, nan = math.inf, math.nan
    first = torch.tensor([nan, inf, -inf, 1.0, nan, inf, 0.0])
    second = torch.tensor([nan, inf, -inf, 1.0, 2.0, -inf, -0.0])
    readers = [
        Reader(save(tmp_path / str(i), 1, entries({"w": values}), {})) for i, values in enumerate((first, second))
    ]
    (found,) = examine.compare(*readers, "*")
    assert (found.different, found.largest, found.relative) == (2, inf, inf)
    (found,) = examine.compare(readers[0], readers[0], "*")
    assert found.same


def test_neither_tensors_nor_files_are_whole_in_memory(tmp_path):
    reader = Reader(save(tmp_path, 1, entries({"w": torch.ones(3_000_000)}), {}))
    sizes = [part.numel() for part in examine._parts(reader, "w")]
    assert max(sizes) == 1000
    assert sum(sizes) == 3_000_000
    tracemalloc.start()
    assert reader.damage() == []
    assert tracemalloc.get_traced_memory()[1] < 3 * 2**20  # of a file of 12 MB
    tracemalloc.stop()


def test_damage_stops_an_inspection(tmp_path):
    path = save(tmp_path, 1, entries(make()), {})
    file = path / "rank-00000.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 4
    file.write_bytes(raw)
    reader = Reader(path)
    with pytest.raises(CheckpointError, match=r"rank-00000\.safetensors: bytes 0 to .* are damaged"):
        list(examine.contents(reader, list(reader.tensors)))
