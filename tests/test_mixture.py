"""The three forms of a mixture: what sources share what, and what is refused."""

from __future__ import annotations

import pytest

from megapoly.config_schema import Stage
from megapoly.errors import ConfigError
from megapoly.mixture import groups_of, non_english_part

LANGUAGES = {"web": "en", "books": "en", "th": "th", "ko": "ko", "pairs": "en-th", "code": "code"}


def groups(of=LANGUAGES, **mixture):
    found = groups_of(Stage(name="s", tokens=1, **mixture), of)
    return {group.key: (pytest.approx(group.share), group.sources) for group in found}


@pytest.mark.parametrize(
    ("language", "part"),
    [("en", 0), ("en-US", 0), ("code", 0), ("th", 1), ("zh-Hant", 1), ("en-th", 0.5), ("th-en", 0.5), ("de-fr", 1),
     ("parallel", 1), ("en-xx", 0.5), ("pt-BR", 1)],
)  # fmt: skip
def test_what_is_not_english(language, part):
    assert non_english_part(language) == part


def test_weights_are_one_group():
    (group,) = groups_of(Stage(name="s", tokens=1, weights={"web": 0.75, "ko": 0.25}), LANGUAGES)
    assert (group.share, group.sources, group.weights) == (1, ("web", "ko"), {"web": 0.75, "ko": 0.25})


def test_languages_by_name_and_pattern():
    found = groups(languages={"en": 0.5, "en-*": 0.1, "*": 0.4})
    assert found == {
        "languages.en": (0.5, ("web", "books")),
        "languages.en-*": (0.1, ("pairs",)),
        "languages.*": (0.4, ("th", "ko", "code")),
    }
    # A name goes before a pattern, wherever it stands.
    named = groups(languages={"*": 0.9, "th": 0.1})
    assert named["languages.th"] == (0.1, ("th",))


def test_non_english_counts_half_of_pairs():
    found = groups(non_english=0.6, languages={"en-th": 0.2, "code": 0.05})
    assert found == {
        "languages.en-th": (0.2, ("pairs",)),
        "languages.code": (0.05, ("code",)),
        "non_english": (0.5, ("th", "ko")),  # 0.6 - 0.2 / 2
        "non_english (English)": (0.25, ("web", "books")),  # 1 - 0.2 - 0.05 - 0.5
    }


@pytest.mark.parametrize(("non_english", "others"), [(0.0, 0.0), (1.0, 1.0), (0.3, 0.3)])
def test_non_english_alone(non_english, others):
    found = groups({"a": "en", "b": "th"}, non_english=non_english)
    assert found == {"non_english": (others, ("b",)), "non_english (English)": (1 - others, ("a",))}


WRONG = {
    "nothing": ({}, "found none of them"),
    "two forms": ({"weights": {"web": 1.0}, "non_english": 0.3}, "found weights and non_english"),
    "unknown source": ({"weights": {"wob": 1.0}}, "unknown source 'wob'; did you mean 'web'?"),
    "sum of weights": ({"weights": {"web": 0.5}}, "the weights sum to 0.5, not 1; divide each by 0.5"),
    "no weight": ({"weights": {"web": 0.0}}, "the weights sum to 0, not 1; give a source a weight"),
    "sum of languages": ({"languages": {"en": 0.5, "*": 0.6}}, "the shares of languages sum to 1.1, not 1"),
    "language without a key": (
        {"languages": {"en": 0.5, "th": 0.5}},
        "no key is of source 'ko' (ko), source 'pairs' (en-th), source 'code' (code); give each",
    ),
    "key without a source": (
        {"languages": {"jo": 0.5, "*": 0.5}},
        "no source for 'jo'; there are: code, en, en-th, ko, th",
    ),
    "pattern that comes too late": (
        {"languages": {"*": 0.5, "en-*": 0.5}},
        "no source for 'en-*'; its sources have keys before it",
    ),
    "neither": ({"non_english": 0.3}, "source 'pairs' (en-th), source 'code' (code) is neither English nor"),
    "too little of others": (
        {"non_english": 0.3, "languages": {"en-th": 0.8, "code": 0}},
        "leaves other languages -0.1 of the samples (non_english 0.3, of which languages hold 0.4; languages 0.8 in",
    ),
    "too little English": (
        {"non_english": 0.8, "languages": {"en-th": 0.2, "code": 0.2}},
        "leaves English -0.1 of the samples",
    ),
    "no English left": (
        {"non_english": 0.5, "languages": {"en-th": 0, "code": 0, "en": 0.3}},
        "leaves English 0.2 of the samples (non_english 0.5, of which languages hold 0; languages 0.3 in all), but no",
    ),
    "unlike languages": (
        {"non_english": 0.5, "languages": {"en-*": 0.1, "*": 0.2}},
        "languages.*: beside non_english the languages of a key have to be alike",
    ),
}


@pytest.mark.parametrize(("mixture", "message"), WRONG.values(), ids=WRONG)
def test_what_is_refused(mixture, message):
    with pytest.raises(ConfigError) as error:
        groups(**mixture)
    assert message in str(error.value)
