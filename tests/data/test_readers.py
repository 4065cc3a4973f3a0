"""Readers: every format says the same, pieces are the whole, and what is bad is named and counted."""

from __future__ import annotations

import gzip
import json
import pickle
import random
from contextlib import suppress

import pyarrow
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from megapoly.data import readers
from megapoly.data.builder import build
from megapoly.data.readers import BadRecord, BadRecords, Input, Record, expand, open_reader, parse, read_texts
from megapoly.data.tokenizer_training import train_tokenizer
from megapoly.errors import DataError

# Every line end that Python knows and files do not, text that JSON escapes, and more than a chunk holds.
TEXTS = ["the first", "zwei\r\nLines", "ข้อมูล\n\n", "long " * 400, "a\u2028b\x0bc\x1dd\u0085", '"\\\t\0', "😀 é"] * 12


def json_lines(texts, newline="\n"):
    return "".join(
        json.dumps({"text": text, "n": i}, ensure_ascii=i % 2 == 0) + newline for i, text in enumerate(texts)
    ).encode()


def write_parquet(path, texts, **options):
    parquet.write_table(pyarrow.table({"n": range(len(texts)), "text": texts}), path, row_group_size=9, **options)


def compress(data, suffix):
    """In two members or frames, which both formats allow."""
    half = len(data) // 3
    if suffix == ".gz":
        return gzip.compress(data[:half]) + gzip.compress(data[half:])
    if suffix == ".zst":
        return zstandard.compress(data[:half]) + zstandard.compress(data[half:])
    return data


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The same texts in every format; the text of a line or a paragraph has no line end or blank line inside."""
    folder = tmp_path_factory.mktemp("formats")
    for suffix in ("", ".gz", ".zst"):
        (folder / f"a.jsonl{suffix}").write_bytes(compress(json_lines(TEXTS), suffix))
        (folder / f"crlf.json{suffix}").write_bytes(compress(b"\xef\xbb\xbf" + json_lines(TEXTS, "\r\n"), suffix))
    write_parquet(folder / "t.parquet", TEXTS)
    return folder


@pytest.mark.parametrize("size", [1, 3000, 1 << 20])
def test_every_format_gives_the_same_records_whole_or_in_pieces(folder, size):
    files = expand([folder])
    assert len(files) == 7
    for file in files:
        whole = list(open_reader(file))
        assert [record.values["text"] for record in whole] == TEXTS
        assert [(record.values["n"] + 1, record.path) for record in whole] == [(i + 1, file) for i in range(len(TEXTS))]
        assert [record.line for record in whole] == list(range(1, len(TEXTS) + 1))
        reader = open_reader(file)
        chunks = list(reader.chunks(size))
        assert reader.position == reader.size == file.stat().st_size
        assert chunks == list(open_reader(file).chunks(size))
        pieces = [record for chunk in chunks for record in parse(pickle.loads(pickle.dumps(chunk)))]
        assert [record.values for record in pieces] == [record.values for record in whole]
        # A message names the line, also where a plain file was cut and no line was counted.
        assert [str(record.error("is odd")) for record in pieces] == [
            f"{file}, {'row' if file.suffix == '.parquet' else 'line'} {i + 1}: is odd" for i in range(len(TEXTS))
        ]
        assert len(chunks) == 1 if size == 1 << 20 else len(chunks) > 3


def test_every_format_builds_the_same_dataset(folder, tmp_path):
    tokenizer = train_tokenizer({"xx": [folder / "a.jsonl"]}, tmp_path / "t.model", vocabulary=300)
    for number, text in enumerate(TEXTS):
        (tmp_path / f"{number:03}.txt.gz").write_bytes(gzip.compress(f"{text}\n".encode()))
    for i, inputs in enumerate([*([file] for file in expand([folder])), sorted(tmp_path.glob("*.txt.gz"))]):
        build(inputs, tmp_path / str(i), tokenizer, language="xx")
        for suffix in (".bin", ".idx", ".json"):
            assert (tmp_path / f"{i}{suffix}").read_bytes() == (tmp_path / f"0{suffix}").read_bytes(), inputs


# Plain text


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize(
    ("document", "content", "wanted"),
    [
        ("file", "\ufeffone\n\ntwo\n", [(1, "one\n\ntwo")]),
        ("file", "one\r\n", [(1, "one")]),
        ("file", " one ", [(1, " one ")]),
        ("line", "\ufeffone\r\n two \nthree", [(1, "one"), (2, " two "), (3, "three")]),
        ("line", "a\u2028b\x0bc\rd\n", [(1, "a\u2028b\x0bc\rd")]),
        ("paragraph", "\ufeff\n\none\ntwo \n\n \n\nthree\n", [(3, "one\ntwo "), (8, "three")]),
        ("paragraph", "one\r\ntwo\r\n\r\nthree\r\n \t\r\n", [(1, "one\r\ntwo"), (4, "three")]),
        ("paragraph", "one\n \n\n\n", [(1, "one")]),
        ("paragraph", "\n \n", []),
    ],
)
def test_plain_text(tmp_path, document, content, wanted, suffix):
    path = tmp_path / f"x.txt{suffix}"
    path.write_bytes(compress(content.encode(), suffix))
    for size in (1, 5, 1000):
        found = [record for chunk in open_reader(path, Input(document)).chunks(size) for record in parse(chunk)]
        lines = [str(record.error("?")) for record in found]
        assert [record.values for record in found] == [{"text": text} for _, text in wanted]
        assert lines == [f"{path}, line {line}: ?" for line, _ in wanted]


@given(st.lists(st.sampled_from(["a", "bc", "", " ", "\r"]), max_size=30), st.integers(1, 12))
def test_paragraphs_are_what_splitting_gives(tmp_path_factory, lines, size):
    path = tmp_path_factory.getbasetemp() / "paragraphs.txt"
    content = "\n".join(lines)
    path.write_bytes(content.encode())
    wanted = [[]]
    for line in lines:
        wanted[-1:] = [[*wanted[-1], line]] if line.strip() else [wanted[-1], []]
    chunks = open_reader(path, Input("paragraph")).chunks(size)
    assert [r.text("text") for c in chunks for r in parse(c)] == ["\n".join(each) for each in wanted if each]


# What is bad

BAD = [
    (b'{"text": "\xff"}', "not UTF-8", "is not UTF-8, at byte 10 of it; convert the file to UTF-8"),
    (b'{"text": "\xed\xa0\x80"}', "not UTF-8", "is not UTF-8, at byte 10 of it"),
    (b'{"text": "a"', "not JSON", "is not JSON (Expecting ',' delimiter at character 13); expected one object a line"),
    (b'{"text": "a', "not JSON", "is not JSON (Unterminated string starting at character 10)"),
    (b'{"text": "a"} x', "not JSON", "is not JSON (Extra data"),
    (b'{"n": ' + b"9" * 5000 + b"}", "not JSON", "is not JSON (Exceeds the limit"),
    (b"[" * 100_000, "not JSON", "is not JSON (maximum recursion depth"),
    (b"", "blank", "is blank; expected one object a line"),
    (b" \t", "blank", "is blank; expected one object a line"),
    (b'["a"]', "not an object", "is a JSON list; expected one object a line"),
    (b'{"n": 1}', "no field", "has no field 'text', only ['n']; name the field that holds the text"),
    (b'{"text": null}', "no text", "field 'text' holds null, not text"),
    (b'{"text": 5}', "no text", "field 'text' holds int, not text"),
    (b'{"text": ""}', "empty", "field 'text' is empty"),
    (b'{"text": " \\n"}', "empty", "field 'text' is empty"),
    (b'{"text": "\\ud800"}', "half a surrogate pair", "field 'text' holds half a surrogate pair"),
]


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_bad_lines_stop_or_are_counted(tmp_path, suffix):
    good = b'{"text": "good"}\n'
    path = tmp_path / f"x.jsonl{suffix}"
    for line, kind, message in BAD:
        path.write_bytes(compress(good * 3 + line + b"\n" + good, suffix))
        with pytest.raises(BadRecord) as raised:
            list(read_texts([path], "text", BadRecords()))
        assert str(raised.value).startswith(f"{path}, line 4: {message}")
        assert str(pickle.loads(pickle.dumps(raised.value))) == str(raised.value)
        bad = BadRecords("skip")
        assert list(read_texts([path], "text", bad)) == ["good"] * 4
        assert bad.counts == {kind: 1}
    path.write_bytes(compress(b"".join(good + line + b"\n" for line, _, _ in BAD), suffix))
    for size in (1, 100, 10**6):
        bad = BadRecords("skip", keep=1)
        for chunk in open_reader(path).chunks(size):
            part = BadRecords("skip", keep=1)
            assert set(readers.texts(parse(chunk), "text", part)) <= {"good"}
            bad.merge(part)
        assert bad.counts == {kind: sum(kind == other for _, other, _ in BAD) for _, kind, _ in BAD}
        assert bad.report()[:3] == ["skipped 5 bad records: not JSON", f"  {path}, line 6: {BAD[2][2]}", "  ..."]
    assert BadRecords().report() == []


def test_what_json_allows(tmp_path):
    """As Python's module has it: NaN, the last of a key, numbers of any size, half a pair that nobody asks for."""
    lines = [
        (b'{"n": NaN, "text": "a"}', "a"),
        (b'{"text": "a", "text": "b"}', "b"),
        (b'{"n": 123456789012345678901234567890, "m": 1e999, "text": "c"}', "c"),
        (b'{"\\udfff": "\\ud800", "text": "\\ud83d\\ude00\\u0000"}', "😀\0"),
        (b' {"text":"\\u006f\xcc\x88"}\r', "o\u0308"),
    ]
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"\n".join(line for line, _ in lines))
    assert list(read_texts([path], "text", BadRecords())) == [text for _, text in lines]


def test_bad_plain_text(tmp_path):
    path = tmp_path / "x.txt"
    path.write_bytes(b"a\n\xff\n\nb")
    for document, count in (("file", {"not UTF-8": 1}), ("line", {"not UTF-8": 1, "blank": 1})):
        bad = BadRecords("skip")
        list(read_texts([path], "text", bad, document))
        assert bad.counts == count
    path.write_bytes(b"")
    with pytest.raises(BadRecord, match=r"x\.txt, line 1: field 'text' is empty"):
        list(read_texts([path], "text", BadRecords()))
    path.write_bytes("UTF-16".encode("utf-16"))
    with pytest.raises(BadRecord, match=r"x\.txt, line 1: is not UTF-8, at byte 0"):
        list(read_texts([path], "text", BadRecords()))


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_a_record_that_is_too_long_is_passed_over(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(readers, "RECORD_BYTES", 3 << 20)
    monkeypatch.setattr(readers, "_CHUNK", 1 << 10)
    long = b"x" * (3 << 20)
    line = b'{"text": "%s"}\n'
    (tmp_path / f"x.jsonl{suffix}").write_bytes(compress(line % b"a" + line % long + line % b"b", suffix))
    (tmp_path / f"x.txt{suffix}").write_bytes(compress(b"a\n\n" + 4 * (b"y" * (1 << 20) + b"\n") + b"z\n\nb\n", suffix))
    for name, document, line_number, wanted in (
        ("x.jsonl", "file", 2, ["a", "b"]),
        ("x.txt", "paragraph", 3, ["a", "b"]),
        ("x.txt", "file", 1, []),
    ):
        path = tmp_path / f"{name}{suffix}"
        for size in (1, 1 << 20):
            bad = BadRecords("skip")
            chunks = open_reader(path, Input(document)).chunks(size)
            assert [text for chunk in chunks for text in readers.texts(parse(chunk), "text", bad)] == wanted
            assert bad.report() == [
                "skipped 1 bad records: too long",
                f"  {path}, line {line_number}: is longer than 3 MiB, which is the most that is read; split it",
            ]


# Damage


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "t.parquet"])
def test_a_file_that_was_cut_short_is_refused(folder, tmp_path, name):
    data = (folder / name).read_bytes()
    path = tmp_path / name
    for length in {0, 1, 7, len(data) // 5, len(data) * 4 // 5, len(data) - 1}:
        path.write_bytes(data[:length])
        with pytest.raises(DataError, match=rf"{name}(, after line \d+)?: (cannot be read|has no bytes)"):
            list(read_texts([path], "text", BadRecords("skip")))


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "t.parquet"])
def test_damage_is_an_error_or_seen_as_bad_lines(folder, tmp_path, name):
    """Compressed files have checksums; of plain ones and tables without, text may differ, and nothing else happens."""
    data = (folder / name).read_bytes()
    path = tmp_path / name
    pick = random.Random(name)
    wrong = 0
    for _ in range(60):
        damaged = bytearray(data)
        for _ in range(pick.randint(1, 3)):
            damaged[pick.randrange(len(data))] ^= 1 << pick.randrange(8)
        path.write_bytes(damaged)
        with suppress(DataError):
            wrong += 1
            found = list(open_reader(path))
            wrong -= 1
            assert all(isinstance(record, Record | BadRecord) for record in found)
    assert wrong > 0 or name == "a.jsonl"


def test_a_table_with_checksums_hides_no_damage(tmp_path):
    texts = [f"{i} {'text ' * 50}" for i in range(500)]
    path = tmp_path / "t.parquet"
    write_parquet(path, texts, write_page_checksum=True, compression="none", use_dictionary=False)
    damaged = bytearray(path.read_bytes())
    damaged[damaged.index(b"250 text")] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(DataError, match=r"t\.parquet: cannot be read"):
        list(open_reader(path))


def test_bad_rows(tmp_path):
    path = tmp_path / "t.parquet"
    raw = pyarrow.array([b"a", b"\xff", b"c", None, b" "], pyarrow.binary())
    text = pyarrow.Array.from_buffers(pyarrow.string(), 5, raw.buffers())  # unchecked, as another writer may be
    parquet.write_table(pyarrow.table({"text": text, "n": range(5)}), path)
    bad = BadRecords("skip")
    assert list(read_texts([path], "text", bad)) == ["a", "c"]
    assert bad.report() == [
        "skipped 1 bad records: not UTF-8",
        f"  {path}, row 2: is not UTF-8, at byte 0 of a field; convert the text to UTF-8",
        "skipped 1 bad records: no text",
        f"  {path}, row 4: field 'text' holds null, not text",
        "skipped 1 bad records: empty",
        f"  {path}, row 5: field 'text' is empty; remove such records, or skip them",
    ]
    with pytest.raises(BadRecord, match=r"t\.parquet, row 1: has no field 'body', only \['n', 'text'\]"):
        list(read_texts([path], "body", BadRecords()))


def test_only_the_columns_that_are_asked_for_are_read(tmp_path):
    parquet.write_table(pyarrow.table({"text": ["a"], "key": ["k"], "other": [1]}), tmp_path / "t.parquet")
    (record,) = open_reader(tmp_path / "t.parquet", Input(fields=("text", "key", "absent")))
    assert record.values == {"text": "a", "key": "k"}


def test_a_plain_file_that_shrinks_is_refused(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(json_lines(TEXTS))
    last = list(open_reader(path).chunks(1000))[-1]
    path.write_bytes(json_lines(TEXTS)[:1000])
    with pytest.raises(DataError, match=r"x\.jsonl: cannot be read \(it has become shorter"):
        list(parse(last))


# Which files


def test_directories_and_patterns_are_sorted_and_inputs_keep_their_order(tmp_path):
    names = ["b/2.jsonl", "b/10.txt", "a.jsonl.gz", "b/c/x.parquet", ".hidden/x.jsonl", "b/.x.swp"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).touch()

    def named(*inputs):
        return [path.relative_to(tmp_path).as_posix() for path in expand([tmp_path / each for each in inputs])]

    assert named(".") == ["a.jsonl.gz", "b/10.txt", "b/2.jsonl", "b/c/x.parquet"]
    assert named("b/c", "*.gz") == ["b/c/x.parquet", "a.jsonl.gz"]
    assert named("**/*.[jp]*") == ["a.jsonl.gz", "b/2.jsonl", "b/c/x.parquet"]
    assert named("[ab]*") == named(".")
    (tmp_path / "odd[1].txt").touch()
    assert named("odd[1].txt") == ["odd[1].txt"]
    (tmp_path / "b" / "up").symlink_to(tmp_path)
    assert named("b") == ["b/10.txt", "b/2.jsonl", "b/c/x.parquet", "b/up/a.jsonl.gz", "b/up/odd[1].txt"]


def test_inputs_that_stand_for_nothing_or_are_unknown(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "README.md").touch()
    known = r"expected \*\.jsonl, .*\*\.parquet"
    for given_input, message in (
        (tmp_path / "empty", rf"empty: no file; {known}"),
        (tmp_path / "*.txt", rf"\*\.txt: no file; {known}"),
        (tmp_path / "README.md", rf"README\.md: is of no known format; {known}$"),
        (tmp_path, r"README\.md: is of no known format; .*; to leave it out, name the others by a pattern"),
    ):
        with pytest.raises(DataError, match=message):
            expand([given_input])
    with pytest.raises(DataError, match=rf"README\.md: is of no known format; {known}"):
        open_reader(tmp_path / "README.md")
    with pytest.raises(DataError, match=r"absent\.jsonl: cannot be read \(No such file"):
        open_reader(tmp_path / "absent.jsonl")
    (tmp_path / "x.jsonl").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"x\.jsonl: is named twice"):
        expand(["x.jsonl", tmp_path / "x.jsonl"])
    with pytest.raises(DataError, match=r"x\.jsonl: is named twice"):
        expand([tmp_path / "x.jsonl", tmp_path / "*.jsonl"])
    (tmp_path / "x.parquet.gz").touch()
    with pytest.raises(DataError, match=r"x\.parquet\.gz: is of no known format"):
        open_reader(tmp_path / "x.parquet.gz")
