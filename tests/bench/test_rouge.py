"""megapoly bench rouge, in small."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megapoly.cli import main
from tests.instruct.server import bank

pytest.importorskip("rouge_score")


def test_the_filter_is_measured_beside_rouge_score(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = bank(60)
    path = tmp_path / "es.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--tasks", "100", "--repeats", "1", "--json", str(tmp_path / "rouge.json")]
    with pytest.raises(SystemExit, match="0"):
        main(["bench", "rouge", f"es={path}", *options])
    assert "Mpairs/s" in capsys.readouterr().out
    (row,) = json.loads((tmp_path / "rouge.json").read_text())["rows"]
    assert row["number"] == 100
    assert 30 < row["kept"] < 100
    assert row["pairs"] < 100 * 100
    assert row["ratio"] == pytest.approx(row["value"] / row["peer_value"])
