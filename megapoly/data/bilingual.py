"""Aligned pairs of sentences, written as documents. No torch.

PolyLM trained on parallel text but does not say how a pair was written. The forms here follow from what a model should
learn of pairs: to go on in the other language (one text after the other), to translate where the languages are named
(labels, as in few-shot prompts), and to translate on request (the sentence that PolyLM's WMT20 prompts use). Every form
stands in both directions, and a pair gets one form and direction by a keyed hash: over a corpus they are equally
frequent, so that none becomes a habit, and the same pair is always written alike. A pair is one document.
"""

from __future__ import annotations

from hashlib import blake2b

from megapoly.data.records import Record

#: {a}, {b} the texts, {A}, {B} the names of their languages in English.
TEMPLATES = (
    "{a}\n{b}",
    "{a}\n\n{b}",
    "{A}: {a}\n{B}: {b}",
    "[{A}] {a} [{B}] {b}",
    "{a}\nTranslate this sentence from {A} to {B}.\n{b}",
    "Translate from {A} to {B}.\n{a}\n{b}",
)

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

    Raises:
        DataError: there are not exactly two.
    """
    found = sorted((name for name in record.values if name in LANGUAGES), key=lambda name: (name != "en", name))
    if len(found) != 2:
        raise record.error(
            f"has {len(found)} fields named by language codes among {sorted(record.values)}, where a pair has two;"
            " name the two fields"
        )
    return found[0], found[1]


def render(languages: tuple[str, str], texts: tuple[str, str], seed: int) -> str:
    """The document of a pair: one of the templates in one direction, by a keyed hash of the pair.

    A language code that is not in :data:`LANGUAGES` stands for itself.
    """
    text = "\0".join((*languages, *texts)).encode()
    draw = blake2b(text, digest_size=8, key=seed.to_bytes(8, "little"), person=b"template").digest()
    number = int.from_bytes(draw, "little") % (2 * len(TEMPLATES))
    template, turned = TEMPLATES[number // 2], number % 2
    first, second = (1, 0) if turned else (0, 1)
    names = [LANGUAGES.get(code, code) for code in languages]
    return template.format(a=texts[first], b=texts[second], A=names[first], B=names[second])
