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
from megapoly.data.huggingface_tokenizer import SETTINGS, TEMPLATE, HuggingFaceTokenizer, read_settings
from megapoly.data.load_tokenizer import load_tokenizer
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

    A ``<s>`` of megapoly's own was never trained: a document begins after the end of another.
    """
    tokenizer = _of_run(weights)
    if tokenizer is None or tokenizer.eod < 0:
        return {}
    named = tokenizer.bos if isinstance(tokenizer, HuggingFaceTokenizer) else None
    begins = [*tokenizer.begin, *([] if named is None else [named]), tokenizer.eod]
    return {"bos_token_id": begins[0], "eos_token_id": tokenizer.eod}


def kept_files(weights: Weights) -> dict[str, Write]:
    """What writes each of a tokenizer's own files, by name; of a run's tokenizer.json also what ends a text."""
    copies: dict[str, Write] = {plain_name(weights, path): copy_of(path) for path in weights.tokenizer}
    tokenizer = _of_run(weights)
    if isinstance(tokenizer, HuggingFaceTokenizer):
        copies[SETTINGS] = _json(_settings(weights, tokenizer))
    return copies


def tokenizer_files(weights: Weights) -> tuple[dict[str, Write], list[str]]:
    """What writes each file for transformers, by name, and sentences about what is not as it should be."""
    files = kept_files(weights)
    tokenizer = _of_run(weights)
    if tokenizer is None:
        return files, []
    if isinstance(tokenizer, SentencePieceTokenizer):
        content = make_tokenizer_json(tokenizer)
        if content is None:
            return files, [
                f"{tokenizer.path}: not written as tokenizer.json, which transformers needs for the same ids (it takes"
                " the package tokenizers and a byte-pair model without normalisation); use tokenizer.model with"
                " sentencepiece"
            ]
        files["tokenizer.json"] = lambda target: target.write_bytes(content)
    config = _settings(weights, tokenizer)
    if (template := template_of(weights)) is not None:
        begin = "".join(map(tokenizer.piece, tokenizer.begin))
        config |= {"chat_template": template.jinja(begin), TEMPLATE: template.model_dump()}
    return {**files, SETTINGS: _json(config)}, []


def _of_run(weights: Weights) -> Tokenizer | None:
    """The tokenizer of what megapoly has trained; None where it came with the weights from transformers."""
    paths = tokenizers_among(weights.tokenizer)
    return load_tokenizer(paths[0], ends=False) if paths and "huggingface" not in weights.origin else None


def _settings(weights: Weights, tokenizer: Tokenizer) -> dict[str, Any]:
    """``tokenizer_config.json`` of a run's tokenizer: what it had, and what it is."""
    ends = {key.removesuffix("_id"): tokenizer.piece(token) for key, token in end_ids(weights).items()}
    own: dict[str, Any] = {}
    if isinstance(tokenizer, SentencePieceTokenizer):
        ends |= {"unk_token": tokenizer.piece(0)}
        own = {"add_bos_token": False, "add_eos_token": False}
    else:
        own = read_settings(tokenizer.path.with_name(SETTINGS))
    # A class of a family puts rules of its own in place of the file's.
    kind = {"tokenizer_class": "PreTrainedTokenizerFast"}
    return {"clean_up_tokenization_spaces": False, **own, **kind, **ends}


def _json(content: dict[str, Any]) -> Write:
    return lambda target: target.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
