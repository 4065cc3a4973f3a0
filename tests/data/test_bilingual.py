"""Pairs as documents: every form, both directions, the same pair always alike."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megapoly.data.bilingual import LANGUAGES, TEMPLATES, fields_of, load_templates, pair_fields, render
from megapoly.data.records import Record
from megapoly.errors import ConfigError, DataError


def record(**values):
    return Record(Path("p.jsonl"), 7, values)


def test_every_form_in_both_directions_equally_often():
    seen = Counter()
    forms = {}
    for turned in (False, True):
        for template in TEMPLATES:
            names = {"A": "German", "B": "English"} if turned else {"A": "English", "B": "German"}
            forms[template.format(a="{de}" if turned else "{en}", b="{en}" if turned else "{de}", **names)] = 0
    assert len(forms) == 2 * len(TEMPLATES)
    count = 6000
    for i in range(count):
        text = render(("en", "de"), (f"x{i}x", f"y{i}y"), 1)
        seen[text.replace(f"x{i}x", "{en}").replace(f"y{i}y", "{de}")] += 1
    assert set(seen) == set(forms)
    share = count / len(forms)
    assert all(abs(n - share) < 5 * share**0.5 for n in seen.values())


def test_the_same_pair_is_written_alike_and_the_seed_matters():
    texts = [render(("en", "de"), (str(i), str(-i)), 1) for i in range(100)]
    assert texts == [render(("en", "de"), (str(i), str(-i)), 1) for i in range(100)]
    assert texts != [render(("en", "de"), (str(i), str(-i)), 2) for i in range(100)]


def test_texts_may_look_like_templates():
    for i in range(50):
        text = render(("en", "de"), (f"{{b}} {i}", "{A} {"), 0)
        assert f"{{b}} {i}" in text
        assert "{A} {" in text


def test_an_unknown_language_stands_for_itself():
    assert any("from English to tlh." in render(("en", "tlh"), (str(i), "x"), 0) for i in range(100))


def test_the_languages_of_polylm_have_names():
    names = {"ar": "Arabic", "he": "Hebrew", "id": "Indonesian", "zh": "Chinese", "gd": "Scottish Gaelic"}
    assert {code: LANGUAGES[code] for code in names} == names
    polylm = "en zh es fr pt ru de it ar ja ko th vi id nl pl tr he"
    assert set(polylm.split()) <= set(LANGUAGES)


def test_fields_are_found_by_language_code():
    assert pair_fields(record(source="os", he="א", en="a")) == ("en", "he")
    assert pair_fields(record(th="x", de="y", text="z")) == ("de", "th")
    assert pair_fields(record(id="17", th="x", en="y")) == ("en", "th")
    assert pair_fields(record(id="x", en="y")) == ("en", "id")


@pytest.mark.parametrize(
    ("language", "fields"),
    [("en-th", ("en", "th")), ("th-en", ("en", "th")), ("th-de", ("de", "th")), ("en-id", ("en", "id")),
     ("en-xx", ()), ("pairs", ()), ("th", ()), ("en-en", ()), ("zh-Hant", ())],
)  # fmt: skip
def test_fields_of_a_language_that_is_a_pair(language, fields):
    assert fields_of(language) == fields


@pytest.mark.parametrize("values", [{"en": "a"}, {"text": "a"}, {"en": "a", "de": "b", "th": "c", "id": "17"}])
def test_records_without_exactly_two_languages_are_refused(values):
    with pytest.raises(DataError, match=r"p\.jsonl, line 7: has \d fields named by language codes"):
        pair_fields(record(**values))


# Templates of one's own


def templates_file(tmp_path, text):
    path = tmp_path / "templates.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_templates_of_a_file(tmp_path):
    path = templates_file(tmp_path, 'templates = ["{a}\\n{b}", "{{{A}}} {a} ⇒ {B}|{B}: {b}"]')
    templates = load_templates(path)
    assert templates == ("{a}\n{b}", "{{{A}}} {a} ⇒ {B}|{B}: {b}")
    seen = {render(("en", "th"), ("a{A}", "{b}\x00b"), seed, templates) for seed in range(60)}
    assert seen == {
        "a{A}\n{b}\x00b",
        "{b}\x00b\na{A}",
        "{English} a{A} ⇒ Thai|Thai: {b}\x00b",
        "{Thai} {b}\x00b ⇒ English|English: a{A}",
    }


def test_the_defaults_pass_their_own_check(tmp_path):
    path = templates_file(tmp_path, f"templates = {json.dumps(TEMPLATES)}")
    assert load_templates(path) == TEMPLATES
    pairs = [(str(i), f"t{i}") for i in range(200)]
    assert [render(("en", "de"), pair, 3, load_templates(path)) for pair in pairs] == [
        render(("en", "de"), pair, 3) for pair in pairs
    ]


def test_weights_are_the_frequencies_in_both_directions(tmp_path):
    """Pearson's test with 5 degrees of freedom, for a fixed seed: 20.5 is passed by chance once in a thousand times."""
    path = templates_file(tmp_path, 'templates = ["{a} {b}", "{A} {a} {b}", "{a}, {b}"]\nweights = [6, 3, 1]')
    templates = load_templates(path)
    count = 20_000
    seen = Counter()
    for i in range(count):
        text = render(("fr", "ja"), (f"x{i}", f"y{i}"), 5, templates)
        seen[text.replace(f"x{i}", "x").replace(f"y{i}", "y")] += 1
    shares = {"x y": 0.3, "y x": 0.3, "French x y": 0.15, "Japanese y x": 0.15, "x, y": 0.05, "y, x": 0.05}
    assert set(seen) == set(shares)
    assert sum((seen[form] - count * share) ** 2 / (count * share) for form, share in shares.items()) < 20.5


@given(st.text(), st.text(), st.integers(0, 2**64 - 1), st.sampled_from(["{a}{b}", "<{A}>{{{b}}}{a}", "{b} {B} {a}"]))
def test_both_texts_stand_inside_as_they_are(first, second, seed, template):
    names = {"A": "English", "B": "Thai"}, {"A": "Thai", "B": "English"}
    wanted = []
    for (a, b), name in zip(((first, second), (second, first)), names):
        form = {"{a}{b}": a + b, "<{A}>{{{b}}}{a}": f"<{name['A']}>" + "{" + b + "}" + a}
        wanted.append(form.get(template, f"{b} {name['B']} {a}"))
    assert render(("en", "th"), (first, second), seed, (template,)) in wanted


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('templates = ["{a} {b}", "{a}"]', r"templates\[1\], '{a}', holds {b} 0 times"),
        ('templates = ["{a} {b} {a}"]', "holds {a} 2 times"),
        ('templates = ["{a} {b} {c}"]', "holds {c}"),
        ('templates = ["{a} {b} {}"]', "holds {}"),
        ('templates = ["{a} {b} {0}"]', "holds {0}"),
        ('templates = ["{a!r} {b}"]', "holds {a!r}"),
        ('templates = ["{a:>99} {b}"]', "holds {a:>99}"),
        ('templates = ["{a.__class__} {b}"]', "holds {a.__class__}"),
        ('templates = ["{a[0]} {b}"]', r"holds {a\[0\]}"),
        ('templates = ["{a} {b} {"]', "has a brace that is not closed or opened"),
        ('templates = ["{a} {b} }"]', "has a brace that is not closed or opened"),
        ('templates = ["{{a}} {b}"]', "holds {a} 0 times"),
        ('templates = [""]', "holds {a} 0 times"),
        ('templates = ["{a} {b}", 7]', r"templates\[1\], 7, is not a text"),
        ('templates = ["{a} {b}", "{b}{a}", "{a} {b}"]', r"templates\[2\], '{a} {b}', stands there twice"),
        ("templates = []", "templates has to be a list of texts"),
        ('templates = "{a} {b}"', "templates has to be a list of texts"),
        ("", "templates has to be a list of texts"),
        ('templates = ["{a} {b}"]\nweigths = [1]', r"unknown keys \['weigths'\]"),
        ('templates = ["{a} {b}"]\nweights = [1, 2]', r"weights \[1, 2\]; expected 1 whole numbers"),
        ('templates = ["{a} {b}"]\nweights = [0]', "expected 1 whole numbers"),
        ('templates = ["{a} {b}"]\nweights = [0.5]', "expected 1 whole numbers"),
        ('templates = ["{a} {b}"]\nweights = [true]', "expected 1 whole numbers"),
        ('templates = ["{a} {b}"]\nweights = 1', "expected 1 whole numbers"),
        ('templates = ["{a} {b}"]\nweights = [1001]', "a sum of at most 1000"),
        ("templates = [", "is not TOML"),
    ],
)
def test_wrong_files_of_templates_are_refused(tmp_path, text, message):
    with pytest.raises(ConfigError, match=rf"templates\.toml: .*{message}"):
        load_templates(templates_file(tmp_path, text))


def test_a_file_of_templates_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.toml: cannot be read \(No such file"):
        load_templates(tmp_path / "none.toml")
    (tmp_path / "t.toml").write_bytes(b'templates = ["\xff{a}{b}"]')
    with pytest.raises(ConfigError, match=r"t\.toml: is not UTF-8"):
        load_templates(tmp_path / "t.toml")
