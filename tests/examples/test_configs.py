"""The example configs say what they claim, and the scripts beside them are sound."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from megapoly.config import Config, Model, load
from megapoly.data.curriculum import stages_of
from megapoly.data.epochs import settle
from megapoly.data.plan import plan_from_config
from megapoly.data.segments import Source
from megapoly.instruct.config import load as load_instruct

EXAMPLES = Path(__file__).parents[2] / "examples"
POLYLM = {"1.7b": load(EXAMPLES / "polylm/1.7b.toml"), "13b": load(EXAMPLES / "polylm/13b.toml")}
TUNING = {"1.7b": load(EXAMPLES / "tuning/1.7b.toml"), "13b": load(EXAMPLES / "tuning/13b.toml")}
both = pytest.mark.parametrize("config", POLYLM.values(), ids=POLYLM.keys())


def parameters(model: Model) -> int:
    """GPT-2's closed formula, with a tied output: 12 h^2 + 13 h a layer where ffn = 4 h."""
    h, f = model.hidden, model.ffn
    attention = 4 * h * h + 4 * h
    feed_forward = 2 * h * f + f + h
    norms = 4 * h
    return (model.vocabulary + model.positions) * h + model.layers * (attention + feed_forward + norms) + 2 * h


@pytest.mark.parametrize(
    ("name", "billions", "written"), [("1.7b", 1.737, "1,737,084,928"), ("13b", 13.907, "13,906,790,400")]
)
def test_parameters_are_the_released_models(name: str, billions: float, written: str) -> None:
    count = parameters(POLYLM[name].model)
    assert round(count / 1e9, 3) == billions
    assert f"{count:,}" == written
    for file in (f"polylm/{name}.toml", "polylm/README.md"):
        assert written in (EXAMPLES / file).read_text(encoding="utf-8")


@both
def test_length_of_the_run_is_the_scripts(config: Config) -> None:
    assert config.total_tokens == 152_500 * 2048 * 2048 == 610_000 * 512 * 2048
    assert config.total_steps == {2048: 152_500, 512: 610_000}[config.train.global_batch]
    assert config.data.stages[1].tokens == pytest.approx(97e9, rel=1e-4)


def test_schedule_is_the_scripts() -> None:
    large, small = POLYLM["13b"], POLYLM["1.7b"]
    for config, warmup, decay in ((large, 2_500, 150_000), (small, 2_000, 608_000)):
        assert config.optimizer.warmup_tokens == warmup * config.step_tokens
        assert config.optimizer.decay_tokens == decay * config.step_tokens
        assert (config.optimizer.learning_rate, config.optimizer.weight_decay) == (6e-5, 1e-4)


@both
def test_fits_256_ranks_as_released(config: Config) -> None:
    settled = config.on(256)
    assert (settled.mesh.dp, settled.mesh.pp, settled.mesh.tp) == (32, 1, 8)
    assert settled.microbatches == config.train.global_batch // (32 * config.layout.micro_batch)
    assert config.model.vocabulary % (128 * settled.mesh.tp) == 0  # no padded rows


@both
def test_weights_are_the_papers(config: Config) -> None:
    # Billions of tokens: figure 5 by language, figure 4 for code and parallel text.
    figures = {
        "en": 424.96, "zh": 139.29, "ru": 7.61, "es": 5.62, "de": 5.56, "fr": 5.10, "it": 4.31, "pt": 4.27, "ja": 4.19,
        "vi": 4.13, "id": 3.91, "pl": 3.84, "nl": 3.52, "ar": 3.48, "tr": 3.42, "th": 2.89, "he": 2.10, "ko": 0.84,
        "code": 7.5, "parallel": 1.0,
    }  # fmt: skip
    # As if the datasets were of the paper's sizes.
    sources = [
        Source(name, config.data.sources[name].language, name, round(billions * 1e9))
        for name, billions in figures.items()
    ]
    (_, _, first), (_, _, second) = stages_of(config, sources)
    assert set(first) == set(second) == set(config.data.sources) == set(figures)
    total = sum(figures.values())
    for name, billions in figures.items():
        assert first[name] == pytest.approx(billions / total, abs=2e-6)
    assert 1 - first["en"] - first["code"] == pytest.approx(0.30, abs=0.03)
    # Stage 2: figure 4's percentages, of a sum of 100.01.
    assert second["en"] == pytest.approx((4.65 + 14.79 + 12.31) / 100.01, abs=2e-6)
    assert second["code"] == pytest.approx(7.76 / 100.01, abs=2e-6)
    assert second["parallel"] == pytest.approx(4.76 / 100.01, abs=2e-6)
    assert 1 - second["en"] - second["code"] == pytest.approx(0.60, abs=0.01)
    others = set(figures) - {"en", "code", "parallel"}
    ratios = [second[name] / figures[name] ** 0.3 for name in others]
    assert max(ratios) / min(ratios) == pytest.approx(1, abs=1e-6)


def test_two_sizes_train_on_the_same_mixture() -> None:
    large, small = POLYLM["13b"].data, POLYLM["1.7b"].data
    assert large.stages == small.stages
    assert math.fsum((large.stages[0].weights or {}).values()) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize(("name", "batch"), [("1.7b", 32), ("13b", 64)])
def test_tuning_is_the_papers(name: str, batch: int) -> None:
    """polylm.md, 6; the model is the one that was pre-trained."""
    config = TUNING[name]
    assert config.model == POLYLM[name].model
    assert (config.train.global_batch, config.train.sequence, config.optimizer.learning_rate) == (batch, 2048, 1e-5)
    assert config.total_tokens == pytest.approx(16e6, rel=0.01)
    assert config.data.separate_documents
    assert config.data.loss == "responses"
    languages = ["ar", "de", "es", "fr", "id", "ja", "ko", "pt", "ru", "th", "vi"]
    assert [source.language for source in config.data.sources.values()] == languages
    assert config.on(8).mesh.world_size == 8


def test_tuning_with_a_curriculum() -> None:
    """By the sizes of MultiAlpaca: every example of the first stage once, then the shares move."""
    config = load(EXAMPLES / "tuning/curriculum.toml")
    assert config.model == TUNING["1.7b"].model
    sizes = {"es": 500, "ja": 550, "pt": 560}
    datasets = {name: _Packs(windows * 2048) for name, windows in sizes.items()}
    settled, lines = settle(config, datasets)
    assert [stage.tokens for stage in settled.data.stages] == [51 * 65536, 101 * 65536]
    assert len(lines) == 2
    plan = plan_from_config(settled, datasets)
    _, end = plan.stage_bounds(0)
    first = dict(zip((source.name for source in plan.sources), plan.counts_at(end).tolist(), strict=True))
    assert all(abs(first[name] - sizes[name]) <= 32 for name in sizes)


@dataclass(frozen=True)
class _Packs:
    train_tokens: int
    identity: str = "x"
    pack: int = 2048


def test_the_readmes_config_runs(tmp_path: Path) -> None:
    blocks = re.findall(
        r"```toml\n(\[model\].*?)```", (EXAMPLES.parent / "README.md").read_text(encoding="utf-8"), re.DOTALL
    )
    assert len(blocks) == 1
    (tmp_path / "run.toml").write_text(blocks[0], encoding="utf-8")
    assert load(tmp_path / "run.toml").on(8).mesh.dp == 8
    assert load(tmp_path / "run.toml", ["layout.tp=2"]).on(4).mesh.dp == 2  # the line that goes on elsewhere


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize("script", ["examples/slurm/train.sbatch", ".ci/run"])
def test_shell_scripts_parse(script: str) -> None:
    checked = subprocess.run(["bash", "-n", EXAMPLES.parent / script], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr


def test_self_instruct_has_the_numbers_of_multialpaca() -> None:
    config = load_instruct(EXAMPLES / "instruct/multialpaca.toml")
    assert sorted(config.languages) == ["ar", "de", "es", "fr", "id", "ja", "ko", "pt", "ru", "th", "vi"]
    rounds = config.rounds
    assert (rounds.count, rounds.requests, rounds.first, rounds.seeds, rounds.pool, rounds.tasks) == (
        10,
        100,
        10,
        2,
        1,
        17,
    )
    overlaps = {code: float(config.overlap(code)) for code in config.languages}
    assert {code: value for code, value in overlaps.items() if value != 0.5} == {"ko": 0.3, "vi": 0.3, "ar": 0.2}
    assert config.filter.similarity == 0.7
    assert config.endpoint is not None
    assert config.endpoint.context == 4096


def test_self_instruct_of_the_readme_is_a_config(tmp_path: Path) -> None:
    page = (EXAMPLES.parent / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```toml\n(directory = .*?)```", page, re.DOTALL)
    (tmp_path / "instruct.toml").write_text(block)
    assert list(load_instruct(tmp_path / "instruct.toml").languages) == ["es", "th", "ja"]
