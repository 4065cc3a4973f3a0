"""A data plan as plain values, and back from them with every value checked. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

from megapoly.data.segments import Segment, Source
from megapoly.errors import DataError


def checked(document: Any, kind: type, where: str) -> dict[str, Any]:
    """Values of a dataclass from JSON: every field without a default there, no other than its fields, each of its type.

    A field with a default is one that came later: older documents have none.
    """
    expected = {field.name: field.type for field in fields(kind)}
    later = {field.name for field in fields(kind) if field.default is not MISSING}
    if not isinstance(document, Mapping) or not expected.keys() - later <= document.keys() <= expected.keys():
        found = sorted(document) if isinstance(document, Mapping) else type(document).__name__
        raise DataError(f"{where}: found {found}, expected the keys {sorted(expected)}")
    return {key: _value(document[key], str(expected[key]), f"{where}.{key}") for key in expected if key in document}


def _value(value: Any, kind: str, where: str) -> Any:
    if kind in ("int", "str"):
        if type(value).__name__ != kind:
            raise DataError(f"{where}: found {value!r}, expected {kind}")
        return value
    if not isinstance(value, list):
        raise DataError(f"{where}: found {type(value).__name__}, expected a list")
    item = kind.removeprefix("tuple[").removesuffix(", ...]")
    records = {"Source": Source, "Segment": Segment}
    if item not in records:
        return tuple(_value(entry, item, f"{where}.{i}") for i, entry in enumerate(value))
    record = records[item]
    return tuple(record(**checked(entry, record, f"{where}.{i}")) for i, entry in enumerate(value))
