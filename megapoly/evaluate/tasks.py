"""The benchmark as tasks of lm-evaluation-harness."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from lm_eval.api.task import ConfigurableTask, Task

from megapoly.data.readers import BadRecords, read_texts
from megapoly.data.templates import TEMPLATES, Template
from megapoly.errors import DataError
from megapoly.evaluate import metrics
from megapoly.evaluate.benchmarks import BITS, MOST, Benchmark, Doc
from megapoly.evaluate.records import Records


def make_task(benchmark: Benchmark, language: str, records: Records, *, shots: int, tuned: bool) -> Task:
    """A benchmark in one language.

    Args:
        shots: examples before the question; others than it.
        tuned: a text goes on until the model ends it, else to a line's end; and the prompt is that of a tuned model.

    Raises:
        DataError: there are fewer records than examples.
    """
    others = records.examples is not records.docs
    if shots > len(records.examples) - (not others):
        raise DataError(f"{benchmark.name} in {language}: has no {shots} examples; give fewer with --few-shot")
    splits = {"test": records.docs, **({"examples": records.examples} if others else {})}
    common: dict[str, Any] = {
        "task": f"{benchmark.name}/{language}",
        "custom_dataset": _of({name: Dataset.from_list(docs) for name, docs in splits.items()}),
        "test_split": "test",
        "fewshot_split": "examples" if others else "test",
        "num_fewshot": shots,
        "metadata": {"version": 1},
    }
    made = _options(benchmark, language) if benchmark.options else _text(benchmark, language, tuned)
    return ConfigurableTask(config={**common, **made})


def tuned_prompt(benchmark: Benchmark, language: str, template: Template) -> Callable[[Doc], str]:
    """The question as a model that is tuned by ``template`` is asked."""
    return lambda doc: template.turn(benchmark.prompt(doc, language))


def make_bits_task(language: str, path: Path, limit: int | None) -> Task:
    """Bits per byte of the texts of a file; an object a line with ``text``, or as other corpora are read."""
    docs = []
    for text in read_texts([path], "text", BadRecords()):
        docs.append({"text": text})
        if len(docs) == limit:
            break
    if not docs:
        raise DataError(f"{path}: has no text; expected an object with 'text' a line")
    return ConfigurableTask(
        config={
            "task": f"{BITS}/{language}",
            "custom_dataset": _of({"test": Dataset.from_list(docs)}),
            "test_split": "test",
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": lambda doc: doc["text"],
            "metric_list": [{"metric": BITS, "aggregation": BITS, "higher_is_better": False}],
            "metadata": {"version": 1},
        }
    )


def _options(benchmark: Benchmark, language: str) -> dict[str, Any]:
    options = benchmark.options
    assert options
    return {
        "output_type": "multiple_choice",
        "doc_to_text": lambda doc: "",
        "doc_to_choice": lambda doc: options(doc, language),
        "doc_to_target": benchmark.answer,
        "target_delimiter": "",
        "metric_list": [{"metric": benchmark.metric, "aggregation": "mean", "higher_is_better": True}],
    }


def _text(benchmark: Benchmark, language: str, tuned: bool) -> dict[str, Any]:
    judge = _judge(benchmark, language)

    def base(doc: Doc) -> str:
        return benchmark.prompt(doc, language) + benchmark.cue

    return {
        "output_type": "generate_until",
        "doc_to_text": tuned_prompt(benchmark, language, TEMPLATES["multialpaca"]) if tuned else base,
        "doc_to_target": lambda doc: benchmark.targets(doc)[0],
        "target_delimiter": "" if tuned else benchmark.gap,
        "generation_kwargs": {"until": [] if tuned else ["\n"], "max_gen_toks": MOST, "do_sample": False},
        "process_results": judge,
        "metric_list": [
            {"metric": benchmark.metric, "aggregation": _aggregation(benchmark, language), "higher_is_better": True}
        ],
    }


def _judge(benchmark: Benchmark, language: str) -> Callable[[Doc, Sequence[str]], Mapping[str, Any]]:
    def judge(doc: Doc, results: Sequence[str]) -> dict[str, Any]:
        text, targets = results[0].strip(), benchmark.targets(doc)
        if benchmark.metric == "bleu":
            return {"bleu": (text, targets)}
        if benchmark.metric == "rouge":
            return {"rouge": metrics.rouge(text, targets[0], language)}
        return {"f1": metrics.f1(text, targets, language)}

    return judge


def _aggregation(benchmark: Benchmark, language: str) -> Any:
    if benchmark.metric != "bleu":
        return "mean"
    return lambda pairs: metrics.bleu(pairs, language.split("-")[-1])[0]


def _of(splits: dict[str, Dataset]) -> Callable[..., dict[str, Dataset]]:
    return lambda **rest: splits
