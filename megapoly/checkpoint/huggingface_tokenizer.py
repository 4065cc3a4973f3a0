"""The tokenizer's files for transformers: those that the weights came with, or made of a SentencePiece model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from megapoly.checkpoint.huggingface import SENTENCEPIECE
from megapoly.checkpoint.unfinished import copy_of
from megapoly.checkpoint.weights import Weights, template_of
from megapoly.data.huggingface import TEMPLATE
from megapoly.data.huggingface_export import make_tokenizer_json
from megapoly.data.tokenizer import Tokenizer

Write = Callable[[Path], object]


def own_model(weights: Weights) -> Path | None:
    """The SentencePiece model of what megapoly has trained; None where weights and tokenizer came from transformers."""
    paths = weights.tokenizer
    own = len(paths) == 1 and paths[0].suffix == ".model" and "huggingface" not in weights.origin
    return paths[0] if own else None


def plain_name(weights: Weights, path: Path) -> str:
    """Of a file of the tokenizer, in a folder of weights; a lone SentencePiece model may have had any name."""
    return SENTENCEPIECE if path.suffix == ".model" and len(weights.tokenizer) == 1 else path.name


def end_ids(weights: Weights) -> dict[str, int]:
    """``bos_token_id`` and ``eos_token_id`` of a run's tokenizer.

    Both are </s>: it ends a document, and a document begins after it. <s> was never trained.
    """
    model = own_model(weights)
    if model is None:
        return {}
    end = Tokenizer.load(model).eod
    return {"bos_token_id": end, "eos_token_id": end}


def tokenizer_files(weights: Weights) -> tuple[dict[str, Write], list[str]]:
    """What writes each file, by name, and sentences about what is not as it should be."""
    model = own_model(weights)
    if model is None:
        return {plain_name(weights, path): copy_of(path) for path in weights.tokenizer}, []
    files: dict[str, Write] = {SENTENCEPIECE: copy_of(model)}
    tokenizer = Tokenizer.load(model)
    content = make_tokenizer_json(tokenizer)
    if content is None:
        return files, [
            f"{model}: not written as tokenizer.json, which transformers needs for the same ids (it takes the package"
            " tokenizers and a byte-pair model without normalisation); use tokenizer.model with sentencepiece"
        ]
    end = tokenizer.piece(tokenizer.eod)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": end,
        "eos_token": end,
        "unk_token": tokenizer.piece(0),
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
    }
    if (template := template_of(weights)) is not None:
        config |= {"chat_template": template.jinja(), TEMPLATE: template.model_dump()}
    files["tokenizer.json"] = _bytes(content)
    files["tokenizer_config.json"] = _bytes((json.dumps(config, indent=2) + "\n").encode())
    return files, []


def _bytes(content: bytes) -> Write:
    return lambda target: target.write_bytes(content)
