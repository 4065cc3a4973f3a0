"""What is made of a server's responses, what is sent to it, and the limits."""

from __future__ import annotations

import json
import random
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megapoly.errors import ConfigError, DataError
from megapoly.instruct.config import Budget
from megapoly.instruct.endpoint import read_answer, retry_after
from megapoly.instruct.journal import Journal, Key
from megapoly.instruct.limits import Account, Pace, reserve
from megapoly.instruct.model import Answer, Fault, Tokens
from megapoly.instruct.report import read_folder
from tests.instruct import runs, server
from tests.instruct.runs import NEEDED, ROWS, go


def reply(**choice: Any) -> bytes:
    return json.dumps({"choices": [choice], "usage": {"prompt_tokens": 3, "completion_tokens": 4}}).encode()


def test_answers_of_both_apis() -> None:
    chat = reply(message={"role": "assistant", "content": "a"}, finish_reason="stop")
    assert read_answer(chat) == Answer("a", "stop", Tokens(3, 4))
    assert read_answer(reply(text="a", finish_reason="length")) == Answer("a", "length", Tokens(3, 4))
    assert read_answer(b'{"choices": [{"text": "a"}], "usage": {"prompt_tokens": true}}') == Answer("a", None, None)
    assert read_answer(b'{"choices": [{"text": "\\ud800!"}]}') == Answer("?!", None, None)
    filtered = reply(message={"content": None}, finish_reason="content_filter")
    assert read_answer(filtered) == Answer("", "content_filter", Tokens(3, 4))
    assert [Answer("", finish, None).cut for finish in ("stop", "eod", "length", None)] == [False, False, True, True]


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b"", "malformed"),
        (b'{"choices": [{"text": "a"', "malformed"),
        (b"[" * 100_000, "malformed"),
        (b"\xff", "malformed"),
        (b"[]", "no choices"),
        (b"{}", "no choices"),
        (b'{"choices": []}', "no choices"),
        (b'{"choices": ["a"]}', "no choices"),
        (b'{"choices": [{"message": {"content": null}, "finish_reason": "stop"}]}', "no text"),
        (b'{"choices": [{"text": 3}]}', "no text"),
        (b'{"choices": [{"text": "a", "finish_reason": 3}]}', "no text"),
    ],
)
def test_what_is_no_answer_may_have_been_paid_for(body: bytes, kind: str) -> None:
    found = read_answer(body)
    assert isinstance(found, Fault)
    assert (found.kind, found.billed, found.fatal) == (kind, True, False)


def test_retry_after_in_its_forms() -> None:
    assert retry_after({"retry-after": "3"}, 0) == 3
    assert retry_after({"retry-after": "9", "retry-after-ms": "250"}, 0) == 0.25
    assert retry_after({"retry-after": "Thu, 01 Jan 1970 00:01:40 GMT"}, 40.0) == 60
    assert retry_after({"retry-after": "Thu, 01 Jan 1970 00:00:00 GMT"}, 40.0) == 0
    assert retry_after({"retry-after": "1e9"}, 0) == 600
    assert retry_after({"retry-after": "soon"}, 0) is None
    assert retry_after({"retry-after": "nan"}, 0) is None
    assert retry_after({}, 0) is None


def test_what_is_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["endpoint.key_variable=MY_KEY", "endpoint.extra={presence_penalty=0.5}", "endpoint.temperature=0.3"]
    sets = [part for option in options for part in ("--set", option)]
    with server.Endpoint(ROWS) as endpoint:
        path = runs.write(tmp_path, endpoint.url)
        monkeypatch.delenv("MY_KEY", raising=False)
        assert go(path, *sets) == 1
        assert "the environment variable MY_KEY is not set" in capsys.readouterr().err
        monkeypatch.setenv("MY_KEY", "secret-7")
        assert go(path, *sets) == 0
    assert endpoint.keys == {"Bearer secret-7"}
    expected = {"model": "fake", "temperature": 0.3, "top_p": 1.0, "presence_penalty": 0.5, "max_tokens": 600}
    assert all({key: body[key] for key in expected} == expected for body in endpoint.bodies)
    assert not any(b"secret-7" in file.read_bytes() for file in (tmp_path / "run").iterdir())


def test_a_model_that_goes_on_from_its_prompt(tmp_path: Path) -> None:
    with server.Endpoint(ROWS) as endpoint:
        path = runs.write(tmp_path, endpoint.url)
        assert go(path, "--set", "endpoint.api=completions") == 0
    assert len(runs.journal(tmp_path / "run").answers) == endpoint.total == NEEDED
    assert {body["prompt"].rsplit("\n", 1)[1] for body in endpoint.bodies} == {"1. Instruction:", "4. Instruction:"}
    assert len(runs.rows(tmp_path / "run/tasks.es.jsonl")) > 20


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (401, {"error": {"message": "wrong key"}}, "the model refuses: HTTP 401: wrong key"),
        (404, {"error": {"message": "no model"}}, "the model refuses: HTTP 404: no model"),
        (429, {"error": {"message": "pay", "code": "insufficient_quota"}}, "the model refuses: HTTP 429: pay"),
        (500, {"error": {"message": "x"}}, "failed 3 times, at last: HTTP 500: x"),
    ],
)
def test_what_ends_a_run(
    tmp_path: Path, status: int, body: Any, message: str, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    with server.Endpoint(ROWS) as endpoint:
        path = runs.write(tmp_path, endpoint.url)
        with monkeypatch.context() as patch:
            refusal = json.dumps(body).encode()
            patch.setattr(endpoint, "_answer", lambda handler, *_: server.send(handler, status, refusal))
            assert go(path, "--set", "endpoint.retries=2") == 1
        assert message in capsys.readouterr().err
        asked = endpoint.total
        assert 0 < asked <= 4 * 3
        assert go(path) == 0
        assert endpoint.total == asked + NEEDED


def test_a_prompt_that_is_too_long_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with server.Endpoint(ROWS) as endpoint:
        path, answer = runs.write(tmp_path, endpoint.url), endpoint._answer
        error = b'{"error": {"message": "too long", "code": "context_length_exceeded"}}'

        def refuse(handler: Any, body: Any, prompt: str, attempt: int) -> None:
            if "write tasks" in prompt and random.Random(prompt).random() < 0.3:
                server.send(handler, 400, error)
            else:
                answer(handler, body, prompt, attempt)

        monkeypatch.setattr(endpoint, "_answer", refuse)
        assert go(path) == 0
    assert endpoint.total == NEEDED
    reasons = [row["reason"] for row in runs.rows(tmp_path / "run/dropped.es.jsonl")]
    assert 0 < reasons.count("refused prompts") < runs.REQUESTS


def test_a_refused_translation_is_not_asked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with server.Endpoint(ROWS) as endpoint:
        path, answer = runs.write(tmp_path, endpoint.url), endpoint._answer
        seeds, refused = [row["instruction"] for row in runs.rows(tmp_path / "seeds.jsonl")], [1]

        def refuse(handler: Any, body: Any, prompt: str, attempt: int) -> None:
            if "Translate" in prompt and any(seeds[i] in prompt for i in refused):
                message = {"message": f"{len(prompt)} tokens, too long", "code": "context_length_exceeded"}
                server.send(handler, 400, json.dumps({"error": message}).encode())
            else:
                answer(handler, body, prompt, attempt)

        monkeypatch.setattr(endpoint, "_answer", refuse)
        assert go(path) == 0
        assert endpoint.total == NEEDED
        out = capsys.readouterr().out
        assert "es: refused, mostly: HTTP 400: " in out
        assert "translations  refused" in out
        assert len(runs.rows(tmp_path / "run/seeds.es.jsonl")) == runs.SEEDS - 2
        refused[:] = range(runs.SEEDS)
        assert go(path, "--set", "directory=other") == 1
        assert endpoint.total == NEEDED + runs.SEEDS - 1
        error = " ".join(capsys.readouterr().err.split())
        assert "0 of 7 seeds are there in Spanish" in error
        assert "(the model refused 7 of 7 prompts, mostly: HTTP 400: " in error
    (row,) = [each.row() for each in read_folder(tmp_path / "run")[1]]
    assert row["refused"] == 1
    assert "tokens, too long" in row["refusal"]


def test_a_server_that_is_not_there_costs_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with server.Endpoint(ROWS) as endpoint:
        path = runs.write(tmp_path, endpoint.url)
    assert go(path, "--set", "endpoint.retries=1") == 1
    assert "Connection refused" in capsys.readouterr().err
    assert runs.journal(tmp_path / "run").spent == Tokens()


class _Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_no_minute_has_more_requests_or_tokens_than_it_may() -> None:
    clock, pick = _Clock(), random.Random(0)
    pace = Pace(5, 1000, clock)
    asked: list[tuple[float, int]] = []
    for i in range(300):
        tokens = pick.randrange(1, 700)
        if i == 150:
            pace.pause(100)
            paused = clock.now + 100
        while (delay := pace.delay(tokens)) > 0:
            clock.now += delay
        if i == 150:
            assert clock.now >= paused
        pace.note(tokens)
        asked.append((clock.now, tokens))
        clock.now += pick.random() * 5
    for begin, _ in asked:
        minute = [tokens for at, tokens in asked if begin <= at < begin + 60 - 1e-6]
        assert len(minute) <= 5
        assert sum(minute) <= 1000
    # And no slower than it has to be: each waits for a minute that is full without it.
    for (before, _), (at, tokens) in pairwise(asked):
        if at - before > 5 and at != paused:
            last = [each for moment, each in asked if at - 60 - 1e-6 <= moment < at]
            assert len(last) >= 5 or sum(last) + tokens > 1000


def test_a_request_larger_than_a_minute_goes_alone() -> None:
    clock = _Clock()
    pace = Pace(None, 100, clock)
    assert pace.delay(500) == 0
    pace.note(500)
    assert pace.delay(1) == 60


def test_a_reserve_bounds_whatever_a_request_can_cost() -> None:
    pick = random.Random(0)
    for _ in range(300):
        budget = Budget(prompt_price=pick.choice((0, 1, 3)), completion_price=pick.choice((0, 1, 3)))
        context = pick.choice((None, 100, 500))
        limit = pick.choice((50, 90)) if context is None or pick.random() < 0.5 else None
        prompt = "é" * pick.randrange(200)
        held = reserve(prompt, SimpleNamespace(limit=limit, context=context), budget)
        for _ in range(20):
            used = pick.randrange(min(2 * len(prompt) + 64, context or 10**9) + 1)
            answer = pick.randrange(min(limit or 10**9, (context or 10**9) - used) + 1)
            assert used + answer <= held.total
            assert budget.cost(used, answer) <= budget.cost(*held)


def test_a_budget_holds_back_what_is_under_way() -> None:
    account = Account(Budget(tokens=100), Tokens(10, 10))
    assert account.allows(Tokens(40, 40))
    account.hold(Tokens(40, 40))
    assert not account.allows(Tokens(1, 0))
    account.settle(Tokens(40, 40), Tokens(5, 5))
    assert account.allows(Tokens(70, 0))
    assert not account.allows(Tokens(71, 0))


def test_a_journal_of_other_settings_or_damaged_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "requests.es.jsonl"
    journal = Journal(path, {"seed": 1})
    ticket = journal.ask(Key(1, 0), "hash", Tokens(3, 4))
    journal.settle(ticket, Answer("a\n\u2028b", "stop", None))
    journal.close()
    found = Journal(path, None)
    assert found.answers == {Key(1, 0): Answer("a\n\u2028b", "stop", None)}
    assert found.used == Tokens(3, 4)  # the model did not say
    with pytest.raises(ConfigError, match="begun with seed 1, now 2"):
        Journal(path, {"seed": 2})
    lines = path.read_bytes().splitlines(keepends=True)
    for bad in (lines[2].replace(b"answer", b"anwser"), b"nothing\n", b"[]\n", lines[1], lines[2] + lines[2]):
        path.write_bytes(b"".join(lines[:2]) + bad)
        with pytest.raises(DataError, match=r"requests.es.jsonl, line \d: is damaged"):
            Journal(path, None)
