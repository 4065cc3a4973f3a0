"""Reports against the libraries' own counts, and the check of our encoder against SentencePiece."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers
from tokenizers import models, pre_tokenizers, processors, trainers

from megapoly.cli import main
from megapoly.data import _index
from megapoly.data.load_tokenizer import load_tokenizer
from megapoly.data.readers import BadRecords
from megapoly.data.sentencepiece_tokenizer import SentencePieceTokenizer
from megapoly.data.tokenizer_check import check
from megapoly.data.tokenizer_report import count_sentences, names_of, open_tokenizer, report
from megapoly.data.tokenizer_training import train_tokenizer
from megapoly.errors import ConfigError, DataError

SHARED = Path(__file__).resolve().parents[3] / "shared/data/corpus"
SENTENCES = {
    "en": "The data of a model are read from many files. Every token has a number!",
    "de": "Die Daten eines Modells werden aus Dateien gelesen. Jedes Stück hat eine Nummer!",
    "th": "ข้อมูลของแบบจำลองถูกอ่านจากหลายไฟล์ และทุกคำมีหมายเลข",
    "zh": "模型的数据从许多文件读取。每个词都有编号！",
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Two or one sentences a line, three lines a document."""
    folder = tmp_path_factory.mktemp("corpus")
    for language, sentence in SENTENCES.items():
        pick = random.Random(language)
        texts = ["\n".join(f"{sentence} {pick.randrange(999)}" for _ in range(3)) for _ in range(30)]
        (folder / f"{language}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return {language: [folder / f"{language}.jsonl"] for language in SENTENCES}


@pytest.fixture(scope="module")
def texts(corpus):
    return {
        language: [json.loads(line)["text"] for line in path.read_text().splitlines()]
        for language, (path,) in corpus.items()
    }


@pytest.fixture(scope="module")
def paths(corpus, texts, tmp_path_factory):
    """Ours, a unigram model without </s>, and byte-level BPE that adds a token at both ends and cuts what is long."""
    folder = tmp_path_factory.mktemp("models")
    train_tokenizer(corpus, folder / "ours.model", vocabulary=400)
    lines = [line for each in texts.values() for text in each for line in text.split("\n")]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(folder / "unigram"), model_type="unigram", vocab_size=150,
        eos_id=-1, minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=350,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>"],
    )
    bpe.train_from_iterator(texts["en"], trainer)
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A <s>", special_tokens=[("<s>", 0)])
    bpe.enable_truncation(5)
    bpe.enable_padding(length=50)
    (folder / "bytes").mkdir()
    bpe.save(str(folder / "bytes/tokenizer.json"))
    return [folder / "ours.model", folder / "unigram.model", folder / "bytes/tokenizer.json"]


def test_counts_are_those_of_the_libraries(corpus, texts, paths):
    made = report(dict(zip(names_of(paths), map(open_tokenizer, paths))), corpus)
    pieces = [sentencepiece.SentencePieceProcessor(model_file=str(path)) for path in paths[:2]]
    bpe = tokenizers.Tokenizer.from_file(str(paths[2]))
    bpe.no_truncation()
    bpe.no_padding()
    assert made.tokenizers == ("ours", "unigram", "bytes")
    assert made.vocabularies == (400, pieces[1].vocab_size(), 350)
    assert [row.language for row in made.rows] == list(corpus)
    for row in made.rows:
        mine = texts[row.language]
        size = sum(len(text.encode()) for text in mine)
        tokens = [sum(len(model.encode(text)) for text in mine) for model in pieces]
        tokens.append(sum(len(bpe.encode(text, add_special_tokens=False)) for text in mine))
        # Every line ends one sentence with its number, after the marks of the others; Thai has no marks.
        sentences = 30 * 3 * {"en": 3, "de": 3, "th": 1, "zh": 3}[row.language]
        assert (row.documents, row.sentences, row.bytes, row.tokens) == (30, sentences, size, tuple(tokens))
        assert row.bytes_per_token == pytest.approx([size / count for count in tokens])
        assert row.tokens_per_sentence == pytest.approx([count / sentences for count in tokens])
    for i in range(3):
        assert made.mean_bytes_per_token()[i] == pytest.approx(np.mean([row.bytes_per_token[i] for row in made.rows]))
        costs = [row.tokens_per_sentence[i] for row in made.rows]
        assert made.mean_tokens_per_sentence()[i] == pytest.approx(np.mean(costs))


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("One. Two! Three? 'Four.' Five", 5),
        ("Version 3.14 of a.b is out... now", 2),
        ("一。二！三？」四", 4),
        ("هل هذا سؤال؟ نعم.", 2),
        ("यह एक है। दो।", 2),
        ("a\n\n- - -\nb\n", 2),
        ("...\n!", 0),
        ("", 0),
    ],
)
def test_what_a_sentence_is(text, count):
    assert count_sentences(text) == count


def test_names():
    paths = [Path("a/x.model"), Path("b/x.model"), Path("gpt2/tokenizer.json"), Path("y.model")]
    assert names_of(paths) == ["a/x.model", "b/x.model", "gpt2", "y"]


def test_bad_tokenizer_files(tmp_path, paths):
    whole = paths[2].read_bytes()
    path = tmp_path / "bad.json"
    with pytest.raises(DataError, match=r"bad\.json: cannot be read \(No such file"):
        open_tokenizer(path)
    pick = random.Random(0)
    garbage = [b"", b"{}", b"[]", b"garbage", whole[:-1], whole[: len(whole) // 2], pick.randbytes(1000)]
    for content in garbage:
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"bad\.json: is no tokenizer of the tokenizers library"):
            open_tokenizer(path)
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(pick.randint(1, 3)):
            damaged[pick.randrange(len(whole))] = pick.choice(b'{}[]",:019azAZ \\')
        path.write_bytes(damaged)
        try:
            _, lengths = open_tokenizer(path).encode_flat(["the data", "é", ""])
        except DataError:
            continue
        assert len(lengths) == 3
    (tmp_path / "bad.model").write_bytes(whole)
    with pytest.raises(DataError, match=r"bad\.model: is not a SentencePiece model"):
        open_tokenizer(tmp_path / "bad.model")


def test_a_tokenizer_that_lacks_a_word(tmp_path):
    words = tokenizers.Tokenizer(models.WordLevel({"the": 0}, unk_token="<unk>"))
    words.save(str(tmp_path / "words.json"))
    with pytest.raises(DataError, match=r"words\.json: cannot encode a text"):
        open_tokenizer(tmp_path / "words.json").encode_flat(["other"])


def test_a_report_of_nothing(tmp_path, paths):
    (tmp_path / "x.jsonl").write_text('{"text": "..."}\n')
    with pytest.raises(DataError, match="language 'xx': no document with words"):
        report({"ours": open_tokenizer(paths[0])}, {"xx": [tmp_path / "x.jsonl"]})


# The check


def test_the_check_finds_every_difference_and_only_those(corpus, texts, paths, tmp_path):
    tokenizer = load_tokenizer(paths[0])
    rows = check(tokenizer, corpus)
    for row in rows:
        assert (row.different, row.first, row.documents) == (0, "", 30)
        assert row.tokens == sum(len(tokenizer.encode(text)) for text in texts[row.language])
        assert row.bytes == sum(len(text.encode()) for text in texts[row.language])
        assert min(row.speed, row.library_speed) > 0
    # Another model's encoder in its place stands for a wrong one.
    other = train_tokenizer(
        {language: corpus[language] for language in ("en", "de")}, tmp_path / "o.model", vocabulary=400
    )
    tokenizer._fast = _index.BpeEncoder(other.path.read_bytes())
    right = sentencepiece.SentencePieceProcessor(model_file=str(paths[0]))
    for row in check(tokenizer, corpus):
        pairs = [(right.encode(text), other.encode(text)) for text in texts[row.language]]
        wrong = [i for i, (wanted, found) in enumerate(pairs) if wanted != found]
        assert row.different == len(wrong) > 0
        wanted, found = pairs[wrong[0]]
        at = next(i for i in range(len(wanted)) if wanted[i] != found[i])
        assert row.first == (
            f"document {wrong[0]} of {row.language!r}, token {at}: {found[at : at + 5]}, expected {wanted[at : at + 5]}"
        )


def test_a_model_of_the_library_alone_has_nothing_to_check(corpus, texts, tmp_path):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts["en"]), model_prefix=str(tmp_path / "u"), model_type="unigram", vocab_size=60,
        minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    with pytest.raises(DataError, match=r"u\.model: is encoded by sentencepiece \(.*nothing to compare"):
        check(load_tokenizer(tmp_path / "u.model"), corpus)


@pytest.mark.long
def test_a_vocabulary_of_256000_on_real_text(tmp_path):
    """As PolyLM's; every id of the real text is the library's."""
    if not SHARED.exists():
        pytest.skip("the corpus of real text is not here")
    files = {path.name.split(".")[0]: [path] for path in sorted(SHARED.glob("*.jsonl.gz"))}
    made = train_tokenizer(files, tmp_path / "t.model", vocabulary=256_000)
    assert made.vocabulary == 256_000
    rows = check(made, files)
    assert [row.different for row in rows] == [0] * 18
    assert sum(row.documents for row in rows) > 50_000


# The commands


def arguments(corpus):
    return [f"{language}={path}" for language, (path,) in corpus.items()]


def test_the_report_command(corpus, paths, tmp_path, capsys):
    models_given = [word for path in paths for word in ("--model", str(path))]
    files = ["--picture", str(tmp_path / "r.svg"), "--json", str(tmp_path / "r.json"), "--baseline", "2"]
    with pytest.raises(SystemExit, match="0"):
        main(["tokenizer", "report", *models_given, *files, *arguments(corpus)])
    out = capsys.readouterr().out.splitlines()
    made = report(dict(zip(names_of(paths), map(open_tokenizer, paths))), corpus)
    for row in made.rows:
        best = max(row.bytes_per_token)
        shown = [f"{value:.3f}{'*' if value == best else ''}" for value in row.bytes_per_token]
        assert [row.language, *shown] in [line.split() for line in out]
    assert sum(line.startswith(" mean") for line in out) == 2
    rows = {row["name"]: row for row in json.loads((tmp_path / "r.json").read_text())["rows"]}
    assert len(rows) == 3 * 5 * 2
    chinese = made.rows[-1]
    assert rows["ours, zh: bytes per token"] == {
        "name": "ours, zh: bytes per token",
        "value": chinese.bytes_per_token[0],
        "unit": "bytes/token",
        "peer": "unigram",
        "peer_value": chinese.bytes_per_token[1],
        "ratio": pytest.approx(chinese.tokens[1] / chinese.tokens[0]),
    }
    assert rows["bytes, zh: tokens per sentence"]["ratio"] == pytest.approx(chinese.tokens[1] / chinese.tokens[2])
    assert (tmp_path / "r.svg").read_text().startswith("<?xml")
    for extra, message in (
        (["--baseline", "4"], "--baseline 4: there are 3 tokenizers"),
        (["--picture", "r.gif"], "--picture r.gif: a picture is one of"),
        (["--model", str(paths[0])], "named twice"),
    ):
        with pytest.raises(SystemExit, match="1"):
            main(["tokenizer", "report", *models_given, *extra, *arguments(corpus)])
        assert message in capsys.readouterr().err


def test_skipped_records_are_said(corpus, paths, tmp_path, capsys):
    path = tmp_path / "en.jsonl"
    path.write_bytes(b"bad\n" + corpus["en"][0].read_bytes())
    for command in (["report", "--model", str(paths[0])], ["check", str(paths[0])]):
        with pytest.raises(SystemExit, match="1"):
            main(["tokenizer", *command, f"en={path}"])
        assert "en.jsonl, line 1: is not JSON" in capsys.readouterr().err
        with pytest.raises(SystemExit, match="0"):
            main(["tokenizer", *command, "--on-bad", "skip", f"en={path}"])
        assert "skipped 1 bad records: not JSON\n" in capsys.readouterr().out


def test_the_check_command(corpus, paths, tmp_path, capsys, monkeypatch):
    command = ["tokenizer", "check", str(paths[0]), "--json", str(tmp_path / "c.json"), *arguments(corpus)]
    with pytest.raises(SystemExit, match="0"):
        main(command)
    assert "the same ids as SentencePiece's in all 120 documents" in capsys.readouterr().out
    rows = json.loads((tmp_path / "c.json").read_text())["rows"]
    assert [(row["name"], row["documents"], row["different"]) for row in rows] == [
        (f"{language}: encode", 30, 0) for language in corpus
    ]
    encode = SentencePieceTokenizer.encode_flat

    def wrong(self, texts, threads=0, special=False, by_library=False):
        ids, lengths = encode(self, texts, threads, special, by_library)
        return ids + by_library, lengths

    monkeypatch.setattr(SentencePieceTokenizer, "encode_flat", wrong)
    with pytest.raises(SystemExit, match="1"):
        main(command)
    assert "gives other ids than SentencePiece in 120 documents, first in document 0 of 'en'" in capsys.readouterr().err


def test_bad_counts_reach_the_caller(corpus, paths, tmp_path):
    path = tmp_path / "en.jsonl"
    path.write_bytes(corpus["en"][0].read_bytes() + b'{"text": ""}\n')
    bad = BadRecords("skip")
    made = report({"ours": open_tokenizer(paths[0])}, {"en": [path]}, bad=bad)
    assert (made.rows[0].documents, bad.counts) == (30, {"empty": 1})


def test_a_picture_needs_a_known_suffix_before_the_work(paths):
    from megapoly.charts.figure import check_picture

    with pytest.raises(ConfigError, match=r"\.gif"):
        check_picture(Path("x.gif"))
