"""ROUGE-L and the filter beside the rouge-score library and its brute force."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable, Sequence
from fractions import Fraction

import pytest

from megapoly.instruct.rouge import Pool, exact, reaches
from megapoly.instruct.words import load_words
from tests.instruct import runs

rouge_scorer = pytest.importorskip("rouge_score.rouge_scorer", reason="the oracle")
Words = Callable[[str], list[str]]


class _Tokenizer:
    def __init__(self, words: Words) -> None:
        self.tokenize = words


def f_measure(words: Words) -> Callable[[str, str], float]:
    scorer = rouge_scorer.RougeScorer(["rougeL"], tokenizer=_Tokenizer(words))
    return lambda one, other: scorer.score(one, other)["rougeL"].fmeasure


def brute_force(texts: Sequence[str], words: Words, threshold: float) -> list[int | None]:
    """The filter as rouge-score has it, one pair after another; its number on a tie is one rounding off at most."""
    score, kept = f_measure(words), []
    found: list[int | None] = []
    for text in texts:
        like = next((i for i, each in enumerate(kept) if score(each, text) >= threshold - 1e-12), None)
        found.append(like)
        if like is None:
            kept.append(text)
    return found


def sift(texts: Sequence[str], words: Words, threshold: float, size: int) -> list[int | None]:
    pool = Pool(threshold)
    cut = [words(text) for text in texts]
    found: list[int | None] = []
    for begin in range(0, len(cut), size):
        block = cut[begin : begin + size]
        found += pool.sift(block, [True] * len(block))
    assert len(pool) == found.count(None)
    return found


@pytest.mark.parametrize(("size", "threshold"), [(17, 0.7), (1, 0.5), (400, 0.2), (5, 1.0)])
def test_the_filter_is_the_brute_force_on_random_texts(size: int, threshold: float) -> None:
    pick = random.Random(size * threshold)
    texts = [" ".join(pick.choices("abcdefgh", k=pick.randint(1, 14))) for _ in range(120)]
    texts += [" ".join(pick.choices(["w" + str(i) for i in range(300)], k=pick.randint(60, 150))) for _ in range(6)]
    texts += [text + " z" for text in texts[::7]]
    words = load_words("en")
    expected = brute_force(texts, words, threshold)
    assert sift(texts, words, threshold, size) == expected
    assert 0 < expected.count(None) < len(texts)


@pytest.mark.skipif(not runs.REAL.exists(), reason="the text of development is not beside the checkout")
@pytest.mark.parametrize("language", ["es", "ja", "pt"])
def test_the_filter_is_the_brute_force_on_real_instructions(language: str) -> None:
    with gzip.open(runs.REAL / f"multialpaca.{language}.jsonl.gz", "rt", encoding="utf-8") as file:
        texts = [json.loads(line)["instruction"] for line in file]
    sample = random.Random(0).sample(texts, 120)
    sample += [text + " " + text[:9] for text in sample[::9]]
    words = load_words(language)
    assert sift(sample, words, 0.7, 17) == brute_force(sample, words, 0.7)


def test_words_of_english_are_those_of_rouge_score() -> None:
    from rouge_score.tokenize import tokenize

    words = load_words("en-US")
    for text in ("Don't stop: 3.14 of İstanbul's naïve co-operation_ﬁne", "", "!?", "Ａ b", "one\n\ttwo"):
        assert words(text) == tokenize(text, None)
    pick = random.Random(0)
    for _ in range(200):
        text = "".join(chr(pick.choice((pick.randrange(32, 127), pick.randrange(0x20, 0x3000)))) for _ in range(30))
        assert words(text) == tokenize(text, None)


@pytest.mark.parametrize("language", ["es", "de", "ru", "vi"])
def test_plain_words_are_cut_by_icu_as_by_rouge_score(language: str) -> None:
    text = "Write 12 short poems, please: on rain; (and) WIND!"
    assert load_words(language)(text) == load_words("en")(text)
    one, other = "give me a list of ten fruits", "give a short list of ten green fruits"
    assert f_measure(load_words(language))(one, other) == f_measure(load_words("en"))(one, other)


@pytest.mark.parametrize(
    ("language", "text", "expected"),
    [
        ("th", "ฉันรักประเทศไทยมาก", ["ฉัน", "รัก", "ประเทศไทย", "มาก"]),
        ("ja", "カリフォルニア大学はどこですか？", ["カリフォルニア", "大学", "は", "どこ", "です", "か"]),
        ("zh", "你好，世界。", ["你好", "世界"]),
        ("ko", "나는 학교에 갔다.", ["나는", "학교에", "갔다"]),
        ("ar", "ما هي عاصمة مصر؟", ["ما", "هي", "عاصمة", "مصر"]),
        ("es", "¿Cuál es el MÁXIMO, 😀 ½ ＡＢ?", ["cuál", "es", "el", "máximo", "1⁄2", "ab"]),
    ],
)
def test_words_of_languages(language: str, text: str, expected: list[str]) -> None:
    assert load_words(language)(text) == expected


def test_a_tie_reaches_the_threshold() -> None:
    """7 of 10 words is 0.7, whatever floating point makes of it."""
    assert exact(0.7) == Fraction(7, 10)
    assert reaches(7, 10, 10, exact(0.7))
    assert not reaches(699, 1000, 1000, exact(0.7))
    words = load_words("en")
    for common, one, other in ((7, 10, 10), (7, 8, 12), (14, 20, 20), (21, 25, 35), (35, 40, 60)):
        texts = [" ".join(f"c{i}" for i in range(common)) + "".join(f" {side}{i}" for i in range(size - common))
                 for side, size in (("a", one), ("b", other))]  # fmt: skip
        assert sift(texts, words, 0.7, 2) == [None, 0]
        assert f_measure(words)(*texts) == pytest.approx(0.7, abs=2e-16)


def test_what_is_not_wanted_is_judged_and_stays_out() -> None:
    pool = Pool(0.7)
    pool.add(["a", "b", "c"])
    block = [["x", "y"], ["x", "y"], ["a", "b", "c"], ["x", "y"]]
    assert pool.sift(block, [False, True, True, True]) == [None, None, 0, 1]
    assert len(pool) == 2


def test_an_input_exceeds_above_the_threshold_alone() -> None:
    pool, half = Pool(0.7), Fraction(1, 2)
    assert not pool.exceeds(["a", "b"], ["a", "c"], half)
    assert pool.exceeds(["a", "b"], ["a"], half)
    assert not pool.exceeds([], [], half)
