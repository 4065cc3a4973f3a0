"""The tokenizer's files for transformers: those that the weights came with, or made of a SentencePiece model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megapoly.checkpoint.huggingface import SENTENCEPIECE, tokenizers_among
from megapoly.checkpoint.unfinished import copy_of
from megapoly.checkpoint.weights import Weights, template_of
from megapoly.data.huggingface_export import make_tokenizer_json
from megapoly.data.huggingface_tokenizer import SETTINGS, TEMPLATE, read_settings
from megapoly.data.sentencepiece_tokenizer import SentencePieceTokenizer
from megapoly.data.tokenizer import Tokenizer

Write = Callable[[Path], object]


def plain_name(weights: Weights, path: Path) -> str:
    """Of a file of the tokenizer, in a folder of weights; that of a run may have had any name."""
    if tokenizers_among(weights.tokenizer) != [path]:
        return path.name
    return "tokenizer.json" if path.suffix == ".json" else SENTENCEPIECE


def end_ids(weights: Weights) -> dict[str, int]:
    """``bos_token_id`` and ``eos_token_id`` of a run's tokenizer; nothing of weights that came with their own.

    Where the tokenizer puts nothing before a text both are the token that ends a document: one begins after it. A
    ``<s>`` of megapoly's own was never trained.
    """
    tokenizer = _of_run(weights)
    if tokenizer is None or tokenizer.eod < 0:
        return {}
    return {"bos_token_id": (*tokenizer.begin, tokenizer.eod)[0], "eos_token_id": tokenizer.eod}


def tokenizer_files(weights: Weights) -> tuple[dict[str, Write], list[str]]:
    """What writes each file, by name, and sentences about what is not as it should be."""
    copies: dict[str, Write] = {plain_name(weights, path): copy_of(path) for path in weights.tokenizer}
    tokenizer = _of_run(weights)
    if tokenizer is None:
        return copies, []
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    if not isinstance(tokenizer, SentencePieceTokenizer):
        ends = end_ids(weights)
        config |= {key.removesuffix("_id"): tokenizer.piece(token) for key, token in ends.items()}
        config |= read_settings(tokenizer.path.with_name(SETTINGS))
        return {**copies, SETTINGS: _settings(config, weights, tokenizer)}, []
    content = make_tokenizer_json(tokenizer)
    if content is None:
        return copies, [
            f"{tokenizer.path}: not written as tokenizer.json, which transformers needs for the same ids (it takes the"
            " package tokenizers and a byte-pair model without normalisation); use tokenizer.model with sentencepiece"
        ]
    end = tokenizer.piece(tokenizer.eod)
    config |= {"bos_token": end, "eos_token": end, "unk_token": tokenizer.piece(0)}
    config |= {"add_bos_token": False, "add_eos_token": False}
    made = {"tokenizer.json": _bytes(content), SETTINGS: _settings(config, weights, tokenizer)}
    return {**copies, **made}, []


def _of_run(weights: Weights) -> Tokenizer | None:
    """The tokenizer of what megapoly has trained; None where it came with the weights from transformers."""
    paths = tokenizers_among(weights.tokenizer)
    return Tokenizer.load(paths[0], ends=False) if paths and "huggingface" not in weights.origin else None


def _settings(config: dict[str, Any], weights: Weights, tokenizer: Tokenizer) -> Write:
    """``tokenizer_config.json``, with the template where there is one."""
    if (template := template_of(weights)) is not None:
        begin = "".join(map(tokenizer.piece, tokenizer.begin))
        config = {**config, "chat_template": template.jinja(begin), TEMPLATE: template.model_dump()}
    return _bytes((json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode())


def _bytes(content: bytes) -> Write:
    return lambda target: target.write_bytes(content)
