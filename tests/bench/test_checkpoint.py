"""``megapoly bench checkpoint`` on a small state: every turn runs, checks what it loaded, and becomes a row."""

import json

import pytest

from megapoly.bench import checkpoint
from megapoly.cli import main
from megapoly.errors import ConfigError, TrainingError


def test_rows_of_a_small_state(tmp_path, capsys):
    sizes = ["--megabytes", "4", "--ranks", "1", "--repeats", "1"]
    with pytest.raises(SystemExit, match="0"):
        main(["bench", "checkpoint", *sizes, "--folder", str(tmp_path), "--json", str(tmp_path / "rows.json")])
    document = json.loads((tmp_path / "rows.json").read_text())
    rows = {row["name"]: row for row in document["rows"]}
    assert list(rows) == ["save", "async_stall", "load_rows", "load_columns", "load_cold", "convert"]
    for row in rows.values():
        assert 3.5 < row["megabytes"] <= 4
        better = row["peer_value"] / row["value"] if row["unit"] == "ms" else row["value"] / row["peer_value"]
        assert row["ratio"] == pytest.approx(better)
    assert rows["save"]["wanted"] == pytest.approx(0.9 * rows["save"]["limit"])
    assert rows["convert"]["wanted"] == pytest.approx(0.8 * rows["convert"]["limit"])
    assert rows["load_rows"]["wanted"] == rows["load_rows"]["peer_value"]
    assert "folder" not in document["settings"]
    out = capsys.readouterr().out
    assert "load_columns: 2 ranks" in out
    assert [path.name for path in tmp_path.iterdir()] == ["rows.json"]
    assert "| save | MB/s |" in checkpoint.markdown(document)


def test_too_small_a_state_and_a_rank_that_fails(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="--megabytes 0 is too little for 16 matrices"):
        checkpoint.measure(checkpoint.Options(megabytes=0))
    monkeypatch.setattr(checkpoint, "PROGRAM", "megapoly.bench.no_such_program")
    with pytest.raises(TrainingError, match=r"a rank failed: .*No module named megapoly\.bench\.no_such_program"):
        checkpoint.measure(checkpoint.Options(megabytes=4, folder=tmp_path))
