"""From JSON lines to a dataset: what comes out, what is held out, and every bad line."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys

import numpy as np
import pytest

from megapoly.cli import main
from megapoly.data import encode
from megapoly.data.builder import Options, Progress, build, held_out
from megapoly.data.indexed import IndexedDataset
from megapoly.data.tokenizer_training import train_tokenizer
from megapoly.data.verify import verify
from megapoly.errors import ConfigError, DataError
from tests.data.building import GERMAN, WORDS, documents, sentence, write_lines


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    texts = [f"{sentence(WORDS, i)}\n{sentence(GERMAN, i)}" for i in range(400)]
    return write_lines(folder / "mixed.jsonl.gz", [{"text": text, "id": i} for i, text in enumerate(texts)]), texts


@pytest.fixture(scope="module")
def tokenizer(corpus, tmp_path_factory):
    return train_tokenizer({"xx": [corpus[0]]}, tmp_path_factory.mktemp("model") / "t.model", vocabulary=400)


# What comes out


def test_documents_come_back_training_first(tmp_path, corpus, tokenizer):
    path, texts = corpus
    side = build([path], tmp_path / "d", tokenizer, language="xx", options=Options(validation_fraction=0.2))
    train = [text for text in texts if not held_out(text, 1234, 0.2)]
    held = [text for text in texts if held_out(text, 1234, 0.2)]
    assert documents(tmp_path / "d") == [[*tokenizer.encode(text), tokenizer.eod] for text in train + held]

    dataset = IndexedDataset(tmp_path / "d")
    assert dataset.sidecar == side
    assert side.language == "xx"
    assert side.tokenizer.sha256 == tokenizer.sha256
    assert (side.documents, side.bytes) == (len(texts), sum(len(text.encode()) for text in texts))
    assert (side.validation.documents, side.validation.bytes) == (len(held), sum(len(text.encode()) for text in held))
    assert dataset.train_documents == len(train) == dataset.documents - side.validation.documents
    assert dataset.train_tokens == sum(len(tokenizer.encode(text)) + 1 for text in train)
    assert dataset.tokens - dataset.train_tokens == side.validation.tokens
    assert verify(tmp_path / "d") == []
    # The windows of the whole stream decode to the texts, with the byte count of the sidecar.
    stream = dataset.gather(np.array([0]), dataset.tokens, tokenizer.vocabulary)[0]
    assert tokenizer.byte_lengths()[stream].sum() == side.bytes
    assert tokenizer.decode(stream.tolist()) == "".join(train + held)


def test_builds_are_deterministic_whatever_the_batches(tmp_path, corpus, tokenizer, monkeypatch):
    options = Options(validation_fraction=0.1)
    build([corpus[0]], tmp_path / "a", tokenizer, language="xx", options=options)
    monkeypatch.setattr(encode, "_BATCH_BYTES", 500)
    build([corpus[0]], tmp_path / "b", tokenizer, language="xx", options=Options(validation_fraction=0.1, threads=2))
    for suffix in (".bin", ".idx", ".json"):
        assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()


def test_several_inputs_follow_each_other(tmp_path, tokenizer):
    one = write_lines(tmp_path / "1.jsonl", [{"body": "one"}])
    two = write_lines(tmp_path / "2.jsonl.gz", [{"body": "two"}, {"body": "three"}])
    build([two, one], tmp_path / "d", tokenizer, language="en", options=Options(("body",), validation_fraction=0))
    wanted = [[*tokenizer.encode(text), tokenizer.eod] for text in ("two", "three", "one")]
    assert documents(tmp_path / "d") == wanted


def test_progress_reaches_the_end(tmp_path, corpus, tokenizer, monkeypatch):
    monkeypatch.setattr(encode, "_BATCH_BYTES", 5000)
    seen: list[Progress] = []
    side = build([corpus[0]], tmp_path / "d", tokenizer, language="xx", progress=seen.append)
    size = corpus[0].stat().st_size
    assert len(seen) > 3
    assert [state.documents for state in seen] == sorted(state.documents for state in seen)
    assert seen[-1] == Progress(side.documents, side.bytes, input_read=size, input_size=size)


# What is held out


def test_the_share_that_is_held_out():
    count = sum(held_out(f"key {i}", 5, 0.1) for i in range(10_000))
    assert abs(count - 1000) < 5 * 30  # five standard deviations
    assert not any(held_out(f"key {i}", 5, 0.0) for i in range(1000))


def test_a_larger_share_holds_out_the_same_and_more():
    small = {i for i in range(2000) if held_out(str(i), 5, 0.05)}
    large = {i for i in range(2000) if held_out(str(i), 5, 0.2)}
    assert small < large
    assert small != {i for i in range(2000) if held_out(str(i), 6, 0.05)}


def test_both_sides_of_a_pair_and_the_same_text_fall_on_one_side(tmp_path, tokenizer):
    english = [sentence(WORDS, i) for i in range(200)]
    german = [sentence(GERMAN, i) for i in range(200)]
    pairs = write_lines(tmp_path / "en-de.jsonl", [{"de": d, "en": e, "source": "s"} for e, d in zip(english, german)])
    alone = write_lines(tmp_path / "en.jsonl", [{"text": e} for e in english])
    keyed = write_lines(tmp_path / "de.jsonl", [{"text": d, "key": e} for e, d in zip(english, german)])
    wanted = {e.rsplit(maxsplit=1)[-1] for e in english if held_out(e, 1234, 0.25)}
    assert 20 < len(wanted) < 80
    for path, options in (
        (alone, Options(validation_fraction=0.25)),
        (keyed, Options(validation_fraction=0.25)),
        (pairs, Options(pairs=True, validation_fraction=0.25)),
        (pairs, Options(("de", "en"), pairs=True, validation_fraction=0.25)),
    ):
        build([path], tmp_path / "d", tokenizer, language="xx", options=Options(**{**vars(options), "overwrite": True}))
        dataset = IndexedDataset(tmp_path / "d")
        held = documents(tmp_path / "d")[dataset.train_documents :]
        numbers = {word for ids in held for word in tokenizer.decode(ids).split() if word.isdigit()}
        assert numbers == wanted


def test_pairs_hold_both_texts(tmp_path, tokenizer):
    records = [{"en": sentence(WORDS, i), "he": f"אבג {i}", "source": "s"} for i in range(50)]
    side = build(
        [write_lines(tmp_path / "p.jsonl", records)], tmp_path / "d", tokenizer, language="en-he",
        options=Options(pairs=True, validation_fraction=0),
    )  # fmt: skip
    texts = [tokenizer.decode(ids) for ids in documents(tmp_path / "d")]
    assert len(texts) == 50
    assert all(record["en"] in text and record["he"] in text for record, text in zip(records, texts))
    assert side.bytes == sum(len(text.encode()) for text in texts)


# Bad input


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a"', r"line 3: is not JSON"),
        ("", r"line 3: is blank; expected one object a line"),
        ("[1]", r"line 3: is a JSON list; expected one object a line"),
        ('{"body": "a"}', r"line 3: has no field 'text', only \['body'\]"),
        ('{"text": ""}', r"line 3: field 'text' is empty"),
        ('{"text": " \\n"}', r"line 3: field 'text' is empty"),
        ('{"text": 5}', r"line 3: field 'text' holds int, not text"),
        ('{"text": "\\ud800"}', r"line 3: field 'text' holds half a surrogate pair"),
        ('{"text": "a", "key": 5}', r"line 3: field 'key' holds int, not text"),
        (b'{"text": "\xff"}', r"line 3: is not UTF-8, at byte 10 of it; convert the file"),
    ],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_a_bad_line_is_named_and_nothing_is_left(tmp_path, tokenizer, line, message, suffix):
    content = b'{"text": "a"}\n{"text": "b"}\n' + (line if isinstance(line, bytes) else line.encode()) + b"\n"
    path = tmp_path / f"bad{suffix}"
    path.write_bytes(gzip.compress(content) if suffix == ".jsonl.gz" else content)
    with pytest.raises(DataError, match=rf"bad\{suffix}, {message}"):
        build([path], tmp_path / "out" / "d", tokenizer, language="en")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_bad_pair_is_named(tmp_path, tokenizer):
    path = write_lines(tmp_path / "p.jsonl", [{"en": "a", "de": "b"}, {"en": "a", "de": " "}])
    with pytest.raises(DataError, match=r"p\.jsonl, line 2: field 'de' is empty"):
        build([path], tmp_path / "d", tokenizer, language="en-de", options=Options(pairs=True))
    with pytest.raises(DataError, match=r"p\.jsonl, line 1: has no field 'fr'"):
        build([path], tmp_path / "d", tokenizer, language="en-fr", options=Options(("en", "fr"), pairs=True))
    # The language says which fields: an identifier is no Indonesian.
    path = write_lines(tmp_path / "i.jsonl", [{"en": "a", "id": "row-1"}])
    with pytest.raises(DataError, match=r"i\.jsonl, line 1: has no field 'th'"):
        build([path], tmp_path / "d", tokenizer, language="en-th", options=Options(pairs=True))


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-20], lambda data: data[:40] + b"\0" * 20 + data[60:], lambda data: b"x"]
)
def test_a_damaged_gzip_file_is_named(tmp_path, corpus, tokenizer, damage):
    path = tmp_path / "bad.jsonl.gz"
    path.write_bytes(damage(corpus[0].read_bytes()))
    with pytest.raises(DataError, match=r"bad\.jsonl\.gz(, (after )?line \d+)?: (cannot be read|is not JSON)"):
        build([path], tmp_path / "d", tokenizer, language="xx")


def test_no_document(tmp_path, tokenizer):
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(DataError, match=r"no document in .*empty\.jsonl"):
        build([tmp_path / "empty.jsonl"], tmp_path / "d", tokenizer, language="he")
    with pytest.raises(DataError, match="no document in"):
        build([], tmp_path / "d", tokenizer, language="he")
    with pytest.raises(DataError, match=r"absent\.jsonl: cannot be read"):
        build([tmp_path / "absent.jsonl"], tmp_path / "d", tokenizer, language="he")
    key = next(str(i) for i in range(100) if held_out(str(i), 1234, 0.5))
    path = write_lines(tmp_path / "one.jsonl", [{"text": "a", "key": key}])
    with pytest.raises(DataError, match=r"all 1 documents of .*one.* are held out by validation_fraction 0\.5"):
        build([path], tmp_path / "d", tokenizer, language="he", options=Options(validation_fraction=0.5))


def test_a_folder_that_cannot_be_written(tmp_path, corpus, tokenizer):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot be written"):
        build([corpus[0]], tmp_path / "file" / "d", tokenizer, language="xx")


@pytest.mark.parametrize(
    "options", [{"fields": ("a", "b")}, {"fields": ("a",), "pairs": True}, {"validation_fraction": 1.0}, {"seed": -1}]
)
def test_wrong_options(options):
    with pytest.raises(ConfigError):
        Options(**options)


# Whole or absent


def test_a_dataset_is_kept_unless_told(tmp_path, corpus, tokenizer):
    build([corpus[0]], tmp_path / "d", tokenizer, language="xx")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert sorted(before) == ["d.bin", "d.idx", "d.json"]
    other = write_lines(tmp_path.parent / "other.jsonl", [{"text": "other"}])
    with pytest.raises(DataError, match=r"d\.bin, .*d\.idx: exists already"):
        build([other], tmp_path / "d", tokenizer, language="xx")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    build([other], tmp_path / "d", tokenizer, language="xx", options=Options(overwrite=True))
    assert documents(tmp_path / "d") == [[*tokenizer.encode("other"), tokenizer.eod]]


def test_a_failed_build_keeps_the_old_dataset(tmp_path, corpus, tokenizer):
    build([corpus[0]], tmp_path / "d", tokenizer, language="xx")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    bad = tmp_path.parent / "bad.jsonl"
    bad.write_text('{"text": "a"}\nbad\n')
    with pytest.raises(DataError, match="line 2"):
        build([bad], tmp_path / "d", tokenizer, language="xx", options=Options(overwrite=True))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


# Commands


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        main(list(map(str, arguments)))
    return ended.value.code, capsys.readouterr()


def test_commands_from_text_to_a_verified_dataset(tmp_path, corpus, capsys):
    model, prefix = tmp_path / "t.model", tmp_path / "d"
    code, shown = run(capsys, "tokenizer", "train", "--output", model, "--vocabulary", 400, f"xx={corpus[0]}")
    assert (code, "400 ids, 1 languages" in shown.out) == (0, True)
    options = ("--model", model, "--json", tmp_path / "rows.json")
    code, shown = run(capsys, "tokenizer", "report", *options, f"xx={corpus[0]}")
    written = json.loads((tmp_path / "rows.json").read_text())
    assert code == 0
    assert set(written) == {"device", "versions", "rows"}
    assert written["rows"][0]["name"] == "t, xx: bytes per token"
    assert f"{written['rows'][0]['value']:.3f}" in shown.out
    code, shown = run(
        capsys,
        "data",
        "build",
        "--tokenizer",
        model,
        "--language",
        "xx",
        "--output",
        prefix,
        "--validation",
        0.1,
        corpus[0],
    )
    side = IndexedDataset(prefix).sidecar
    assert code == 0
    assert f"400 documents ({side.validation.documents} held out)" in shown.out
    code, shown = run(capsys, "data", "inspect", prefix, "--tokenizer", model, "--document", 0)
    assert code == 0
    assert f"{side.tokens:,}" in shown.out
    assert next(text for text in corpus[1] if not held_out(text, 1234, 0.1)) in shown.out
    assert run(capsys, "data", "verify", prefix)[0] == 0

    content = bytearray(prefix.with_suffix(".bin").read_bytes())
    content[100] ^= 1
    prefix.with_suffix(".bin").write_bytes(content)
    code, shown = run(capsys, "data", "verify", prefix)
    assert code == 1
    assert "1 damaged place" in shown.out
    assert "bytes 0 to" in shown.out
    assert "error: 1 of 1 datasets are damaged" in shown.err


def test_an_error_is_one_message_and_no_traceback(tmp_path, corpus, capsys):
    code, shown = run(capsys, "data", "inspect", tmp_path / "[absent]")
    assert code == 1
    assert shown.out == ""
    assert shown.err.startswith(f"error: {tmp_path}/[absent].bin: cannot be read")
    assert shown.err.count("\n") == 1
    code, shown = run(capsys, "tokenizer", "report", "--model", tmp_path / "absent.model", f"xx={corpus[0]}")
    assert code == 1
    assert "absent.model: cannot be read" in shown.err


@pytest.mark.parametrize(
    "command", ["tokenizer train", "tokenizer report", "data build", "data inspect", "data verify"]
)
def test_help_has_an_example(capsys, command):
    code, shown = run(capsys, *command.split(), "--help")
    assert code == 0
    assert f"Example: megapoly {command} " in " ".join(shown.out.split())


def test_help_loads_nothing_heavy():
    """In a process of its own, which has loaded nothing else."""
    code = (
        "import sys; from megapoly.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "print('LOADED', [name for name in ('torch', 'numpy', 'sentencepiece') if name in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "tokenizer" in shown
    assert "LOADED []" in shown


def test_python_m_megapoly(tmp_path):
    arguments = [sys.executable, "-m", "megapoly", "data", "inspect", str(tmp_path / "absent")]
    ended = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    assert "absent.bin: cannot be read" in ended.stderr
