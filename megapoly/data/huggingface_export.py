"""A SentencePiece model as a ``tokenizer.json`` of the tokenizers library, where that has the same ids. No torch."""

from __future__ import annotations

import json
import random
from typing import Any

from megapoly.data.sentencepiece_tokenizer import SPACE, SentencePieceTokenizer

_SAMPLES = (
    "a", " a", "  two  spaces ", "a\nb\t c\r\n", "1234 12.5%", "ﬁ ① Å é e\u0301", "Die Größe – „so“",
    "日本語のテキスト。", "ข้อความ", "текст", "نص عربي", "👩‍👩‍👧 🇩🇪",
    "\u00a0\u3000", "x" * 50, "", "   ", "don't we'll", "<0x0A>",
)  # fmt: skip


def make_tokenizer_json(tokenizer: SentencePieceTokenizer) -> bytes | None:
    """The file, or None where the library is not there or has other ids for some text.

    Two forms are tried: text as it is, and with a space put before it, as LLaMA's models do. The proof is by example:
    texts of many scripts, and texts of random pieces. The names of control pieces, and the character that SentencePiece
    writes for a space, are where the library's rules differ by design.
    """
    try:
        from tokenizers import Tokenizer as Library
    except ImportError:
        return None
    vocabulary = _pieces(tokenizer)
    if vocabulary is None:
        return None
    texts = _texts(tokenizer)
    expected = tokenizer.encode_batch(texts)
    for prefix in (False, True):
        document = _document(tokenizer, vocabulary, prefix)
        content = json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()
        try:
            library = Library.from_buffer(content)
        except Exception:  # the library raises nothing narrower
            return None
        found = [each.ids for each in library.encode_batch(texts, add_special_tokens=False)]
        decoded = [library.decode(ids, skip_special_tokens=False) for ids in expected]
        if found == expected and decoded == [tokenizer.decode(ids) for ids in expected]:
            return content
    return None


def _pieces(tokenizer: SentencePieceTokenizer) -> dict[str, int] | None:
    """Ids by piece; None where two have one name."""
    vocabulary = {tokenizer.piece(i): i for i in range(tokenizer.vocabulary)}
    return vocabulary if len(vocabulary) == tokenizer.vocabulary else None


def _texts(tokenizer: SentencePieceTokenizer) -> list[str]:
    draw = random.Random(0)
    texts = list(_SAMPLES)
    for length in (1, 2, 5, 20, 100):
        for _ in range(60):
            text = tokenizer.decode([draw.randrange(tokenizer.vocabulary) for _ in range(length)])
            if "\ufffd" not in text and SPACE not in text:
                texts.append(text)
    return texts


def _document(tokenizer: SentencePieceTokenizer, vocabulary: dict[str, int], prefix: bool) -> dict[str, Any]:
    special = [i for i in range(tokenizer.vocabulary) if tokenizer.is_special(i)]
    merges = [
        (i, piece[:at], piece[at:])
        for piece, i in vocabulary.items()
        if i not in special and not tokenizer.is_byte(i)
        for at in range(1, len(piece))
        if piece[:at] in vocabulary and piece[at:] in vocabulary
    ]
    before: list[dict[str, Any]] = [{"type": "Prepend", "prepend": SPACE}] if prefix else []
    after: list[dict[str, Any]] = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": i, "content": tokenizer.piece(i), "single_word": False, "lstrip": False, "rstrip": False,
                "normalized": False, "special": True,
            }
            for i in special
        ],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [*before, {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}],
        },
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                *after,
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": tokenizer.piece(0),
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": [[left, right] for _, left, right in sorted(merges)],
        },
    }  # fmt: skip
