"""Likelihoods and texts of every task against the harness's own class for transformers, on the same weights."""

from __future__ import annotations

import json
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
from torch import Tensor, nn

from tests.evaluate import benchmark
from tests.evaluate.answering import Answers, answers, own_answers
from tests.ranks import run_cases

models = pytest.importorskip("tests.generate.models", exc_type=ImportError)
pytest.importorskip("lm_eval", reason="the harness")
pytest.importorskip("accelerate", reason="which the class of the harness that is compared with needs")

from lm_eval import evaluator  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402

from megapoly.evaluate import run  # noqa: E402

FAMILIES = ("gpt2", "llama", "bloom")
POSITIONS = 256
MOST = 12
TASKS = ("xnli", "pawsx", "xcopa", "xwinograd", "tydiqa_goldp", "wmt20", "mtg_title", "bits_per_byte", "letters")
LAYOUTS = {1: [(1, 1, 1)], 2: [(2, 1, 1), (1, 2, 1), (1, 1, 2)], 4: [(4, 1, 1), (1, 2, 2), (2, 2, 1), (2, 1, 2)]}

LETTERS = """
task: letters
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{file}"}}, cache_dir: "{cache}"}}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{{{sentence1}}}} "
doc_to_target: label
doc_to_choice: ["A", "B", "no", "not at all"]
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a task of the harness, whose options are one token or several after a context that ends in a space."""
    folder = benchmark.make(tmp_path_factory.mktemp("benchmarks"))
    (folder / "tasks").mkdir()
    content = LETTERS.format(file=folder / "pawsx/dev.en.jsonl", cache=folder / "cache")
    (folder / "tasks/letters.yaml").write_text(content)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, nn.Module]]:
    """Texts of llama begin with a token of their own."""
    made = {}
    for family in FAMILIES:
        folder = tmp_path_factory.mktemp(family)
        made[family] = folder, widened(models.save(family, folder, POSITIONS, begins=family == "llama"))
    return made


def widened(model: nn.Module) -> nn.Module:
    """With the norms of LLaMA in the model's float64, which transformers computes in fp32 whatever the dtype."""

    def forward(norm: Any, x: Tensor) -> Tensor:
        return norm.weight * x * (x.square().mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt()

    for module in model.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            module.forward = MethodType(forward, module)
    return model


def options(data: Path, tuned: bool) -> dict[str, Any]:
    return dict(
        tasks=TASKS, data=data, texts={"en": data / "text.en.jsonl"}, tuned=tuned, most=MOST, include=data / "tasks"
    )


def peer_answers(folder: Path, peer: nn.Module, asked: dict[str, Any], positions: int = POSITIONS) -> Answers:
    tokenizer = models.transformers.AutoTokenizer.from_pretrained(folder)
    # One at a time: transformers' masks of padding are no numbers in float64.
    model = HFLM(pretrained=peer, tokenizer=tokenizer, batch_size=1, max_length=positions)
    tasks = run.prepare(run.Options(**asked))
    for each in tasks:
        each.task.set_fewshot_seed(1234)
        if each.task.OUTPUT_TYPE == "generate_until":
            each.task.set_config("generation_kwargs", {"max_gen_toks": MOST}, update=True)
    return answers(evaluator.evaluate(model, {"tasks": {each.task.task_name: each.task for each in tasks}})["samples"])


def check(family: str, mine: Answers, its: Answers, tasks: tuple[str, ...] = TASKS) -> None:
    """To 1e-8; of BLOOM, whose softmax transformers computes in fp32 whatever the dtype, to 1e-5."""
    near = 1e-5 if family == "bloom" else 1e-8
    assert list(mine) == list(its)
    assert {name.split("/")[0] for name in mine} == set(tasks)
    for name, theirs in its.items():
        for own, other in zip(mine[name], theirs, strict=True):
            if isinstance(other[0], str):
                assert own == other, name
            elif isinstance(other[0], tuple):
                assert own[0][0] == pytest.approx(other[0][0], abs=near), name
                assert own[0][1] == other[0][1]
            else:
                assert own[0] == pytest.approx(other[0], abs=4 * near), name


@pytest.fixture(scope="module")
def peers(folders: dict[str, tuple[Path, nn.Module]], data: Path) -> dict[tuple[str, bool], Answers]:
    return {}


def check_layouts(
    folders: dict[str, tuple[Path, nn.Module]],
    peers: dict[tuple[str, bool], Answers],
    data: Path,
    cases: list[tuple[str, tuple[int, int, int], bool]],
) -> None:
    for family, _, tuned in cases:
        if (family, tuned) not in peers:
            peers[family, tuned] = peer_answers(*folders[family], options(data, tuned))
    made = [(folders[family][0], layout, options(data, tuned)) for family, layout, tuned in cases]
    dp, pp, tp = cases[0][1]
    size = dp * pp * tp
    found = run_cases(size, own_answers, made) if size > 1 else [[own_answers(0, 1, *case)] for case in made]
    for (family, _, tuned), ranks in zip(cases, found, strict=True):
        check(family, ranks[0][0], peers[family, tuned])
        assert ranks[1:] == [None] * (size - 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_records_longer_than_the_model(tmp_path: Path, data: Path, family: str) -> None:
    """The same of their beginning is left out, and of how many is told."""
    positions = 160
    peer = widened(models.save(family, tmp_path, positions, begins=family == "llama"))
    if family == "bloom":  # which has no longest sequence of its own
        settings = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**settings, "seq_length": positions}))
    long = tuple(name for name in TASKS if name not in ("xwinograd", "bits_per_byte"))
    asked = {**options(data, False), "tasks": long, "texts": {}, "shots": 3}
    mine, figures = own_answers(0, 1, tmp_path, (1, 1, 1), asked)
    check(family, mine, peer_answers(tmp_path, peer, asked, positions), long)
    assert {each.task for each in figures if each.truncated} == {*long}


@pytest.mark.parametrize("family", FAMILIES)
def test_one_rank(
    folders: dict[str, tuple[Path, nn.Module]], peers: dict[tuple[str, bool], Answers], data: Path, family: str
) -> None:
    check_layouts(folders, peers, data, [(family, (1, 1, 1), family == "gpt2")])
    said = [text for name, mine in peers[family, family == "gpt2"].items() for (text,) in mine if "wmt" in name]
    assert len(set(said)) > 4
    assert max(map(len, said)) > 4


def test_four_ranks(
    folders: dict[str, tuple[Path, nn.Module]], peers: dict[tuple[str, bool], Answers], data: Path
) -> None:
    check_layouts(folders, peers, data, [("llama", (2, 2, 1), False), ("bloom", (2, 1, 2), False)])


@pytest.mark.long
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("tuned", [False, True])
def test_all_families_and_layouts(
    folders: dict[str, tuple[Path, nn.Module]],
    peers: dict[tuple[str, bool], Answers],
    data: Path,
    size: int,
    tuned: bool,
) -> None:
    check_layouts(folders, peers, data, [(family, layout, tuned) for family in FAMILIES for layout in LAYOUTS[size]])
