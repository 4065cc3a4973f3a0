"""Damages files at random and reads them; a process of its own, since what it looks for may end one.

    python fuzz.py FOLDER KIND:FIRST:COUNT...

says the number of every case before it begins, and at the end how often each outcome came, as JSON. A case depends on
its kind and number only. An outcome is "refused" (our error), "same" (what was written), or "told" (something else was
read, and ``data verify`` says so, or nothing can say so); anything else is a traceback, or the end of the process.
"""

from __future__ import annotations

import faulthandler
import json
import os
import random
import resource
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np

from megapoly.data import _index
from megapoly.data.indexed import HEADER, IndexedDataset
from megapoly.data.merge import Assembly, merge
from megapoly.data.verify import verify
from megapoly.errors import DataError
from tests.data.ondisk import VOCABULARY, write

SECONDS = 100  # after which a case hangs
MEGABYTES = 1500  # that the process may take; 250 are the libraries'
ODD = (-(2**63), -(2**31), -1, 0, 1, 2, 33, 2**15, 2**31 - 1, 2**31, 2**40, 2**62, 2**63 - 1)

Case = Callable[[random.Random], str]


def damage(draw: random.Random, content: bytes) -> bytes:
    """Cut, lengthened, with flipped bits, or with some bytes in a row that are others, come twice, or are gone."""
    data = bytearray(content)
    at, size = draw.randrange(len(data)), draw.choice((1, 2, 4, 8, 100, 5000))
    match draw.choice(("cut", "cut a little", "longer", "bits", "bits", "bits", "noise", "zeros", "gone", "twice")):
        case "cut":
            del data[at:]
        case "cut a little":
            del data[-draw.randint(1, 12) :]
        case "longer":
            data += draw.randbytes(size)
        case "bits":
            for _ in range(draw.choice((1, 1, 2, 5))):
                data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        case "noise":
            data[at : at + size] = draw.randbytes(len(data[at : at + size]))
        case "zeros":
            data[at : at + size] = bytes(len(data[at : at + size]))
        case "gone":
            del data[at : at + size]
        case "twice":
            data[at:at] = data[at : at + size]
    return bytes(data)


class Datasets:
    """Cases of one file of a dataset: 201 documents in two blocks, 20 of them held out."""

    def __init__(self, folder: Path, suffix: str) -> None:
        self._prefix, self._suffix, self._folder = folder / "d", suffix, folder
        rng = np.random.default_rng(1)
        sizes = [*rng.integers(1, 40, 100), 600_000, *rng.integers(1, 40, 100)]
        texts = [rng.integers(0, VOCABULARY, size) for size in sizes]
        write(self._prefix, texts, held_out=20)
        write(folder / "other", texts[:50], held_out=5)
        self._whole = {each: (folder / f"d{each}").read_bytes() for each in (".bin", ".idx", ".json")}
        self._other = (folder / f"other{suffix}").read_bytes()
        self._texts, self._stream = texts, np.concatenate(texts)
        self._begins = np.cumsum([0, *map(len, texts)])[:-1]
        merge([self._prefix], folder / "merged")
        self._merged = [(folder / f"merged{each}").read_bytes() for each in (".bin", ".idx")]
        self._batch = self._fill(IndexedDataset(self._prefix))

    def __call__(self, draw: random.Random) -> str:
        for suffix, content in self._whole.items():
            self._path(suffix).write_bytes(content)
        opened = IndexedDataset(self._prefix) if draw.random() < 0.2 else None
        if foreign := self._suffix != ".json" and draw.random() < 0.2:
            self._path(".json").unlink()
        whole = self._whole[self._suffix]
        special = draw.random()
        if special < 0.3:
            damaged = self._changed_value(draw, whole)
        else:
            damaged = self._other if special < 0.32 else damage(draw, whole)
        with open(self._path(self._suffix), "r+b") as file:  # the very file that is open
            file.write(damaged)
            file.truncate()
        try:
            dataset = opened or IndexedDataset(self._prefix)
        except DataError:
            return "refused"
        outcomes = set(self._read(draw, dataset))
        try:
            told = bool(verify(self._prefix, vocabulary=VOCABULARY))
        except DataError:
            told = True
        unknown = self._suffix == ".json" and b'"crc32"' not in damaged
        if not told and damaged != whole and not (foreign or unknown):
            raise AssertionError("verify takes the file for whole")
        if opened is None and draw.random() < 0.1:
            outcomes.add(self._merge(foreign))
        if "other" in outcomes:
            return "told"
        return "refused" if "refused" in outcomes else "same"

    def _path(self, suffix: str) -> Path:
        return self._folder / f"d{suffix}"

    def _changed_value(self, draw: random.Random, content: bytes) -> bytes:
        """A number of the .idx, a token of the .bin, or a value of the .json is an odd one."""
        if self._suffix == ".json":
            tree = json.loads(content)
            parent = draw.choice([tree, tree, *(value for value in tree.values() if isinstance(value, dict))])
            key = draw.choice([*parent, "added"])
            parent[key] = draw.choice((*ODD, None, 1.5, "", "0123abcd", [], {}, True, 10**30, "\ud800", 1e999))
            return json.dumps(tree, indent=1).encode()
        data = bytearray(content)
        if self._suffix == ".bin":
            at, size = 2 * draw.randrange(len(data) // 2), 2
        else:
            n = len(self._texts)
            places = [(0, 8), (9, 8), (17, 1), (18, 8), (26, 8)]
            places += [
                (HEADER.size + 4 * draw.randrange(n), 4),
                (HEADER.size + 4 * n + 8 * draw.randrange(2 * n + 1), 8),
            ]
            at, size = draw.choice(places)
        old = int.from_bytes(data[at : at + size], "little")
        new = draw.choice((*ODD, old + 1, old - 1, old + 2, 2 * old, draw.randrange(10)))
        data[at : at + size] = (new % (1 << 8 * size)).to_bytes(size, "little")
        return bytes(data)

    def _read(self, draw: random.Random, dataset: IndexedDataset) -> Iterator[str]:
        """Everything that reads a dataset: an outcome of each."""

        def outcome(wanted: object, call: Callable[..., object], *arguments: object) -> str:
            try:
                return "same" if np.array_equal(call(*arguments), wanted) else "other"
            except DataError:
                return "refused"

        for i in range(min(dataset.documents, len(self._texts))):
            yield outcome(self._texts[i], dataset.document, i)
        length = 97
        for start in (0, 5, draw.randrange(dataset.tokens), draw.randrange(dataset.tokens), dataset.tokens - length):
            wanted = self._stream[start : start + length] if start >= 0 else ()
            yield outcome([wanted], dataset.gather, np.array([start]), length, VOCABULARY)
            begins = self._begins[(self._begins > start) & (self._begins < start + length)]
            yield outcome(begins, dataset.boundaries, start, start + length)
        yield outcome(self._begins[1:], dataset.boundaries, 0, dataset.tokens)
        yield outcome(self._batch, self._fill, dataset)
        counts = [dataset.train_documents, dataset.pack]
        yield "same" if counts == [len(self._texts) - 20, 0] else "other"

    def _fill(self, dataset: IndexedDataset) -> np.ndarray:
        """Tokens, labels and positions of a batch with separate documents, and cu_seqlens, in one array."""
        starts = np.array([0, 1000, 500_000, 601_000])
        parts = [np.full((4, 64), -5, np.int64) for _ in range(3)]
        ends = _index.fill(
            [dataset.reader], np.zeros(4, np.int32), starts, np.full(4, dataset.tokens), VOCABULARY, True, *parts,
            _index.Progress(),
        )  # fmt: skip
        return np.concatenate([*(part.ravel() for part in parts), ends])

    def _merge(self, foreign: bool) -> str:
        """Through all that a merge does: what is left is whole or nothing."""
        for number, assembly in enumerate((Assembly(), Assembly(deduplicate=True, shuffle=1))):
            output = self._folder / f"out{number}"
            try:
                merge([self._prefix], output, assembly, overwrite=True)
            except DataError:
                if any(path.name.endswith(".partial") for path in self._folder.iterdir()):
                    raise AssertionError("a merge that failed left something behind") from None
                return "refused"
            if verify(output):
                raise AssertionError("a merge wrote a damaged dataset")
        found = [(self._folder / f"out0{each}").read_bytes() for each in (".bin", ".idx")]
        if found != self._merged and not foreign:
            raise AssertionError("a merge wrote wrong tokens")
        return "same" if found == self._merged else "other"


def cases(kind: str, folder: Path) -> Case:
    if kind in (".bin", ".idx", ".json"):
        return Datasets(folder, kind)
    from tests.data import fuzz_text

    return fuzz_text.cases(kind, folder)


def main(folder: Path, jobs: list[str]) -> None:
    counts: dict[str, Counter[str]] = {}
    for job in jobs:
        kind, first, count = job.split(":")
        own = folder / kind.strip(".")
        own.mkdir()
        run = cases(kind, own)
        for number in range(int(first), int(first) + int(count)):
            os.write(1, f"{kind} {number}\n".encode())
            faulthandler.dump_traceback_later(SECONDS, exit=True)
            counts.setdefault(kind, Counter())[run(random.Random(f"{kind} {number}"))] += 1
        faulthandler.cancel_dump_traceback_later()
    taken = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    with suppress(FileNotFoundError):  # under AddressSanitizer memory is counted otherwise
        if taken > MEGABYTES and "libasan" not in Path("/proc/self/maps").read_text():
            raise AssertionError(f"reading damaged files took {taken} MB")
    print(json.dumps(counts))


if __name__ == "__main__":
    faulthandler.enable()
    main(Path(sys.argv[1]), sys.argv[2:])
