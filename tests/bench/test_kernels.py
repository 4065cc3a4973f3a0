"""``bench kernels``: small runs of the whole command, and how it finds and ends the benchmarks."""

from __future__ import annotations

import importlib.util
import json
from importlib.machinery import ModuleSpec
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from megapoly.bench import kernels, report
from megapoly.cli import main
from megapoly.errors import ConfigError, TrainingError

EMPTY = dict.fromkeys(("share_of_limit", "shape", "peer", "peer_value", "ratio", "extra_bytes", "peer_extra_bytes"))


def test_the_command_gives_rows_pages_and_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows, folder, picture = tmp_path / "rows.json", tmp_path / "results", tmp_path / "all.png"
    options = ["--quick", "--device=cpu", "--threads=1", f"--json={rows}", f"--save={folder}", f"--picture={picture}"]
    with pytest.raises(SystemExit, match="0"):
        main(["bench", "kernels", "rotary", "cross_entropy", *options])
    document = json.loads(rows.read_text())
    measured = document["rows"][2:]
    assert [(row["name"], row["op"], row["peer"]) for row in measured] == [
        ("rotary forward", "rotary", "eager"), ("rotary backward", "rotary", "eager"),
        ("rotary in place", "rotary", None),
        ("cross-entropy forward", "cross_entropy", "eager"), ("cross-entropy backward", "cross_entropy", "eager"),
    ]  # fmt: skip
    forward, backward = measured[3:]
    # Eager keeps the log-probabilities, and its backward pass makes gradients of two such sizes.
    assert backward["peer_extra_bytes"] > 0
    assert backward["extra_bytes"] < backward["peer_extra_bytes"]
    assert forward["peak_bytes"] >= forward["extra_bytes"] > 0
    assert document["settings"]["ops"] == "rotary cross_entropy"
    assert document["device"] == report.cpu_name()
    pages = sorted(path.name for path in folder.iterdir())
    stem = next(name.removesuffix(".md") for name in pages if name.endswith(".md"))
    assert pages == sorted(f"{stem}{end}" for end in (".json", ".md", "-rotary.svg", "-cross-entropy.svg"))
    page = (folder / f"{stem}.md").read_text()
    assert "| rotary in place | PolyLM-1.7B: 16 x 1 x 16 x 3 x 128 | float32 |" in page
    assert page.count("No GPU was used") == 1
    assert ElementTree.parse(folder / f"{stem}-rotary.svg").getroot().tag.endswith("svg")
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "cross-entropy backward" in capsys.readouterr().out


def test_a_folder_gets_a_picture_for_each_op(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["bench", "kernels", "rotary", "--quick", "--device=cpu", f"--picture={tmp_path / 'pictures'}"])
    assert [path.name for path in (tmp_path / "pictures").iterdir()] == ["rotary.svg"]


def test_what_cannot_be_measured_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for options, says in (
        (["norms"], "bench kernels norms: unknown; the known ones are activation, adamw"),
        (["norm", "--picture=a.gif"], "a picture is one of .svg"),
        (["norm", "--device=tpu"], "argument --device: invalid choice: 'tpu'"),
        *([] if torch.cuda.is_available() else [(["norm", "--device=cuda"], "torch finds no GPU on this machine")]),
    ):
        with pytest.raises(SystemExit, match="1"):
            main(["bench", "kernels", *options])
        assert says in capsys.readouterr().err


def test_a_limit_of_time_keeps_the_rows_that_are_there() -> None:
    rows = list(kernels.measure(kernels.Options(("rotary",), quick=True, device="cpu", seconds=0)))
    assert [row["name"] for row in rows] == ["copy"]


@pytest.fixture
def benchmarks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of an installed wheel, empty."""
    origin = tmp_path / "site" / "megapoly_kernels" / "__init__.py"
    spec = ModuleSpec("megapoly_kernels", None, origin=str(origin))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    place = origin.parent / "bench"
    place.mkdir(parents=True)
    return place


def test_benchmarks_are_found_in_a_wheel_or_missed(benchmarks: Path) -> None:
    with pytest.raises(ConfigError, match=r"bench kernels: no run\.py in .*site/bench or .*expected .*take a checkout"):
        kernels.folder()
    (benchmarks / "run.py").write_text("")
    assert kernels.folder() == benchmarks


def test_a_benchmark_that_ends_with_an_error_says_why(benchmarks: Path) -> None:
    row = {"name": "copy", "device": "CPU"}
    (benchmarks / "run.py").write_text(f"print({json.dumps(row)!r}, flush=True)\nraise MemoryError('no more')\n")
    found = []
    with pytest.raises(TrainingError, match=r"(?s)bench kernels ended with status 1:.*MemoryError: no more"):
        found.extend(kernels.measure(kernels.Options()))
    assert found == [row]
    assert next(kernels.measure(kernels.Options())) == row


def test_a_peer_that_fails_is_told() -> None:
    first = {**EMPTY, "name": "copy", "value": 20.0, "unit": "GB/s", "dtype": "float32", "device": "NVIDIA H200"}
    failed = {
        **EMPTY,
        "name": "norm",
        "value": 250.4,
        "unit": "GB/s",
        "dtype": "bfloat16",
        "peer": "liger",
        "note": "no",
    }
    assert kernels.cells(failed)[:8] == ("norm", "", "bfloat16", "250 GB/s", "", "liger", "failed", "")
    document = report.make_report([first, {**failed, "shape": "2 x 3"}], "NVIDIA H200", {})
    lines = kernels.notes(document)
    assert lines[-1] == "norm, 2 x 3, liger: no"
    assert not any("No GPU" in line for line in lines)
