"""Loading a tokenizer of either kind. No torch."""

from __future__ import annotations

from pathlib import Path

from megapoly.data.huggingface_tokenizer import HuggingFaceTokenizer
from megapoly.data.sentencepiece_tokenizer import SentencePieceTokenizer
from megapoly.data.tokenizer import Tokenizer
from megapoly.errors import DataError


def load_tokenizer(path: str | Path, ends: bool = True) -> Tokenizer:
    """Load a tokenizer: a ``.json`` of the ``tokenizers`` library, or else a SentencePiece model.

    Args:
        ends: refuse one that has no id to end documents with.

    Raises:
        DataError: the file is missing, or is no tokenizer, or cannot end documents and ``ends`` is set.
        ConfigError: the ``tokenizers`` library is needed, and is not installed.
    """
    path = Path(path)
    if path.is_dir():
        raise DataError(f"{path}: is a folder; give the tokenizer.json or the SentencePiece model in it")
    return (HuggingFaceTokenizer if path.suffix == ".json" else SentencePieceTokenizer)(path, ends)
