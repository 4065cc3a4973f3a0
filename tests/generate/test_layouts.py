"""Texts and likelihoods under every layout of ranks against one process, in float64, from a folder of Hugging Face."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any

import pytest

from megapoly.context import Axis, ParallelContext
from megapoly.errors import ConfigError
from megapoly.generate import Generator, Sampling
from megapoly.generate.replica import check_layout
from megapoly.mesh import Mesh
from tests.ranks import run_cases

FAMILIES = ("gpt2", "llama", "bloom")
LAYOUTS = {
    size: [
        (dp, pp, size // (dp * pp)) for dp in range(1, size + 1) for pp in range(1, size + 1) if size % (dp * pp) == 0
    ]
    for size in (1, 2, 4)
}
PROMPTS = ["hello world", "h", "", "中文 and more of it", "or"]
SAMPLINGS = (
    Sampling(tokens=8, temperature=0),
    Sampling(
        tokens=12,
        samples=2,
        seed=4,
        top_k=40,
        top_p=0.9,
        repetition_penalty=1.3,
        stop=tuple("ewQz94ABp"),
    ),
    Sampling(tokens=6, temperature=1.4, seed=2),
)

Result = tuple[list[dict[str, Any]], list[dict[str, Any]], str]


def results(rank: int, size: int, folder: Path, layout: tuple[int, int, int]) -> Result:
    """All texts, likelihoods, and the text of a stream."""
    dp, pp, tp = layout
    context = ParallelContext.create(Mesh(dp=dp, pp=pp, tp=tp)) if size > 1 else ParallelContext.create()
    generator = Generator.open(folder, context=context, batch=4)
    texts = [dataclasses.asdict(each) for sampling in SAMPLINGS for each in generator.generate(PROMPTS, sampling)]
    likelihoods = generator.log_likelihood(["hello", "", "or", "中"], [" world", "he", "中文", "hello or not"])
    stream = "".join(generator.stream("hello", SAMPLINGS[2]))
    context.close()
    return texts, [dataclasses.asdict(each) for each in likelihoods], stream


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    models = pytest.importorskip("tests.generate.models", exc_type=ImportError)
    made = {}
    for family in FAMILIES:
        made[family] = tmp_path_factory.mktemp(family)
        models.save(family, made[family])
    return made


@pytest.fixture(scope="module")
def alone(folders: dict[str, Path]) -> dict[str, Result]:
    return {family: results(0, 1, folder, (1, 1, 1)) for family, folder in folders.items()}


def check(folders: dict[str, Path], alone: dict[str, Result], chosen: list[tuple[str, tuple[int, int, int]]]) -> None:
    size = chosen[0][1][0] * chosen[0][1][1] * chosen[0][1][2]
    found = run_cases(size, results, [(folders[family], layout) for family, layout in chosen])
    for (family, layout), ranks in zip(chosen, found, strict=True):
        expected = alone[family]
        assert all(rank == ranks[0] for rank in ranks)
        texts, likelihoods, stream = ranks[0]
        assert stream == expected[2]
        for mine, its in zip(texts, expected[0], strict=True):
            assert mine.pop("log_probabilities") == pytest.approx(its["log_probabilities"], abs=1e-10)
            assert mine == {key: value for key, value in its.items() if key != "log_probabilities"}, (family, layout)
        for mine, its in zip(likelihoods, expected[1], strict=True):
            assert mine == {**its, "log_probability": pytest.approx(its["log_probability"], abs=1e-10)}


def test_the_texts_say_something(alone: dict[str, Result]) -> None:
    for texts, _, _ in alone.values():
        assert {each["finish_reason"] for each in texts} >= {"length", "stop"}
        assert len({tuple(each["tokens"]) for each in texts}) > 0.7 * len(texts)


def test_every_layout_gives_the_same(folders: dict[str, Path], alone: dict[str, Result]) -> None:
    """A sample: one of pipelines of tensor-parallel ranks, and two more."""
    others = random.Random(0).sample([layout for layout in LAYOUTS[4] if layout != (1, 2, 2)], 2)
    check(folders, alone, list(zip(FAMILIES, [(1, 2, 2), *others], strict=True)))


@pytest.mark.long
@pytest.mark.parametrize("size", [2, 4])
def test_every_layout_gives_the_same_for_every_family(
    folders: dict[str, Path], alone: dict[str, Result], size: int
) -> None:
    check(folders, alone, [(family, layout) for family in FAMILIES for layout in LAYOUTS[size]])


def test_layouts_that_the_model_does_not_divide_by_are_refused(folders: dict[str, Path]) -> None:
    model, alone = Generator.open(folders["llama"]).replica.model, ParallelContext.create()
    for axis, message in (
        ("tp", r"model\.key_value_heads 4 does not divide by --tp 5; choose --tp from \[1, 2, 4\], or"),
        ("pp", "--pp 5 is more than the 4 layers of the model: a stage would have none; set --pp to 4 or less"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_layout(model, dataclasses.replace(alone, **{axis: Axis(axis, (0, 1, 2, 3, 4))}))
