"""The words of a text, as ROUGE compares them, by language. No torch.

English is cut as the rouge-score library does: runs of a-z and 0-9 in lower case. Everything else is cut by ICU's word
boundaries (UAX #29, and dictionaries for Thai, Japanese, Chinese and other scripts without spaces), after NFKC and in
lower case; what holds no letter and no digit is no word.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from typing import TypeAlias

from megapoly.errors import ConfigError

Words: TypeAlias = Callable[[str], list[str]]
_ENGLISH = re.compile("[a-z0-9]+")


def load_words(language: str) -> Words:
    """What cuts texts of a language into words.

    Args:
        language: its code, such as ``th`` or ``pt-BR``, an ICU locale.

    Raises:
        ConfigError: icu4py is not installed.
    """
    if language.split("-")[0] == "en":
        return lambda text: _ENGLISH.findall(text.lower())
    try:
        from icu4py.breakers import WordBreaker
    except ImportError as error:
        raise ConfigError(
            f"words of language {language!r} need icu4py: pip install 'megapoly[instruct]'"
        ) from error  # fmt: skip

    def cut(text: str) -> list[str]:
        breaker = WordBreaker(unicodedata.normalize("NFKC", text).lower(), language)
        return [word for word in breaker if any(map(str.isalnum, word))]

    return cut
