"""ROUGE-L between word sequences, and a pool in which no two are alike. No torch.

With L the length of the longest common subsequence of m and n words, precision L/m and recall L/n, the F measure is
2L / (m + n) (Lin 2004, beta = 1). Thresholds are compared in whole numbers, so that a pair exactly on one is decided
the same everywhere: it reaches it. The rouge-score library computes 2pr / (p + r) in floating point, which on such a
tie may come out one rounding below.

A pool holds each sequence as a string, a character for each distinct word. rapidfuzz compares a block of candidates
with the whole pool in C++, in SIMD lanes, with the threshold as its cut-off (which skips by length); the few that it
finds are then decided in whole numbers. So the result is that of the brute force.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from megapoly.errors import ConfigError

_SLACK = 1e-4  # rapidfuzz's scores come in fp32
_SURROGATES = range(0xD800, 0xE000)  # are no characters
_CHARACTERS = 0x110000 - len(_SURROGATES)


class Pool:
    """Word sequences, of which none that :meth:`sift` let in reaches a ROUGE-L with another.

    Args:
        threshold: of the F measure, above 0. A float stands for the decimal number that it prints as.

    Raises:
        ConfigError: rapidfuzz is not installed.
    """

    def __init__(self, threshold: float | Fraction) -> None:
        try:
            from rapidfuzz import process
            from rapidfuzz.distance import Indel, LCSseq
        except ImportError as error:
            raise ConfigError("self-instruct needs rapidfuzz: pip install 'megapoly[instruct]'") from error
        self._cdist, self._indel, self._common = process.cdist, Indel.normalized_similarity, LCSseq.similarity
        self._threshold = exact(threshold)
        self._codes: dict[str, int] = {}
        self._members: list[str] = []

    def __len__(self) -> int:
        return len(self._members)

    def add(self, words: Sequence[str]) -> None:
        """Put a sequence in, whatever it is like."""
        self._members.append(_code(words, self._codes))

    def sift(self, block: Sequence[Sequence[str]], wanted: Sequence[bool]) -> list[int | None]:
        """Put candidates in, one after another: those that are wanted, and alike to none that is there by then.

        Returns:
            for each the number of the first member that it reaches the threshold with; None where there is none.
        """
        codes = [_code(words, self._codes) for words in block]
        found = self._alike(codes)
        before = len(self._members)
        for i, code in enumerate(codes):
            if found[i] is None:
                later = enumerate(self._members[before:], before)
                found[i] = next((number for number, each in later if self._reaches(code, each)), None)
            if found[i] is None and wanted[i]:
                self._members.append(code)
        return found

    def _alike(self, codes: list[str]) -> list[int | None]:
        if not self._members or not codes:
            return [None] * len(codes)
        cutoff = max(float(self._threshold) - _SLACK, 1e-9)
        scores = self._cdist(codes, self._members, scorer=self._indel, score_cutoff=cutoff, dtype=np.float32)
        found: list[int | None] = [None] * len(codes)
        for i in np.flatnonzero(scores.any(axis=1)).tolist():
            near = np.flatnonzero(scores[i]).tolist()
            found[i] = next((number for number in near if self._reaches(codes[i], self._members[number])), None)
        return found

    def exceeds(self, one: Sequence[str], other: Sequence[str], threshold: Fraction) -> bool:
        """Whether the F measure of two sequences, in the pool or not, is more than ``threshold``."""
        codes: dict[str, int] = {}
        a, b = _code(one, codes), _code(other, codes)
        total = len(a) + len(b)
        return total > 0 and 2 * self._common(a, b) * threshold.denominator > threshold.numerator * total

    def _reaches(self, one: str, other: str) -> bool:
        return reaches(self._common(one, other), len(one), len(other), self._threshold)


def _code(words: Sequence[str], codes: dict[str, int]) -> str:
    """The words as characters, new ones with the next that are free in ``codes``."""
    numbers = [codes.setdefault(word, len(codes)) for word in words]
    if len(codes) > _CHARACTERS:
        raise ConfigError(f"more than {_CHARACTERS:,} distinct words in the tasks of a language: run it in two folders")
    return "".join([chr(n if n < _SURROGATES.start else n + len(_SURROGATES)) for n in numbers])


def exact(threshold: float | Fraction) -> Fraction:
    """A threshold as the fraction that its decimals say."""
    return threshold if isinstance(threshold, Fraction) else Fraction(str(threshold))


def reaches(common: int, one: int, other: int, threshold: Fraction) -> bool:
    """Whether 2 ``common`` / (``one`` + ``other``) is ``threshold`` or more; never of two empty sequences."""
    return one + other > 0 and 2 * common * threshold.denominator >= threshold.numerator * (one + other)
