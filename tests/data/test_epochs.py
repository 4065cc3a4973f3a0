"""Stages in epochs: what the data makes of them, and what is refused. Against counting."""

from __future__ import annotations

import math

import pytest

from megapoly.config import parse
from megapoly.data.epochs import settle
from megapoly.data.plan import plan_from_config
from megapoly.errors import ConfigError, DataError


class Known:
    def __init__(self, tokens, pack=0):
        self.identity, self.train_tokens, self.pack = f"{tokens}", tokens, pack


DATASETS = {"es": Known(50 * 8, pack=8), "ja": Known(17 * 8 + 3), "code": Known(23 * 8 + 1)}  # windows: 50, 17, 23


def config(*stages, **optimizer):
    languages = {"es": "es", "ja": "ja", "code": "code"}
    return parse(
        {
            "model": {"layers": 1, "hidden": 8, "heads": 2, "ffn": 8, "vocabulary": 100, "positions": 8},
            "data": {
                "tokenizer": "t",
                "sources": {name: {"path": name, "language": language} for name, language in languages.items()},
                "stages": list(stages),
                "separate_documents": True,
            },
            "train": {"directory": "run", "sequence": 8, "global_batch": 4},
            "optimizer": {"learning_rate": 0.01, **optimizer},
        }
    )


def test_every_window_so_often():
    """Without a mixture every source comes as often as the others: to within the last global batch."""
    for epochs in (1, 3, 0.5):
        settled, lines = settle(config({"name": "tune", "epochs": epochs}), DATASETS)
        samples = math.ceil(90 * epochs)
        batches = math.ceil(samples / 4)
        (stage,) = settled.data.stages
        assert (stage.tokens, stage.epochs) == (batches * 4 * 8, None)
        assert settled.total_steps == batches
        told = f"{epochs:g} epoch{'' if epochs == 1 else 's'} of 90 windows"
        assert lines == [f"stage 'tune': {told} are {batches * 32:,} tokens, {batches} global batches"]
        plan = plan_from_config(settled, DATASETS)
        counts = dict(zip([source.name for source in plan.sources], plan.counts_at(plan.total_samples), strict=True))
        for name, windows in (("es", 50), ("ja", 17), ("code", 23)):
            assert abs(counts[name] - epochs * windows) <= 4


def test_of_the_sources_of_a_mixture():
    """Only those with a share count; several stages, tokens beside epochs; nothing changes when it is settled again."""
    stages = (
        {"name": "a", "epochs": 2, "weights": {"es": 0.5, "ja": 0.5}},
        {"name": "b", "tokens": 320, "languages": {"*": 1.0}},
        {"name": "c", "epochs": 1, "languages": {"es": 0.5, "ja": 0.5, "code": 0.0}, "alpha": 1.0, "gradual": True},
    )
    settled, lines = settle(config(*stages), DATASETS)
    assert [stage.tokens for stage in settled.data.stages] == [34 * 32, 320, 17 * 32]
    assert [line.split(":")[0] for line in lines] == ["stage 'a'", "stage 'c'"]
    assert settle(settled, DATASETS) == (settled, [])
    assert parse(settled.document()).data == settled.data.model_copy(
        update={"tokenizer": parse(settled.document()).data.tokenizer}
    )


@pytest.mark.parametrize(
    ("stage", "problem"),
    [
        ({"name": "a"}, r"data.stages.0 \(a\): its length is given by tokens or by epochs; found none"),
        ({"name": "a", "tokens": 32, "epochs": 1.0}, "length is given by tokens or by epochs; found both"),
        ({"name": "a", "tokens": 32}, "a mixture is given by weights"),
    ],
)
def test_lengths_that_are_none(stage, problem):
    with pytest.raises(ConfigError, match=problem):
        config(stage)


def test_what_the_length_does_not_fit():
    """Found when the length is known."""
    found = config({"name": "a", "epochs": 1}, warmup_tokens=10**6)
    with pytest.raises(
        ConfigError, match=r"1 epoch of 90 windows .*; optimizer.warmup_tokens 1000000 is not less than"
    ):
        settle(found, DATASETS)
    with pytest.raises(DataError, match="stage 'a': its sources have no whole window of 8 tokens"):
        settle(config({"name": "a", "epochs": 1}), {name: Known(7) for name in DATASETS})
