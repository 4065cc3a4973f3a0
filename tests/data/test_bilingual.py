"""Pairs as documents: every form, both directions, the same pair always alike."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from megapoly.data.bilingual import LANGUAGES, TEMPLATES, pair_fields, render
from megapoly.data.records import Record
from megapoly.errors import DataError


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


@pytest.mark.parametrize("values", [{"en": "a"}, {"text": "a"}, {"en": "a", "de": "b", "id": "17"}])
def test_records_without_exactly_two_languages_are_refused(values):
    with pytest.raises(DataError, match=r"p\.jsonl, line 7: has \d fields named by language codes"):
        pair_fields(record(**values))
