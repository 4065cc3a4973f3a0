"""The byte-pair encoder of csrc/index against the library, token for token."""

from __future__ import annotations

import gzip
import io
import json
import random
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from megapoly.data import _index
from megapoly.data.load_tokenizer import load_tokenizer
from megapoly.errors import DataError

CORPUS = Path(__file__).resolve().parents[3] / "shared/data/corpus"
WORDS = [
    "der",
    "die",
    "das",
    "the",
    "of",
    "and",
    "a",
    "12",
    "1999",
    "ein",
    "eine",
    "слово",
    "язык",
    "言語",
    "の",
    "は",
    "ภาษา",
    "ไทย",
    "한국어",
    "שפה",
    "لغة",
    "naïve",
    "ﬁn",
    "Ⅳ",
    "İ",
    "ẞ",
    "x2",
    "—",
    "…",
    "😀",
]
BASE = {"model_type": "bpe", "vocab_size": 450, "minloglevel": 2, "hard_vocab_limit": False}
VARIANTS = {
    "polylm": {
        "byte_fallback": True,
        "split_digits": True,
        "allow_whitespace_only_pieces": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "add_dummy_prefix": False,
    },
    "llama": {
        "byte_fallback": True,
        "split_digits": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
    },
    "library's defaults": {},
    "case folding": {"normalization_rule_name": "nmt_nfkc_cf", "byte_fallback": True},
    "nfkc": {"normalization_rule_name": "nfkc", "remove_extra_whitespaces": False},
    "space after": {"treat_whitespace_as_suffix": True, "byte_fallback": True},
    "across words": {"split_by_whitespace": False, "split_by_unicode_script": False, "split_by_number": False},
    "few characters": {"character_coverage": 0.98, "normalization_rule_name": "identity"},
}


def _train(**options: object) -> bytes:
    draw = random.Random(0)
    lines = [" ".join(draw.choices(WORDS, k=draw.randint(1, 12))) + "  " * draw.randint(0, 2) for _ in range(600)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=model, **BASE | options)
    return model.getvalue()


def _library(model: bytes) -> sentencepiece.SentencePieceProcessor:
    library = sentencepiece.SentencePieceProcessor()
    library.LoadFromSerializedProto(model)
    return library


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request):
    model = _train(**VARIANTS[request.param])
    ours = _index.BpeEncoder(model)
    assert ours.refusal == ""
    return ours, _library(model)


def _assert_same(pair, texts):
    ours, library = pair
    ids, lengths = ours.encode(texts, 1)
    assert np.split(ids, np.cumsum(lengths)[:-1])[0].dtype == np.int32
    assert [part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1])] == [library.encode(t) for t in texts]


def test_words_and_spaces(pair):
    draw = random.Random(1)
    texts = [
        "",
        " ",
        "   ",
        "a",
        "\n",
        "\t a",
        "a\u3000b",
        "\ufeffa",
        "\0",
        "a\0b",
        " a  b   c ",
        "12345",
        "1 2\u2581 3",
    ]
    for _ in range(2000):
        words = draw.choices(
            [*WORDS, "Zebra", "qwx", "\u2581", "\n", "  ", "e\u0301", "가", "각"], k=draw.randint(1, 30)
        )
        texts.append(draw.choice([" ", "", "  "]).join(words))
    _assert_same(pair, texts)


def test_long_text_takes_the_heap(pair):
    """Chunks of more characters than the quick way takes, with many equal pairs."""
    draw = random.Random(2)
    texts = [unit * 3000 for unit in ("a", "th", "the", " ", "言語", "ภาษา", "😀", "ö")]
    texts += ["".join(draw.choices("ethrandsi", k=n)) for n in (23, 24, 25, 26, 100, 5000)]
    _assert_same(pair, texts)


def test_any_bytes(pair):
    """Bytes that are not UTF-8: every lead byte with every kind of tail, surrogates, overlong forms, random ones."""
    draw = random.Random(3)
    tails = (
        b"",
        b"a",
        b"\x80",
        b"\x80\x80",
        b"\x80\x80\x80",
        b"\xbf\xbf\xbf\xbf",
        b"\x9f\xbf",
        b"\xa0\x80",
        b"\x8f\xbf\xbf",
    )
    texts = [b"x" + bytes([lead]) + tail + b"y" for lead in range(128, 256) for tail in tails]
    texts += [draw.randbytes(draw.randint(1, 40)) for _ in range(2000)]
    whole = " ".join(WORDS).encode()
    for _ in range(1000):
        broken = bytearray(whole)
        for _ in range(3):
            broken[draw.randrange(len(broken))] = draw.randrange(256)
        texts.append(bytes(broken[draw.randrange(20) : draw.randrange(20, len(broken))]))
    ours, library = pair
    ids, lengths = ours.encode(texts, 1)
    # The library decodes what it is given as bytes only in this call, where it also returns ids.
    expected = [library.encode(text) for text in texts]
    assert [part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1])] == expected


@settings(max_examples=300, deadline=None)
@given(st.lists(st.text(max_size=60), min_size=1, max_size=5))
def test_any_unicode(pair, texts):
    _assert_same(pair, texts)


def test_threads_change_nothing(pair):
    draw = random.Random(4)
    texts = [" ".join(draw.choices(WORDS, k=draw.randint(0, 50))) for _ in range(101)]
    one = pair[0].encode(texts, 1)
    for threads in (2, 3, 200):
        for a, b in zip(one, pair[0].encode(texts, threads), strict=True):
            np.testing.assert_array_equal(a, b)
    ids, lengths = pair[0].encode([], 4)
    assert ids.size == lengths.size == 0


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"model_type": "unigram"}, "not a byte-pair model"),
        ({"model_type": "char"}, "not a byte-pair model"),
        ({"user_defined_symbols": ["<sep>"]}, "user-defined"),
    ],
)
def test_what_is_not_covered_goes_to_the_library(options, why, tmp_path):
    model = _train(**options)
    (tmp_path / "t.model").write_bytes(model)
    tokenizer = load_tokenizer(tmp_path / "t.model")
    assert tokenizer.encoder.startswith("sentencepiece (")
    assert why in tokenizer.encoder
    texts = [" ".join(WORDS), "a<sep>b", ""]
    assert tokenizer.encode_batch(texts) == [_library(model).encode(text) for text in texts]
    with pytest.raises(DataError, match="cannot be used"):
        _index.BpeEncoder(model).encode(texts, 1)


def test_half_a_surrogate_pair_is_refused(tmp_path):
    for options in (VARIANTS["polylm"], {"model_type": "unigram"}):
        (tmp_path / "t.model").write_bytes(_train(**options))
        with pytest.raises(DataError, match="half a surrogate pair"):
            load_tokenizer(tmp_path / "t.model").encode_batch(["a\ud800b"])


@pytest.mark.parametrize("cases", [400, pytest.param(20_000, marks=pytest.mark.long)])
def test_damaged_models_are_refused_or_read_as_the_library_reads_them(tmp_path, cases):
    """Cut and flipped model files: our error, or what the library makes of the same bytes."""
    draw = random.Random(5)
    models = [_train(**VARIANTS[name]) for name in ("polylm", "library's defaults")]
    texts = [" ".join(WORDS), "the  the1999", "言語のภาษา"]
    refused = same = 0
    for _ in range(cases):
        damaged = bytearray(draw.choice(models))
        if draw.random() < 0.2:
            del damaged[draw.randrange(len(damaged)) :]
        else:
            for _ in range(draw.randint(1, 4)):
                damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
        (tmp_path / "t.model").write_bytes(damaged)
        try:
            tokenizer = load_tokenizer(tmp_path / "t.model")
        except DataError:
            refused += 1
            continue
        if tokenizer.encoder == "megapoly":
            ids = [tokenizer._fast.encode([text], 1)[0].tolist() for text in texts]
            assert ids == [_library(bytes(damaged)).encode(text) for text in texts]
            same += 1
    assert refused > cases // 20
    assert same > cases // 20


@pytest.mark.skipif(not CORPUS.is_dir(), reason="the folder of real text is not there")
@pytest.mark.parametrize("most", [40, pytest.param(None, marks=pytest.mark.long)], ids=["sample", "all"])
def test_real_text_in_18_languages(tmp_path_factory, most):
    model = _train(**VARIANTS["polylm"] | {"vocab_size": 450})
    files = sorted(CORPUS.glob("*.jsonl.gz"))
    assert len(files) == 18
    lines = []
    for file in files:
        with gzip.open(file, "rt") as texts:
            lines += [json.loads(line)["text"][:2000] for line, _ in zip(texts, range(40))]
    trained = io.BytesIO()
    options = BASE | VARIANTS["polylm"] | {"vocab_size": 8000}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=trained, **options)
    for each_model in (model, trained.getvalue()):
        ours, library = _index.BpeEncoder(each_model), _library(each_model)
        for file in files:
            with gzip.open(file, "rt") as texts:
                documents = [json.loads(line)["text"] for line, _ in zip(texts, range(most or 10**9))]
            ids, lengths = ours.encode(documents, 2)
            expected = library.encode(documents, num_threads=2)
            assert lengths.tolist() == [len(each) for each in expected]
            np.testing.assert_array_equal(ids, np.concatenate([np.array(each, np.int32) for each in expected]))
