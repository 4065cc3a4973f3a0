"""The tokenizer of a model's weights, whatever its kind, as generation needs it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megapoly.checkpoint.huggingface import sha256, tokenizers_among
from megapoly.checkpoint.weights import Weights, check_tokenizer
from megapoly.data.huggingface_tokenizer import SETTINGS, HuggingFaceTokenizer, read_settings
from megapoly.data.load_tokenizer import load_tokenizer
from megapoly.errors import DataError


class Question(str):
    """A prompt in the form of a tuned model, whose ids are those that it was tuned with."""

    __slots__ = ()


class Vocabulary:
    """Text to ids and back.

    Attributes:
        path: the tokenizer's file.
        size: number of ids.
        ends: ids that end a text.
        beginning: ids of an empty text: what begins one, or else what ended the one before.
        prefix: id that stands before a text whose first token is scored: what begins one where there is such a token,
            as in lm-evaluation-harness.
        notes: sentences for the user about what could not be proven.

    Raises:
        DataError: there is no tokenizer, or the given one is known to be another, or has more ids than the model.
    """

    def __init__(self, weights: Weights, file: Path | None = None) -> None:
        self.path = _find(weights, file)
        self._before: list[int] = []
        self._tokenizer = load_tokenizer(self.path, ends=self.path.suffix != ".json")
        self.ends = _ends(weights, self._tokenizer.eod)
        own = not isinstance(self._tokenizer, HuggingFaceTokenizer)
        if own or file is None or "huggingface" not in weights.origin:
            check_tokenizer(weights, self._tokenizer)
        if own and self._tokenizer.bos is not None and _begins(weights, self.path):
            self._before = [self._tokenizer.bos]
        self.size = self._tokenizer.vocabulary
        if file is not None and self.size > weights.model.vocabulary:
            raise DataError(
                f"{file}: has {self.size} ids, and the model of {weights.path} a vocabulary of"
                f" {weights.model.vocabulary}; give the tokenizer that it was trained with"
            )
        self.notes = [] if file is None else _unproven(weights, file)
        self.beginning = self.encode("") or [min(self.ends, default=0)]
        self.prefix = self._find_prefix()

    def encode(self, text: str, begins: bool = True) -> list[int]:
        """Ids of a text; with ``begins`` after the token that begins one, where the model was trained with it."""
        if isinstance(text, Question):
            return self._tokenizer.encode_prompts([text], [True], threads=1)[0].tolist()
        if isinstance(self._tokenizer, HuggingFaceTokenizer):
            return self._tokenizer.encode_prompt(text, begins)
        ids = self._tokenizer.encode(text)
        return self._before + ids if begins else ids

    def encode_whole(self, text: str) -> list[int]:
        """As :meth:`encode`; a text that begins with the very words of :attr:`prefix` gets no second one."""
        tokenizer = self._tokenizer
        special = isinstance(tokenizer, HuggingFaceTokenizer) and text.startswith(tokenizer.piece(self.prefix))
        return self.encode(text, begins=not special)

    def _find_prefix(self) -> int:
        if isinstance(self._tokenizer, HuggingFaceTokenizer):
            found = (self._tokenizer.bos, self._tokenizer.eod, self.beginning[-1])
            return next(token for token in found if token not in (None, -1))
        return self._before[0] if self._before else self._tokenizer.eod

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids)


def _find(weights: Weights, file: Path | None) -> Path:
    found = [file] if file else tokenizers_among(weights.tokenizer)
    if not found:
        notes = "".join(f" ({note})" for note in weights.notes)
        raise DataError(
            f"{weights.path}: comes with no tokenizer, neither a tokenizer.json nor a SentencePiece model; give one"
            f" with --tokenizer{notes}"
        )
    return found[0]


def _unproven(weights: Weights, file: Path) -> list[str]:
    """That a given ``tokenizer.json`` may be of another model, where it is no file that the weights come with.

    A SentencePiece model is refused by :func:`check_tokenizer` where it is known to be another.
    """
    if file.suffix != ".json" or not (weights.tokenizer or weights.tokenizer_sha256):
        return []
    if sha256(file) in (weights.tokenizer_sha256, *map(sha256, weights.tokenizer)):
        return []
    own = ", ".join(str(each) for each in weights.tokenizer) or f"SHA-256 {weights.tokenizer_sha256}"
    return [
        f"{file}: cannot be proven to be the tokenizer that the weights were trained with ({own}); another one gives"
        " wrong texts"
    ]


def _ends(weights: Weights, eod: int) -> frozenset[int]:
    """As the model's generation_config.json says, then its config.json, then its tokenizer."""
    kept = weights.origin.get("huggingface", {})
    for document in (kept.get("generation_config", {}), kept.get("config", {})):
        found = document.get("eos_token_id")
        if found is not None:
            return frozenset(found if isinstance(found, list) else [found])
    return frozenset() if eod < 0 else frozenset([eod])


def _begins(weights: Weights, path: Path) -> bool:
    """Whether texts begin with a token, for a SentencePiece model; LLaMA's of Hugging Face do where nothing is said."""
    settings = read_settings(path.with_name(SETTINGS)) if "huggingface" in weights.origin else {}
    by_default = "Llama" in str(settings.get("tokenizer_class", ""))
    return bool(settings.get("add_bos_token", by_default))
