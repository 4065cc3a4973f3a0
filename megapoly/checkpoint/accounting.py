"""Whether a set of tensors is just the one that is expected. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from megapoly.errors import CheckpointError


def check_tensors(
    path: Path, found: Mapping[str, Sequence[int]], expected: Mapping[str, Sequence[int]], what: str, advice: str
) -> None:
    """Check shapes by name.

    Args:
        what: is said of ``path`` where they differ, such as "a checkpoint of another model".
        advice: what to do then.

    Raises:
        CheckpointError: listing by name what is missing, unexpected, or of another shape.
    """
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected]
    other = [
        f"{name} {list(found[name])}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in found and tuple(found[name]) != tuple(shape)
    ]
    problems = {"missing": missing, "unexpected": unexpected, "of another shape": other}
    parts = [f"{len(names)} {kind}: {some(names)}" for kind, names in problems.items() if names]
    if parts:
        raise CheckpointError(f"{path}: {what}; of its tensors {'; '.join(parts)}. {advice}")


def some(names: Iterable[str], most: int = 8) -> str:
    """The first of a list, and how many more there are."""
    listed = list(names)
    return ", ".join(listed[:most]) + (f" and {len(listed) - most} more" if len(listed) > most else "")
