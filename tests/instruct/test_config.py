"""The config of self-instruct: what it refuses, and what the others do with it."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest

from megapoly.errors import ConfigError
from megapoly.instruct.config import load

SMALL = """
directory = "run"
seeds = "seeds.jsonl"
languages = ["es", "ko", "pt-BR"]
[endpoint]
model = "m"
context = 4096
"""


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "instruct.toml"
    path.write_text(text)
    return path


def test_the_defaults_are_polylms(tmp_path: Path) -> None:
    config = load(written(tmp_path, SMALL))
    assert config.requests() == 910
    assert config.rounds.tasks == 17
    assert config.filter.similarity == 0.7
    assert [config.overlap(code) for code in config.languages] == [Fraction(1, 2), Fraction(3, 10), Fraction(1, 2)]
    others = load(tmp_path / "instruct.toml", ['languages=["vi", "ar", "ar-EG"]'])
    assert [others.overlap(code) for code in others.languages] == [Fraction(3, 10), Fraction(1, 5), Fraction(1, 5)]
    assert [config.name(code) for code in config.languages] == ["Spanish", "Korean", "Portuguese"]
    assert config.directory == tmp_path / "run"


def test_languages_have_settings_of_their_own(tmp_path: Path) -> None:
    own = 'languages.ko = { input_overlap = 0.4, seeds = "ko.jsonl" }\nlanguages.tlh = { name = "Klingon" }'
    text = SMALL.replace('languages = ["es", "ko", "pt-BR"]', own)
    config = load(written(tmp_path, text), ["filter.input_overlap=0.6"])
    assert (config.overlap("ko"), config.overlap("tlh")) == (Fraction(2, 5), Fraction(3, 5))
    assert config.name("tlh") == "Klingon"
    assert config.languages["ko"].seeds == tmp_path / "ko.jsonl"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("directory =", "dirctory ="), "unknown key 'dirctory'; did you mean 'directory'"),
        (("context =", "contxt ="), "unknown key 'endpoint.contxt'; did you mean 'context'"),
        (("context = 4096", ""), "give max_tokens, context, or both"),
        (("context = 4096", "context = 10\nmax_tokens = 10"), "max_tokens 10 leaves nothing of context 10"),
        (("[endpoint]", '[local]\npath = "m"\n[endpoint]'), "either \\[endpoint\\] or \\[local\\]"),
        (('[endpoint]\nmodel = "m"\ncontext = 4096', ""), "either \\[endpoint\\] or \\[local\\]"),
        (('"es"', '"tlh"'), "language 'tlh' has no name here"),
        (('"es"', '"en/x"'), "language 'en/x' has no name here"),
        (('["es", "ko", "pt-BR"]', '{ "a/b" = { name = "x" } }'), "language 'a/b': a code is letters"),
        (('["es", "ko", "pt-BR"]', "[]"), "languages is empty"),
        (('["es", "ko", "pt-BR"]', "3"), "languages: input should be a valid dictionary, found 3"),
        (("context = 4096", "context = 0"), "endpoint.context: input should be greater than 0, found 0"),
        (("[endpoint]", "[budget]\nmoney = 3\n[endpoint]"), "budget.money needs budget.prompt_price"),
        (("context = 4096", "context = 9\nextra = { max_tokens = 3 }"), "endpoint.extra.max_tokens cannot be set"),
        (("context = 4096", "context = 9\nextra = { best_of = 3 }"), "endpoint.extra.best_of cannot be set"),
        (('model = "m"', ""), "key 'endpoint.model' is missing"),
        (('[endpoint]\nmodel = "m"\ncontext = 4096', '[local]\npath = "m"\ntemplate = "x"'), "hold {prompt} once"),
    ],
)
def test_what_is_refused(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    assert change[0] in SMALL
    with pytest.raises(ConfigError, match=rf"instruct.toml: .*({message})"):
        load(written(tmp_path, SMALL.replace(*change)))
