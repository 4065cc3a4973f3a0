"""``megapoly bench evaluate``: rows from made-up turns by hand, and a small run of the whole command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megapoly.bench import evaluate
from megapoly.cli import main
from megapoly.errors import ConfigError
from tests.evaluate import benchmark


def test_rows_from_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    turns = [evaluate.Turn("xnli", 10, (2.0, 4.0), 1e-5), evaluate.Turn("xnli", 10, (1.0, 5.0), 2e-5)]
    monkeypatch.setattr(evaluate, "_run", lambda options, folder, progress: turns)
    monkeypatch.setattr(evaluate, "version", lambda name: "1")
    (row,) = evaluate.measure(evaluate.Options("folder", tasks=("xnli",)))
    assert (row["value"], row["peer_value"]) == (7.5, (2.5 + 2.0) / 2)
    assert row["ratio_spread"] == [2, 5]
    assert (row["records"], row["apart"]) == (10, 2e-5)
    monkeypatch.setattr(evaluate, "version", lambda name: None)
    with pytest.raises(ConfigError, match="which needs lm_eval: pip install lm_eval"):
        evaluate.measure(evaluate.Options("folder"))


def test_a_small_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("lm_eval", "transformers", "accelerate"):
        pytest.importorskip(name, reason="the peer")
    folder = benchmark.make(tmp_path / "data")
    sizes = "--tasks xcopa,wmt20 --limit 2 --layers 1 --hidden 16 --heads 2 --groups 1 --vocabulary 400 --tokens 4"
    sizes += " --positions 512 --threads 1 --repeats 1"
    with pytest.raises(SystemExit, match="0"):
        main(["bench", "evaluate", "--data", str(folder), *sizes.split(), "--json", str(tmp_path / "rows.json")])
    document = json.loads((tmp_path / "rows.json").read_text())
    assert [row["name"] for row in document["rows"]] == ["xcopa", "wmt20"]
    for row in document["rows"]:
        assert row["apart"] < 1e-3
        assert row["ratio"] == pytest.approx(row["value"] / row["peer_value"])
    assert "| xcopa |" in evaluate.markdown(document)
    assert "xcopa" in capsys.readouterr().out
