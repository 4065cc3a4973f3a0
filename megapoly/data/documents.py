"""From a record to a document: its text, and whether it is held out for validation. No torch.

Whether a document is held out is a keyed hash of what it says and of nothing else, so that the same text falls on the
same side in every dataset of a seed, and the two sides of a pair do.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b
from typing import NamedTuple

from megapoly.data import bilingual, instructions
from megapoly.data.instructions import Example
from megapoly.data.merge import Assembly
from megapoly.data.readers import Document as TextDocument
from megapoly.data.readers import Input, Policy, Record
from megapoly.data.templates import Template
from megapoly.errors import ConfigError


@dataclass(frozen=True)
class Shard:
    """The part of a build that one job of an array does: number ``number`` of ``count``, counted from 1."""

    number: int = 1
    count: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.count:
            raise ConfigError(f"shard {self.number}/{self.count}: shards are numbered from 1 to their count, as in 3/8")

    @classmethod
    def parse(cls, text: str) -> Shard:
        """The shard that is written as ``3/8``."""
        number, _, count = text.partition("/")
        if not (number.isascii() and number.isdigit() and count.isascii() and count.isdigit()):
            raise ConfigError(f"shard {text!r}: expected a number and a count, as in 3/8")
        return cls(int(number), int(count))

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"


_PLAIN = Assembly()


@dataclass(frozen=True)
class Options:
    """How records are read, split and put together.

    Attributes:
        fields: the field of the text, or the two fields of a pair, named by their language codes. Where none is given:
            ``text``, or the two codes of the language where it is a pair, such as en-th, or else the two fields of
            the record that are named by language codes.
        pairs: records are pairs, written as :mod:`megapoly.data.bilingual` says.
        templates: the forms that pairs are written in.
        instructions: records are instructions or chats, written by this template; :mod:`megapoly.data.instructions`
            says what ``fields`` are then.
        longest: tokens of the longest example that is not left out, of instructions; 0 is that of a pack, where there
            are packs, else any. A cut answer has no end.
        key_field: the field that decides, where a record has it, what is held out; else the text does, of a pair the
            English text (its first, where none is English), of instructions and chats the first instruction.
        document: what is a document of a .txt file.
        bad_records: the first bad record stops the build, or all are counted and skipped.
        validation_fraction: share of the documents to hold out.
        seed: of the split and of the forms of pairs.
        shard: the part of the input to build.
        assembly: what is done with the documents when all are encoded.
        processes: that encode; 0 is one for each core, 1 is this process alone.
        threads: for encoding where this process does it alone; 0 is one for each core.
        overwrite: replace a dataset that exists, and begin anew where another build was interrupted.
    """

    fields: tuple[str, ...] = ()
    pairs: bool = False
    templates: tuple[str, ...] = bilingual.TEMPLATES
    instructions: Template | None = None
    longest: int = 0
    key_field: str = "key"
    document: TextDocument = "file"
    bad_records: Policy = "stop"
    validation_fraction: float = 0.001
    seed: int = 1234
    shard: Shard = Shard()
    assembly: Assembly = _PLAIN
    processes: int = 0
    threads: int = 0
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.pairs and self.instructions:
            raise ConfigError("pairs and instructions are set; records are one of the two, build two datasets")
        counts = (1, 2, 3) if self.instructions else (1 + self.pairs,)
        if self.fields and (len(self.fields) not in counts or not all(self.fields)):
            expected = "a pair has two" if self.pairs else "a text has one; for pairs of two, set pairs"
            if self.instructions:
                expected = "instructions have two or three, instruction,output or instruction,input,output; chats one"
            raise ConfigError(f"fields {self.fields}: {expected}")
        pack = self.assembly.pack
        if self.longest and not self.instructions:
            raise ConfigError(f"longest {self.longest}: is for instructions; other text is cut where it is too long")
        if self.longest < 0 or (pack and self.longest > pack):
            raise ConfigError(f"longest {self.longest} is not from 0 to pack {pack}, into which no longer one fits")
        if self.document not in ("file", "line", "paragraph"):
            raise ConfigError(f"document {self.document!r} is not file, line or paragraph")
        if self.bad_records not in ("stop", "skip"):
            raise ConfigError(f"bad_records {self.bad_records!r} is not stop or skip")
        if not 0 <= self.validation_fraction < 1:
            raise ConfigError(f"validation_fraction {self.validation_fraction} is not in [0, 1), such as 0.001")
        if not 0 <= self.seed < 2**64:
            raise ConfigError(f"seed {self.seed} is not in [0, 2^64)")
        if self.processes < 0 or self.threads < 0:
            raise ConfigError(f"processes {self.processes}, threads {self.threads}: neither can be below 0")
        if self.shard.count > 1 and self.assembly.changes:
            raise ConfigError(
                f"shard {self.shard}: duplicates, shuffle and packs are of all shards together; leave them to"
                " `megapoly data merge`, which takes the same options"
            )

    @property
    def most_tokens(self) -> int:
        """Of an example that is not left out; 0: any."""
        return self.longest or (self.assembly.pack if self.instructions else 0)

    @property
    def input(self) -> Input:
        """How the files are read. Of a .parquet file only the columns that decide something are."""
        named = self.fields or (() if self.pairs else ("text",))
        if self.instructions and not self.fields:
            named = (*instructions.FIELDS, instructions.MESSAGES)
        return Input(self.document, (*named, self.key_field) if named else ())


class Document(NamedTuple):
    """A text to encode, or an example of instructions."""

    text: str
    bytes: int
    held_out: bool
    example: Example | None = None


def to_document(record: Record, options: Options) -> Document:
    """The document of a record.

    Raises:
        BadRecord: a field is missing, empty or no text.
    """
    if options.instructions is not None:
        example = instructions.to_example(record, options.instructions, options.fields)
        key = record.text(options.key_field) if options.key_field in record.values else example.key
        held = _held_out(key.encode(), options.seed, options.validation_fraction)
        return Document("", example.bytes, held, example)
    if options.pairs:
        first, second = options.fields or bilingual.pair_fields(record)
        texts = (record.text(first), record.text(second))
        text = bilingual.render((first, second), texts, options.seed, options.templates)
        key = texts[1] if second == "en" else texts[0]
    else:
        key = text = record.text(options.fields[0] if options.fields else "text")
    if options.key_field in record.values:
        key = record.text(options.key_field)
    coded = text.encode()
    coded_key = coded if key is text else key.encode()
    return Document(text, len(coded), _held_out(coded_key, options.seed, options.validation_fraction))


def held_out(key: str, seed: int, fraction: float) -> bool:
    """Whether a document with this key is held out: blake2b(key, seed) as a number in [0, 1) is below ``fraction``."""
    return _held_out(key.encode(), seed, fraction)


def _held_out(key: bytes, seed: int, fraction: float) -> bool:
    if not fraction:
        return False
    digest = blake2b(key, digest_size=8, key=seed.to_bytes(8, "little"), person=b"validation").digest()
    return int.from_bytes(digest, "little") < fraction * 2**64
