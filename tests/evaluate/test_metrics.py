"""Figures and their standard errors against the libraries and against the variance of repeated draws."""

from __future__ import annotations

import math
import random
from statistics import fmean, stdev

import pytest

from megapoly.evaluate import metrics

TEXTS = [
    ("the cat sat on the mat", "a cat sat on a mat"),
    ("rain falls", "it rains over the old town"),
    ("nobody saw her go home", "nobody saw her go home"),
    ("one two three four five", "five four three two one and more"),
]
JAPANESE = [("猫がマットの上に座っている。", "猫はマットの上に座っています。"), ("雨が町に降る。", "町に雨が降る。")]
CHINESE = [("猫坐在垫子上", "猫在垫子上坐着"), ("雨落在城里", "雨落在城里")]


def test_bleu_is_that_of_sacrebleu() -> None:
    sacrebleu = pytest.importorskip("sacrebleu")
    for texts, language, tokenizer in ((TEXTS, "en", "13a"), (CHINESE, "zh", "zh"), (JAPANESE, "ja", "ja-mecab")):
        pairs = [(text, [target]) for text, target in texts]
        expected = sacrebleu.corpus_bleu(
            [text for text, _ in texts], [[target for _, target in texts]], tokenize=tokenizer
        )
        assert metrics.bleu(pairs, language) == (pytest.approx(expected.score), None)
        assert 0 < expected.score < 100
        value, error = metrics.summary("bleu", pairs, f"en-{language}")
        assert error is not None
        assert value > 0
        assert error > 0
    assert metrics.bleu([("a b c d e", ["a b c d e"])], "de", bootstrap=10) == (pytest.approx(100), None)


def test_rouge_is_that_of_the_library() -> None:
    scorer = pytest.importorskip("rouge_score.rouge_scorer")
    for text, target in TEXTS:
        scores = scorer.RougeScorer(["rouge1", "rouge2", "rougeL"]).score(target, text)
        expected = fmean(score.fmeasure for score in scores.values())
        assert metrics.rouge(text, target, "en") == pytest.approx(expected)
        assert metrics.rouge(text, target, "de") == pytest.approx(expected)  # the same words
    spaced = [(" ".join(a), " ".join(b)) for a, b in CHINESE]
    for (text, target), (text_words, target_words) in zip(CHINESE, spaced, strict=True):
        assert metrics.rouge(text, target, "zh") == metrics.rouge(text_words, target_words, "zh") > 0
    assert metrics.rouge("Größe über alles", "größe ÜBER alles", "de") == 1
    assert metrics.rouge("", "a", "de") == 0


def test_f1_is_the_best_of_the_answers() -> None:
    pytest.importorskip("lm_eval")
    assert metrics.f1("the Big cat!", ["dog", "a big cat"], "en") == 1
    assert metrics.f1("big cat", ["big dog here"], "en") == pytest.approx(2 * (1 / 2) * (1 / 3) / (1 / 2 + 1 / 3))
    assert metrics.f1("", ["x"], "ko") == 0


def test_errors_are_the_spread_of_repeated_draws() -> None:
    draw = random.Random(0)

    def documents(count: int) -> list[tuple[float, int]]:
        sizes = [draw.randrange(20, 200) for _ in range(count)]
        return [(-size * draw.uniform(0.5, 1.5), size) for size in sizes]

    found = [metrics.summary("bits_per_byte", documents(50), "en") for _ in range(400)]
    spread = stdev(value for value, _ in found)
    assert fmean(error for _, error in found if error) == pytest.approx(spread, rel=0.1)
    value, error = metrics.bits_per_byte([(-math.log(2) * 30, 10)])
    assert (value, error) == (pytest.approx(3), None)
    assert metrics.summary("acc", [1.0, 0.0, 1.0, 1.0], "th") == (75, pytest.approx(100 * stdev([1, 0, 1, 1]) / 2))
    assert metrics.summary("acc", [1.0], "th") == (100, None)
