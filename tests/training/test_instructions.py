"""Tuning on instructions: the loss and gradients of the answers alone, epochs, validation, what is kept and handed on.

The oracle of the loss is PyTorch's cross-entropy on transformers' model of the same weights, one example at a time.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from megapoly import config
from megapoly.checkpoint.convert import convert
from megapoly.checkpoint.weights import Options, open_weights, template_of
from megapoly.cli import main
from megapoly.context import ParallelContext
from megapoly.data.builder import Options as BuildOptions
from megapoly.data.builder import build
from megapoly.data.indexed import IndexedDataset
from megapoly.data.load_tokenizer import load_tokenizer
from megapoly.data.samples import Batch, read, validation
from megapoly.data.templates import TEMPLATES
from megapoly.engine import Engine
from megapoly.errors import DataError, TrainingError
from megapoly.run import Run, open_data, prepare
from megapoly.trainer import train
from tests import tuning
from tests.corpus import lines
from tests.parity.cases import assert_close, pieces, reassemble
from tests.ranks import run_cases

PLAIN = TEMPLATES["multialpaca"]
LENGTH = tuning.PACK


@pytest.fixture(scope="module")
def toml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tuning.make(tmp_path_factory.mktemp("tuning"))


def begin(toml: Path, folder: Path, *sets: str, size: int = 1, **choices: Any) -> Run:
    settings = config.load(toml, [f"train.directory={str(folder)!r}", *sets]).on(size)
    return prepare(settings, ParallelContext.create(settings.mesh), **choices)


@pytest.fixture(scope="module")
def tuned(toml: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tuned") / "run"
    train(begin(toml, folder), Console(quiet=True))
    return folder


Examples = list[tuple[list[int], list[bool], int]]


def packed(run: Run, samples: int, **choices: Any) -> tuple[Batch, Examples]:
    """A batch of packs, and the examples in it one by one, with their sources."""
    options = {"vocabulary": run.config.model.vocabulary, "separate_documents": True, "with_tokens": True}
    batch = read(run.plan, run.datasets, np.arange(samples), **options, **choices)
    located = run.plan.locate(np.arange(samples))
    examples: Examples = []
    for source, window in zip(located.source.tolist(), located.window.tolist()):
        dataset = run.datasets[run.plan.sources[source].name]
        first = dataset.document_at(window * LENGTH)
        for number in range(first, dataset.documents):
            if dataset.start(number) >= (window + 1) * LENGTH:
                break
            learned = dataset.learned(number).tolist()
            if not all(learned):  # padding
                examples.append((dataset.document(number).tolist(), learned, source))
    return batch, examples


def alone(examples: Examples) -> Batch:
    """Every example in a row of its own, filled up."""
    count = len(examples)
    tokens, labels = torch.zeros(count, LENGTH, dtype=torch.int64), torch.full((count, LENGTH), -1)
    ends = [0]
    for row, (ids, learned, _) in enumerate(examples):
        tokens[row, : len(ids)] = torch.tensor(ids)
        after = torch.tensor(ids[1:]).where(torch.tensor(learned[1:]), torch.tensor(-1))
        labels[row, : len(ids) - 1] = after
        ends += [row * LENGTH + len(ids), (row + 1) * LENGTH]
    positions = torch.cat([torch.arange(n) for n in np.diff(sorted(set(ends)))]).view(count, LENGTH)
    source = torch.tensor([source for _, _, source in examples], dtype=torch.int32)
    cuts = torch.tensor(sorted(set(ends)), dtype=torch.int32)
    return Batch(torch.arange(count), source, tokens, labels, positions, cuts)


def gradients(run: Run, batch: Batch) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Of the sum of the losses; and loss sums and counted tokens by source."""
    engine = Engine(run.config, ParallelContext.create(run.config.mesh))
    engine.initialise()
    _, sums = engine.gradients(batch.split(1), sources=len(run.plan.sources))
    found = {name: value * batch.positions.numel() for name, value in reassemble([pieces(engine, "gradient")]).items()}
    return found, sums.numpy()


def test_packed_and_one_by_one(toml: Path, tmp_path: Path) -> None:
    """The same sums of losses by source and the same gradients, whether examples share a row or not."""
    run = begin(toml, tmp_path / "run")
    batch, examples = packed(run, 16)
    assert len(examples) > 24
    together, sums = gradients(run, batch)
    apart, others = gradients(run, alone(examples))
    np.testing.assert_allclose(sums, others, rtol=1e-12)
    assert_close(together, apart, 1e-10)


@pytest.mark.parametrize("all_learned", [False, True])
def test_the_loss_of_plain_pytorch(toml: Path, tmp_path: Path, all_learned: bool) -> None:
    """Loss of a step, and a gradient, by transformers' model and cross_entropy with ignore_index."""
    transformers = pytest.importorskip("transformers", reason="the oracle of this test")
    run = begin(toml, tmp_path / "run", f"data.loss={'all' if all_learned else 'responses'!r}")
    run.save()
    convert(open_weights(tmp_path / "run"), tmp_path / "hf", "huggingface", Options())
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float64).train()
    batch, examples = packed(run, 8, all_learned=all_learned)
    total, counted = torch.zeros((), dtype=torch.float64), 0
    for ids, learned, _ in examples:
        logits = model(torch.tensor([ids])).logits[0, :-1]
        labels = torch.tensor(
            [i if answer or all_learned else -100 for i, answer in zip(ids[1:], learned[1:], strict=True)]
        )
        total = total + torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
        counted += int((labels >= 0).sum())
    total.backward()
    assert sum((batch.labels >= 0).sum(1)) == counted
    found, _ = gradients(run, batch)
    expected = model.transformer.wte.weight.grad.numpy()
    assert np.abs(found["embedding.weight"] - expected).max() < 1e-10 * np.abs(expected).max()
    train(run, Console(quiet=True), stop_step=1)
    (event,) = lines(tmp_path / "run", "train")
    assert event["loss"] == pytest.approx(total.item() / counted, rel=1e-10)
    assert sum(each["tokens"] for each in event["sources"].values()) == counted


def test_batches_without_an_answer(toml: Path, tmp_path: Path) -> None:
    """A micro-batch without a counted token adds nothing; a global batch without one is refused."""
    run = begin(toml, tmp_path / "run")
    batch, _ = packed(run, 8)
    labels = batch.labels.clone()
    labels[3] = -1
    some = Batch(batch.samples, batch.source, batch.tokens, labels, batch.positions, batch.cu_seqlens)
    expected, _ = gradients(run, some)
    kept = torch.arange(8) != 3
    fewer, _ = gradients(run, Batch(*(column[kept] for column in (
        batch.samples, batch.source, batch.tokens, batch.labels, batch.positions)), _without(batch, 3)))  # fmt: skip
    assert_close(expected, fewer, 1e-10)
    none = Batch(
        batch.samples, batch.source, batch.tokens, torch.full_like(labels, -1), batch.positions, batch.cu_seqlens
    )
    with pytest.raises(TrainingError, match="no token of this global batch is counted in the loss"):
        run.engine.step(none.split(1), 0.01, sources=2)


def _without(batch: Batch, row: int) -> torch.Tensor:
    assert batch.cu_seqlens is not None
    cuts = batch.cu_seqlens
    before, after = cuts[cuts <= row * LENGTH], cuts[cuts > (row + 1) * LENGTH] - LENGTH
    return torch.cat((before, after))


def some_steps(rank: int, size: int, toml: Path, folder: Path, sets: list[str]) -> list[float]:
    run = begin(toml, folder, *sets, size=size)
    train(run, Console(quiet=True), stop_step=3)
    run.context.close()
    return [event["loss"] for event in lines(folder, "train")]


def test_layouts(toml: Path, tmp_path: Path) -> None:
    """Losses and validation by language under dp, pp and tp are those of one process."""
    cases = [
        (toml, tmp_path / "0", ["layout.tp=2", "layout.pp=2"]),
        (toml, tmp_path / "1", ["layout.dp=2", "layout.pp=2", "layout.schedule='zero-bubble'"]),
        (toml, tmp_path / "2", ["layout.dp=2", "layout.tp=2", "layout.micro_batch=2"]),
    ]
    run_cases(4, some_steps, cases, timeout=200)
    some_steps(0, 1, toml, tmp_path / "one", [])
    expected = [event["loss"] for event in lines(tmp_path / "one", "train")]
    (held,) = lines(tmp_path / "one", "validation")
    for _, folder, _ in cases:
        assert [event["loss"] for event in lines(folder, "train")] == pytest.approx(expected, rel=1e-9)
        (found,) = lines(folder, "validation")
        assert found["loss_by_language"] == pytest.approx(held["loss_by_language"], rel=1e-9)


def test_validation_counts_answers_by_language(toml: Path, tmp_path: Path) -> None:
    """Also where all tokens are trained on; every language apart, and its loss is told."""
    sets = ["data.loss='all'", "validation.windows=99"]
    run = begin(toml, tmp_path / "run", *sets)
    console = Console(record=True, width=200, file=io.StringIO())
    train(run, console, stop_step=1)
    (event,) = lines(tmp_path / "run", "validation")
    engine = Engine(run.config, ParallelContext.create(run.config.mesh))
    engine.initialise()
    for number, source in enumerate(run.plan.sources):
        batch = validation(
            run.plan, run.datasets, number, windows=99, rows_multiple=1, vocabulary=run.config.model.vocabulary,
            separate_documents=True, with_tokens=True,
        )  # fmt: skip
        dataset = run.datasets[source.name]
        documents = range(dataset.train_documents, dataset.documents)
        answers = sum(int(kept.sum()) for i in documents if not (kept := dataset.learned(i)).all())
        assert batch.labels is not None
        assert int((batch.labels >= 0).sum()) == answers
        total = sum(float(losses.sum()) for losses in engine.evaluate(batch.split(1)))
        assert event["loss_by_language"][source.language] == pytest.approx(total / answers, rel=1e-10)
    told = console.export_text()
    assert "stage 'tune': 2 epochs of" in told
    assert "loss by language:" in told
    assert f"ja {event['loss_by_language']['ja']:.4f}" in told


def test_epochs_and_resumption(toml: Path, tuned: Path, tmp_path: Path) -> None:
    """As many steps as the data has; the same run goes on, and `data plan` tells the same."""
    settings, _, datasets, _ = open_data(config.load(toml))
    windows = sum(dataset.train_tokens // LENGTH for dataset in datasets.values())
    assert len(lines(tuned, "train")) == settings.total_steps == -(-2 * windows // 8)
    assert json.loads((tuned / "config.json").read_text())["data"]["stages"][0]["epochs"] is None
    train(begin(toml, tmp_path / "run"), Console(quiet=True), stop_step=5)
    resumed = begin(toml, tmp_path / "run", resume="always")
    assert resumed.edits == []
    assert resumed.template == PLAIN
    train(resumed, Console(quiet=True))
    losses = [[event["loss"] for event in lines(folder, "train")] for folder in (tmp_path / "run", tuned)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-10)


def test_learning(tuned: Path) -> None:
    before, after = (event["loss_by_language"] for event in lines(tuned, "validation"))
    assert all(after[language] < before[language] - 0.5 for language in ("es", "ja"))


def command(*arguments: object, code: int = 0) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*map(str, arguments)])
    assert ended.value.code == code


def test_the_template_is_handed_on(toml: Path, tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From run to Hugging Face, to a checkpoint of weights, to Megatron and back; to a run that begins with them."""
    at = tuned
    for name, to in (("hf", "huggingface"), ("own", "megapoly"), ("mg", "megatron"), ("own2", "megapoly")):
        convert(open_weights(at), tmp_path / name, to, Options())  # type: ignore[arg-type]
        at = tmp_path / name
        assert template_of(open_weights(at)) == PLAIN
    texts = [{"text": row["output"]} for row in tuning.records("es") if "output" in row]
    tokenizer = load_tokenizer(toml.parent / "poly.model")
    source = tuning.write(tmp_path / "plain.jsonl", texts)
    build([source], tmp_path / "plain", tokenizer, language="es", options=BuildOptions(threads=1))
    (stage,) = config.load(toml).document()["data"]["stages"]
    assert stage["epochs"] == 2
    sets = [
        f"data.sources={{plain={{path={str(tmp_path / 'plain')!r},language='es'}}}}",
        "validation.windows=0",
        "train.global_batch=2",
    ]
    for name, first, template in (("a", tmp_path / "own", PLAIN), ("b", tmp_path / "hf", PLAIN), ("c", None, None)):
        run = begin(toml, tmp_path / name, *sets, init_from=first)
        assert run.template == template
        run.save()
        assert template_of(open_weights(tmp_path / name)) == template
    capsys.readouterr()
    ask = ("--instruction", "la casa", "--temperature", 0, "--tokens", 12)
    command("generate", tmp_path / "hf", "--prompt", "la casa\ngrande\n\n", *ask[2:])
    expected = capsys.readouterr().out.partition("|")[2]
    for folder in (tuned, tmp_path / "hf", tmp_path / "own", tmp_path / "a"):
        command("generate", folder, *ask, "--input", "grande")
        assert capsys.readouterr().out == expected
    command("generate", tuned, "--chat", "--prompt", "la casa", "--prompt", "en", *ask[2:])
    several = capsys.readouterr().out
    command("generate", tuned, "--prompt", "la casa\n\n", "--prompt", "en\n\n", *ask[2:])
    assert several == capsys.readouterr().out
    command("generate", tmp_path / "c", *ask, code=1)
    assert "c: was not tuned on instructions by megapoly" in capsys.readouterr().err


def test_several_templates_are_refused(toml: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(toml.parent / "poly.model")
    options = BuildOptions(instructions=TEMPLATES["chat"], threads=1, longest=LENGTH)
    source = toml.parent / "th.jsonl"
    build([source], tmp_path / "th", tokenizer, language="th", options=options)
    assert IndexedDataset(tmp_path / "th").pack == 0
    th = f"data.sources.th={{path={str(tmp_path / 'th')!r},language='th'}}"
    with pytest.raises(DataError, match=r"'es' and 'th' were built with templates .*; build both with one --template"):
        begin(toml, tmp_path / "run", th)


def test_a_stream_is_told(toml: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(toml.parent / "poly.model")
    options = BuildOptions(instructions=PLAIN, threads=1)
    build([toml.parent / "th.jsonl"], tmp_path / "th", tokenizer, language="th", options=options)
    th = f"data.sources.th={{path={str(tmp_path / 'th')!r},language='th'}}"
    console = Console(record=True, width=300, file=io.StringIO())
    train(begin(toml, tmp_path / "run", th, "validation.windows=0"), console, stop_step=1)
    assert "instructions in a stream, whose windows cut examples" in " ".join(console.export_text().split())
