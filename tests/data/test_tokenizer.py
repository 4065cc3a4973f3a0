"""Tokenizers: text comes back to the byte, languages are sampled by the exponent, and every bad input is an error."""

from __future__ import annotations

import gzip
import hashlib
import json
import random

import numpy as np
import pytest
import sentencepiece
from hypothesis import example, given
from hypothesis import strategies as st

from megapoly.data import tokenizer_training as module
from megapoly.data.builder import build
from megapoly.data.indexed import IndexedDataset
from megapoly.data.load_tokenizer import load_tokenizer
from megapoly.data.readers import BadRecords
from megapoly.data.tokenizer import check_matches
from megapoly.data.tokenizer_training import sampling_rates, train_tokenizer
from megapoly.errors import DataError

SENTENCES = {
    "en": "the data of a model are read from many files and every token of it has a number",
    "de": "die Daten eines Modells werden aus vielen Dateien gelesen und jedes Stück hat eine Nummer",
    "th": "ข้อมูล ของ แบบจำลอง ถูก อ่าน จาก หลาย ไฟล์ และ ทุก คำ มี หมายเลข",
    "zh": "模型 的 数据 从 许多 文件 读取 每个 词 都有 编号",
}
WORDS = {language: sentence.split() for language, sentence in SENTENCES.items()}


def write_corpus(folder, language, documents, seed=0):
    rng = random.Random(f"{language} {seed}")
    path = folder / f"{language}.jsonl"
    lines = [
        json.dumps({"text": "\n".join(" ".join(rng.choices(WORDS[language], k=12)) for _ in range(4)) + " 2024"})
        for _ in range(documents)
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    return {language: [write_corpus(folder, language, 60)] for language in WORDS}


@pytest.fixture(scope="module")
def tokenizer(corpus, tmp_path_factory):
    return train_tokenizer(corpus, tmp_path_factory.mktemp("model") / "t.model", vocabulary=500)


@pytest.fixture(scope="module")
def lengths(tokenizer):
    return tokenizer.byte_lengths()


# Text and bytes


@given(st.text())
@example("a\nb\r\n\tc\0d")
@example("one▁two ▁ ▁▁")
@example("<s></s><unk><0x0A>")
@example("  two  spaces   and\u00a0others\u3000 ")
@example("e\u0301 é ﬁ Å 𝔘 👩‍👩‍👧 \ufeff\u200b▅⁇")
@example("12345 ٣٤٥ ๑๒๓")
def test_text_comes_back_and_its_bytes_are_counted(tokenizer, lengths, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert int(lengths[ids].sum()) == len(text.encode())
    assert tokenizer.eod not in ids


def test_batches_encode_alike(tokenizer):
    texts = ["the data", "", "▁", "a▁b▁", "die Daten\n", "数据" * 50] * 10
    assert tokenizer.encode_batch(texts, threads=2) == [tokenizer.encode(text) for text in texts]


def test_pieces(tokenizer):
    model = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer.path))
    assert [model.id_to_piece(i) for i in range(4)] == ["<unk>", "<s>", "</s>", "<0x00>"]
    assert tokenizer.eod == 2
    assert tokenizer.vocabulary == model.vocab_size() == 500
    assert tokenizer.encode("\n") == [model.piece_to_id("<0x0A>")]
    assert len(tokenizer.encode("2024")) == 4
    assert len(tokenizer.encode("the data of")) < len("the data of") / 2
    lengths = tokenizer.byte_lengths()
    assert lengths.dtype == np.int32
    assert lengths.shape == (500,)
    assert lengths[:4].tolist() == [0, 0, 0, 1]
    assert lengths[model.piece_to_id("▁")] == 1
    assert tokenizer.sha256 == hashlib.sha256(tokenizer.path.read_bytes()).hexdigest()


def test_text_without_a_space_leaves_a_piece_for_it(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in ["数据数据模型", "模型数据"] * 20))
    made = train_tokenizer({"zh": [path]}, tmp_path / "t.model", vocabulary=268)
    assert made.decode(made.encode("数 据")) == "数 据"
    assert int(made.byte_lengths()[made.encode("数 据")].sum()) == 7


# Training


def test_training_is_deterministic(corpus, tokenizer, tmp_path):
    again = train_tokenizer(dict(reversed(corpus.items())), tmp_path / "t.model", vocabulary=500)
    assert again.sha256 == tokenizer.sha256
    assert [path.name for path in tmp_path.iterdir()] == ["t.model"]


def test_gzip_trains_alike(corpus, tokenizer, tmp_path):
    packed = {}
    for language, (path,) in corpus.items():
        packed[language] = [tmp_path / f"{language}.jsonl.gz"]
        packed[language][0].write_bytes(gzip.compress(path.read_bytes()))
    assert train_tokenizer(packed, tmp_path / "t.model", vocabulary=500).sha256 == tokenizer.sha256


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("budget", [100_000, 10**9])
def test_rates_follow_the_exponent(alpha, budget):
    sizes = {"en": 1_000_000, "de": 100_000, "he": 1_000}
    rates = sampling_rates(sizes, alpha, budget)
    seen = {name: rates[name] * sizes[name] for name in sizes}
    assert sum(seen.values()) == pytest.approx(min(budget, 1_101_000))
    for name in sizes:
        assert seen[name] / seen["en"] == pytest.approx((sizes[name] / sizes["en"]) ** alpha)


def test_lines_are_drawn_at_their_rates():
    """2000 lines of one language at 0.4 and of another at 2.5: copies of a line are the rate rounded down or up."""
    texts = {language: ["\n".join(f"{language} {i}" for i in range(2000))] for language in ("aa", "bb")}
    drawn = list(module._sentences(texts, {"aa": 0.4, "bb": 2.5}))
    copies = {language: [drawn.count(f"{language} {i}") for i in range(2000)] for language in texts}
    assert set(copies["aa"]) == {0, 1}
    assert set(copies["bb"]) == {2, 3}
    # Within five standard deviations of a binomial count.
    assert sum(copies["aa"]) == pytest.approx(800, abs=110)
    assert sum(copies["bb"]) == pytest.approx(5000, abs=112)


def test_long_lines_are_cut_and_not_left_out():
    drawn = list(module._sentences({"th": ["ข้อมูล" * 1000]}, {"th": 1.0}))
    assert "".join(drawn) == "ข้อมูล" * 1000
    assert max(map(len, drawn)) == 1000


def test_a_vocabulary_that_is_too_large_names_the_largest(corpus, tmp_path):
    with pytest.raises(DataError, match=r"a vocabulary of 50000 is more .* the largest possible is (\d+)") as raised:
        train_tokenizer(corpus, tmp_path / "t.model", vocabulary=50_000)
    assert not list(tmp_path.iterdir())
    largest = int(str(raised.value).rsplit(maxsplit=1)[-1])
    assert train_tokenizer(corpus, tmp_path / "t.model", vocabulary=largest).vocabulary == largest


def test_a_vocabulary_that_is_too_small_names_the_smallest(corpus, tmp_path):
    with pytest.raises(DataError, match=r"a vocabulary of 260 has no room .* the smallest possible is (\d+)") as raised:
        train_tokenizer(corpus, tmp_path / "t.model", vocabulary=260)
    smallest = int(str(raised.value).rsplit(maxsplit=1)[-1])
    assert train_tokenizer(corpus, tmp_path / "t.model", vocabulary=smallest).vocabulary == smallest


def test_an_existing_tokenizer_is_kept_unless_told(corpus, tmp_path):
    output = tmp_path / "t.model"
    output.write_bytes(b"kept")
    with pytest.raises(DataError, match="exists already"):
        train_tokenizer(corpus, output, vocabulary=500)
    assert output.read_bytes() == b"kept"
    assert train_tokenizer(corpus, output, vocabulary=500, overwrite=True).vocabulary == 500


def test_bad_training_input(corpus, tmp_path):
    output = tmp_path / "t.model"
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    with pytest.raises(DataError, match="language 'he': no document in"):
        train_tokenizer({**corpus, "he": [empty]}, output, vocabulary=500)
    with pytest.raises(DataError, match=r"absent\.jsonl: cannot be read"):
        train_tokenizer({"he": [tmp_path / "absent.jsonl"]}, output, vocabulary=500)
    with pytest.raises(DataError, match=r"en\.jsonl, line 1: has no field 'body'"):
        train_tokenizer(corpus, output, vocabulary=500, text_field="body")
    with pytest.raises(DataError, match=r"alpha 1\.5 is not from 0"):
        train_tokenizer(corpus, output, vocabulary=500, alpha=1.5)
    assert not output.exists()


def test_bad_records_are_counted_once_and_change_nothing(corpus, tokenizer, tmp_path):
    """The text is read twice, for its size and for training."""
    damaged = {**corpus, "de": [tmp_path / "de.jsonl"]}
    damaged["de"][0].write_bytes(b"bad\n" + corpus["de"][0].read_bytes() + b'{"text": "\xff"}\n')
    with pytest.raises(DataError, match=r"de\.jsonl, line 1: is not JSON"):
        train_tokenizer(damaged, tmp_path / "t.model", vocabulary=500)
    bad = BadRecords("skip")
    assert train_tokenizer(damaged, tmp_path / "t.model", vocabulary=500, bad=bad).sha256 == tokenizer.sha256
    assert bad.counts == {"not JSON": 1, "not UTF-8": 1}


# Loading


def test_bad_model_files(tmp_path, tokenizer):
    with pytest.raises(DataError, match=r"absent\.model: cannot be read \(No such file"):
        load_tokenizer(tmp_path / "absent.model")
    for content in (b"", b"garbage" * 100, tokenizer.path.read_bytes()[:1000]):
        (tmp_path / "bad.model").write_bytes(content)
        with pytest.raises(DataError, match=r"bad\.model: is not a SentencePiece model"):
            load_tokenizer(tmp_path / "bad.model")


def test_a_model_without_an_end_is_refused(tmp_path):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["some text here"] * 10), model_prefix=str(tmp_path / "t"), model_type="char",
        vocab_size=12, bos_id=-1, eos_id=-1, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    with pytest.raises(DataError, match=r"t\.model: has no control piece </s>"):
        load_tokenizer(tmp_path / "t.model")
    own = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "t.model"))
    assert load_tokenizer(tmp_path / "t.model", ends=False).encode("some text") == own.encode("some text")


def test_a_foreign_model_encodes_as_sentencepiece_does(tmp_path):
    """One that puts a space first, and has byte pieces: splitting its text would add spaces."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["some text here", "and there"] * 10), model_prefix=str(tmp_path / "t"),
        model_type="bpe", vocab_size=290, byte_fallback=True, minloglevel=2,
    )  # fmt: skip
    loaded = load_tokenizer(tmp_path / "t.model")
    own = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "t.model"))
    for text in ("some text", "a▁b", "ü"):
        assert loaded.encode(text) == own.encode(text)


# Match


def test_a_dataset_of_another_tokenizer_is_refused(corpus, tokenizer, tmp_path):
    build(corpus["en"], tmp_path / "en", tokenizer, language="en")
    dataset = IndexedDataset(tmp_path / "en")
    check_matches(tokenizer, dataset)
    other = train_tokenizer(corpus, tmp_path / "other.model", vocabulary=510)
    with pytest.raises(DataError, match=r"en: was built with a tokenizer of 500 ids.*other\.model has 510"):
        check_matches(other, dataset)
    (tmp_path / "en.json").unlink()
    check_matches(other, IndexedDataset(tmp_path / "en"))
