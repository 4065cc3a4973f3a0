"""The protocol of PolyLM's paper (arXiv 2307.06018, section 5), as the harness is given it: literally."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megapoly.evaluate.benchmarks import BENCHMARKS
from megapoly.evaluate.records import Records
from tests.evaluate import benchmark

make_task = pytest.importorskip("megapoly.evaluate.tasks", exc_type=ImportError).make_task

TYDIQA = "Read the context and answer the question in one or a few words in English.\nContext: C.\nQuestion: Q?"
# Of every task: language, metric, a record, and the sentences, or the prompt of a base and of a tuned model.
PROTOCOL: dict[str, tuple[str, str, dict[str, Any], Any]] = {
    "xnli": (
        "en", "acc_norm", {"premise": "It rains.", "hypothesis": "It is wet.", "label": "neutral"},
        ["It rains, right? Yes, It is wet.", "It rains, right? Also, It is wet.", "It rains, right? No, It is wet."],
    ),
    "pawsx": (
        "en", "acc", {"sentence1": "A b.", "sentence2": "B a.", "label": 1},
        ["A b, right? No, B a.", "A b, right? Yes, B a."],
    ),
    "xcopa": (
        "it", "acc",
        {"premise": "Piove.", "choice1": "Esco.", "choice2": "Resto.", "question": "effect", "label": 1},
        ["Piove quindi esco.", "Piove quindi resto."],
    ),
    "xwinograd": (
        "en", "acc", {"sentence": "A saw B as _ ran.", "option1": "A", "option2": "B", "label": 0},
        ["A saw B as A ran.", "A saw B as B ran."],
    ),
    "tydiqa_goldp": (
        "en", "f1", {"context": "C.", "question": "Q?", "answers": [{"text": "a"}]},
        (
            TYDIQA + "\nAnswer:",
            TYDIQA + "\n\n",
        ),
    ),
    "wmt20": (
        "de-en", "bleu", {"source": "Guten Tag.", "target": "Hello."},
        (
            "Guten Tag. Translate this sentence from German to English.\n",
            "Guten Tag. Translate this sentence from German to English.\n\n",
        ),
    ),
    **{
        f"mtg_{name}": (
            "de", "rouge", {"source": "Es war.", "target": "Ende."},
            (f"Es war. {asked} in German.\n", f"Es war. {asked} in German.\n\n"),
        )
        for name, asked in (
            ("story", "Write the end of this story"), ("title", "Write a title for this text"),
            ("question", "Write a question that this text answers"), ("summary", "Write a summary of this text"),
        )
    },
}  # fmt: skip


def made(name: str, language: str, docs: list[dict[str, Any]], tuned: bool = False) -> Any:
    return make_task(BENCHMARKS[name], language, Records(docs, docs, "test"), shots=0, tuned=tuned)


def test_every_task_is_here() -> None:
    assert set(PROTOCOL) == set(BENCHMARKS)


@pytest.mark.parametrize("name", PROTOCOL)
def test_what_the_harness_is_asked(name: str) -> None:
    language, metric, doc, asked = PROTOCOL[name]
    for tuned in (False, True):
        task = made(name, language, [doc], tuned)
        assert list(task.aggregation()) == [metric]
        if isinstance(asked, list):
            assert task.OUTPUT_TYPE == "multiple_choice"
            assert task.doc_to_text(doc) == ""
            assert task.doc_to_choice(doc) == asked
            assert task.config.target_delimiter == ""
        else:
            assert task.OUTPUT_TYPE == "generate_until"
            assert task.doc_to_text(doc) == asked[tuned]
            settings = task.config.generation_kwargs
            assert settings == {"until": [] if tuned else ["\n"], "max_gen_toks": 256, "do_sample": False}


def test_xnli_is_decided_by_the_likelihood_of_a_character() -> None:
    """The first is the likeliest, the second the likeliest for its length."""
    doc = {"premise": "It rains.", "hypothesis": "It is wet.", "label": "neutral"}
    task = made("xnli", "en", [doc])
    lengths = [len(option) for option in task.doc_to_choice(doc)]
    assert lengths[1] > lengths[0]
    likelihoods = [(-1.0 * lengths[0], False), (-1.0 * lengths[1] + 0.5, False), (-99.0, False)]
    assert likelihoods[0] > likelihoods[1]
    assert task.process_results(doc, likelihoods) == {"acc_norm": 1.0}


@pytest.mark.parametrize(
    ("language", "first", "second", "expected"),
    [
        ("ar", "ذهب", "بقي", ["ذهب، صحيح؟ نعم، بقي", "ذهب، صحيح؟ أيضا، بقي", "ذهب، صحيح؟ لا، بقي"]),
        ("th", "ไป", "อยู่", ["ไป ใช่ไหม ใช่ อยู่", "ไป ใช่ไหม นอกจากนี้ อยู่", "ไป ใช่ไหม ไม่ อยู่"]),
        ("ru", "Шёл", "Стоял", ["Шёл, верно? Да, Стоял", "Шёл, верно? Также, Стоял", "Шёл, верно? Нет, Стоял"]),
    ],
)
def test_words_are_in_the_order_of_labels(language: str, first: str, second: str, expected: list[str]) -> None:
    """Yes is entailment, also is neutral, no is contradiction."""
    doc = {"premise": first, "hypothesis": second, "label": "entailment"}
    assert made("xnli", language, [doc]).doc_to_choice(doc) == expected
    answers = [BENCHMARKS["xnli"].answer({"label": label}) for label in ("entailment", "neutral", "contradiction")]
    assert answers == [0, 1, 2]


@pytest.mark.parametrize("tuned", [False, True])
def test_texts_of_base_models_alone_have_an_example(tuned: bool, tmp_path: Path) -> None:
    run = pytest.importorskip("megapoly.evaluate.run", exc_type=ImportError)
    tasks = ("xnli", "pawsx", "xcopa", "xwinograd", "tydiqa_goldp", "wmt20", "mtg_title")
    prepared = run.prepare(run.Options(tasks, data=benchmark.make(tmp_path / "data"), tuned=tuned))
    shots = {each.name: each.task.get_config("num_fewshot") for each in prepared}
    texts = 0 if tuned else 1
    assert shots == {
        "xnli": 0, "pawsx": 0, "xcopa": 0, "xwinograd": 0, "tydiqa_goldp": texts, "wmt20": texts, "mtg_title": texts,
    }  # fmt: skip
