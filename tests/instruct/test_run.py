"""Whole runs against an endpoint with faults: nothing is lost, nothing twice, and no request more than is needed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megapoly.instruct.tasks import Task
from tests.instruct import runs
from tests.instruct.runs import NEEDED, ROWS, go
from tests.instruct.server import FAULTS, Endpoint


def test_what_is_made(undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    for name, content in undisturbed.items():
        (tmp_path / name).write_bytes(content)
    kept, dropped = runs.rows(tmp_path / "tasks.es.jsonl"), runs.rows(tmp_path / "dropped.es.jsonl")
    assert all(set(row) == {"instruction", "input", "output"} for row in kept)
    assert {row["reason"] for row in dropped} >= {"similar", "repeated input", "cut off"}
    assert all(row["like"] for row in dropped if row["reason"] == "similar")
    seeds = runs.rows(tmp_path / "seeds.es.jsonl")
    assert [row["id"] for row in seeds] == ["seed_0", "seed_1", "seed_2", *(f"seed_{i}" for i in range(4, 8))]
    assert all(row["instruction"].startswith("§") for row in seeds)


def test_faults_cost_no_task_and_no_request_too_many(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    with Endpoint(ROWS, 0.4) as endpoint:
        path = runs.write(tmp_path, endpoint.url)
        assert go(path, *runs.SHORT) == 0
    assert runs.files(tmp_path / "run") == undisturbed
    found = runs.journal(tmp_path / "run")
    assert len(found.answers) == len(endpoint.received) == NEEDED
    faults = sum(found.faults.values())
    assert endpoint.total == NEEDED + faults  # each fault was asked again, once
    for kind in ("429", "500", "malformed", "no choices"):  # on a busy machine one more may time out
        assert found.faults[kind] <= endpoint.faults[kind]
    assert faults >= endpoint.faults.total() - endpoint.faults["cut"] - endpoint.faults["no usage"]
    assert set(found.faults) >= {"429", "500", "malformed", "no choices", "connection", "time-out"}
    assert set(endpoint.faults) == {*FAULTS, "cut"}
    assert found.spent.total >= endpoint.billed
    assert 1 < endpoint.most <= 4


def test_a_second_run_asks_nothing_and_writes_the_same(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    with Endpoint(ROWS) as endpoint:
        path = runs.write(tmp_path, endpoint.url)
        assert go(path, "--set", "rounds.count=2") == 0
        some = endpoint.total
        for name in runs.files(tmp_path / "run"):
            (tmp_path / "run" / name).unlink()
        assert go(path) == 0
        assert endpoint.total == NEEDED > some
        assert go(path) == 0
        assert endpoint.total == NEEDED
    assert runs.files(tmp_path / "run") == undisturbed


@pytest.mark.parametrize("unit", ["tokens", "money"])
def test_the_budget_is_never_exceeded_and_a_higher_one_goes_on(
    tmp_path: Path, undisturbed: dict[str, bytes], unit: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """By what the endpoint bills, for answers that never arrived too."""
    prices = "[budget]\nprompt_price = 10.0\ncompletion_price = 10.0\n"
    with Endpoint(ROWS, 0.4) as endpoint:
        path = runs.write(tmp_path, endpoint.url, more=prices)
        for cap in (5_000, 12_000, 20_000):
            value = str(cap) if unit == "tokens" else str(cap * 10 / 1e6)
            assert go(path, *runs.SHORT, "--set", f"budget.{unit}={value}") == 1
            assert "The budget does not allow another request" in capsys.readouterr().out
            assert endpoint.billed <= runs.journal(tmp_path / "run").spent.total <= cap
            before = endpoint.total
        assert go(path, *runs.SHORT) == 0
        assert endpoint.total > before > 0
    assert runs.files(tmp_path / "run") == undisturbed


def test_languages_share_the_budget_and_nothing_else(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    with Endpoint(ROWS) as endpoint:
        path = runs.write(tmp_path, endpoint.url, '"th", "en", "es"')
        assert go(path, "--language", "es") == 0
        assert runs.files(tmp_path / "run") == undisturbed
        spent = runs.journal(tmp_path / "run").spent.total
        assert go(path, "--set", f"budget.tokens={spent + 1000}") == 1
        assert not (tmp_path / "run/tasks.th.jsonl").exists()
        assert go(path) == 0
    made = runs.files(tmp_path / "run")
    assert {name: made[name] for name in undisturbed} == undisturbed
    assert "requests.th.jsonl" in os.listdir(tmp_path / "run")
    assert len(runs.journal(tmp_path / "run", "en").answers) == runs.REQUESTS  # its seeds need no translation
    assert [row["id"] for row in runs.rows(tmp_path / "run/seeds.en.jsonl")][:4] == [f"seed_{i}" for i in (0, 1, 2, 4)]


def test_an_input_that_the_instruction_holds_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Korean's threshold of 0.3 would drop it, as it does an input that is like the instruction without being in it."""
    answer = Task("Sort 3, 1, 2 now", "3, 1, 2", "1, 2, 3").block(4) + "\n" + Task("Add 7, 8", "8, 7", "15").block(5)
    with Endpoint(ROWS, cut=0) as endpoint:
        path, text = runs.write(tmp_path, endpoint.url, '"ko"'), endpoint.text
        monkeypatch.setattr(endpoint, "text", lambda prompt: text(prompt) if "Translate" in prompt else answer)
        assert go(path, "--set", "rounds.count=1", "--set", "rounds.first=1") == 0
    made = runs.rows(tmp_path / "run/tasks.ko.jsonl")
    assert made == [{"instruction": "Sort 3, 1, 2 now", "input": "", "output": "1, 2, 3"}]
    assert [row["reason"] for row in runs.rows(tmp_path / "run/dropped.ko.jsonl")] == ["repeated input"]
