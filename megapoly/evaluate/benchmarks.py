"""PolyLM's benchmark: what is asked, in which languages, and how an answer is judged (arXiv 2307.06018, section 5).

Understanding is measured by the option whose whole sentence is the likeliest, without examples. Texts are generated
greedily: of base models after one example and up to a line's end, of tuned ones until they end them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from megapoly.errors import ConfigError
from megapoly.evaluate.words import BECAUSE, NAMES, RIGHT, clause, lowered

Doc: TypeAlias = Mapping[str, Any]
Metric = Literal["acc", "acc_norm", "f1", "bleu", "rouge"]
MOST = 256  # tokens of a text


@dataclass(frozen=True)
class Hub:
    """Where the data are on Hugging Face's hub.

    Attributes:
        path: of the data set.
        splits: those that are measured by, and that examples come from.
        subset: of a language.
        convert: a record there to one as of a local file; None leaves it out.
    """

    path: str
    splits: tuple[str, str]
    subset: Callable[[str], str] = str
    convert: Callable[[dict[str, Any], str], dict[str, Any] | None] = lambda doc, language: doc


@dataclass(frozen=True)
class Benchmark:
    """One task in all its languages. Either it has options, or a prompt and targets.

    Attributes:
        metric: ``acc_norm`` is by the likelihood of a character of the sentence.
        languages: that it has, in the order of tables; of a translation the direction.
        file: of a language and split, in a folder of benchmarks.
        splits: the first that is there is measured, examples are from another one where there is one.
        fields: that a record has, with their types.
        options, answer: sentences of a record, and the number of the right one.
        prompt, targets: the question as text, and answers to it.
        chance: what guessing gets, of 100; None where it gets nothing.
        translated: the records of all languages are the same, in this order.
        cue, gap: of a base model: what asks for the answer, and what stands before that of an example.
    """

    name: str
    about: str
    metric: Metric
    languages: tuple[str, ...]
    file: str
    splits: tuple[str, ...]
    fields: Mapping[str, type]
    hub: Hub | None = None
    options: Callable[[Doc, str], list[str]] | None = None
    answer: Callable[[Doc], int] = lambda doc: doc["label"]
    prompt: Callable[[Doc, str], str] = lambda doc, language: ""
    targets: Callable[[Doc], list[str]] = lambda doc: [doc["target"]]
    chance: float | None = None
    translated: bool = False
    cue: str = "\n"
    gap: str = ""

    def averages(self, languages: Sequence[str]) -> dict[str, list[str]]:
        """The languages of each average; translations from English and into it are told apart."""
        if not self.is_translation:
            return {"average": list(languages)}
        into = [each for each in languages if each.endswith("-en")]
        rest = [each for each in languages if each not in into]
        return {name: part for name, part in (("X-en", into), ("en-X", rest)) if part}

    @property
    def is_translation(self) -> bool:
        return "-" in self.languages[0]

    def chosen(self, wanted: Sequence[str]) -> list[str]:
        """Those of its languages that are in ``wanted``; of a translation also by its other language."""
        parts = {each: set(each.split("-")) - {"en"} if self.is_translation else {each} for each in self.languages}
        return [each for each in self.languages if each in wanted or parts[each] & set(wanted)]


def _xnli(doc: Doc, language: str) -> list[str]:
    form, *words = RIGHT[language]
    return [form.format(first=clause(doc["premise"]), word=word, second=doc["hypothesis"].strip()) for word in words]


def _pawsx(doc: Doc, language: str) -> list[str]:
    form, yes, _, no = RIGHT[language]
    first, second = clause(doc["sentence1"]), doc["sentence2"].strip()
    return [form.format(first=first, word=word, second=second) for word in (no, yes)]


def _xcopa(doc: Doc, language: str) -> list[str]:
    form, because, therefore = BECAUSE[language]
    word = because if doc["question"] == "cause" else therefore
    first = clause(doc["premise"])
    return [form.format(first=first, word=word, second=lowered(doc[name], language)) for name in ("choice1", "choice2")]


def _xwinograd(doc: Doc, language: str) -> list[str]:
    return [doc["sentence"].replace("_", option, 1) for option in (doc["option1"], doc["option2"])]


def _tydiqa(doc: Doc, language: str) -> str:
    return (
        f"Read the context and answer the question in one or a few words in {NAMES[language]}.\n"
        f"Context: {doc['context'].strip()}\nQuestion: {doc['question'].strip()}"
    )


def _wmt(doc: Doc, language: str) -> str:
    source, target = (NAMES[each] for each in language.split("-"))
    return f"{doc['source'].strip()} Translate this sentence from {source} to {target}."


def _mtg(task: str) -> Callable[[Doc, str], str]:
    return lambda doc, language: f"{doc['source'].strip()} {task} in {NAMES[language]}."


_LABELS = ("entailment", "neutral", "contradiction")


def _hub_xnli(doc: dict[str, Any], language: str) -> dict[str, Any]:
    return {**doc, "label": _LABELS[doc["label"]]}


def _hub_xwinograd(doc: dict[str, Any], language: str) -> dict[str, Any]:
    return {**doc, "label": int(doc["answer"]) - 1}


def _hub_tydiqa(doc: dict[str, Any], language: str) -> dict[str, Any] | None:
    if not doc["id"].startswith(NAMES[language].lower()):
        return None
    return {**doc, "answers": [{"text": text} for text in doc["answers"]["text"]]}


_CHOICES = {
    "xnli": Benchmark(
        name="xnli",
        about="natural language inference: P, right? {Yes/Also/No}, H",
        metric="acc_norm",
        languages=("ar", "bg", "de", "el", "en", "es", "fr", "hi", "ru", "sw", "th", "tr", "ur", "vi", "zh"),
        file="xnli/{split}.{language}.jsonl",
        splits=("test", "dev"),
        fields={"premise": str, "hypothesis": str, "label": str},
        hub=Hub("facebook/xnli", ("test", "validation"), convert=_hub_xnli),
        options=_xnli,
        answer=lambda doc: _LABELS.index(doc["label"]),
        chance=100 / 3,
        translated=True,
    ),
    "pawsx": Benchmark(
        name="pawsx",
        about="paraphrases: S1, right? {Yes/No}, S2",
        metric="acc",
        languages=("de", "en", "es", "fr", "ja", "ko", "zh"),
        file="pawsx/{split}.{language}.jsonl",
        splits=("test", "dev"),
        fields={"sentence1": str, "sentence2": str, "label": int},
        hub=Hub("google-research-datasets/paws-x", ("test", "validation")),
        options=_pawsx,
        chance=50.0,
        translated=True,
    ),
    "xcopa": Benchmark(
        name="xcopa",
        about="causes and effects: premise {because/therefore} choice",
        metric="acc",
        languages=("et", "ht", "id", "it", "qu", "sw", "ta", "th", "tr", "vi", "zh"),
        file="xcopa/{split}.{language}.jsonl",
        splits=("test", "val"),
        fields={"premise": str, "choice1": str, "choice2": str, "question": str, "label": int},
        hub=Hub("cambridgeltl/xcopa", ("test", "validation")),
        options=_xcopa,
        chance=50.0,
        translated=True,
    ),
    "xwinograd": Benchmark(
        name="xwinograd",
        about="whom a pronoun means: a sentence with either name in its place",
        metric="acc",
        languages=("en", "fr", "ja", "pt", "ru", "zh"),
        file="xwinograd/dataset.tsv",
        splits=("test",),
        fields={"sentence": str, "option1": str, "option2": str, "label": int},
        hub=Hub(
            "Muennighoff/xwinograd",
            ("test", "test"),
            subset=lambda language: "jp" if language == "ja" else language,
            convert=_hub_xwinograd,
        ),
        options=_xwinograd,
        chance=50.0,
    ),
}

_TEXTS = {
    "tydiqa_goldp": Benchmark(
        name="tydiqa_goldp",
        about="answers from a passage: F1 of their words",
        metric="f1",
        languages=("ar", "bn", "en", "fi", "id", "ko", "ru", "sw", "te"),
        file="tydiqa_goldp/{split}.{language}.jsonl",
        splits=("dev", "train"),
        fields={"context": str, "question": str, "answers": list},
        hub=Hub(
            "google-research-datasets/tydiqa",
            ("validation", "train"),
            subset=lambda language: "secondary_task",
            convert=_hub_tydiqa,
        ),
        prompt=_tydiqa,
        targets=lambda doc: [each["text"] for each in doc["answers"]],
        cue="\nAnswer:",
        gap=" ",
    ),
    "wmt20": Benchmark(
        name="wmt20",
        about="translation of newstest2020: sacreBLEU; without --data from sacrebleu",
        metric="bleu",
        languages=("de-en", "ja-en", "ru-en", "zh-en", "en-de", "en-ja", "en-ru", "en-zh"),
        file="wmt20/{language}.jsonl",
        splits=("test",),
        fields={"source": str, "target": str},
        prompt=_wmt,
    ),
} | {
    f"mtg_{name}": Benchmark(
        name=f"mtg_{name}",
        about=f"MTG, {what}: mean of ROUGE-1, 2 and L; with --data alone",
        metric="rouge",
        languages=("de", "en", "es", "fr", "zh"),
        file=f"mtg/{name}.{{language}}.jsonl",
        splits=("test",),
        fields={"source": str, "target": str},
        prompt=_mtg(task),
    )
    for name, what, task in (
        ("story", "the end of a story", "Write the end of this story"),
        ("title", "the title of a text", "Write a title for this text"),
        ("question", "a question on a text", "Write a question that this text answers"),
        ("summary", "the summary of a text", "Write a summary of this text"),
    )
}

BENCHMARKS: dict[str, Benchmark] = {**_CHOICES, **_TEXTS}
BITS = "bits_per_byte"
GROUPS = {"mtg": [name for name in BENCHMARKS if name.startswith("mtg_")]}


def check_languages(option: str, wanted: Sequence[str], tasks: Sequence[str]) -> None:
    """Refuse languages that none of the benchmark's tasks has; of ``tasks`` empty, none is asked.

    Raises:
        ConfigError: naming one, and those that there are.
    """
    known = {part for task in tasks for each in BENCHMARKS[task].languages for part in (each, *each.split("-"))}
    for language in wanted:
        if tasks and language not in known:
            there = ", ".join(sorted(each for each in known if "-" not in each))
            raise ConfigError(f"{option} {language}: is a language of none of {', '.join(tasks)}; they have {there}")
