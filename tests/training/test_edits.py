"""The curriculum of a running job is edited: it takes effect where the run goes on, and is said so."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from megapoly import config
from megapoly.checkpoint import state, store
from megapoly.cli import app
from megapoly.context import ParallelContext
from megapoly.data.plan import Plan
from megapoly.errors import ConfigError, DataError
from megapoly.run import Resume, prepare
from megapoly.trainer import train
from tests.corpus import STEP, lines

BATCH = 8
RUSSIAN = f"data.stages=[{{name='first',tokens={20 * STEP},weights={{ru=1.0}}}}]"


def go(toml: Path, run: Path, *extra: str, resume: Resume = "never", stop_step: int | None = None) -> str:
    settings = config.load(toml, [f"train.directory={str(run)!r}", "validation.windows=0", *extra]).on(1)
    shown = Console(file=io.StringIO(), width=400)
    train(prepare(settings, ParallelContext.create(), resume), shown, stop_step=stop_step)
    return shown.file.getvalue()


def tokens_by_source(run: Path) -> list[dict[str, int]]:
    return [{name: each["tokens"] for name, each in event["sources"].items()} for event in lines(run, "train")]


def saved_plan(run: Path) -> Plan:
    return Plan.from_document(store.Reader(state.newest(run / "checkpoints")).meta["plan"])


def windows(plan: Plan) -> list[tuple[str, int, int]]:
    found = plan.locate(np.arange(plan.total_samples))
    names = [plan.sources[i].name for i in found.source]
    return list(zip(names, found.epoch.tolist(), found.window.tolist(), strict=True))


def test_new_weights_from_where_the_run_goes_on(toml: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    go(toml, run, stop_step=5)
    before = saved_plan(run)
    shown = go(toml, run, RUSSIAN, resume="always")
    assert "from sample 40 on with an edited curriculum" in shown
    assert "data.stages.0.weights.ru: the run has 0.3, the config has 1.0" in shown
    steps = tokens_by_source(run)
    assert len(steps) == 20
    assert all(step.get("en") for step in steps[:5])
    assert not any(step.get("en") for step in steps[5:])
    after = saved_plan(run)
    assert windows(after)[: 5 * BATCH] == windows(before)[: 5 * BATCH]
    assert len(set(windows(after))) == after.total_samples  # nothing twice in an epoch
    assert json.loads((run / "config.json").read_text())["data"]["stages"][0]["weights"] == {"ru": 1.0}
    # The edit is now the run's own: it goes on without a word.
    assert "edited" not in go(toml, run, RUSSIAN, resume="always")


def test_a_source_that_joins(toml: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    go(toml, run, stop_step=5)
    for suffix in (".bin", ".idx", ".json"):
        shutil.copy(toml.with_name("en" + suffix), tmp_path / ("more" + suffix))
    more = (f"data.sources.more={{path='{tmp_path}/more',language='en'}}",
            f"data.stages=[{{name='first',tokens={9 * STEP},weights={{ru=0.5,more=0.5}}}}]")  # fmt: skip
    shown = go(toml, run, *more, resume="always")
    assert "data.sources.more.language: the run has nothing, the config has en" in shown
    steps = tokens_by_source(run)
    assert len(steps) == 9
    assert sum(step.get("more", 0) for step in steps[5:]) > 0
    assert not any(step.get("more") for step in steps[:5])
    assert [source.name for source in saved_plan(run).sources] == ["en", "ru", "more"]
    with pytest.raises(DataError, match="source 'more' is in the plan of this run but is not among"):
        go(toml, run, RUSSIAN, resume="always")


def test_stages_that_the_run_has_outlived(toml: Path, tmp_path: Path) -> None:
    go(toml, tmp_path / "run", stop_step=5)
    short = f"data.stages=[{{name='first',tokens={4 * STEP},weights={{ru=1.0}}}}]"
    with pytest.raises(ConfigError, match="end after 32 samples, but the run has trained 40"):
        go(toml, tmp_path / "run", short, resume="always")


def test_the_plan_of_an_edit_before_it_is_trained(toml: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    go(toml, run, stop_step=5)
    place = ["--set", f"train.directory={str(run)!r}", "--set", RUSSIAN]
    result = CliRunner().invoke(
        app, ["data", "plan", str(toml), "--resume", *place, "--json", str(tmp_path / "p.json")]
    )
    assert result.exit_code == 0, result.output
    assert "goes on from step-00000005, sample 40 with an edited curriculum:" in result.output
    rows = json.loads((tmp_path / "p.json").read_text())["rows"]
    en = saved_plan(run).counts_at(40).tolist()[0]
    assert {row["source"]: row["tokens"] // 16 for row in rows} == {"en": en, "ru": 160 - en}
    small = CliRunner().invoke(app, ["data", "plan", str(toml), "--set", "model.vocabulary=300"])
    assert "model.vocabulary 300 is less than" in str(small.exception)
    for suffix in (".bin", ".idx"):
        shutil.copy(toml.with_name("en" + suffix), tmp_path / ("bare" + suffix))
    bare = CliRunner().invoke(app, ["data", "plan", str(toml), "--set", f"data.sources.en.path='{tmp_path}/bare'"])
    assert f"held-out part are unknown: 'en' ({tmp_path}/bare)" in bare.output
    assert "not validated, since nothing of them is held out: 'en'" in bare.output
    without = CliRunner().invoke(app, ["data", "plan", str(toml), *place])
    assert "edited" not in without.output
