"""Reading of a TOML file and of overrides into plain values, and what is said of keys and values that do not fit."""

from __future__ import annotations

import difflib
import sys
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args, get_origin

import pydantic

from megapoly.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def read_toml(path: Path) -> dict[str, Any]:
    """The tree of a TOML file.

    Raises:
        ConfigError: a file that cannot be read, or is not UTF-8 or TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); give the path of a TOML file") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text, at byte {error.start}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: is not TOML: {error}") from error


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Set one ``section.key=value`` in ``tree``."""
    key, separator, text = override.partition("=")
    path = key.strip().split(".")
    if not separator or not all(path):
        raise ConfigError(f"--set {override}: expected section.key=value, such as --set layout.tp=2")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    at: Any = tree
    for i, part in enumerate(path):
        last = i == len(path) - 1
        if isinstance(at, list):
            if not part.isdecimal() or int(part) >= len(at):
                raise ConfigError(
                    f"--set {override}: {'.'.join(path[:i])} is a list of {len(at)}, which has no entry {part!r};"
                    " entries are counted from 0"
                )
            if last:
                at[int(part)] = value
            else:
                at = at[int(part)]
        elif isinstance(at, dict):
            if last:
                at[part] = value
            else:
                at = at.setdefault(part, {})
        else:
            raise ConfigError(f"--set {override}: {'.'.join(path[:i])} is a value, not a section")


def _annotation_model(annotation: Any) -> tuple[type[pydantic.BaseModel] | None, str]:
    """The section inside an annotation and how it is held: 'one', 'list' or 'dict'."""
    origin = get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        for option in get_args(annotation):
            found = _annotation_model(option)
            if found[0]:
                return found
        return None, "one"
    if origin in (list, dict):
        return _annotation_model(get_args(annotation)[-1])[0], origin.__name__
    return (
        (annotation, "one")
        if isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel)
        else (None, "one")
    )


def refuse_unknown(section: type[pydantic.BaseModel], tree: Any, path: tuple[str, ...], where: str) -> None:
    """Refuse a key that ``section`` does not have, naming the nearest that it has."""
    if not isinstance(tree, Mapping):
        return
    known = section.model_fields
    for key, value in tree.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(sorted(known))}"
            raise ConfigError(f"{where}: unknown key {'.'.join((*path, key))!r}; {hint}")
        inner, held = _annotation_model(known[key].annotation)
        if inner is None:
            continue
        if held == "list" and isinstance(value, list):
            parts: Iterable[tuple[str, Any]] = ((str(i), item) for i, item in enumerate(value))
        elif held == "dict" and isinstance(value, Mapping):
            parts = value.items()
        else:
            refuse_unknown(inner, value, (*path, key), where)
            continue
        for name, item in parts:
            refuse_unknown(inner, item, (*path, key, name), where)


def explain(problem: Any) -> str:
    """A line for one problem that pydantic found."""
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "missing":
        return f"key {key!r} is missing"
    return f"{key}: {problem['msg'][0].lower()}{problem['msg'][1:]}, found {problem['input']!r}"
