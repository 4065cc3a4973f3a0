"""Megatron's format: against megatron-core's own reader and writer, and every damaged file."""

from __future__ import annotations

import json
import pickle
import struct
import zlib

import numpy as np
import pytest

from megapoly.data import _index
from megapoly.data.indexed import HEADER, IndexedDataset
from megapoly.data.sidecar import Checksums
from megapoly.data.verify import verify
from megapoly.errors import DataError
from tests.data.ondisk import VOCABULARY, patch, random_documents, write

CODES = {"uint8": 1, "int8": 2, "int16": 3, "int32": 4, "int64": 5, "uint16": 8}


@pytest.fixture(scope="module")
def megatron():
    return pytest.importorskip("megatron.core.datasets.indexed_dataset", reason="megatron-core is not installed")


@pytest.fixture
def dataset(tmp_path):
    """The prefix of a dataset of 50 documents, the last 5 held out."""
    return write(tmp_path / "d", random_documents(), held_out=5)


# Against megatron-core


@pytest.mark.parametrize("vocabulary", [1000, 65499, 65500, 200_000])
def test_megatron_reads_our_files_and_would_write_the_same_bytes(tmp_path, megatron, vocabulary):
    documents = random_documents(vocabulary=vocabulary)
    documents[0][0] = vocabulary - 1
    prefix = write(tmp_path / "ours", documents, vocabulary=vocabulary)

    theirs = megatron.IndexedDataset(str(prefix))
    assert theirs.index.dtype is megatron.DType.optimal_dtype(vocabulary)
    assert len(theirs) == len(documents)
    for i, document in enumerate(documents):
        np.testing.assert_array_equal(theirs[i], document)

    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), megatron.DType.optimal_dtype(vocabulary))
    for document in documents:
        builder.add_document(document, [len(document)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"ours{suffix}").read_bytes() == (tmp_path / f"theirs{suffix}").read_bytes()


@pytest.mark.parametrize("name", CODES)
def test_megatron_reads_every_dtype_that_we_write(tmp_path, megatron, name):
    documents = random_documents(vocabulary=128)
    documents[1][0] = 127
    writer = _index.Writer(str(tmp_path / "d.bin"), str(tmp_path / "d.idx"), CODES[name], 128)
    writer.append(np.concatenate(documents), np.array([len(document) for document in documents]))
    writer.finish()
    for mapped in (True, False):
        theirs = megatron.IndexedDataset(str(tmp_path / "d"), mmap=mapped)
        assert theirs.index.dtype is getattr(np, name)
        assert [theirs[i].tolist() for i in range(len(theirs))] == [document.tolist() for document in documents]
    assert theirs.document_indices.tolist() == list(range(len(documents) + 1))


@pytest.mark.parametrize("name", ["float32", "float64"])
def test_megatrons_files_of_fractions_are_refused(tmp_path, megatron, name):
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "d.bin"), getattr(np, name))
    builder.add_document(np.array([1.5]), [1])
    builder.finalize(str(tmp_path / "d.idx"))
    with pytest.raises(DataError, match=rf"d\.idx: holds {name} values; token ids are whole numbers"):
        IndexedDataset(tmp_path / "d")


@pytest.mark.parametrize("name", CODES)
def test_we_read_what_megatron_writes(tmp_path, megatron, name):
    documents = random_documents(vocabulary=120)
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "d.bin"), getattr(np, name))
    for document in documents:
        # Two sequences a document, the first of which may be empty.
        builder.add_document(document, [len(document) // 2, len(document) - len(document) // 2])
    builder.end_document()  # a document without a sequence
    builder.finalize(str(tmp_path / "d.idx"))

    dataset = IndexedDataset(tmp_path / "d")
    assert dataset.dtype == np.dtype(name)
    assert (dataset.documents, dataset.tokens) == (len(documents) + 1, sum(map(len, documents)))
    assert (dataset.train_documents, dataset.train_tokens) == (dataset.documents, dataset.tokens)
    assert dataset.sidecar is None
    for i, document in enumerate(documents):
        np.testing.assert_array_equal(dataset.document(i), document)
    assert dataset.document(len(documents)).tolist() == []
    starts = np.cumsum([len(document) for document in documents])[:-1]
    np.testing.assert_array_equal(dataset.boundaries(0, dataset.tokens), starts)
    assert verify(tmp_path / "d", vocabulary=120) == []
    assert "outside the vocabulary of 100" in str(verify(tmp_path / "d", vocabulary=100)[0])


# Reading


def test_counts_and_split(dataset):
    documents = random_documents()
    opened = IndexedDataset(dataset)
    assert (opened.documents, opened.tokens) == (50, sum(map(len, documents)))
    assert (opened.train_documents, opened.train_tokens) == (45, sum(map(len, documents[:45])))
    assert opened.dtype == np.uint16


def test_gather_crosses_documents(dataset):
    stream = np.concatenate(random_documents())
    opened = IndexedDataset(dataset)
    starts = np.array([0, 17, len(stream) - 33, 3])
    got = opened.gather(starts, 33, VOCABULARY)
    assert got.dtype == np.int64
    np.testing.assert_array_equal(got, [stream[start : start + 33] for start in starts])
    assert opened.gather(np.array([], np.int64), 33, VOCABULARY).shape == (0, 33)
    assert opened.gather(np.array([5]), 0, VOCABULARY).shape == (1, 0)


def test_boundaries_lie_strictly_inside(dataset):
    documents = random_documents()
    starts = np.cumsum([0, *map(len, documents)])[:-1]
    opened = IndexedDataset(dataset)
    for start in range(0, opened.tokens, 7):
        for length in (1, 2, 30, 200, opened.tokens):
            wanted = starts[(starts > start) & (starts < start + length)]
            np.testing.assert_array_equal(opened.boundaries(start, start + length), wanted)


def test_document_at(dataset):
    documents = random_documents()
    owners = np.repeat(np.arange(len(documents)), [len(document) for document in documents])
    opened = IndexedDataset(dataset)
    assert [opened.document_at(token) for token in range(opened.tokens)] == owners.tolist()
    with pytest.raises(IndexError):
        opened.document(len(documents))
    with pytest.raises(IndexError):
        opened.document(-1)


def test_pickles_by_prefix(dataset):
    again = pickle.loads(pickle.dumps(IndexedDataset(dataset)))
    np.testing.assert_array_equal(again.document(3), random_documents()[3])


def test_identity_is_the_content(tmp_path):
    documents = random_documents()
    first = IndexedDataset(write(tmp_path / "a", documents)).identity
    assert IndexedDataset(write(tmp_path / "b", documents)).identity == first
    documents[7][0] ^= 1
    assert IndexedDataset(write(tmp_path / "c", documents)).identity != first
    foreign = IndexedDataset(write(tmp_path / "d", documents, sidecar=False)).identity
    assert IndexedDataset(write(tmp_path / "e", documents, sidecar=False)).identity == foreign
    assert IndexedDataset(write(tmp_path / "f", documents[1:], sidecar=False)).identity != foreign


@pytest.mark.parametrize(("start", "length"), [(-1, 5), (0, 10**12), (2**62, 5), (10**6, 0), (None, 2)])
def test_gather_outside_the_file(dataset, start, length):
    opened = IndexedDataset(dataset)
    start = opened.tokens - 1 if start is None else start
    with pytest.raises(DataError, match=r"d\.bin.*window"):
        opened.gather(np.array([0, start]), length, VOCABULARY)


def test_gather_refuses_ids_outside_the_vocabulary(dataset):
    stream = np.concatenate(random_documents())
    token = int(np.argmax(stream[10:60])) + 10
    with pytest.raises(DataError, match=f"token {token} has id {stream[token]}, outside the vocabulary"):
        IndexedDataset(dataset).gather(np.array([10]), 50, int(stream[token]))


def test_gather_from_a_file_that_was_cut_after_opening(dataset):
    opened = IndexedDataset(dataset)
    with open(f"{dataset}.bin", "r+b") as file:
        file.truncate(100)
    np.testing.assert_array_equal(
        opened.gather(np.array([0]), 50, VOCABULARY)[0], np.concatenate(random_documents())[:50]
    )
    with pytest.raises(DataError, match="ends at byte 100"):
        opened.gather(np.array([0]), 51, VOCABULARY)


def test_an_index_that_was_cut_after_opening(dataset):
    """Read, not mapped: an error, where a mapped file would end the process."""
    opened = IndexedDataset(dataset)
    with open(f"{dataset}.idx", "r+b") as file:
        file.truncate(HEADER.size + 100)
    for read in (lambda: opened.document(40), lambda: opened.boundaries(0, opened.tokens), lambda: opened.lengths[:]):
        with pytest.raises(DataError, match=r"d\.idx: ends at byte \d+, earlier than when it was opened"):
            read()


def test_numbers_of_the_index_outlive_their_dataset(dataset):
    columns = IndexedDataset(dataset)
    lengths, ids = columns.lengths[:], columns.document(3)
    del columns
    assert lengths.tolist() == [len(document) for document in random_documents()]
    assert ids.tolist() == random_documents()[3].tolist()


# Damaged files


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_missing_file(dataset, suffix):
    dataset.with_suffix(suffix).unlink()
    with pytest.raises(DataError, match=rf"d\{suffix}: cannot be read \(No such file"):
        IndexedDataset(dataset)


@pytest.mark.parametrize(
    ("suffix", "keep", "message"),
    [
        (".bin", -2, r"d\.bin: has \d+ bytes, but by d\.idx"),
        (".bin", 0, r"d\.bin: has 0 bytes"),
        (".idx", -1, "cut short or damaged: 50 sequences and 51 document indices need 1042 bytes, and there are 1041"),
        (".idx", HEADER.size, "there are 34"),
        (".idx", 20, "20 bytes, fewer than its header"),
        (".idx", 0, "0 bytes, fewer than its header"),
    ],
)
def test_truncated_file(dataset, suffix, keep, message):
    path = dataset.with_suffix(suffix)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match=message):
        IndexedDataset(dataset)


@pytest.mark.parametrize(
    ("offset", "data", "message"),
    [
        (0, b"NOTMINE", "begins with b'NOTMINE"),
        (9, struct.pack("<Q", 2), "version 2; an index begins with"),
        (17, b"\x09", "dtype code 9 is not of the format"),
        (17, b"\x07", "holds float32 values"),
        (17, b"\x04", r"d\.bin: has \d+ bytes"),
        (18, struct.pack("<Q", 51), "51 sequences and 51 document indices need"),
        (18, struct.pack("<Q", 2**63), "9223372036854775808 sequences"),
        (26, struct.pack("<Q", 50), "50 sequences and 50 document indices need"),
        (34 + 4 * 49, struct.pack("<i", 10**6), r"d\.bin: has \d+ bytes, but by d\.idx its tokens run"),
        (34 + 4 * 50, struct.pack("<q", 2), "run from byte 2"),
        (34 + 12 * 50 - 8, struct.pack("<q", 0), "its tokens run from byte 0 to byte"),
        (34 + 12 * 50, struct.pack("<q", 1), "run from \\[1\\] to \\[50\\], and have to from 0 to 50"),
        (34 + 12 * 50 + 8 * 50, struct.pack("<q", 49), "from \\[0\\] to \\[49\\]"),
    ],
)
def test_damaged_index(dataset, offset, data, message):
    patch(dataset.with_suffix(".idx"), offset, data)
    with pytest.raises(DataError, match=message):
        IndexedDataset(dataset)


@pytest.mark.parametrize(
    ("offset", "value"), [(34 + 12 * 50 + 8 * 25, 1000), (34 + 12 * 50 + 8 * 25, -3), (34 + 4 * 50 + 8 * 25, 2**40)]
)
def test_damage_in_the_middle_is_found_where_it_is_read(dataset, offset, value):
    patch(dataset.with_suffix(".idx"), offset, struct.pack("<q", value))
    opened = IndexedDataset(dataset)
    with pytest.raises(DataError, match=r"d\.idx: is damaged at the (index|lengths or pointers) of"):
        opened.document(25)


def test_index_without_a_document(tmp_path):
    (tmp_path / "d.bin").write_bytes(b"")
    (tmp_path / "d.idx").write_bytes(HEADER.pack(b"MMIDIDX\x00\x00", 1, 8, 0, 1) + struct.pack("<q", 0))
    with pytest.raises(DataError, match="holds no document"):
        IndexedDataset(tmp_path / "d")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda side: side | {"documents": 49}, "is of another build: it tells of 49 documents"),
        (lambda side: side | {"tokens": 7}, "is of another build"),
        (lambda side: side | {"version": 2}, "version: Input should be 1"),
        (lambda side: side | {"tokens": -1}, "tokens: Input should be greater"),
        (lambda side: {key: value for key, value in side.items() if key != "checksums"}, "checksums: Field required"),
        (
            lambda side: side | {"validation": side["validation"] | {"documents": 6}},
            "are not the last ones of the .idx",
        ),
        (
            lambda side: side | {"validation": side["validation"] | {"documents": 51}},
            "are not the last ones of the .idx",
        ),
        (lambda side: [side], "Input should be an object"),
        (lambda side: side | {"checksums": side["checksums"] | {"bin": ""}}, "0 checksums of blocks of 1048576 bytes"),
        (lambda side: side | {"checksums": side["checksums"] | {"block": 4096}}, "checksums of blocks of 4096 bytes"),
        (lambda side: side | {"checksums": side["checksums"] | {"idx": "0123456x"}}, "checksums.idx: String should"),
    ],
)
def test_wrong_sidecar(dataset, change, message):
    path = dataset.with_suffix(".json")
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(DataError, match=rf"d\.json.*{message}"):
        IndexedDataset(dataset)


def test_sidecar_that_is_not_json(dataset):
    dataset.with_suffix(".json").write_text('{"format": ')
    with pytest.raises(DataError, match=r"d\.json: is not the sidecar of an indexed dataset \(Invalid JSON"):
        IndexedDataset(dataset)


# Writing


def test_checksums_are_zlibs(tmp_path):
    """Over several blocks, the last one not full and of odd length in the .idx."""
    rng = np.random.default_rng(1)
    documents = [rng.integers(0, VOCABULARY, 700_001), rng.integers(0, VOCABULARY, 600_000), np.array([1])]
    prefix = write(tmp_path / "d", documents)
    sums = IndexedDataset(prefix).sidecar.checksums
    for suffix, digits in ((".bin", sums.bin), (".idx", sums.idx)):
        content = prefix.with_suffix(suffix).read_bytes()
        blocks = [content[i : i + (1 << 20)] for i in range(0, len(content), 1 << 20)]
        assert Checksums.split(digits) == [zlib.crc32(block) for block in blocks]


def test_both_checksums_are_zlibs():
    """At the sizes where the ways of counting change: 16 and 64 bytes."""
    data = np.random.default_rng(2).bytes(5000)
    for size in (*range(150), 1023, 4096, 5000):
        for at in (0, 1, 7):
            part = data[at : at + size]
            assert _index.crc32(part) == _index.crc32(part, by_tables=True) == zlib.crc32(part)
            both = _index.crc32(memoryview(part), zlib.crc32(b"before"))
            assert both == _index.crc32(part, zlib.crc32(b"before"), by_tables=True) == zlib.crc32(b"before" + part)
    with pytest.raises(ValueError, match="without gaps"):
        _index.crc32(memoryview(data)[::2])


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_the_writer_takes_both_types_of_ids(tmp_path, dtype):
    documents = random_documents()
    write(tmp_path / "a", documents)
    writer = _index.Writer(str(tmp_path / "b.bin"), str(tmp_path / "b.idx"), 8, VOCABULARY)
    for document in documents:
        writer.append(document.astype(dtype), np.array([len(document)]))
    writer.finish()
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.idx", "a.json", "b.bin", "b.idx"]


@pytest.mark.parametrize(
    ("ids", "lengths", "message"),
    [
        ([1, 2, VOCABULARY], [3], "token 4: id 1000 is outside the vocabulary of 1000"),
        ([1, -1], [2], "token 3: id -1 is outside"),
        ([1, 2], [2, 0], "document 2 has 0 tokens"),
        ([1, 2], [-1, 3], "document 1 has -1 tokens"),
        ([1, 2], [3], "sum to more than the 2 ids"),
        ([1, 2], [1], "sum to 1 less than the ids"),
    ],
)
def test_writer_refuses_and_writes_nothing(tmp_path, ids, lengths, message):
    writer = _index.Writer(str(tmp_path / "d.bin"), str(tmp_path / "d.idx"), 8, VOCABULARY)
    writer.append(np.array([5, 6]), np.array([2]))
    with pytest.raises(DataError, match=message):
        writer.append(np.array(ids), np.array(lengths))
    assert writer.finish()[:2] == (1, 2)
    assert IndexedDataset(tmp_path / "d").document(0).tolist() == [5, 6]


def test_writer_refuses_what_it_cannot_be(tmp_path):
    names = str(tmp_path / "d.bin"), str(tmp_path / "d.idx")
    with pytest.raises(DataError, match="a vocabulary of 65537 does not fit token ids of at most 65535"):
        _index.Writer(*names, 8, 65537)
    with pytest.raises(DataError, match="a vocabulary of 0 does not fit"):
        _index.Writer(*names, 8, 0)
    with pytest.raises(DataError, match="dtype code 7 does not stand for an integer type"):
        _index.Writer(*names, 7, 10)
    with pytest.raises(DataError, match=r"absent.d\.bin: cannot be created \(No such file"):
        _index.Writer(str(tmp_path / "absent" / "d.bin"), names[1], 8, 10)
    writer = _index.Writer(*names, 8, VOCABULARY)
    with pytest.raises(ValueError, match="one dimension"):
        writer.append(np.zeros((2, 2), np.int64), np.array([4]))
    with pytest.raises(TypeError):
        writer.append(np.array([1.5]), np.array([1]))
    writer.append(np.array([1]), np.array([1]))
    writer.finish()
    with pytest.raises(DataError, match="finished already"):
        writer.append(np.array([1]), np.array([1]))
