"""``megapoly bench generate``: rows from made-up turns by hand, and a small run of the whole command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megapoly.bench import generate
from megapoly.cli import main
from megapoly.errors import ConfigError, TrainingError

pytest.importorskip("transformers", reason="the peer")


def test_rows_from_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    turns = [
        generate.Turn(2, (0.5, 1.0), (3.0, 6.0), 8e9, 4e9, 2e9, 1e9, 1.0),
        generate.Turn(2, (0.25, 0.75), (1.0, 1.5), 8e9, 4e9, 2e9, 1e9, 0.5),
    ]
    monkeypatch.setattr(generate, "_run", lambda options, folder, progress: turns)
    prefill, decode = generate.measure(generate.Options(prompt=10, tokens=4, batches=(2,)))
    assert (prefill["name"], decode["name"]) == ("prefill, batch 2", "decode, batch 2")
    assert prefill["spread"] == [20 / 0.5, 20 / 0.25]
    assert prefill["peer_value"] == (20 / 1.0 + 20 / 0.75) / 2
    assert prefill["limit"] == 20 * 4e9 / 1e9
    assert decode["spread"] == [6 / 3.0, 6 / 1.0]
    assert decode["limit"] == 2 * 8e9 / 2e9
    assert decode["share_of_limit"] == 4.0 / 8
    assert decode["ratio_spread"] == [pytest.approx(1.5), pytest.approx(2.0)]
    assert decode["same_texts"] == 0.5


def test_a_small_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = (
        "--layers 1 --hidden 16 --heads 2 --groups 1 --vocabulary 61 --prompt 6 --tokens 4 --batches 1,3 --threads 1"
    )
    with pytest.raises(SystemExit, match="0"):
        main(
            [
                "bench",
                "generate",
                *sizes.split(),
                "--threads",
                "1",
                "--repeats",
                "1",
                "--json",
                str(tmp_path / "rows.json"),
            ]
        )
    document = json.loads((tmp_path / "rows.json").read_text())
    rows = {row["name"]: row for row in document["rows"]}
    assert list(rows) == ["prefill, batch 1", "decode, batch 1", "prefill, batch 3", "decode, batch 3"]
    for row in rows.values():
        assert row["same_texts"] == 1
        assert row["ratio"] == pytest.approx(row["value"] / row["peer_value"])
    assert "decode, batch 3: " in capsys.readouterr().out
    assert "| decode, batch 1 |" in generate.markdown(document)


def test_errors(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="--tokens 1 leaves no step"):
        generate.measure(generate.Options(tokens=1))
    with pytest.raises(SystemExit, match="1"):
        main(["bench", "generate", "--batches", "1,x"])
    assert "--batches '1,x': expected numbers" in capsys.readouterr().err
    monkeypatch.setattr(generate, "PROGRAM", "megapoly.bench.no_such_program")
    with pytest.raises(TrainingError, match=r"process failed: .*No module named megapoly\.bench\.no_such_program"):
        generate.measure(generate.Options())
    monkeypatch.setattr(generate, "version", lambda name: None)
    with pytest.raises(ConfigError, match="which is not installed"):
        generate.measure(generate.Options())
