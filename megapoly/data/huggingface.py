"""Tokenizers of the ``tokenizers`` library, to compare with. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megapoly.errors import ConfigError, DataError


class HuggingFaceTokenizer:
    """A ``tokenizer.json``. Its begin and end tokens are not counted, and nothing is cut or filled up.

    Attributes:
        vocabulary: number of ids, added tokens included.

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
