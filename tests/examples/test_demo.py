"""The demo's run and what is reported of it."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("polib", reason="needs the demo's packages: pip install -e '.[demo]'")
pytest.importorskip("matplotlib", reason="needs the demo's packages: pip install -e '.[demo]'")

import results
import run
from corpora import LANGUAGES
from rich.console import Console
from rich.table import Table

from megapoly import config as configuration
from megapoly.data.curriculum import stages_of
from megapoly.data.segments import Source
from megapoly.errors import TrainingError

SIZES = {name: 1000 * (i + 1) for i, name in enumerate((*LANGUAGES, "pairs"))}
GLOBAL_BATCH = 16


def text_of(table: Table) -> str:
    console = Console(width=200, file=io.StringIO(), record=True)
    console.print(table)
    return console.export_text()


TOML = run.ROOT / "examples/demo" / run.CONFIG.name


@pytest.fixture
def config() -> configuration.Config:
    return configuration.load(TOML)


def test_weights_follow_the_curriculum(config: configuration.Config) -> None:
    sources = [Source(n, each.language, n, SIZES[n]) for n, each in config.data.sources.items()]
    stages = stages_of(config, sources)
    for (_, _, weights), non_english in zip(stages, (0.3, 0.6), strict=True):
        others = [weights[name] for name in LANGUAGES[1:]]
        assert weights.keys() == SIZES.keys()
        assert sum(weights.values()) == pytest.approx(1, abs=1e-9)
        assert sum(others) + weights["pairs"] / 2 == pytest.approx(non_english)
        assert weights["he"] / weights["zh"] == pytest.approx((SIZES["he"] / SIZES["zh"]) ** 0.3)
    assert [weights["pairs"] for _, _, weights in stages] == pytest.approx([0.05, 0.2])


def test_the_vocabulary_is_the_tokenizers(config: configuration.Config) -> None:
    assert config.model.vocabulary == run.VOCABULARY


def test_the_config_runs_under_both_layouts(config: configuration.Config) -> None:
    assert config.on(run.RANKS).mesh.world_size == run.RANKS
    overrides = run.SECOND_LAYOUT
    second = configuration.load(TOML, overrides).on(run.RANKS)
    assert (second.mesh.dp, second.mesh.pp, second.mesh.tp) == (4, 1, 2)
    assert second.identity() == config.identity()
    first_stage = config.data.stages[0].tokens // config.step_tokens
    assert config.total_steps // 2 < first_stage < config.total_steps  # resumed inside a stage, which then changes
    assert config.train.global_batch == GLOBAL_BATCH


def log_of(path: Path, *, gap: int = 0) -> results.History:
    """A run of 20 steps that changes its layout after the 10th, and its stage after the 12th."""
    events: list[dict[str, Any]] = [{"kind": "start", "step": 0, "resumed_from": None}]
    for step in range(1, 21):
        if step == 11:
            events.append({"kind": "start", "step": 10, "resumed_from": "step-00000010"})
        events.append(
            {
                "kind": "train",
                "step": step,
                "tokens": 4096 * step,
                "sample": GLOBAL_BATCH * step + (gap if step > 10 else 0),
                "stage": "stage-1" if step <= 12 else "stage-2",
                "loss": 8 - step / 10,
                "layout": "dp 2 x pp 2 x tp 2" if step <= 10 else "dp 4 x pp 1 x tp 2",
                "sources": {"en": {"loss": 1.0, "tokens": 3072}, "th": {"loss": 1.0, "tokens": 1024}},
            }
        )
    for at, bits in (("before", 4.0), ("between", 2.5), ("after", 2.25)):
        events.append({"kind": "validation", "at": at, "step": 0, "bits_per_byte": {"en": bits, "th": bits / 2}})
    path.write_text("".join(json.dumps(event) + "\n" for event in events), encoding="utf-8")
    return results.History.read(path)


def test_continuity(tmp_path: Path) -> None:
    table, sentence = results.continuity(log_of(tmp_path / "log.jsonl"), GLOBAL_BATCH)
    shown = text_of(table)
    assert "144 to 159" in shown  # step 10
    assert "160 to 175" in shown  # step 11
    assert "before: 7.450" in sentence
    assert "after: 6.450" in sentence


@pytest.mark.parametrize("gap", [-GLOBAL_BATCH, GLOBAL_BATCH])
def test_a_gap_is_an_error(tmp_path: Path, gap: int) -> None:
    with pytest.raises(TrainingError, match=rf"resumed at sample {160 + gap}, but the run had trained up to 160"):
        results.continuity(log_of(tmp_path / "log.jsonl", gap=gap), GLOBAL_BATCH)


def test_bits_per_byte(tmp_path: Path) -> None:
    shown = text_of(results.bits_per_byte_table(log_of(tmp_path / "log.jsonl")))
    assert [cell.strip() for cell in shown.splitlines()[-2].split("│")[1:-1]] == [
        "th",
        "2.000",
        "1.250",
        "1.125",
        "+0.125",
    ]
    (tmp_path / "log.jsonl").write_text(
        '{"kind": "validation", "at": "before", "bits_per_byte": {}}\n', encoding="utf-8"
    )
    with pytest.raises(TrainingError, match="no validation 'between'"):
        results.bits_per_byte_table(results.History.read(tmp_path / "log.jsonl"))


def test_picture(tmp_path: Path) -> None:
    output = tmp_path / "result.png"
    results.picture(log_of(tmp_path / "log.jsonl"), output)
    assert output.read_bytes().startswith(b"\x89PNG\r\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.jsonl", "result.png"]


def test_an_earlier_demo_is_moved_aside(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    assert run.move_aside(folder) is None
    for number in (1, 2):
        folder.mkdir()
        (folder / "log.jsonl").write_text(str(number), encoding="utf-8")
        assert run.move_aside(folder) == tmp_path / f"demo.{number}"
    assert [(tmp_path / f"demo.{n}/log.jsonl").read_text(encoding="utf-8") for n in (1, 2)] == ["1", "2"]


def test_a_failed_command_ends_the_demo(capfd: pytest.CaptureFixture[str]) -> None:
    demo = run.Demo(Console())
    with pytest.raises(SystemExit) as ended:
        demo.command("exit 3")
    assert ended.value.code == 3
    assert "ended with code 3" in capfd.readouterr().out
    demo.command("echo 'two words' | wc -w")
    assert capfd.readouterr().out.splitlines()[-1].strip() == "2"
