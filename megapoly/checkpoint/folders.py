"""The folders of a run's checkpoints: which there are, which is the newest, and which go.

ROOT/step-00001000/         a whole checkpoint
ROOT/.step-00002000/        one that is being written, or removed
ROOT/NAME/step-00001500/    one of a branch that the run has left
"""

from __future__ import annotations

import os
import re
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megapoly.data.files import sync_folder
from megapoly.errors import CheckpointError

MANIFEST = "manifest.json"
CHECKPOINTS = "checkpoints"  # of a run, in its folder
_STEP = re.compile(r"step-(\d{8,})")


def folder(root: Path, step: int) -> Path:
    """Where the checkpoint of a step stands."""
    return root / f"step-{step:08d}"


def steps(root: Path) -> list[int]:
    """Steps of the whole checkpoints in a folder, ascending; none where there is no folder."""
    found = (_STEP.fullmatch(path.name) for path in root.iterdir()) if root.is_dir() else ()
    return sorted(int(match[1]) for match in found if match and (root / match[0] / MANIFEST).is_file())


def newest(root: Path) -> Path:
    """Folder of the whole checkpoint with the most steps."""
    found = steps(root)
    if not found:
        raise CheckpointError(
            f"{root}: no whole checkpoint (a folder step-N with a {MANIFEST}); check the path, or start a new run"
        )
    return folder(root, found[-1])


@dataclass(frozen=True)
class Keep:
    """Which checkpoints stay: the ``last`` so many, the newest from before the step ``before``, and those of steps that
    are a multiple of ``every``."""

    last: int
    before: int | None = None
    every: int | None = None

    def __post_init__(self) -> None:
        if self.last < 1:
            raise ValueError(f"{self.last} checkpoints to keep; it is at least 1")

    def of(self, found: Sequence[int]) -> set[int]:
        """The steps that stay, of ascending ones."""
        before = [each for each in found if self.before is not None and each < self.before]
        multiples = [each for each in found if self.every is not None and each % self.every == 0]
        return {*found[-self.last :], *before[-1:], *multiples}


def prune(root: Path, step: int, keep: Keep) -> None:
    """Remove the checkpoints up to ``step`` that do not stay."""
    found = [each for each in steps(root) if each <= step]
    kept = keep.of(found)
    for old in found:
        if old not in kept:
            _remove(folder(root, old))


def _remove(checkpoint: Path) -> None:
    """Renamed first, so that a kill in the middle leaves no half checkpoint under a whole one's name."""
    try:
        hidden = checkpoint.with_name(f".{checkpoint.name}")
        os.rename(checkpoint, hidden)
        shutil.rmtree(hidden)
    except OSError as error:
        warnings.warn(f"{checkpoint}: an old checkpoint could not be removed ({error})", stacklevel=2)


def retire(root: Path, after: int, name: str) -> list[int]:
    """Move the checkpoints of steps after ``after`` into the folder ``root/name``; return their steps.

    Each moves by one rename, the newest first: a kill in between leaves a row of whole checkpoints without a gap. One
    of the same step that an interrupted start has left there before is replaced.

    Raises:
        CheckpointError: one could not be moved.
    """
    later = [step for step in reversed(steps(root)) if step > after]
    try:
        for step in later:
            target = folder(root / name, step)
            if target.exists():
                _remove(target)
            target.parent.mkdir(exist_ok=True)
            os.rename(folder(root, step), target)
            sync_folder(target.parent)
            sync_folder(root)
    except OSError as error:
        raise CheckpointError(
            f"{root}: checkpoint {step} of a branch that is left could not be moved into {name} ({error.strerror});"
            " move it away by hand, then resume"
        ) from error
    return later
