"""How texts are judged, by the libraries of the field, and how sure a figure is."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Any, TypeAlias

from megapoly.errors import ConfigError

Pair: TypeAlias = tuple[str, list[str]]  # a text, and what it is compared with
BOOTSTRAP = 1000  # samples for the standard error of a corpus' BLEU
_ROUGE = ("rouge1", "rouge2", "rougeL")
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\W_\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+")
_INSTALL = "pip install 'megapoly[eval]'"


def f1(prediction: str, answers: Sequence[str], language: str) -> float:
    """The best overlap of words with an answer, of 1; as the harness's own TyDiQA counts it."""
    try:
        from lm_eval.tasks.tydiqa.utils import f1_score
    except ImportError as error:
        raise ConfigError(f"F1 needs lm-eval 0.4.13 or newer: {_INSTALL}") from error
    return max(float(f1_score(prediction, answer, language)) for answer in answers)


class _Words:
    """What rouge-score counts as words in English, in any script; each Chinese or Japanese character is one."""

    def tokenize(self, text: str) -> list[str]:
        return _WORD.findall(text.lower())


def rouge(prediction: str, target: str, language: str) -> float:
    """Mean F-measure of ROUGE-1, ROUGE-2 and ROUGE-L, of 1."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ConfigError(f"ROUGE needs rouge-score: {_INSTALL}") from error
    scorer = RougeScorer(_ROUGE, tokenizer=None if language == "en" else _Words())
    scores = scorer.score(target, prediction)
    return fmean(scores[name].fmeasure for name in _ROUGE)


def bleu_tokenizer(language: str) -> str:
    """sacreBLEU's for a language."""
    return {"ja": "ja-mecab", "zh": "zh", "ko": "char"}.get(language, "13a")


def make_bleu(language: str) -> Any:
    """sacreBLEU of texts in a language.

    Raises:
        ConfigError: it, or the MeCab that it needs for Japanese, is not installed.
    """
    try:
        from sacrebleu.metrics.bleu import BLEU
    except ImportError as error:
        raise ConfigError(f"BLEU needs sacrebleu: {_INSTALL}") from error
    try:
        return BLEU(tokenize=bleu_tokenizer(language))
    except RuntimeError as error:
        raise ConfigError(f"Japanese BLEU needs MeCab: {_INSTALL}") from error


def bleu(pairs: Sequence[Pair], language: str, bootstrap: int = 0) -> tuple[float, float | None]:
    """sacreBLEU of a corpus into ``language``, of 100, and with ``bootstrap`` samples its standard error.

    The error is a half of sacreBLEU's 95 % interval over 1.96.
    """
    metric = make_bleu(language)
    texts, references = [text for text, _ in pairs], [[targets[0] for _, targets in pairs]]
    if bootstrap and len(pairs) > 1:
        found = metric.corpus_score(texts, references, n_bootstrap=bootstrap)
        return float(found.score), float(found._ci) / 1.96  # the result has no public name for it
    return float(metric.corpus_score(texts, references).score), None


def bits_per_byte(values: Sequence[tuple[float, int]]) -> tuple[float, float | None]:
    """Bits per byte of documents, of each of which log-probability (nats) and bytes are given, and the standard error.

    The error is that of a ratio of sums, by the delta method.
    """
    size = sum(count for _, count in values)
    ratio = -sum(value for value, _ in values) / size / math.log(2)
    if len(values) < 2:
        return ratio, None
    rests = [-value / math.log(2) - ratio * count for value, count in values]
    variance = len(values) / (len(values) - 1) * sum(rest * rest for rest in rests)
    return ratio, math.sqrt(variance) / size


def mean(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean and its standard error."""
    return fmean(values), stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def summary(metric: str, values: Sequence[Any], language: str) -> tuple[float, float | None]:
    """The figure of a benchmark and its standard error, from what each record got; all but bits are of 100."""
    if metric == "bits_per_byte":
        return bits_per_byte(values)
    if metric == "bleu":
        return bleu(values, language.split("-")[-1], BOOTSTRAP)
    value, error = mean(values)
    return 100 * value, None if error is None else 100 * error
