"""Tokenizers of the ``tokenizers`` library: those of models that come from Hugging Face, and others to compare with. No
torch.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megapoly.errors import ConfigError, DataError

SETTINGS = "tokenizer_config.json"  # of transformers, beside a tokenizer.json or a SentencePiece model
TEMPLATE = "megapoly_template"  # in it, beside the chat_template that was made of it


class HuggingFaceTokenizer:
    """A ``tokenizer.json``. Its begin and end tokens are not counted, and nothing is cut or filled up.

    Attributes:
        vocabulary: number of ids, added tokens included.
        bos, eos: ids of the tokens that begin and end a text, as the ``tokenizer_config.json`` beside it says; None
            where it does not.

    Raises:
        ConfigError: the library is not installed.
        DataError: the file is missing, or is no such tokenizer.
    """

    def __init__(self, path: Path) -> None:
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise ConfigError(f"{path}: reading it needs tokenizers: pip install 'megapoly[data]'") from error
        self.path = path
        try:
            content = path.read_bytes()
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}); give a tokenizer.json") from error
        try:
            self._tokenizer = Tokenizer.from_buffer(content)
        except Exception as error:  # the library raises nothing narrower
            raise DataError(
                f"{path}: is no tokenizer of the tokenizers library ({error}); give a tokenizer.json that it has saved"
            ) from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.vocabulary = int(self._tokenizer.get_vocab_size(with_added_tokens=True))
        settings = read_settings(path.with_name(SETTINGS))
        self.bos, self.eos = (self._special(settings.get(name)) for name in ("bos_token", "eos_token"))

    def encode(self, text: str, begins: bool = True) -> list[int]:
        """Ids of a text; with ``begins`` after the token that begins one where the tokenizer adds it.

        As transformers does, whatever ``add_bos_token`` of its settings says.

        Raises:
            DataError: the tokenizer has no token for a part of the text.
        """
        try:
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=begins).ids
        except Exception as error:  # as above
            raise DataError(f"{self.path}: cannot encode a text ({error})") from error
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; special tokens have none."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """Tokens of every text.

        Raises:
            DataError: the tokenizer has no token for a part of a text, as some without byte fallback.
        """
        try:
            encoded = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        except Exception as error:  # as above
            raise DataError(f"{self.path}: cannot encode a text ({error})") from error
        return [len(each.ids) for each in encoded]

    def _special(self, token: Any) -> int | None:
        """The id of a token as settings name it: its text, or an object with that."""
        if isinstance(token, dict):
            token = token.get("content")
        found = self._tokenizer.token_to_id(token) if isinstance(token, str) else None
        return None if found is None else int(found)

    def piece(self, token: int) -> str:
        """The text of one token, special ones too."""
        return str(self._tokenizer.id_to_token(token))


def read_settings(path: Path) -> dict[str, Any]:
    """The values of a ``tokenizer_config.json``; none where there is no such file.

    Raises:
        DataError: it is no JSON object.
    """
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as JSON ({error}); copy it again from its source") from error
    if not isinstance(found, dict):
        raise DataError(f"{path}: holds {type(found).__name__}, expected an object of settings")
    return found
