"""The thresholds of rules.toml, by language."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import steps
from datatrove.pipeline.dedup import MinhashConfig
from datatrove.pipeline.filters import GopherQualityFilter, GopherRepetitionFilter

from megapoly.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FILE = Path(__file__).with_name("rules.toml")
STEPS = {
    "language": steps.LanguageFilter,
    "tidy": steps.Tidy,
    "repetition": GopherRepetitionFilter,
    "quality": GopherQualityFilter,
    "digits": steps.DigitsFilter,
    "duplicates": MinhashConfig,
}
_NOT_THRESHOLDS = {"language", "exclusion_writer", "norm_config", "hash_config"}

Rules = Mapping[str, Mapping[str, Any]]  # of one language: step -> argument -> value


def load(path: Path, languages: Sequence[str]) -> dict[str, Rules]:
    """The rules of each language: those of ``[default]``, with what the language's own sections change.

    Raises:
        ConfigError: a language that the language filter does not know, a step or an argument that there is not, a step
            without rules, a value that is no threshold.
    """
    if unknown := sorted(set(languages) - steps.known_languages()):
        raise ConfigError(f"language {unknown[0]!r} is none of lid.176: {', '.join(sorted(steps.known_languages()))}")
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); give a file like {FILE.name}") from error
    for section, table in tables.items():
        _check(path, section, table)
    default = tables.get("default", {})
    if missing := [step for step in STEPS if step not in default]:
        raise ConfigError(f"{path}: [default.{missing[0]}] is missing; every step needs its rules")
    return {
        code: {step: {**default[step], **tables.get(code, {}).get(step, {})} for step in STEPS} for code in languages
    }


def _check(path: Path, section: str, table: Any) -> None:
    for step, arguments in table.items() if isinstance(table, Mapping) else ((section, table),):
        if step not in STEPS or not isinstance(arguments, Mapping):
            known = ", ".join(f"[{section}.{name}]" for name in STEPS)
            raise ConfigError(f"{path}: {section}.{step} is no section of a step; expected {known}")
        known_names = sorted(set(inspect.signature(STEPS[step]).parameters) - _NOT_THRESHOLDS)
        for name, value in arguments.items():
            if name not in known_names:
                raise ConfigError(f"{path}: {name} in [{section}.{step}] is none of {', '.join(known_names)}")
            if not _is_threshold(step, name, value):
                raise ConfigError(f"{path}: {name} in [{section}.{step}] cannot be {value!r}; see {FILE.name}")


def _is_threshold(step: str, name: str, value: Any) -> bool:
    if name == "stop_words":
        return isinstance(value, list) and all(isinstance(word, str) for word in value)
    if name in ("top_n_grams", "dup_n_grams"):
        return isinstance(value, list) and all(
            isinstance(pair, list) and len(pair) == 2 and type(pair[0]) is int and _is_number(pair[1]) for pair in value
        )
    if step == "duplicates":
        return type(value) is int and value > 0
    return _is_number(value) and (type(value) is int or name not in ("max_characters", "max_word_length"))


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and value >= 0
