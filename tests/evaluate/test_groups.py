"""Averages over tasks: of the harness's groups and tags against the harness, and their errors against the records."""

from __future__ import annotations

import json
import random
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest

from tests.evaluate import benchmark

models = pytest.importorskip("tests.generate.models", exc_type=ImportError)
pytest.importorskip("lm_eval", reason="the harness")

import tokenizers  # noqa: E402
from lm_eval import evaluator  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from megapoly.cli.common import write_rows  # noqa: E402
from megapoly.data.templates import TEMPLATES  # noqa: E402
from megapoly.evaluate import run  # noqa: E402
from megapoly.evaluate.leader import Leader  # noqa: E402
from megapoly.evaluate.model import HarnessModel  # noqa: E402
from megapoly.evaluate.results import Figure, averages, notes, read_figures, table, without_averages  # noqa: E402
from megapoly.generate import Generator  # noqa: E402

COUNTS = {"de": 7, "th": 20, "zh": 13}


@pytest.fixture(scope="module")
def leader(tmp_path_factory: pytest.TempPathFactory) -> Leader:
    folder = tmp_path_factory.mktemp("gpt2")
    models.save("gpt2", folder, 256)
    return Leader(Generator.open(folder))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tasks of different sizes with a tag, in a group by records, and one by itself."""
    folder = tmp_path_factory.mktemp("tasks")
    draw = random.Random(3)
    for language, count in COUNTS.items():
        rows = [{"q": benchmark.sentence(draw, language), "a": draw.randrange(3)} for _ in range(count)]
        benchmark.write(folder / f"{language}.jsonl", rows)
        (folder / f"{language}.yaml").write_text(
            f"task: ask_{language}\ntag: ask\ndataset_path: json\ndataset_kwargs: {{data_files: {{test:"
            f' "{folder / language}.jsonl"}}, cache_dir: "{folder / "cache"}"}}\ntest_split: test\noutput_type:'
            ' multiple_choice\ndoc_to_text: "{{q}}"\ndoc_to_choice: ["yes", "no", "perhaps"]\ndoc_to_target: a\n'
        )
    (folder / "all.yaml").write_text(
        "group: everything\ntask: [ask_de, ask_th, ask_zh]\naggregate_metric_list:\n  - {metric: acc, weight_by_size:"
        " true}\n"
    )
    return folder


def measure(leader: Leader, asked: run.Options) -> tuple[list[Figure], list[dict[str, Any]]]:
    return run.evaluate(leader, "m", run.prepare(asked), asked, lambda *_: None)


@pytest.mark.parametrize("name", ["ask", "everything"])
def test_of_the_harness(leader: Leader, tasks: Path, name: str, tmp_path: Path) -> None:
    figures, _ = measure(leader, run.Options([name], include=tasks))
    loaded = TaskManager(include_path=tasks, include_defaults=False).load([name])
    found = evaluator.evaluate(HarnessModel(leader, None, lambda *_: None), loaded, bootstrap_iters=1000)["results"]
    languages = [each.removeprefix("ask_") if name == "ask" else each for each in loaded["tasks"]]
    accuracies = [each for each in figures if each.metric == "acc"]
    assert [each.name for each in accuracies] == [f"{name}/{each}" for each in (*languages, "average")]
    for each, task in zip(accuracies, loaded["tasks"]):
        assert each.value == pytest.approx(100 * found[task]["acc,none"])
        assert each.error == pytest.approx(100 * found[task]["acc_stderr,none"])
        assert (each.samples, each.unit) == (COUNTS[task.removeprefix("ask_")], "%")
    whole = accuracies[-1]
    parts = accuracies[:-1]
    assert len({each.value for each in parts}) == 3
    mean = fmean(each.value for each in parts)
    weighted = sum(each.value * each.samples for each in parts) / 40
    assert weighted != pytest.approx(mean)
    assert whole.value == pytest.approx(100 * found[name]["acc,none"] if name == "everything" else mean)
    assert whole.value == pytest.approx(weighted if name == "everything" else mean)
    assert (whole.parts, whole.samples) == (tuple(languages), 40)
    # Kept with the rest, and shown below its tasks.
    write_rows(tmp_path / "f.json", [each.row() for each in figures])
    assert without_averages(read_figures(tmp_path / "f.json")) == figures
    assert averages(figures) == []
    assert [row[1] for row in table(accuracies).rows] == [*languages, "average"]
    assert any("a group of lm-eval" in line for line in notes(figures))


def test_a_single_task_has_no_average(leader: Leader, tasks: Path) -> None:
    figures, _ = measure(leader, run.Options(["ask_th"], include=tasks))
    assert {(each.task, each.language, each.parts) for each in figures} == {("ask_th", "", ())}


def test_the_error_over_translated_records(leader: Leader, tmp_path: Path) -> None:
    """That of the means of every record over the languages; a language with other records is independent of them."""
    draw = random.Random(1)
    labels = [draw.randrange(2) for _ in range(60)]
    for language, first in (("th", 0), ("zh", 0), ("id", 60)):
        rows = [
            {"premise": benchmark.sentence(draw, "th"), "choice1": benchmark.sentence(draw, "zh"),
             "choice2": benchmark.sentence(draw, "de"), "question": "cause", "label": label, "idx": number}
            for number, label in enumerate(labels, first)
        ]  # fmt: skip
        rows[3]["label"] = int(language == "th")  # as in the real data, answers may differ
        benchmark.write(tmp_path / f"xcopa/test.{language}.jsonl", rows)
    figures, samples = measure(leader, run.Options(["xcopa"], data=tmp_path))
    assert [each.language for each in figures] == ["id", "th", "zh"]
    got = {
        language: [
            sample["acc"]
            for sample in sorted(samples, key=lambda sample: sample["doc_id"])
            if sample["task"] == f"xcopa/{language}"
        ]
        for language in ("id", "th", "zh")
    }
    mean = [(one + other) / 2 for one, other in zip(got["th"], got["zh"], strict=True)]
    both = averages([each for each in figures if each.language != "id"])[0]
    assert both.value == pytest.approx(100 * fmean(mean))
    assert both.error == pytest.approx(100 * stdev(mean) / 60**0.5)
    alone = {each.language: each.error or 0 for each in figures}
    assert both.error != pytest.approx((alone["th"] ** 2 + alone["zh"] ** 2) ** 0.5 / 2, rel=0.01)
    (all_three,) = averages(figures)
    assert all_three.error == pytest.approx(((2 * both.error) ** 2 + alone["id"] ** 2) ** 0.5 / 3)
    assert json.loads(json.dumps(figures[1].row()))["covariances"].keys() == {"zh"}


@pytest.mark.parametrize("tuned", [True, False])
def test_ids_of_a_question(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tuned: bool) -> None:
    """Those that a model was tuned with: its tokenizer ends a text, too, and a question goes on."""
    folder, data = tmp_path / "model", benchmark.make(tmp_path / "data")
    models.save("llama", folder, 256)
    made = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    made.save(str(folder / "tokenizer.json"))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    template = {"megapoly_template": TEMPLATES["chat"].model_dump()} if tuned else {}
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, **template}))
    asked: list[list[int]] = []

    def generate(self: Leader, prompts: Any, *rest: Any) -> Any:
        asked.extend(map(list, prompts))
        return self.generator.generate(prompts, rest[0])

    monkeypatch.setattr(Leader, "generate", generate)
    options = run.Options(["wmt20"], languages=["de-en"], data=data, tuned=True, most=4, limit=2)
    _, samples = run.evaluate(Leader(Generator.open(folder)), "m", run.prepare(options), options, lambda *_: None)
    texts = [sample["arguments"][0][0] for sample in samples]
    assert all(text.startswith("<|user|>\n") == tuned for text in texts)
    bare = [made.encode(text, add_special_tokens=False).ids for text in texts]
    assert asked == [[0, *ids] if tuned else [0, *ids, 1] for ids in bare]
