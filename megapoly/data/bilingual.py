"""Aligned pairs of sentences, written as documents. No torch.

PolyLM trained on parallel text but does not say how a pair was written. :data:`TEMPLATES`, the defaults, follow from
what a model should learn of pairs:

- ``{a}\\n{b}`` and ``{a}\\n\\n{b}``, plain concatenation: to go on in the other language, as a translation stands below
  its original in a document. It needs no names and suits any pair.
- ``{A}: {a}\\n{B}: {b}`` and ``[{A}] {a} [{B}] {b}``: to translate where labels name the languages, as in few-shot
  prompts, on two lines or on one.
- ``{a}\\nTranslate this sentence from {A} to {B}.\\n{b}`` and ``Translate from {A} to {B}.\\n{a}\\n{b}``: to translate
  on request, which stands behind the text (the sentence of PolyLM's WMT20 prompts) or before it.

Every template stands in both directions, and a pair gets one template and direction by a keyed hash: over a corpus they
are equally frequent (or by the weights of the file), so that none becomes a habit, and the same pair is always written
alike. A pair is one document. Other templates are a TOML file, :func:`load_templates`.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from string import Formatter
from typing import Any

from megapoly.config_file import read_toml
from megapoly.data.records import Record
from megapoly.errors import ConfigError

#: {a}, {b} the texts, {A}, {B} the names of their languages in English.
TEMPLATES = (
    "{a}\n{b}",
    "{a}\n\n{b}",
    "{A}: {a}\n{B}: {b}",
    "[{A}] {a} [{B}] {b}",
    "{a}\nTranslate this sentence from {A} to {B}.\n{b}",
    "Translate from {A} to {B}.\n{a}\n{b}",
)
MOST_WEIGHT = 1000

_NAMES = """
af Afrikaans, am Amharic, ar Arabic, as Assamese, az Azerbaijani, be Belarusian, bg Bulgarian, bn Bengali, br Breton,
bs Bosnian, ca Catalan, cs Czech, cy Welsh, da Danish, de German, el Greek, en English, eo Esperanto, es Spanish,
et Estonian, eu Basque, fa Persian, fi Finnish, fr French, fy Western Frisian, ga Irish, gd Scottish Gaelic,
gl Galician, gu Gujarati, ha Hausa, he Hebrew, hi Hindi, hr Croatian, hu Hungarian, hy Armenian, id Indonesian,
ig Igbo, is Icelandic, it Italian, ja Japanese, jv Javanese, ka Georgian, kk Kazakh, km Khmer, kn Kannada, ko Korean,
ku Kurdish, ky Kyrgyz, la Latin, lb Luxembourgish, lo Lao, lt Lithuanian, lv Latvian, mg Malagasy, mi Maori,
mk Macedonian, ml Malayalam, mn Mongolian, mr Marathi, ms Malay, mt Maltese, my Burmese, nb Norwegian Bokmål,
ne Nepali, nl Dutch, nn Norwegian Nynorsk, no Norwegian, oc Occitan, om Oromo, or Odia, pa Punjabi, pl Polish,
ps Pashto, pt Portuguese, ro Romanian, ru Russian, rw Kinyarwanda, sa Sanskrit, sd Sindhi, si Sinhala, sk Slovak,
sl Slovenian, sn Shona, so Somali, sq Albanian, sr Serbian, st Southern Sotho, su Sundanese, sv Swedish, sw Swahili,
ta Tamil, te Telugu, tg Tajik, th Thai, ti Tigrinya, tk Turkmen, tl Tagalog, tr Turkish, tt Tatar, ug Uyghur,
uk Ukrainian, ur Urdu, uz Uzbek, vi Vietnamese, wo Wolof, xh Xhosa, yi Yiddish, yo Yoruba, zh Chinese, zu Zulu
"""
#: Names in English by ISO 639-1 code.
LANGUAGES: dict[str, str] = {code: name for code, name in (entry.split(maxsplit=1) for entry in _NAMES.split(","))}


def pair_fields(record: Record) -> tuple[str, str]:
    """The two fields of a record that are named by language codes, English first, else by the alphabet.

    ``id`` is Indonesian only where it makes the second; beside two others it identifies the record.

    Raises:
        DataError: there are not exactly two.
    """
    found = [name for name in record.values if name in LANGUAGES]
    if len(found) == 3 and "id" in found:
        found.remove("id")
    if len(found) != 2:
        raise record.error(
            f"has {len(found)} fields named by language codes among {sorted(record.values)}, where a pair has two;"
            " name the two with --fields, such as en,th"
        )
    return _english_first(*found)


def fields_of(language: str) -> tuple[str, ...]:
    """The fields of the records of a source whose language is a pair, such as ``en-th``; none of another language."""
    codes = language.split("-")
    if len(codes) != 2 or codes[0] == codes[1] or not all(code in LANGUAGES for code in codes):
        return ()
    return _english_first(*codes)


def _english_first(*codes: str) -> tuple[str, str]:
    first, second = sorted(codes, key=lambda code: (code != "en", code))
    return first, second


def render(languages: tuple[str, str], texts: tuple[str, str], seed: int, templates: Sequence[str] = TEMPLATES) -> str:
    """The document of a pair: one of ``templates`` in one direction, by a keyed hash of the pair.

    A language code that is not in :data:`LANGUAGES` stands for itself. The texts stand in the document as they are,
    whatever they hold.
    """
    text = "\0".join((*languages, *texts)).encode()
    draw = blake2b(text, digest_size=8, key=seed.to_bytes(8, "little"), person=b"template").digest()
    number = int.from_bytes(draw, "little") % (2 * len(templates))
    template, turned = templates[number // 2], number % 2
    first, second = (1, 0) if turned else (0, 1)
    names = [LANGUAGES.get(code, code) for code in languages]
    return template.format(a=texts[first], b=texts[second], A=names[first], B=names[second])


def load_templates(path: str | Path) -> tuple[str, ...]:
    """The templates of a TOML file, each as often as its weight says, for :func:`render`::

        templates = ["{a}\\n{b}", "{A}: {a}\\n{B}: {b}"]
        weights = [3, 1]   # whole numbers; equal where left out

    ``{a}`` and ``{b}`` stand for the texts, once each, ``{A}`` and ``{B}`` for the names of their languages; a brace
    is ``{{`` or ``}}``.

    Raises:
        ConfigError: the file cannot be read, or a template or weight is not such a one.
    """
    path = Path(path)
    tree = read_toml(path)
    unknown = sorted(tree.keys() - {"templates", "weights"})
    if unknown:
        raise ConfigError(f"{path}: has unknown keys {unknown}; a file of templates has templates and weights")
    templates = tree.get("templates")
    if not isinstance(templates, list) or not templates:
        raise ConfigError(f'{path}: templates has to be a list of texts, such as templates = ["{{a}}\\n{{b}}"]')
    for number, template in enumerate(templates):
        problem = _problem(template)
        if problem:
            raise ConfigError(
                f"{path}: templates[{number}], {template!r}, {problem}; a template holds {{a}} and {{b}}, the texts,"
                " once each, and may hold {A} and {B}, the names of their languages; a brace is {{ or }}"
            )
        if template in templates[:number]:
            raise ConfigError(
                f"{path}: templates[{number}], {template!r}, stands there twice; give it a weight instead"
            )
    weights = tree.get("weights", [1] * len(templates))
    whole = isinstance(weights, list) and all(type(weight) is int and weight > 0 for weight in weights)
    if not whole or len(weights) != len(templates) or sum(weights) > MOST_WEIGHT:
        raise ConfigError(
            f"{path}: weights {weights!r}; expected {len(templates)} whole numbers, one for each template, from 1, with"
            f" a sum of at most {MOST_WEIGHT}"
        )
    return tuple(template for template, weight in zip(templates, weights) for _ in range(weight))


def _problem(template: Any) -> str | None:
    """What is wrong with a template."""
    if not isinstance(template, str):
        return "is not a text"
    try:
        fields = [found[1:] for found in Formatter().parse(template) if found[1] is not None]
    except ValueError as error:
        return f"has a brace that is not closed or opened ({error})"
    names = []
    for name, specification, conversion in fields:
        if name not in ("a", "b", "A", "B") or specification or conversion:
            shown = f"{name}{'!' + conversion if conversion else ''}{':' + specification if specification else ''}"
            return f"holds {{{shown}}}"
        names.append(name)
    for name in ("a", "b"):
        if names.count(name) != 1:
            return f"holds {{{name}}} {names.count(name)} times"
    return None
