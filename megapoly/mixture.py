"""What a stage of the curriculum mixes: groups of sources, each with its share of the samples. No torch."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from megapoly.config_schema import Stage
from megapoly.errors import ConfigError

_NEAR = 1e-6  # how far shares may be from their sum


@dataclass(frozen=True)
class Group:
    """Sources that have a share of a stage's samples together.

    Attributes:
        key: where the config gives the share.
        weights: of every source, where the config gives them; else sizes decide how the share is split.
    """

    key: str
    share: float
    sources: tuple[str, ...]
    weights: Mapping[str, float] | None = None


def non_english_part(language: str) -> float:
    """How much of the text of a source is counted as not English, by its ``language``.

    None of English (``en``, ``en-US``) and of ``code``, half of pairs with English (``en-th``: two codes in lower
    case), all of the rest.
    """
    codes = language.split("-")
    if len(codes) == 2 and all(code.islower() and 2 <= len(code) <= 3 for code in codes):
        return sum(code != "en" for code in codes) / 2
    return float(codes[0] not in ("en", "code"))


def groups_of(stage: Stage, languages: Mapping[str, str]) -> tuple[Group, ...]:
    """The groups of a stage; their shares sum to 1. Epochs without a mixture are of all sources.

    Args:
        languages: of every source, by its name.

    Raises:
        ConfigError: not one form of mixture but none or several, an unknown source or language, or shares that do not
            fit together. The message begins with the key inside the stage.
    """
    given = [form for form in ("weights", "languages", "non_english") if getattr(stage, form) is not None]
    if given == ["weights"] and stage.weights is not None:
        return _by_weights(stage.weights, languages)
    if given == ["languages"]:
        return _by_languages(stage, languages)
    if given in (["non_english"], ["languages", "non_english"]):
        return _by_non_english(stage, languages)
    if not given and stage.epochs is not None:
        return (Group("epochs", 1.0, tuple(languages)),)
    raise ConfigError(
        f"a mixture is given by weights (of sources), by languages (shares of theirs), or by non_english, which"
        f" languages may stand beside; found {' and '.join(given) or 'none of them'}"
    )


def _by_weights(weights: Mapping[str, float], languages: Mapping[str, str]) -> tuple[Group, ...]:
    for name in weights:
        if name not in languages:
            raise ConfigError(f"weight of an unknown source {name!r}; {_hint(name, languages)}")
    _check_sum("the weights", "a source a weight", weights)
    return (Group("weights", 1.0, tuple(weights), weights),)


def _by_languages(stage: Stage, languages: Mapping[str, str]) -> tuple[Group, ...]:
    shares = stage.languages or {}
    members, rest = _members(shares, languages)
    if rest:
        raise ConfigError(
            f"languages: no key is of {_listed(rest, languages)}; give each language a share, which may be 0, or all of"
            " them one with the key '*'"
        )
    _check_sum("the shares of languages", "a language a share", shares)
    return tuple(Group(f"languages.{key}", share, members[key]) for key, share in shares.items())


def _by_non_english(stage: Stage, languages: Mapping[str, str]) -> tuple[Group, ...]:
    """``languages`` fix the shares of what they name; English and the others share the rest."""
    wanted, shares = stage.non_english or 0.0, stage.languages or {}
    members, rest = _members(shares, languages)
    groups = [Group(f"languages.{key}", share, members[key]) for key, share in shares.items()]
    fixed = 0.0
    for group in groups:
        parts = {non_english_part(languages[name]) for name in group.sources}
        if len(parts) > 1:
            raise ConfigError(
                f"{group.key}: beside non_english the languages of a key have to be alike, but some of"
                f" {_listed(group.sources, languages)} are English, code or pairs with English; name them in keys of"
                " their own"
            )
        fixed += group.share * parts.pop()
    english = [name for name in rest if languages[name].split("-")[0] == "en" and not non_english_part(languages[name])]
    others = [name for name in rest if non_english_part(languages[name]) == 1]
    neither = [name for name in rest if name not in english and name not in others]
    if neither:
        raise ConfigError(
            f"non_english: {_listed(neither, languages)} is neither English nor another language; give it a share in"
            " languages, which may be 0"
        )
    named = math.fsum(shares.values())
    share = wanted - fixed
    for what, key, value, names in (
        ("other languages", "non_english", share, others),
        ("English", "non_english (English)", 1 - named - share, english),
    ):
        sums = f"non_english {wanted:g}, of which languages hold {fixed:g}; languages {named:g} in all"
        if value < -_NEAR:
            raise ConfigError(f"non_english: leaves {what} {value:g} of the samples ({sums}); change one of them")
        if value > _NEAR and not names:
            raise ConfigError(
                f"non_english: leaves {what} {value:g} of the samples ({sums}), but no source of them is left; change"
                " one of them, or add a source"
            )
        if names:
            groups.append(Group(key, max(0.0, value), tuple(names)))
    return tuple(groups)


def _members(shares: Mapping[str, float], languages: Mapping[str, str]) -> tuple[dict[str, tuple[str, ...]], list[str]]:
    """The sources of every key, a language or a pattern of them, and those of no key. The first that fits holds."""
    found: dict[str, list[str]] = {key: [] for key in shares}
    rest: list[str] = []
    for name, language in languages.items():
        key = language if language in shares else next((k for k in shares if fnmatchcase(language, k)), None)
        (rest if key is None else found[key]).append(name)
    for key, names in found.items():
        if not names:
            known = sorted(set(languages.values()))
            taken = "its sources have keys before it" if any(fnmatchcase(each, key) for each in known) else ""
            raise ConfigError(f"languages: no source for {key!r}; {taken or _hint(key, known)}")
    return {key: tuple(names) for key, names in found.items()}, rest


def _check_sum(what: str, missing: str, shares: Mapping[str, float]) -> None:
    total = math.fsum(shares.values())
    if abs(total - 1) > _NEAR:
        hint = f"divide each by {total:.9g}" if total else f"give {missing}"
        raise ConfigError(f"{what} sum to {total:.9g}, not 1; {hint}")


def _hint(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(sorted(known))}"


def _listed(names: Iterable[str], languages: Mapping[str, str]) -> str:
    return ", ".join(f"source {name!r} ({languages[name]})" for name in names)
