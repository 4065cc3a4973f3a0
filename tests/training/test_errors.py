"""What a user gets wrong, or what breaks, is one clear error before anything is trained."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from megapoly import config
from megapoly.context import ParallelContext
from megapoly.data import builder
from megapoly.data.load_tokenizer import load_tokenizer
from megapoly.data.merge import Assembly, merge
from megapoly.data.tokenizer_training import train_tokenizer
from megapoly.errors import CheckpointError, ConfigError, DataError, MegapolyError
from megapoly.launch import choose_device
from megapoly.run import Resume, prepare
from megapoly.trainer import train
from tests.corpus import lines
from tests.ranks import run_ranks


def go(toml: Path, run: Path, *extra: str, resume: Resume = "never", stop_step: int | None = 2) -> None:
    settings = config.load(toml, [f"train.directory={str(run)!r}", "validation.windows=0", *extra]).on(1)
    train(prepare(settings, ParallelContext.create(), resume), Console(quiet=True), stop_step=stop_step)


@pytest.fixture
def folder(toml: Path, tmp_path: Path) -> Path:
    """A copy of the corpus that may be damaged."""
    shutil.copytree(toml.parent, tmp_path / "corpus")
    return tmp_path / "corpus"


def faulty(rank: int, size: int, toml: Path, run: Path, fault: str) -> tuple[str, str]:
    """The error of each rank where rank 1 alone has a fault, and then of a try without it."""

    def error(*sets: str) -> str:
        settings = config.load(toml, [f"train.directory={str(run)!r}", "layout.tp=2", *sets]).on(size)
        context = ParallelContext.create(settings.mesh)
        try:
            prepare(settings, context)
        except MegapolyError as caught:
            return f"{type(caught).__name__}: {caught}" if caught.everywhere else "of one rank alone"
        finally:
            context.close()
        return ""

    return error(*[fault] * (rank == 1)), error()


def test_the_error_of_one_rank_is_that_of_all_and_leaves_nothing_behind(toml: Path, tmp_path: Path) -> None:
    missing = run_ranks(2, faulty, toml, tmp_path / "missing", "data.sources.en.path='nothing'")
    assert missing[0] == missing[1]
    assert "DataError" in missing[0][0]
    assert "nothing.bin" in missing[0][0]
    assert missing[0][1] == ""
    other = run_ranks(2, faulty, toml, tmp_path / "other", "optimizer.clip=0.7")
    assert other[0] == other[1]
    assert "optimizer.clip: rank 0 has 1.0, rank 1 has 0.7" in other[0][0]
    assert other[0][1] == ""


def test_a_run_that_ended_before_its_first_checkpoint(toml: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = config.load(toml, [f"train.directory={str(run)!r}"]).on(1)
    prepare(settings, ParallelContext.create())
    with pytest.raises(CheckpointError, match="ended before its first checkpoint; give --resume-if-any"):
        go(toml, run)
    with pytest.raises(ConfigError, match=r"train\.seed: the run has 1234, the config has 5"):
        go(toml, run, "train.seed=5", resume="if-any")
    go(toml, run, resume="if-any")
    assert [event["step"] for event in lines(run, "train")] == [1, 2]


def test_the_device_of_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("auto", 1) == torch.device("cuda", 1)
    assert choose_device("cpu", 7) == torch.device("cpu")
    with pytest.raises(ConfigError, match="local rank 2 was started on a machine with 2 GPUs"):
        choose_device("auto", 2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert choose_device("auto", 3) == torch.device("cpu")
    with pytest.raises(ConfigError, match="finds no GPU on this machine"):
        choose_device("cuda", 0)


def test_a_rank_without_a_gpu_of_its_own_says_so(toml: Path, tmp_path: Path) -> None:
    code = (
        "import sys, torch; from pathlib import Path; from megapoly.launch import run_training;"
        "torch.cuda.device_count = lambda: 1;"
        "sys.exit(run_training(Path(sys.argv[1]), sys.argv[2:], 'never', None))"
    )
    sets = ["layout.device='auto'", "layout.tp=2", f"train.directory={str(tmp_path / 'run')!r}"]
    ranks = os.environ | {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}
    done = subprocess.run([sys.executable, "-c", code, toml, *sets], env=ranks, capture_output=True, text=True)
    assert done.returncode == 1
    assert "rank 1: layout.device 'auto': local rank 1 was started on a machine with 1 GPUs" in done.stderr


def test_a_run_folder_is_not_overwritten(toml: Path, tmp_path: Path) -> None:
    go(toml, tmp_path / "run")
    with pytest.raises(CheckpointError, match="holds a run already; give --resume"):
        go(toml, tmp_path / "run")


def test_a_run_folder_that_cannot_be_made(toml: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"file/run/config\.json: cannot be written"):
        go(toml, tmp_path / "file" / "run")


def test_resume_with_another_config_lists_the_keys(toml: Path, tmp_path: Path) -> None:
    go(toml, tmp_path / "run")
    with pytest.raises(ConfigError) as raised:
        go(toml, tmp_path / "run", "optimizer.learning_rate=0.02", "train.seed=5", resume="always")
    assert "optimizer.learning_rate: the run has 0.01, the config has 0.02" in str(raised.value)
    assert "train.seed: the run has 1234, the config has 5" in str(raised.value)


def test_packs_that_do_not_fit_are_refused_before_the_run_begins(toml: Path, tmp_path: Path) -> None:
    merge([toml.with_name("en")], tmp_path / "packs", Assembly(pack=8))
    with pytest.raises(DataError, match=r"is made of packs of 8 tokens, but train\.sequence is 16"):
        go(toml, tmp_path / "run", f"data.sources.en.path='{tmp_path}/packs'")
    assert not (tmp_path / "run").exists()


def test_resume_of_nothing_never_starts_anew(toml: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no whole checkpoint|has no checkpoint"):
        go(toml, tmp_path / "run", resume="always")


def test_resume_if_any_begins_or_goes_on(toml: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    go(toml, run, resume="if-any", stop_step=2)
    go(toml, run, resume="if-any", stop_step=4)
    assert [event["step"] for event in lines(run, "train")] == [1, 2, 3, 4]


def test_checkpoint_of_another_model(toml: Path, tmp_path: Path) -> None:
    go(toml, tmp_path / "run")
    with pytest.raises(ConfigError, match=r"model\.layers: the run has 4, the config has 5"):
        go(toml, tmp_path / "run", "model.layers=5", resume="always")


def test_a_changed_dataset_is_refused_on_resume(folder: Path, tmp_path: Path) -> None:
    toml = folder / "run.toml"
    go(toml, tmp_path / "run")
    options = builder.Options(validation_fraction=0.2, threads=1, overwrite=True)
    builder.build(
        [folder / "ru.jsonl"], folder / "ru", load_tokenizer(folder / "poly.model"), language="ru", options=options
    )
    with pytest.raises(DataError, match="source 'ru' has changed"):
        go(toml, tmp_path / "run", resume="always")


def test_a_tokenizer_of_another_dataset(folder: Path, tmp_path: Path) -> None:
    train_tokenizer({"ru": [folder / "ru.jsonl"]}, folder / "other.model", vocabulary=310)
    with pytest.raises(DataError, match="tokenizer"):
        go(folder / "run.toml", tmp_path / "run", f"data.tokenizer={str(folder / 'other.model')!r}")
    assert not (tmp_path / "run").exists()


def test_another_tokenizer_is_refused_on_resume(folder: Path, tmp_path: Path) -> None:
    """Of datasets from elsewhere, without .json, only the checkpoint knows the tokenizer."""
    toml = folder / "run.toml"
    for language in ("en", "ru"):
        (folder / f"{language}.json").unlink()
    go(toml, tmp_path / "run")
    files = {language: [folder / f"{language}.jsonl"] for language in ("en", "ru")}
    other = train_tokenizer(files, folder / "other.model", vocabulary=323, alpha=1)
    with pytest.raises(DataError, match=r"other\.model: is not the tokenizer that .*step-00000002 was trained with"):
        go(toml, tmp_path / "run", f"data.tokenizer={str(other.path)!r}", resume="always", stop_step=3)
    go(toml, tmp_path / "run", resume="always", stop_step=3)


def test_a_vocabulary_smaller_than_the_tokenizer(toml: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.vocabulary 100 is less than the 323 pieces"):
        go(toml, tmp_path / "run", "model.vocabulary=100")


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_missing_and_truncated_files(folder: Path, tmp_path: Path, suffix: str) -> None:
    path = folder / f"en{suffix}"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=rf"en\{suffix}"):
        go(folder / "run.toml", tmp_path / "run")
    path.unlink()
    with pytest.raises(DataError, match=rf"en\{suffix}"):
        go(folder / "run.toml", tmp_path / "run")
