"""``megapoly data build``: what its options do, and what it says."""

from __future__ import annotations

import json
import re

import pytest
import sentencepiece

from megapoly.cli import main
from megapoly.data.indexed import IndexedDataset
from tests.data.building import WORDS, contents, documents, sentence, write_lines


@pytest.fixture
def run(tokenizer, capsys):
    """A build by the command: its code and what it printed."""

    def build(output, *arguments, language="xx"):
        options = ["--tokenizer", tokenizer.path, "--language", language, "--output", output]
        with pytest.raises(SystemExit) as ended:
            main(["data", "build", *map(str, [*options, *arguments])])
        shown = capsys.readouterr()
        return ended.value.code, " ".join(shown.out.split()), " ".join(shown.err.split())

    return build


def test_inputs_of_all_kinds(tmp_path, corpus, tokenizer, run):
    """A folder, a pattern and files are the same text; a line of a .txt is a document where that is said."""
    folder, texts = corpus
    code, told, _ = run(tmp_path / "a", "--document", "line", "--validation", 0, folder)
    assert code == 0
    assert documents(tmp_path / "a") == [[*tokenizer.encode(text), tokenizer.eod] for text in texts]
    size = sum(len(text.encode()) for text in texts)
    assert f"a: 800 documents (0 held out), {size / 1e6:.2f} MB, {IndexedDataset(tmp_path / 'a').tokens:,} tok" in told
    assert re.search(r"[\d,]+ documents/s, [\d.]+ MB/s of text$", told)
    run(tmp_path / "b", "--document", "line", "--validation", 0, f"{folder}/*.jsonl*", f"{folder}/c.txt")
    assert sorted(documents(tmp_path / "b")) == sorted(documents(tmp_path / "a"))
    code, _, told = run(tmp_path / "c", "--validation", 0, f"{folder}/*.pdf")
    assert (code, "*.pdf: no file; expected *.jsonl" in told) == (1, True)


def test_the_librarys_encoder_is_told(tmp_path, run):
    texts = [sentence(WORDS, i) for i in range(200)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_prefix=str(tmp_path / "u"), model_type="unigram", vocab_size=60,
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    path = write_lines(tmp_path / "t.jsonl", [{"text": text} for text in texts])
    code, told, _ = run(tmp_path / "d", "--tokenizer", tmp_path / "u.model", "--validation", 0, path)
    assert code == 0
    assert told.startswith(f"{tmp_path}/u.model: encoded by sentencepiece (it is not a byte-pair model), several times")
    assert "encoded by" not in run(tmp_path / "e", "--validation", 0, path)[1]


def test_shards_that_merge(tmp_path, corpus, run, small_pieces):
    arguments = ["--document", "line", "--validation", 0.1, "--processes", 1, corpus[0]]
    run(tmp_path / "all", *arguments)
    for i in (1, 2, 3):
        assert run(tmp_path / f"part-{i}", "--shard", f"{i}/3", *arguments)[0] == 0
    with pytest.raises(SystemExit):
        main(["data", "merge", "--output", str(tmp_path / "merged"), str(tmp_path / "part-*")])
    assert contents(tmp_path / "merged") == contents(tmp_path / "all")
    code, _, told = run(tmp_path / "d", "--shard", "4/3", *arguments)
    assert (code, told) == (1, "error: shard 4/3: shards are numbered from 1 to their count, as in 3/8")


def test_bad_records_are_told(tmp_path, run):
    path = write_lines(tmp_path / "a.jsonl", [{"text": "a b"}, {"text": 5}, {"body": "c"}, *[{"text": ""}] * 5])
    code, _, told = run(tmp_path / "d", path)
    assert code == 1
    assert told.endswith("a.jsonl, line 2: field 'text' holds int, not text")
    code, told, _ = run(tmp_path / "d", "--on-bad", "skip", path)
    assert code == 0
    assert "1 documents" in told
    assert f"skipped 5 bad records: empty {path}, line 4: field 'text' is empty" in told
    assert f"{path}, line 6: " in told
    assert f"{path}, line 7: " not in told
    assert f"skipped 1 bad records: no text {path}, line 2: field 'text' holds int, not text" in told
    assert {each.kind: each.records for each in IndexedDataset(tmp_path / "d").sidecar.skipped} == {
        "empty": 5, "no text": 1, "no field": 1,
    }  # fmt: skip


@pytest.mark.parametrize("name", ["--field", "--fields"])
def test_the_field_is_named(tmp_path, run, name, tokenizer):
    path = write_lines(tmp_path / "a.jsonl", [{"body": "a b"}])
    assert run(tmp_path / "d", "--validation", 0, name, "body", path)[0] == 0
    assert documents(tmp_path / "d") == [[*tokenizer.encode("a b"), tokenizer.eod]]


def test_pairs_and_their_templates(tmp_path, run, tokenizer):
    path = write_lines(tmp_path / "p.jsonl", [{"de": f"eins {i}", "en": f"one {i}"} for i in range(20)])
    own = tmp_path / "own.toml"
    own.write_text('templates = ["<{A}> {a} <{B}> {b}"]\n')
    options = ("--pairs", "--validation", 0, path)
    assert run(tmp_path / "d", "--templates", own, *options, language="en-de")[0] == 0
    texts = [tokenizer.decode(ids) for ids in documents(tmp_path / "d")]
    turned = [text == f"<German> eins {i} <English> one {i}" for i, text in enumerate(texts)]
    straight = [text == f"<English> one {i} <German> eins {i}" for i, text in enumerate(texts)]
    assert [a + b for a, b in zip(turned, straight)] == [1] * 20
    assert 0 < sum(turned) < 20
    assert IndexedDataset(tmp_path / "d").sidecar.templates == ("<{A}> {a} <{B}> {b}",)
    run(tmp_path / "e", "--fields", "de, en", *options, language="en-de")
    assert len(set(IndexedDataset(tmp_path / "e").sidecar.templates)) == 6
    code, _, told = run(tmp_path / "f", "--templates", own, path)
    assert (code, "is for pairs; give --pairs too" in told) == (1, True)


def test_documents_are_put_together(tmp_path, run):
    """The same as merge with the same options."""
    texts = [{"text": sentence(WORDS, i % 60)} for i in range(100)]
    path = write_lines(tmp_path / "a.jsonl", texts)
    run(tmp_path / "plain", "--validation", 0, path)
    options = ["--deduplicate", "--shuffle", "3", "--pack", "256", "--memory-mb", "300"]
    code, told, _ = run(tmp_path / "d", "--validation", 0, *options, path)
    assert code == 0
    assert "left out: 40 duplicates" in told
    assert "packs of 256 tokens" in told
    with pytest.raises(SystemExit):
        main(["data", "merge", "--output", str(tmp_path / "m"), *options, str(tmp_path / "plain")])
    assert contents(tmp_path / "d") == contents(tmp_path / "m")


def test_what_was_kept_of_an_interrupted_build_is_told(tmp_path, run, small_pieces):
    lines = [json.dumps({"text": f"{sentence(WORDS, i)}"}) for i in range(300)]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines[:200], "{", *lines[200:]]))
    arguments = ("--processes", 1, tmp_path / "a.jsonl")
    code, _, told = run(tmp_path / "d", *arguments)
    assert (code, "line 201: is not JSON" in told) == (1, True)
    code, told, _ = run(tmp_path / "d", "--on-bad", "skip", *arguments)
    assert code == 0
    kept = int(re.search(r"(\d+) documents of an interrupted build were not encoded again", told)[1])
    assert 0 < kept <= 200
    code, _, told = run(tmp_path / "d", *arguments)
    assert (code, "d.bin" in told, "exists already" in told) == (1, True, True)
    code, told, _ = run(tmp_path / "d", "--overwrite", "--on-bad", "skip", *arguments)
    assert (code, "interrupted" in told) == (0, False)
