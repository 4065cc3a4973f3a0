"""Texts that grow by tokens against the text of all tokens: characters stay whole, stop strings are never shown."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import sentencepiece

from megapoly.data.huggingface_tokenizer import HuggingFaceTokenizer
from megapoly.data.load_tokenizer import load_tokenizer
from megapoly.data.tokenizer import Tokenizer
from megapoly.data.tokenizer_training import train_tokenizer
from megapoly.generate.text import GrowingText
from tests.generate.tokenizers import byte_level

TEXTS = (
    "hello world",
    "中文字符，没有空格。",
    "ภาษาไทยไม่มีช่องว่าง",
    "mixed 中 ไทย 🙂 e\u0301 \ufffd end",
    "  two  spaces\nand lines\n",
)


class Words:
    """A token is a string."""

    def __init__(self, *words: str) -> None:
        self.words = words

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self.words[i] for i in ids)


@pytest.fixture(scope="module", params=["sentencepiece", "byte level"])
def tokenizer(request: pytest.FixtureRequest, toml: Path, tmp_path_factory: pytest.TempPathFactory) -> object:
    folder = tmp_path_factory.mktemp("tokenizer")
    if request.param == "byte level":
        byte_level(folder)
        return HuggingFaceTokenizer(folder / "tokenizer.json")
    # Of English alone, so that the other scripts fall back to bytes.
    made = train_tokenizer({"en": [toml.parent / "en.jsonl"]}, folder / "en.model", vocabulary=300)
    return load_tokenizer(made.path)


@pytest.mark.parametrize("text", TEXTS)
def test_parts_join_to_the_text_and_split_no_character(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert len(ids) > len(text) or text.isascii()  # bytes
    growing = GrowingText(tokenizer, tokenizer.encode("a prompt: "))
    parts = [growing.add(i) for i in ids]
    parts.append(growing.finish())
    assert "".join(parts) == growing.text == text
    if "\ufffd" not in text:
        assert "\ufffd" not in "".join(parts)
        assert not parts[-1]  # nothing of a whole text is left to the end


def test_a_tokenizer_that_adds_a_space_before_every_text(toml: Path, tmp_path: Path) -> None:
    """As LLaMA's: its decoder takes the space away again, which would join the first word to the prompt."""
    lines = [json.loads(line)["text"] for line in (toml.parent / "en.jsonl").read_text().splitlines()]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(tmp_path / "llama"), vocab_size=300, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", minloglevel=2,
    )  # fmt: skip
    tokenizer = load_tokenizer(tmp_path / "llama.model")
    text = "abc def 中 ghi"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    for begin in range(1, len(ids) - 1):
        prompt = tokenizer.decode(ids[:begin])
        if "\ufffd" not in prompt:
            growing = GrowingText(tokenizer, ids[:begin])
            assert prompt + "".join(growing.add(i) for i in ids[begin:]) + growing.finish() == text


def test_bytes_that_are_no_character_are_shown_at_the_end(tokenizer: Tokenizer) -> None:
    whole = tokenizer.encode("a中")
    growing = GrowingText(tokenizer, tokenizer.encode("a "))
    assert [growing.add(i) for i in whole[:-1]] == ["a", "", ""]
    rest = growing.finish()
    assert rest
    assert set(rest) == {"\ufffd"}
    growing = GrowingText(tokenizer, tokenizer.encode("a "))
    assert "".join(growing.add(i) for i in (*whole[:-1], *tokenizer.encode("a"))).endswith("\ufffda")


def test_an_empty_prompt_keeps_the_first_character(tokenizer: Tokenizer) -> None:
    growing = GrowingText(tokenizer, [tokenizer.encode("x")[-1]])
    assert "".join(growing.add(i) for i in tokenizer.encode("中 and")) == "中 and"


@pytest.mark.parametrize(
    ("words", "stop", "parts"),
    [
        (("one ", "END", " two"), ("END",), ["one ", ""]),
        (("one E", "N", "D two"), ("END",), ["one ", "", ""]),  # over three tokens
        (("E", "N", "X", "END"), ("END",), ["", "", "ENX", ""]),  # it only began
        (("a", "a", "a", "b"), ("aab",), ["", "", "a", ""]),
        (("xEND",), ("END", "xE"), [""]),  # the first one in the text
        (("ab", "c"), ("b", "abc"), ["a"]),
        (("\n", "\n", "Q"), ("\n\nQ",), ["", "", ""]),
    ],
)
def test_nothing_of_a_stop_string_is_shown(words: tuple[str, ...], stop: tuple[str, ...], parts: list[str]) -> None:
    growing = GrowingText(Words(*words), [], stop)
    shown = [growing.add(i) for i in range(len(parts))]
    assert shown == parts
    assert growing.stopped
    assert growing.text == "".join(parts)
    assert growing.finish() == ""


def test_what_only_began_a_stop_string_is_shown_at_the_end() -> None:
    growing = GrowingText(Words("one E", "N"), [], ("END",))
    assert [growing.add(0), growing.add(1)] == ["one ", ""]
    assert not growing.stopped
    assert growing.finish() == "EN"
    assert growing.text == "one EN"


def test_a_stop_string_of_several_scripts_over_bytes(tokenizer: Tokenizer) -> None:
    prompt, text = "a prompt: ", "ok 中文 stop"
    growing = GrowingText(tokenizer, tokenizer.encode(prompt), ("文 s",))
    for i in tokenizer.encode(text):
        growing.add(i)
        if growing.stopped:
            break
    assert growing.stopped
    assert growing.text == "ok 中"
