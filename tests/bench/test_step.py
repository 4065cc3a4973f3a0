"""``bench step``: rows from made-up turns against arithmetic by hand, and small runs of the whole command."""

from __future__ import annotations

import json

import pytest

from megapoly.bench import report, step
from megapoly.bench.process import Contender, Turn
from megapoly.bench.race import Entry, Peer, Result
from megapoly.bench.task import Task
from megapoly.cli import main
from megapoly.errors import ConfigError, TrainingError
from megapoly.models.cost import flops_per_token

TINY = step.Options(layers=2, hidden=16, heads=2, sequence=8, vocabulary=31, micro_batch=4, repeats=1)
TINY_OPTIONS = [
    "--layers=2",
    "--hidden=16",
    "--heads=2",
    "--sequence=8",
    "--vocabulary=31",
    "--micro-batch=4",
    "--repeats=1",
]


def fake_race(seconds, missing=None):
    """Contenders that take the given seconds for their turns, or are missing."""

    def race(entries: dict[str, Entry], *, steps, repeats, progress):
        results = {}
        for name, entry in entries.items():
            results[name] = Result(entry, steps, parameters=7, flops=4e9)
            key = (name, entry.config.train.global_batch, entry.config.layout.micro_batch)
            results[name].turns = [Turn(s, 2 * s, 1.0) for s in seconds.get(key, seconds.get(name, []))]
            results[name].missing = (missing or {}).get(name, "")
        return results

    return race


def test_rows_from_turns(monkeypatch):
    tokens = 4 * 8  # of a global batch of one micro-batch
    seconds = {
        "matmul": [2.0, 1.0, 4.0], "matmul oneDNN": [0.5],
        ("megapoly", 4, 4): [2.0, 4.0, 1.0], "transformers": [4.0, 4.0, 4.0],
        ("megapoly", 8, 4): [2.0], "dp2": [2.5], "tp2": [4.0], ("megapoly", 8, 1): [3.0], "pp2": [4.0],
    }  # fmt: skip
    monkeypatch.setattr(step, "race", fake_race(seconds, {"megatron": "not installed: x"}))
    rows, gpu = step.measure(TINY, ["transformers", "megatron"], ["dp2", "tp2", "pp2"])
    assert gpu == ""
    assert [(row["name"], row.get("peer")) for row in rows] == [
        ("matmul", None), ("matmul oneDNN", None), ("megapoly", "transformers"), ("megapoly", "megatron"),
        ("dp2", "megapoly"), ("tp2", "megapoly"), ("pp2", "megapoly"), ("pp2 less bubble", "megapoly"),
    ]  # fmt: skip
    matmul, onednn, own, absent, dp, tp, pp, pp_out = rows
    assert (matmul["value"], matmul["unit"], matmul["spread"]) == (2.0, "GFLOP/s", [1.0, 4.0])
    limit = 8e9 / flops_per_token(TINY.config(4, 4).model, 8)
    assert (matmul["tokens_per_second"], onednn["tokens_per_second"]) == (limit / 4, limit)
    assert (own["value"], own["spread"], own["limit"]) == (tokens / 2, [tokens / 4, tokens], limit)
    assert own["share_of_limit"] == tokens / 2 / limit
    assert (own["peer_value"], own["ratio"], own["ratio_spread"]) == (tokens / 4, 2.0, [1.0, 4.0])
    assert (absent["value"], absent["peer_value"], absent["ratio"]) == (tokens / 2, None, None)
    assert absent["note"] == "not installed: x"
    assert (dp["value"], dp["ratio"]) == (2 * tokens / 2.5, 2.0 / 2.5)
    assert (dp["ranks"], dp["threads"], dp["global_batch"], dp["micro_batch"]) == (2, 1, 8, 4)
    assert (tp["ratio"], pp["ratio"], pp["micro_batch"]) == (0.5, 0.75, 1)
    # (p - 1) / (m + p - 1) for p = 2 stages and m = 8 micro-batches
    assert pp_out["bubble"] == pytest.approx(1 / 9)
    assert pp_out["ratio"] == pytest.approx(0.75 * 9 / 8)
    assert pp_out["value"] == pytest.approx(pp["value"] * 9 / 8)
    page = report.markdown(report.make_report(rows, "a processor, 2 cores", {"steps": 1}))
    assert "| megapoly | 16 ±75% |" in page
    assert "| transformers | 8 | 2.00 | 1.00-4.00 |" in page
    assert "megapoly, megatron: not installed: x" in page
    assert "busy" not in page


def test_a_busy_machine_is_told(monkeypatch):
    monkeypatch.setattr(step, "race", fake_race({"matmul": [1.0], "megapoly": [1.0]}))
    rows, _ = step.measure(TINY, [], [])
    assert (rows[0]["processor_share"], rows[1]["name"], rows[1]["peer"]) == (1.0, "megapoly", None)
    rows[0]["processor_share"] = 0.6
    assert any("busy" in line for line in report.notes(report.make_report(rows, "x", {})))


@pytest.mark.parametrize(
    ("name", "layout", "batch"),
    [("dp2", (2, 1, 1), (8, 4)), ("tp2", (1, 2, 1), (8, 4)), ("pp2", (1, 1, 2), (8, 1)), ("dp16", (16, 1, 1), (64, 4))],
)
def test_the_work_of_a_layout(name, layout, batch):
    config = step.layout_config(TINY, name)
    assert (config.mesh.dp, config.mesh.tp, config.mesh.pp) == layout
    assert (config.train.global_batch, config.layout.micro_batch) == batch


@pytest.mark.parametrize(
    ("options", "against", "layouts", "says"),
    [
        (TINY, ["nanotron"], [], "--against nanotron: unknown; the known ones are transformers, megatron"),
        (TINY, [], ["dp1"], "--layouts dp1: expected dp, tp or pp"),
        (TINY, [], ["dp02"], "--layouts dp02: expected"),
        (TINY, [], ["ep2"], "--layouts ep2: expected"),
        (TINY, [], ["tp3"], "choose layout.tp from"),
        (step.Options(device="tpu"), [], [], "--device tpu: unknown; the known ones are cpu, cuda"),
        (step.Options(hidden=30), [], [], "model.hidden 30 does not divide by model.heads 8"),
    ],
)
def test_what_cannot_be_measured_is_refused(options, against, layouts, says):
    with pytest.raises(ConfigError, match=says):
        step.measure(options, against, layouts)


@pytest.mark.long
def test_the_command_gives_every_row(tmp_path, capsys):
    path, folder = tmp_path / "rows.json", tmp_path / "results"
    with pytest.raises(SystemExit, match="0"):
        main(["bench", "step", *TINY_OPTIONS, "--json", str(path), "--save", str(folder)])
    document = json.loads(path.read_text())
    names = ["matmul", "matmul oneDNN", "megapoly", "megapoly", "dp2", "tp2", "pp2", "pp2 less bubble"]
    assert [row["name"] for row in document["rows"]] == names
    assert document["versions"]["torch"]
    assert document["settings"]["sequence"] == 8
    for row in document["rows"]:
        assert row["value"] > 0
        if "peer" in row and not row.get("note", "").startswith("not installed"):
            assert row["ratio"] == pytest.approx(row["value"] / row["peer_value"])
    saved = sorted(file.suffix for file in folder.iterdir())
    assert saved == [".json", ".md"]
    out = capsys.readouterr().out
    assert all(name in out for name in (*names, "transformers", "GFLOP/s"))


def test_a_peer_that_is_absent_or_fails_leaves_a_note(monkeypatch):
    peers = {
        "absent": Peer("megapoly.bench.no_such", "no-such-distribution", "pip install it"),
        "broken": Peer("megapoly.bench.no_such", "torch", "pip install torch"),
    }
    monkeypatch.setattr(step, "PEERS", peers)
    rows, _ = step.measure(TINY, ["absent", "broken"], [])
    absent, broken = rows[-2:]
    assert absent["note"] == "not installed: pip install it"
    assert broken["note"].startswith("failed: ")
    assert "No module named megapoly.bench.no_such" in broken["note"]
    assert absent["value"] == broken["value"] > 0


def test_a_rank_that_dies_ends_the_benchmark_with_its_log(tmp_path):
    task = Task(step.layout_config(TINY, "dp2").document(), threads=1)
    with Contender("dp2", step.OWN, task, tmp_path) as contender:
        contender.processes[1].kill()
        with pytest.raises(TrainingError, match="dp2 ended before its measurement"):
            contender.ready()
        contender.processes[0].kill()  # it would wait for the other
    assert all(process.poll() is not None for process in contender.processes)
