"""What a user of ``megapoly instruct`` sees; a model of this machine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megapoly.cli import main
from megapoly.data.templates import TEMPLATES
from tests.generate import models
from tests.instruct import runs
from tests.instruct.runs import NEEDED, ROWS, go
from tests.instruct.server import Endpoint


def test_a_dry_run_shows_a_prompt_and_what_it_can_cost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prices = "[budget]\nprompt_price = 1.5\ncompletion_price = 2.0\nmoney = 3.0\n"
    with Endpoint(ROWS) as endpoint:
        path = runs.write(tmp_path, endpoint.url, '"es", "en"', prices)
        assert go(path, "--dry-run") == 0
        shown = capsys.readouterr().out
        assert go(path, "--dry-run", "--seeds-only") == 0
        assert capsys.readouterr().out.startswith("Translate the following task")
        assert endpoint.total == 0
        assert not (tmp_path / "run").exists()
        assert go(path) == 0
    assert shown.startswith("Make a list of 8 diverse tasks in Spanish")
    assert "write tasks 4 to 8" in shown
    table = [line.split() for line in shown.splitlines() if line.lstrip().startswith(("es ", "en "))]
    requests = NEEDED + runs.REQUESTS + 2 * (runs.SEEDS - 1)
    assert f"at most {requests} requests take at most" in shown
    assert go(path, "--dry-run", "--set", "endpoint={model='m', max_tokens=600}") == 0
    assert f"at most {requests} requests take about" in capsys.readouterr().out
    assert "the budget ends them at 3.00." in shown
    for row, journal in zip(table, (runs.journal(tmp_path / "run"), runs.journal(tmp_path / "run", "en"))):
        assert int(row[2]) // 3 + int(row[3]) == len(journal.answers)
        assert int(row[4].replace(",", "")) > journal.spent.total


def test_a_report_of_what_was_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Endpoint(ROWS) as endpoint:
        path = runs.write(tmp_path, endpoint.url, more="[budget]\ntokens = 1_000_000\n")
        assert go(path) == 0
    end = capsys.readouterr().out
    with pytest.raises(SystemExit, match="0"):
        main(["instruct", "report", str(tmp_path / "run"), "--json", str(tmp_path / "report.json")])
    assert capsys.readouterr().out == end
    row = json.loads((tmp_path / "report.json").read_text())[0]
    kept, dropped = (runs.rows(tmp_path / f"run/{kind}.es.jsonl") for kind in ("tasks", "dropped"))
    assert row["answered"] == row["requests"] == runs.REQUESTS
    assert row["translations"] == row["seeds"] == 7
    assert row["kept"] == len(kept)
    assert row["with_input"] == sum(bool(task["input"]) for task in kept)
    assert sum(row["dropped"].values()) == len(dropped)
    assert row["proposed"] == len(kept) + len(dropped)
    assert row["prompt_tokens"] + row["completion_tokens"] == endpoint.billed
    assert row["mean_words"]["output"] == sum(len(task["output"].split()) for task in kept) / len(kept)
    assert row["first_words"] == len({task["instruction"].split()[0] for task in kept})
    assert f"spent at most {endpoint.billed:,} of 1,000,000 tokens" in end


def test_a_report_of_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="1"):
        main(["instruct", "report", str(tmp_path)])
    assert "config.json: cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--language", "fr"), "--language fr: the config has es"),
        (("--set", 'leave_out=["seed_77"]'), "has no seed 'seed_77'"),
        (("--set", "seeds=none.jsonl"), "none.jsonl: cannot be read"),
    ],
)
def test_what_is_refused(
    tmp_path: Path, change: tuple[str, str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert go(runs.write(tmp_path, "http://127.0.0.1:9/v1"), *change) == 1
    assert message in capsys.readouterr().err


def test_other_settings_need_another_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Endpoint(ROWS) as endpoint:
        path = runs.write(tmp_path, endpoint.url)
        assert go(path, "--seeds-only") == 0
        for change, what in (("seed=6", "seed 5, now 6"), ("filter.similarity=0.6", "similarity 0.7, now 0.6")):
            assert go(path, "--set", change) == 1
            assert f"was begun with {what}; change that back, or choose another directory" in capsys.readouterr().err
        assert endpoint.total == runs.SEEDS - 1


def test_a_translation_that_cannot_be_used_is_asked_for_again_then_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Endpoint(ROWS) as endpoint:
        path, text = runs.write(tmp_path, endpoint.url), endpoint.text
        seeds = [row["instruction"] for row in runs.rows(tmp_path / "seeds.jsonl")]

        def bad(prompt: str) -> str:
            often = endpoint.received[prompt]
            if "Translate" in prompt and (seeds[1] in prompt or (seeds[2] in prompt and often < 3)):
                return "I would rather not."
            return text(prompt)

        monkeypatch.setattr(endpoint, "text", bad)
        assert go(path) == 0
        assert endpoint.total == NEEDED + 2 + 2
        assert go(path) == 0
        assert endpoint.total == NEEDED + 2 + 2
    made = [row["id"] for row in runs.rows(tmp_path / "run/seeds.es.jsonl")]
    assert made == ["seed_0", "seed_2", *(f"seed_{i}" for i in range(4, 8))]
    dropped = runs.rows(tmp_path / "run/dropped.es.jsonl")
    assert [row["reason"] for row in dropped].count("untranslated seeds") == 1


def test_seeds_in_the_language_need_no_translation(tmp_path: Path) -> None:
    with Endpoint(ROWS) as endpoint:
        path = runs.write(tmp_path, endpoint.url)
        assert go(path, "--set", "languages={es={seeds='seeds.jsonl'}}") == 0
        assert endpoint.total == runs.REQUESTS
    assert len(runs.rows(tmp_path / "run/seeds.es.jsonl")) == runs.SEEDS


def test_a_model_that_writes_no_tasks_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with Endpoint(ROWS) as endpoint:
        monkeypatch.setattr(endpoint, "text", lambda prompt: "Sure!")
        assert go(runs.write(tmp_path, endpoint.url), "--set", 'seeds_language="es"') == 1
        assert "round 1 has no task in 3 answers" in capsys.readouterr().err
        assert endpoint.total == 3


def test_a_checkpoint_of_this_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A random model writes no tasks, but is asked as an endpoint is."""
    from megapoly.instruct.config import Local, load
    from megapoly.instruct.local import Checkpoint, with_own_template
    from megapoly.instruct.rounds import prompt_form

    models.save("llama", tmp_path / "model")
    settings = Local(path=tmp_path / "model", max_tokens=6, batch=3, device="cpu", template="Q {prompt} A")

    def answers(numbers: list[int], settings: Local = settings) -> dict[int, str]:
        model = Checkpoint(settings, seed=4)
        assert (model.concurrency, model.limit, model.context) == (3, 6, models.POSITIONS)
        for number in numbers:
            model.start(number, number, f"p{number}")
        found = dict(model.wait(0.0))
        assert model.wait(0.0) == []
        assert all(each.used.completion <= 6 for each in found.values())
        return {ticket: each.text for ticket, each in found.items()}

    together = answers([5, 1, 2, 3])
    assert sorted(together) == [1, 2, 3, 5]
    assert together == {**answers([1, 3]), **answers([2]), **answers([5])}
    # One that megapoly has tuned is asked in its own form.
    bare = settings.model_copy(update={"template": None})
    plain, wrapped = answers([1], bare), answers([1], settings.model_copy(update={"template": "{prompt}\n\n"}))
    tokenizer = tmp_path / "model/tokenizer_config.json"
    form = TEMPLATES["multialpaca"].model_dump()
    tokenizer.write_text(json.dumps({**json.loads(tokenizer.read_text()), "megapoly_template": form}))
    config = load(runs.write(tmp_path, "http://none", '"en"'))
    assert with_own_template(config) == config
    own = with_own_template(config.model_copy(update={"endpoint": None, "local": bare}))
    assert own.local is not None
    assert plain != wrapped == answers([1], own.local)
    assert prompt_form(own) == "chat"
    model = Checkpoint(settings, seed=4)
    model.start(0, 0, "long " * 100)
    ((_, refused),) = model.wait(0.0)
    assert refused.refused
    assert f"the model {models.POSITIONS} positions" in refused.finish
    path = runs.write(tmp_path, "http://none", '"en"')
    text = path.read_text()
    path.write_text(text[: text.index("[endpoint]")] + '[local]\npath = "model"\nmax_tokens = 4\n')
    assert go(path) == 1
    assert "round 1 has no task in 3 answers" in capsys.readouterr().err
    assert len(runs.journal(tmp_path / "run", "en").answers) == 3
