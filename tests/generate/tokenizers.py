"""A byte-level tokenizer of the tokenizers library, of a few merges: every text is some tokens, of one byte or more."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

tokenizers: Any = pytest.importorskip("tokenizers", reason="makes the tokenizers of these tests")

MERGES = (("h", "e"), ("l", "l"), ("he", "ll"), ("\u0120", "w"), ("o", "r"))  # \u0120 stands for a space
VOCABULARY = 2 + 256 + len(MERGES)


def byte_level(folder: Path, begins: bool = False) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json``; with ``begins`` texts begin with ``<s>``."""
    pieces = ["<s>", "</s>", *sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in MERGES)]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=list(MERGES))
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    if begins:
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>",
        "add_bos_token": not begins,  # which is not asked
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
