"""The sidecar of an indexed dataset: PREFIX.json, which only megapoly writes. No torch."""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic

from megapoly.data.templates import Template
from megapoly.errors import DataError

Count = Annotated[int, pydantic.Field(ge=0, lt=2**63)]
Digits = Annotated[str, pydantic.Field(pattern="^([0-9a-f]{8})*$")]

# How the text of a sidecar ends, which has no checksum elsewhere.
_END = re.compile(rb'(.*),\n "crc32": "([0-9a-f]{8})"\n\}\n', re.DOTALL)


class _Frozen(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class TokenizerMark(_Frozen):
    """The tokenizer that wrote a dataset; ``begin`` and ``eod`` are the ids around every document."""

    sha256: str
    vocabulary: Annotated[int, pydantic.Field(ge=0, le=2**31)]
    begin: tuple[Count, ...] = ()
    eod: Count | None = None


class Validation(_Frozen):
    """The held-out documents: the share that was asked for, the seed of the split, and what came out."""

    fraction: float
    seed: int
    documents: Count
    tokens: Count
    bytes: Count


class Checksums(_Frozen):
    """CRC-32 of every block of ``block`` bytes of the .bin and the .idx: eight hexadecimal digits each, joined."""

    block: int
    bin: Digits
    idx: Digits

    @staticmethod
    def join(crcs: Sequence[int]) -> str:
        return "".join(f"{crc:08x}" for crc in crcs)

    @staticmethod
    def split(digits: str) -> list[int]:
        return [int(digits[i : i + 8], 16) for i in range(0, len(digits), 8)]


class Duplicates(_Frozen):
    """Documents that were left out, since an earlier one has the same tokens."""

    documents: Count = 0
    tokens: Count = 0


class Padding(_Frozen):
    """How packs were filled.

    The room that was left in a pack is a document of its own, the last one of the pack: a row of ``id``, which ends
    every other document and begins none. ``documents`` and ``tokens`` count these rows. ``cut`` counts the documents
    that were longer than a pack, and are several documents now.
    """

    id: Count
    documents: Count
    tokens: Count
    cut: Count


class Place(_Frozen):
    """Where a bad record stands and what is wrong with it.

    Its ``number`` of ``unit`` (line or row) is counted from 1 at byte ``base`` of the file.
    """

    path: str
    unit: str
    number: Count
    base: Count
    what: str


class Skipped(_Frozen):
    """Bad records of one kind that were left out, and the first few of them."""

    kind: str
    records: Count
    first: tuple[Place, ...]


class Sidecar(_Frozen):
    """PREFIX.json. ``documents``, ``tokens`` and ``bytes`` (of UTF-8 text) count the held-out ones too.

    Tokens include the one that ends every document, bytes do not. With ``pack`` the .bin is a row of packs of so many
    tokens, and documents and tokens count their padding; 0 is a stream. Where duplicates were removed, the bytes of
    text that are left are reckoned by the share of their tokens. ``templates`` are those that pairs were written with
    (:mod:`megapoly.data.bilingual`), each as often as its weight; none for other text. ``instructions`` is the template
    of a dataset whose ids are marked (:mod:`megapoly.data.instructions`); None for text, all of which is learned.
    """

    format: Literal["megapoly-indexed"] = "megapoly-indexed"
    version: Literal[1] = 1
    language: str
    tokenizer: TokenizerMark
    documents: Count
    tokens: Count
    bytes: Count
    pack: Count = 0
    padding: Padding | None = None
    duplicates: Duplicates = Duplicates()
    templates: tuple[str, ...] = ()
    instructions: Template | None = None
    skipped: tuple[Skipped, ...] = ()
    validation: Validation
    checksums: Checksums
    tool: str

    @property
    def ids(self) -> int:
        """Number of ids of the .bin: twice the tokenizer's where they are marked."""
        return self.tokenizer.vocabulary * (2 if self.instructions else 1)

    @property
    def bytes_per_token(self) -> float:
        """Of text; the padding of packs does not count."""
        return self.bytes / (self.tokens - (self.padding.tokens if self.padding else 0))

    @classmethod
    def read(cls, path: Path) -> Sidecar | None:
        """The sidecar at ``path``, None where there is none.

        Raises:
            DataError: the file is not a sidecar.
        """
        try:
            return cls.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return None
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror})") from error
        except pydantic.ValidationError as error:
            problem = error.errors()[0]
            key = ".".join(str(at) for at in problem["loc"])
            raise DataError(
                f"{path}: is not the sidecar of an indexed dataset ({key + ': ' if key else ''}{problem['msg']});"
                " build the dataset again"
            ) from error

    @pydantic.model_validator(mode="before")
    @classmethod
    def _without_crc(cls, content: Any) -> Any:
        """The checksum is of the file, not of what it tells: one that a person has changed can be read."""
        return {key: value for key, value in content.items() if key != "crc32"} if type(content) is dict else content

    def text(self) -> str:
        """What is written: JSON, of which the last line is the CRC-32 of all before it, closed by a brace."""
        body = self.model_dump_json(indent=1)
        return f'{body[:-2]},\n "crc32": "{zlib.crc32(body.encode()):08x}"\n}}\n'


def has_changed(path: Path) -> bool:
    """Whether a sidecar is not as :meth:`Sidecar.text` wrote it; of one that never had a checksum that is not known.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read any more ({error.strerror}); try again") from error
    found = _END.fullmatch(content)
    if found is None:
        return b'"crc32"' in content
    return zlib.crc32(found[1] + b"\n}") != int(found[2], 16)
