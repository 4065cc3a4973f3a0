"""Bad records that were skipped, as a sidecar tells of them. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from megapoly.data.readers import BadRecord, BadRecords
from megapoly.data.sidecar import Place, Skipped


def skipped_of(bad: BadRecords) -> tuple[Skipped, ...]:
    """What was counted, by kind."""
    return tuple(
        Skipped(
            kind=kind,
            records=bad.counts[kind],
            first=tuple(
                Place(path=str(each.path), unit=each.unit, number=each.line, base=each.base, what=each.what)
                for each in bad.first[kind]
            ),
        )
        for kind in sorted(bad.counts)
    )


def join_skipped(parts: Iterable[Sequence[Skipped]]) -> tuple[Skipped, ...]:
    """The sum over parts in order; the first places stay first."""
    total = BadRecords("skip")
    for part in parts:
        total.merge(_bad(part))
    return skipped_of(total)


def describe_skipped(skipped: Sequence[Skipped]) -> list[str]:
    """Lines for people; they may read the files to count lines."""
    return _bad(skipped).report()


def _bad(skipped: Sequence[Skipped]) -> BadRecords:
    made = BadRecords("skip")
    for each in skipped:
        made.counts[each.kind] = each.records
        made.first[each.kind] = [
            BadRecord(Path(place.path), place.number, place.unit, place.base, each.kind, place.what)
            for place in each.first
        ]
    return made
