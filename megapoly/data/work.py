"""The folder of a build that is under way: PREFIX.build, with its job, its parts and its lock. No torch.

The job says what is built: of which files, by which tokenizer, with which options. A build that finds a folder of the
same job goes on with the parts that are whole; one of another job is refused, or begun anew. The lock belongs to the
process and its workers and ends with the last of them, however that comes.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import pydantic

import megapoly
from megapoly.data import pieces
from megapoly.data.documents import Options
from megapoly.data.files import write_whole
from megapoly.data.indexed import part
from megapoly.data.lock import lock_folder
from megapoly.data.merge import Assembly
from megapoly.data.naming import NewDataset
from megapoly.data.sidecar import Sidecar
from megapoly.data.tokenizer import Tokenizer
from megapoly.errors import DataError


class InputFile(pydantic.BaseModel, frozen=True):
    """A file as it was when the build began."""

    path: str
    size: int
    mtime_ns: int


class Job(pydantic.BaseModel, frozen=True):
    """What decides the content of the parts.

    ``before`` is the .idx at PREFIX when the build began, as its inode, size and time, and decides nothing: another one
    there is the finished build's.
    """

    format: Literal["megapoly-build"] = "megapoly-build"
    tool: str
    language: str
    tokenizer: str
    piece_bytes: int
    options: dict[str, Any]
    bad_records: str
    inputs: tuple[InputFile, ...]
    before: tuple[int, int, int] | None

    @classmethod
    def of(cls, files: Sequence[Path], tokenizer: Tokenizer, language: str, options: Options, prefix: Path) -> Job:
        """The job of a build.

        Raises:
            DataError: a file cannot be read.
        """
        inputs = []
        for path in files:
            try:
                found = path.stat()
            except OSError as error:
                raise DataError(f"{path}: cannot be read ({error.strerror}); name files that exist") from error
            inputs.append(InputFile(path=str(path), size=found.st_size, mtime_ns=found.st_mtime_ns))
        return cls(
            tool=f"megapoly {megapoly.__version__}",
            language=language,
            tokenizer=f"{tokenizer.sha256}, {[*tokenizer.begin]} ... {tokenizer.eod}",
            piece_bytes=pieces.PIECE_BYTES,
            options={
                "fields": list(options.fields),
                "pairs": options.pairs,
                "templates": list(options.templates) if options.pairs else [],
                "instructions": options.instructions.model_dump() if options.instructions else None,
                "longest": options.most_tokens or None,
                "key_field": options.key_field,
                "document": options.document,
                "validation_fraction": options.validation_fraction,
                "seed": options.seed,
                "shard": str(options.shard),
            },
            bad_records=options.bad_records,
            inputs=tuple(inputs),
            before=_stamp(part(prefix, ".idx")),
        )

    def difference(self, wanted: Job) -> str | None:
        """What would make other parts than ``wanted``, for people."""
        for name, one, other in (
            ("tool", self.tool, wanted.tool),
            ("language", self.language, wanted.language),
            ("tokenizer with SHA-256", self.tokenizer, wanted.tokenizer),
            ("pieces of", self.piece_bytes, wanted.piece_bytes),
            *((name, self.options.get(name), value) for name, value in wanted.options.items()),
        ):
            if one != other:
                return f"{name} {one!r}, now {other!r}"
        # Parts that were built when a bad record would have stopped the build have none.
        if self.bad_records != wanted.bad_records and self.bad_records != "stop":
            return f"bad records {self.bad_records!r}, now {wanted.bad_records!r}"
        for file, found in zip(self.inputs, wanted.inputs):
            if file != found:
                return f"input {_described(file)}, now {_described(found)}"
        if len(self.inputs) != len(wanted.inputs):
            return f"{len(self.inputs)} input files, now {len(wanted.inputs)}"
        return None


class Work:
    """An open work folder, under lock.

    Attributes:
        lock: descriptor that a worker inherits, so that the folder is locked as long as it lives.
        finished: an earlier run has built the dataset, and was killed before it removed the folder.
    """

    def __init__(self, folder: Path, prefix: Path, lock: int) -> None:
        self.folder, self.prefix, self.lock = folder, prefix, lock
        self.finished = False
        self._removed = False
        self._log, self._mark = folder / "begins", folder / "assembling"

    @classmethod
    @contextmanager
    def open(cls, prefix: Path, job: Job, assembly: Assembly, *, overwrite: bool) -> Iterator[Work]:
        """The folder of ``job``. It is left at the end where it holds a whole part.

        Raises:
            DataError: another build runs in it, or it holds another job and ``overwrite`` is not set, or a dataset is
                at ``prefix`` already, or the disk refuses.
        """
        folder = part(prefix, ".build")
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            lock = lock_folder(folder, "a build is running there", "wait for its end, or choose another name")
        except OSError as error:
            raise DataError(f"{folder}: cannot be written ({error})") from error
        work = cls(folder, prefix, lock)
        try:
            work._begin(job, assembly, overwrite)
            yield work
        except OSError as error:
            raise DataError(f"{prefix}: cannot be written ({error})") from error
        finally:
            work.leave()
            os.close(lock)

    def _begin(self, job: Job, assembly: Assembly, overwrite: bool) -> None:
        """Go on with what is there, or begin."""
        there = self._job()
        difference = there.difference(job) if there else None
        if difference is not None and not overwrite:
            raise DataError(
                f"{self.folder}: holds an interrupted build with {difference}; give the options and files of that one"
                " to go on, or --overwrite to begin anew"
            )
        going_on = there is not None and difference is None
        if there is not None and going_on:
            job = job.model_copy(update={"before": there.before})
            named = _stamp(part(self.prefix, ".idx")) not in (None, there.before)
            self.finished = named and self._mark.exists() and self._mark.read_text() == repr(assembly)
            present = [".idx"] if named and not self.finished else []
        else:
            present = [suffix for suffix in (".bin", ".json", ".idx") if part(self.prefix, suffix).exists()]
        if present and not overwrite:
            paths = ", ".join(str(part(self.prefix, suffix)) for suffix in present)
            raise DataError(f"{paths}: exists already; choose another name or overwrite it")
        for path in self.folder.iterdir():
            if path.name != "lock" and (not going_on or path.suffix == ".partial"):
                path.unlink()
        if there != job:
            write_whole(self.folder / "job.json", job.model_dump_json(indent=1).encode())

    def _job(self) -> Job | None:
        try:
            return Job.model_validate_json((self.folder / "job.json").read_bytes())
        except (FileNotFoundError, pydantic.ValidationError):
            return None

    def part(self, number: int) -> Path:
        """The prefix of a part."""
        return self.folder / f"{number:08d}"

    def whole(self) -> set[int]:
        """The parts that are there."""
        return {int(path.stem) for path in self.folder.glob("*.json") if path.stem.isdigit() and self._is_whole(path)}

    def _is_whole(self, path: Path) -> bool:
        """Whether a part with this .json is whole: with an .idx, which comes last, or without documents."""
        try:
            side = Sidecar.read(path)
        except DataError:  # damaged
            return False
        return side is not None and (not side.documents or path.with_suffix(".idx").exists())

    def sidecar(self, number: int) -> Sidecar:
        """What is told of a whole part."""
        side = Sidecar.read(part(self.part(number), ".json"))
        if side is None:
            raise DataError(f"{self.part(number)}.json: has gone; leave the folder alone, or build with --overwrite")
        return side

    def hand_over(self, number: int, new: NewDataset) -> None:
        """Give the files of a part to a new dataset, under its temporary names; the part is none any more."""
        os.replace(part(self.part(number), ".idx"), new.idx)
        os.replace(part(self.part(number), ".bin"), new.bin)

    def begins(self, number: int, span: int) -> None:
        """Note that a part begins with a span, so that a later run can begin there."""
        with open(self._log, "a", encoding="ascii") as file:
            file.write(f"{number} {span}\n")

    def start(self, whole: set[int]) -> tuple[int, int]:
        """The last part known to begin with a span before which all parts are whole, and that span."""
        first = next(i for i in range(len(whole) + 1) if i not in whole)
        best = (0, 0)
        if self._log.exists():
            for line in self._log.read_text(encoding="ascii", errors="replace").splitlines(keepends=True):
                numbers = line.split()
                if line.endswith("\n") and len(numbers) == 2 and all(map(str.isdigit, numbers)):
                    number, span = map(int, numbers)
                    if best[0] < number <= first:
                        best = (number, span)
        return best

    def assembling(self, assembly: Assembly) -> None:
        """Note that all parts are whole: what gets the name of the dataset from now on is this build's."""
        write_whole(self._mark, repr(assembly).encode())

    def leave(self) -> None:
        """Keep what is whole for a later run. A folder that was removed may be another build's by now."""
        if self._removed:
            return
        for path in self.folder.glob("*.partial"):
            path.unlink()
        if not self.whole():
            self.remove()

    def remove(self) -> None:
        """Remove the folder; the job goes last, so that a build that is killed meanwhile is still known to be done."""
        for path in self.folder.iterdir():
            if path.name not in ("job.json", self._mark.name, "lock"):
                path.unlink()
        (self.folder / "job.json").unlink(missing_ok=True)
        self._removed = True
        shutil.rmtree(self.folder)


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def _described(file: InputFile) -> str:
    return f"{file.path} of {file.size} bytes at {file.mtime_ns}"
