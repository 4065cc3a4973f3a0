"""Continuations from a checkpoint: greedy ones against a forward pass over the whole text, sampling by its formulas."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rich.console import Console

from megapoly.config import load
from megapoly.context import ParallelContext
from megapoly.data.tokenizer_training import train_tokenizer
from megapoly.errors import CheckpointError, ConfigError, DataError
from megapoly.generate import Generator, Sampling, choose
from megapoly.layers.call import Call
from megapoly.run import prepare
from megapoly.trainer import train


@pytest.fixture(scope="module")
def run(toml: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generate") / "run"
    config = load(toml, [f"train.directory={str(folder)!r}"]).on(1)
    train(prepare(config, ParallelContext.create()), Console(quiet=True))
    return folder


def test_greedy_is_the_argmax_of_one_pass_over_the_result(run: Path) -> None:
    generator = Generator(run)
    assert generator.step == 20
    prompt = "abc ij"
    text = generator.continue_text(prompt, Sampling(tokens=8, temperature=0))
    first = generator.tokenizer.encode(prompt)
    ids = first + generator.tokenizer.encode(text)
    assert generator.tokenizer.decode(ids) == prompt + text
    tokens = torch.tensor(ids).unsqueeze(1)
    logits = generator.model(None, Call(torch.arange(len(ids)).unsqueeze(1), tokens_SB=tokens))[:, 0]
    for place in range(len(first), len(ids)):
        assert int(logits[place - 1].argmax()) == ids[place]


def test_the_trained_weights_are_loaded(run: Path) -> None:
    fresh = Generator(run / "checkpoints" / "step-00000020")
    fresh.model.initialise(1234)
    prompt = "abc de"
    greedy = Sampling(tokens=12, temperature=0)
    assert Generator(run).continue_text(prompt, greedy) != fresh.continue_text(prompt, greedy)


def test_a_long_text_is_continued_from_its_end(run: Path) -> None:
    generator = Generator(run)
    prompt = "abc def ghij " * 20
    assert len(generator.tokenizer.encode(prompt)) > generator.positions
    sampling = Sampling(tokens=3, seed=1)
    assert generator.continue_text(prompt, sampling) == generator.continue_text(prompt, sampling)
    assert isinstance(generator.continue_text("", sampling), str)


def test_sampling_follows_the_probabilities() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    random = torch.Generator().manual_seed(0)

    def frequencies(sampling: Sampling) -> list[float]:
        drawn = torch.tensor([choose(logits, sampling, random) for _ in range(4000)])
        return (torch.bincount(drawn, minlength=4) / 4000).tolist()

    assert frequencies(Sampling()) == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.04)
    assert frequencies(Sampling(top_p=0.8)) == pytest.approx([0.625, 0.375, 0, 0], abs=0.04)
    assert frequencies(Sampling(top_p=0.4)) == [1, 0, 0, 0]
    squared = [p * p / (0.25 + 0.09 + 0.0225 + 0.0025) for p in (0.5, 0.3, 0.15, 0.05)]
    assert frequencies(Sampling(temperature=0.5)) == pytest.approx(squared, abs=0.04)
    assert choose(logits, Sampling(temperature=0), random) == 0


def test_bad_input(run: Path, toml: Path, tmp_path: Path) -> None:
    other = train_tokenizer({"en": [toml.parent / "en.jsonl"]}, tmp_path / "other.model", vocabulary=300)
    with pytest.raises(DataError, match=r"other\.model: is not the tokenizer that .*step-00000020 was trained with"):
        Generator(run, other.path)
    with pytest.raises(ConfigError, match="top_p 0 is out of range"):
        Sampling(top_p=0)
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        Generator(tmp_path)
