"""Tokenizers of the ``tokenizers`` library: those of models that come from Hugging Face. No torch."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from megapoly.data.sentencepiece_tokenizer import SPACE
from megapoly.data.tokenizer import Ids, Lengths, Tokenizer, read_file
from megapoly.errors import ConfigError, DataError

if TYPE_CHECKING:
    import tokenizers

SETTINGS = "tokenizer_config.json"  # of transformers, beside a tokenizer.json or a SentencePiece model
TEMPLATE = "megapoly_template"  # in it, beside the chat_template that was made of it
_BYTE = re.compile("<0x[0-9A-F]{2}>")


class HuggingFaceTokenizer(Tokenizer):
    """A ``tokenizer.json``. Nothing is cut or filled up.

    A document ends with the ``eos_token`` of the ``tokenizer_config.json`` or ``special_tokens_map.json`` beside it, or
    else the ``eos_token_id`` of a ``config.json``; it begins with what the tokenizer itself puts before a text.

    Raises:
        ConfigError: the library is not installed.
        DataError: the file is missing, or is no such tokenizer, or no token is known that ends a text and ``ends`` is
            set.
    """

    def __init__(self, path: str | Path, ends: bool = True) -> None:
        path = Path(path)
        try:
            import tokenizers
        except ImportError as error:
            raise ConfigError(f"{path}: reading it needs tokenizers: pip install 'megapoly[data]'") from error
        self._content = read_file(path, "a tokenizer.json")
        super().__init__(path, self._content)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(self._content)
        except Exception as error:  # the library raises nothing narrower
            raise DataError(
                f"{path}: is no tokenizer of the tokenizers library ({error}); give a tokenizer.json that it has saved"
            ) from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.encoder = f"tokenizers {tokenizers.__version__}"
        self.vocabulary = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        self.bos = self._named("bos_token")
        eos = self._named("eos_token")
        self.eod = -1 if eos is None else eos
        if ends and eos is None:
            raise DataError(
                f"{path}: no token is known that ends documents; expected an eos_token of its vocabulary in a"
                f" {SETTINGS} beside it: copy that from the model's source, or write it"
            )
        self.begin = self._before()

    def encode_flat(self, texts: Sequence[str], threads: int = 0, special: bool = False) -> tuple[Ids, Lengths]:
        """As of :class:`Tokenizer`; by one thread, or by all that the library has."""
        tokenizer = self._tokenizer if special else self._plain
        batches = [[text] for text in texts] if threads == 1 else [texts]
        try:
            encoded = [
                each.ids for batch in batches for each in tokenizer.encode_batch_fast(batch, add_special_tokens=False)
            ]
        except Exception as error:  # as above
            raise self._cannot(error) from error
        lengths = np.array([len(ids) for ids in encoded], np.int64)
        return np.fromiter(chain.from_iterable(encoded), np.int32, int(lengths.sum())), lengths

    def encode_prompts(self, prompts: Sequence[str], firsts: Sequence[bool], threads: int = 0) -> tuple[Ids, Lengths]:
        """As of :class:`Tokenizer`, and so as transformers has the text of a chat."""
        first = np.array(firsts, np.bool_)
        begin, end = "".join(map(self.piece, self.begin)), "" if first.all() else self.piece(self.eod)
        texts = [(begin if given else end) + prompt for prompt, given in zip(prompts, first)]
        ids, lengths = self.encode_flat(texts, threads, special=True)
        starts = (np.cumsum(lengths) - lengths)[~first]
        if (ids[starts] != self.eod).any():
            raise DataError(f"{self.path}: {end!r} ends documents, and is no special token; add it to added_tokens")
        return np.delete(ids, starts), lengths - ~first

    def encode_prompt(self, text: str, begins: bool = True) -> list[int]:
        """Ids of a text as transformers has them, whatever ``add_bos_token`` of its settings says.

        The words of special tokens stand for these. With ``begins`` the tokenizer's begin and end are added.

        Raises:
            DataError: the tokenizer has no token for a part of the text.
        """
        try:
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=begins).ids
        except Exception as error:  # as above
            raise self._cannot(error) from error
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def piece(self, i: int) -> str:
        return str(self._tokenizer.id_to_token(i) or "")

    def byte_lengths(self) -> npt.NDArray[np.int32]:
        kinds = re.findall(
            r'"type":"(\w+)"', json.dumps(json.loads(self._content).get("decoder"), separators=(",", ":"))
        )
        added = self._tokenizer.get_added_tokens_decoder()
        lengths = np.zeros(self.vocabulary, np.int32)
        for piece, token in self._tokenizer.get_vocab(with_added_tokens=True).items():
            if token in added:
                lengths[token] = 0 if added[token].special else len(piece.encode())
            elif "ByteLevel" in kinds:
                lengths[token] = len(piece)  # a letter for each byte
            elif "ByteFallback" in kinds and _BYTE.fullmatch(piece):
                lengths[token] = 1
            else:
                lengths[token] = len(piece.replace(SPACE, " ").encode())
        return lengths

    @cached_property
    def loses(self) -> bool:
        """Whether a character that it has no token for vanishes."""
        try:
            return not self.encode("\ue0b7")  # of private use
        except DataError:  # such a character is refused
            return False

    @cached_property
    def _plain(self) -> tokenizers.Tokenizer:
        """The same, to which the words of special tokens are text as any."""
        import tokenizers

        plain = tokenizers.Tokenizer.from_buffer(self._content)
        plain.no_truncation()
        plain.no_padding()
        plain.encode_special_tokens = True
        return plain

    def _before(self) -> tuple[int, ...]:
        """What the tokenizer puts before a text: before a letter, or the first of its own words that it encodes."""
        begin: tuple[int, ...] = ()
        for text in chain("a", self._words()):
            try:
                bare, whole = self.encode_prompt(text, begins=False), self.encode_prompt(text)
            except DataError:  # it has no token for this
                continue
            if bare:
                starts = (i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
                begin = tuple(whole[: next(starts, 0)])
                break
        words = "".join(map(self.piece, begin))
        if tuple(self.encode_prompt(words, begins=False)) != begin:
            raise DataError(f"{self.path}: {words!r} begins a text, and is no special token; add it to added_tokens")
        return begin

    def _words(self) -> Iterator[str]:
        """Its words that are no special tokens, by id: the library's dictionary has another order in each process."""
        added = self._tokenizer.get_added_tokens_decoder()
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=False)
        yield from sorted(vocabulary.keys() - {token.content for token in added.values()}, key=vocabulary.__getitem__)

    def _named(self, name: str) -> int | None:
        """The id of the token of a name, ``eos_token`` or ``bos_token``, as the files beside say."""
        for settings in map(self.path.with_name, (SETTINGS, "special_tokens_map.json")):
            token = read_settings(settings).get(name)
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str) and (found := self._tokenizer.token_to_id(token)) is not None:
                return int(found)
        found = read_settings(self.path.with_name("config.json")).get(f"{name}_id")
        found = found[0] if isinstance(found, list) and found else found
        return found if isinstance(found, int) and self._tokenizer.id_to_token(found) is not None else None

    def _cannot(self, error: Exception) -> DataError:
        return DataError(f"{self.path}: cannot encode a text ({error})")


def read_settings(path: Path) -> dict[str, Any]:
    """The values of a ``tokenizer_config.json`` or the like; none where there is no such file.

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
