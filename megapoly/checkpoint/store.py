"""The layout-free checkpoint on disk: safetensors files, and a manifest that maps logical tensors to pieces in them.

    ROOT/step-00001000/manifest.json     tensors, pieces, checksums, and free JSON of the caller (``meta``)
    ROOT/step-00001000/rank-00003.safetensors

A file holds pieces as tensors: a piece that is a whole box in the shape of the box, another one flat. The manifest is
one JSON object; its first line is the CRC-32 of the bytes after it, and every file has a CRC-32 per 1 MiB block.
A checkpoint is written under a name that starts with a dot and renamed when it is whole, so a killed save leaves the
earlier ones as they were. Nothing here knows of models: names, shapes and pieces are the caller's.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megapoly.checkpoint.accounting import check_tensors, some
from megapoly.checkpoint.files import CODES, DTYPES, REMEDY, BlockFile, TensorFile, write_tensors
from megapoly.checkpoint.folders import MANIFEST, Keep, folder, prune
from megapoly.checkpoint.pieces import check_inside, check_tiling, overlaps, say
from megapoly.data.files import make_folder, sync_folder
from megapoly.errors import CheckpointError, everywhere
from megapoly.spec import Box, Index, Piece

_FORMAT, _VERSION = "megapoly-checkpoint", 1


@dataclass(frozen=True)
class Entry:
    """A piece of a logical tensor to be saved. ``data``: ``piece.size`` elements in the piece's order, any device."""

    name: str
    shape: Index
    piece: Piece
    data: torch.Tensor


def save(
    root: Path,
    step: int,
    entries: Iterable[Entry],
    meta: dict[str, Any],
    *,
    rank: int = 0,
    size: int = 1,
    gather: Callable[[Any], list[Any] | None] | None = None,
    broadcast: Callable[[Any], Any] | None = None,
    keep: Keep | None = None,
) -> Path:
    """Write one checkpoint, together with the other ranks; return its folder.

    The pieces of all ranks have to tile every tensor exactly; an empty piece only declares its tensor. A step that is
    there already is refused, not replaced. ``meta`` (JSON, no NaN) is rank 0's. All ranks have to see one ``root``.

    Args:
        gather: gives rank 0 the list of every rank's object, and the other ranks None. Needed where ``size`` > 1.
        broadcast: gives every rank rank 0's object. Needed where ``size`` > 1.
        keep: which checkpoints up to this step stay; the others are removed. None keeps all.

    Raises:
        CheckpointError: on every rank, if any rank failed. The earlier checkpoints are then as they were.
    """
    if size > 1 and (gather is None or broadcast is None):
        raise ValueError("several ranks need gather and broadcast")
    tell = broadcast or (lambda value: value)
    final = folder(root, step)
    temporary = final.with_name(f".{final.name}")

    problem = _attempt(rank, lambda: _prepare(root, final, temporary, meta))[1] if rank == 0 else None
    problem = tell(problem)
    if problem is None:
        written = _attempt(rank, lambda: _write_rank(temporary, rank, entries))
        reports = gather(written) if gather is not None and size > 1 else [written]
        if reports is not None:
            problem = "; ".join(text for _, text in reports if text) or None
            if problem is None:
                parts = [part for part, _ in reports]
                problem = _attempt(rank, lambda: _finish(final, temporary, _manifest(step, meta, parts)))[1]
            if problem is not None:
                shutil.rmtree(temporary, ignore_errors=True)
            elif keep is not None:
                prune(root, step, keep)
        problem = tell(problem)
    if problem is None:
        return final
    raise everywhere(CheckpointError(f"{final}: not saved; {problem}. The earlier checkpoints are as they were"))


def _attempt(rank: int, work: Callable[[], Any]) -> tuple[Any, str | None]:
    """Result and None, or None and what went wrong: a rank that failed has to meet the others all the same."""
    try:
        return work(), None
    except CheckpointError as error:
        return None, str(error)
    except Exception as error:
        return None, f"rank {rank}: {type(error).__name__}: {error}"


def _prepare(root: Path, final: Path, temporary: Path, meta: dict[str, Any]) -> None:
    json.dumps(meta, allow_nan=False)
    if final.exists():
        raise CheckpointError("there is a checkpoint of this step already; move it away, or go on from it")
    make_folder(root)
    for stale in root.glob(".step-*"):
        shutil.rmtree(stale)
    temporary.mkdir()


def _expect_folder(temporary: Path) -> None:
    """Ask the server by trying to make it: a network file system may remember that a folder was not there."""
    try:
        temporary.mkdir()
    except FileExistsError:
        return
    except FileNotFoundError:
        pass
    else:
        temporary.rmdir()
    raise FileNotFoundError(f"{temporary}, which rank 0 made, is not there; all ranks need one shared folder")


def _write_rank(temporary: Path, rank: int, entries: Iterable[Entry]) -> dict[str, Any]:
    """Write the file of one rank; what rank 0 has to know of it."""
    _expect_folder(temporary)
    ordered = sorted(entries, key=lambda entry: -entry.data.element_size())  # every tensor aligned to its own size
    file = f"rank-{rank:05d}.safetensors"
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    rows: list[dict[str, Any]] = []
    stored: list[torch.Tensor] = []
    at = 0
    seen: Counter[str] = Counter()
    for entry in ordered:
        _check_entry(entry)
        box, piece = entry.piece.box, entry.piece
        row: dict[str, Any] = {
            "name": entry.name,
            "shape": list(entry.shape),
            "dtype": str(entry.data.dtype).removeprefix("torch."),
        }
        rows.append(row)
        if not piece.size:
            continue
        key = entry.name if piece == Piece.of(Box.whole(entry.shape)) else f"{entry.name}@{seen[entry.name]}"
        seen[entry.name] += 1
        if key in header:
            raise ValueError(f"tensor {entry.name!r} is given twice by this rank")
        end = at + piece.size * entry.data.element_size()
        header[key] = {"dtype": CODES[entry.data.dtype], "shape": list(_shape(piece)), "data_offsets": [at, end]}
        place = {"start": list(box.start), "stop": list(box.stop), "range": [piece.start, piece.stop]}
        row["piece"] = {"file": file, "key": key, **place}
        stored.append(entry.data)
        at = end
    record = write_tensors(temporary / file, header, stored) if stored else None
    return {"rows": rows, "files": {file: record} if record else {}}


def _shape(piece: Piece) -> Index:
    """In which a file holds a piece."""
    return piece.box.shape if piece.size == piece.box.size else (piece.size,)


def _check_entry(entry: Entry) -> None:
    if "@" in entry.name or entry.name == "__metadata__":
        raise ValueError(f"{entry.name!r} cannot name a tensor: '@' marks pieces, and __metadata__ is the format's")
    if entry.data.dtype not in CODES:
        raise ValueError(f"tensor {entry.name!r}: {entry.data.dtype} cannot be stored; known: {', '.join(DTYPES)}")
    if entry.data.numel() != entry.piece.size:
        raise ValueError(f"tensor {entry.name!r}: {entry.data.numel()} elements for a piece of {entry.piece.size}")


def _manifest(step: int, meta: dict[str, Any], reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    tensors: dict[str, dict[str, Any]] = {}
    files: dict[str, Any] = {}
    for rank, report in enumerate(reports):
        files.update(report["files"])
        for row in report["rows"]:
            tensor = tensors.setdefault(row["name"], {"shape": row["shape"], "dtype": row["dtype"], "pieces": []})
            for what in ("shape", "dtype"):
                if tensor[what] != row[what]:
                    raise CheckpointError(
                        f"tensor {row['name']!r} has {what} {row[what]} on rank {rank}, {tensor[what]} on a rank before"
                    )
            if "piece" in row:
                tensor["pieces"].append(row["piece"])
    return {"format": _FORMAT, "version": _VERSION, "step": step, "meta": meta, "tensors": tensors, "files": files}


def _finish(final: Path, temporary: Path, manifest: dict[str, Any]) -> None:
    """Check that the pieces tile the tensors, write the manifest, and give the checkpoint its name."""
    _check_and_write(temporary / MANIFEST, manifest)
    sync_folder(temporary)
    os.rename(temporary, final)
    sync_folder(final.parent)


def _check_and_write(path: Path, manifest: dict[str, Any]) -> None:
    for name, tensor in manifest["tensors"].items():
        check_tiling(name, tuple(tensor["shape"]), [(piece["file"], _piece(piece)) for piece in tensor["pieces"]])
    rest = json.dumps(manifest, separators=(",", ":"), allow_nan=False)[1:].encode()
    with BlockFile(path) as file:
        file.write(_checksum_line(rest) + rest)


def write_manifest(path: Path, step: int, meta: dict[str, Any], reports: Sequence[dict[str, Any]]) -> None:
    """Write the manifest of files that are written already, as the one of :func:`save`.

    Args:
        reports: each with ``rows``, a piece of a tensor each, and ``files``, size and checksums by name.
    """
    _check_and_write(path, _manifest(step, meta, reports))


def _checksum_line(rest: bytes) -> bytes:
    return b'{"crc32":"%08x",\n' % zlib.crc32(rest)


def _piece(row: Mapping[str, Any]) -> Piece:
    return Piece(Box(tuple(row["start"]), tuple(row["stop"])), *row["range"])


@dataclass(frozen=True)
class Damage:
    """Bytes ``[start, stop)`` of a file that are not as written, and what is in them."""

    file: str
    start: int
    stop: int
    tensors: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.file} bytes {self.start} to {self.stop} ({some(self.tensors)})"


class Reader:
    """A checkpoint opened for reading: any piece of any tensor, from whatever pieces are stored.

    Opening checks the manifest, and that every file is there in its size. Bytes are checked when they are touched.

    Attributes:
        path, step, meta: as saved.
        tensors: logical name -> (shape, dtype).

    Raises:
        CheckpointError: a manifest that is missing, damaged or of another version; a file missing or of another size.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        document = _read_manifest(path / MANIFEST)
        try:
            self.step: int = document["step"]
            self.meta: dict[str, Any] = document["meta"]
            self.tensors: dict[str, tuple[Index, torch.dtype]] = {
                name: (tuple(tensor["shape"]), DTYPES[tensor["dtype"]]) for name, tensor in document["tensors"].items()
            }
            self._pieces: dict[str, list[tuple[TensorFile, str, Piece]]] = {name: [] for name in self.tensors}
            self._files = {
                name: TensorFile(path / name, record["bytes"], record["crc32"])
                for name, record in document["files"].items()
            }
            for name, tensor in document["tensors"].items():
                for row in tensor["pieces"]:
                    self._pieces[name].append((self._files[row["file"]], row["key"], _piece(row)))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{path / MANIFEST}: is not a checkpoint's manifest ({error!r})") from error
        for file in self._files.values():
            file.check_size()

    def read(self, name: str, piece: Piece, out: torch.Tensor) -> None:
        """Fill ``out`` (1-D, ``piece.size`` elements, any device and dtype that holds the kind of number).

        Raises:
            CheckpointError: no such tensor, an element that is not stored, damaged bytes, floats asked for as integers.
        """
        if name not in self.tensors:
            raise CheckpointError(f"{self.path}: has no tensor {name!r}")
        shape, dtype = self.tensors[name]
        check_inside(name, shape, piece)
        if out.shape != (piece.size,):
            raise ValueError(f"tensor {name!r}: out has shape {tuple(out.shape)} for a piece of {piece.size} elements")
        if not torch.can_cast(dtype, out.dtype):
            raise CheckpointError(f"{self.path}: tensor {name!r} is {dtype} and cannot be read as {out.dtype}")
        out = out.detach()
        found = 0
        for file, key, stored in self._pieces[name]:
            for offset, box, offset_stored, box_stored, common in overlaps(piece, stored):
                target = out[offset : offset + box.size].view(box.shape)
                place = (offset_stored, box_stored)
                file.copy(name, key, dtype, place, common, target[common.slices(box.start)])
                found += common.size
        if found != piece.size:
            raise CheckpointError(
                f"{self.path}: tensor {name!r}: {piece.size - found} of the {piece.size} elements of {say(piece)}"
                f" are stored nowhere; it is damaged, {REMEDY}"
            )

    def expect(self, shapes: Mapping[str, Sequence[int]], among: str = "") -> None:
        """Check that the checkpoint holds exactly these tensors, of those whose names begin with ``among``.

        Raises:
            CheckpointError: listing by name what is missing, unexpected, or of another shape.
        """
        found = {name: shape for name, (shape, _) in self.tensors.items() if name.startswith(among) or name in shapes}
        what, advice = "a checkpoint of another model", "Use the model that it was saved with, or another checkpoint"
        check_tensors(self.path, found, shapes, what, advice)

    def pieces(self, name: str) -> int:
        """In how many pieces a tensor is stored."""
        return len(self._pieces[name])

    @property
    def files(self) -> dict[str, int]:
        """Files of tensors with their bytes."""
        return {name: file.size for name, file in self._files.items()}

    def release(self) -> None:
        """Give back what files hold of the memory; the next read maps them anew. What was checked stays checked."""
        for file in self._files.values():
            file.release()

    def damage(self, progress: Callable[[int], object] = lambda done: None) -> list[Damage]:
        """Check every byte of every file, in little memory; ``progress`` hears of the bytes of each block."""
        found = []
        for name, file in self._files.items():
            damaged = file.damaged(progress)
            names = self._names_in(file) if damaged else None
            found += [Damage(name, start, stop, tuple(names(start, stop))) for start, stop in damaged if names]
        return found

    def verify(self) -> None:
        """Check every byte of every file.

        Raises:
            CheckpointError: listing the damaged blocks, with the tensors in them.
        """
        damaged = [str(each) for each in self.damage()]
        if damaged:
            raise CheckpointError(f"{self.path}: damaged: {some(damaged)}; {REMEDY}")

    def _names_in(self, file: TensorFile) -> Callable[[int, int], list[str]]:
        """What tells the tensors with bytes in a range of a file, and the header where it has some.

        Nothing but the header says where tensors are, and its own block may be damaged without it: so it is taken as
        it stands wherever it says just what was written.
        """
        rows = [(name, key, piece) for name, each in self._pieces.items() for of, key, piece in each if of is file]
        layout = file.layout({key: (_shape(piece), self.tensors[name][1]) for name, key, piece in rows})

        def names_at(start: int, stop: int) -> list[str]:
            if layout is None:
                return ["the file's header is damaged"]
            begin, spans = layout
            found = [name for name, key, _ in rows if spans[key][0] < stop and start < spans[key][1]]
            return [*found, *(["or the file's header" if found else "the file's header"] if start < begin else [])]

        return names_at


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error.strerror}); give the folder of a whole checkpoint, step-N"
        ) from error
    damaged = f"{path}: damaged; {REMEDY}"
    try:
        document = json.loads(raw)
    except ValueError as error:
        raise CheckpointError(f"{damaged} (not JSON: {error})") from error
    if not isinstance(document, dict) or document.get("format") != _FORMAT:
        raise CheckpointError(f"{path}: is not the manifest of a megapoly checkpoint")
    if document.get("version") != _VERSION:
        raise CheckpointError(
            f"{path}: has version {document.get('version')!r}; this megapoly reads version {_VERSION}: use the one that"
            " wrote it"
        )
    line, newline, rest = raw.partition(b"\n")
    if line + newline != _checksum_line(rest):
        raise CheckpointError(f"{damaged} (its CRC-32 is {zlib.crc32(rest):08x}, its first line has {line!r})")
    return document
