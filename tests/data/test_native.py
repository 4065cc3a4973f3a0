"""What the C++ refuses that its callers in Python never give it, and what it does after an error."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys

import numpy as np
import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from megapoly.data import _index
from megapoly.data.indexed import IndexedDataset
from megapoly.data.load_tokenizer import load_tokenizer
from megapoly.errors import DataError
from tests.data.ondisk import VOCABULARY, random_documents, write
from tests.data.small import write_megatron

WORDS = ["the", "data", "of", "a", "model", "ein", "Modell", "für", "Daten", "ﬁn", "Ⅳ", "１２", "言語の", "ภาษา"]


def train(**options):
    model = io.BytesIO()
    lines = [" ".join(WORDS[i % 7 :] + WORDS[: i % 5]) for i in range(200)]
    settings = {"model_type": "bpe", "vocab_size": 400, "hard_vocab_limit": False, "minloglevel": 2, **options}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=model, **settings)
    return sentencepiece_model_pb2.ModelProto.FromString(model.getvalue())


@pytest.fixture
def folding():
    """A model with a map of characters, nmt_nfkc."""
    return train()


@pytest.fixture
def bytes_model():
    return train(byte_fallback=True, normalization_rule_name="identity", add_dummy_prefix=False)


# Maps of characters


def encoder(model):
    return _index.BpeEncoder(model.SerializeToString())


def units(table):
    """The trie of a map, and the replacements after it."""
    size = struct.unpack_from("<I", table)[0]
    return np.frombuffer(table, "<u4", size // 4, 4).copy(), table[4 + size :]


def table_of(trie, replacements):
    return struct.pack("<I", 4 * len(trie)) + trie.astype("<u4").tobytes() + replacements


def damaged_tables(table):
    trie, replacements = units(table)
    leaves = trie & 0x8000_0000 != 0  # units that hold a place among the replacements
    for size in (0, 2, 4 * len(trie) + 2, len(table) - 4, len(table), 2**32 - 4):
        yield f"size {size}", struct.pack("<I", size) + table[4:]
    yield "cut in its size", table[:3]
    yield "no replacement", table_of(trie, b"")
    yield "without an end", table_of(trie, replacements[:-1] + b"x")
    yield "not UTF-8", table_of(trie, replacements[:-2] + b"\xff\0")
    yield (
        "in a character",
        table_of(np.where(leaves, 0x8000_0000 | replacements.index(b"\xe3") + 1, trie), replacements),
    )
    yield "beyond the replacements", table_of(np.where(leaves, 0x8000_0000 | len(replacements), trie), replacements)
    yield "a root that leads out", table_of(np.where(np.arange(len(trie)) == 0, 0x1FFFFF << 10, trie), replacements)
    yield "paths that lead out", table_of(trie[: len(trie) // 2 & ~255], replacements)


@pytest.mark.parametrize("which", ["normalizer_spec", "denormalizer_spec"])
def test_damaged_maps_of_characters_are_refused(folding, tmp_path, which):
    """Also the one that only the library applies, which does not look."""
    table = folding.normalizer_spec.precompiled_charsmap
    encoder(folding)
    seen = 0
    for what, damaged in damaged_tables(table):
        getattr(folding, which).precompiled_charsmap = damaged
        (tmp_path / "t.model").write_bytes(folding.SerializeToString())
        with pytest.raises(
            DataError, match=r"t\.model: is not a SentencePiece model \(its map of characters is damaged"
        ):
            pytest.fail(f"{what}: {load_tokenizer(tmp_path / 't.model').encoder}")
        seen += 1
    assert seen == 14


def test_a_map_that_leads_back_to_itself_is_walked_once(folding):
    """Every "a" leads to where the first one did, and is replaced: 32 of them are seen, as in the library."""
    trie = np.zeros(512, np.uint32)
    node = 256
    trie[0] = node << 10
    trie[node ^ ord("a")] = ord("a") << 10 | 1 << 8 | ord("a")  # with a replacement; on by "a", which is where it was
    trie[node] = 0x8000_0000
    folding.normalizer_spec.precompiled_charsmap = table_of(trie, b"the\0")
    serialized = folding.SerializeToString()
    library = sentencepiece.SentencePieceProcessor()
    library.LoadFromSerializedProto(serialized)
    texts = ["a" * n for n in (1, 2, 31, 32, 33, 64, 65, 1000)] + ["b aab", "of aa data"]
    ids, lengths = _index.BpeEncoder(serialized).encode(texts, 1)
    assert [part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1])] == [
        library.encode(text) for text in texts
    ]
    assert lengths[3] == lengths[0] == lengths[4] - 1


# Pieces


def test_pieces_that_are_not_covered_go_to_the_library(bytes_model, tmp_path):
    """And are encoded as it does."""
    number = next(i for i, piece in enumerate(bytes_model.pieces) if piece.piece == "<0x41>")
    first = next(i for i, piece in enumerate(bytes_model.pieces) if piece.type == 1)

    def changed(number, **fields):
        model = type(bytes_model)()
        model.CopyFrom(bytes_model)
        for name, value in fields.items():
            setattr(model.pieces[number], name, value)
        return model

    for model, why in (
        (changed(number, type=1), "it falls back to bytes and lacks some of them"),
        (changed(first, piece="<0x4>", type=6), "its piece '<0x4>' is marked as a byte and is none"),
        (changed(first, piece="<0x4g>", type=6), "its piece '<0x4g>' is marked as a byte and is none"),
        (changed(first, score=float("nan")), "is empty or has no score"),
        (changed(first, piece="a\0"), "a piece holds a zero byte"),
        (changed(first, piece="a" * 1025), "a piece is longer than 1024 bytes"),
        (changed(first, type=5), "is marked unused"),
    ):
        assert why in encoder(model).refusal
        with pytest.raises(DataError, match="the model cannot be used by this encoder"):
            encoder(model).encode(["a"], 1)
    path = tmp_path / "t.model"
    path.write_bytes(changed(first, type=5).SerializeToString())
    loaded = load_tokenizer(path)
    assert loaded.encoder.startswith("sentencepiece (its piece ")
    library = sentencepiece.SentencePieceProcessor(model_file=str(path))
    assert loaded.encode("the data für A") == library.encode("the data für A")


def test_a_piece_that_is_not_utf8_is_refused(bytes_model, tmp_path):
    serialized = bytes_model.SerializeToString()
    word = "für".encode()
    assert word in serialized
    path = tmp_path / "t.model"
    path.write_bytes(serialized.replace(word, b"f\xffxr"))
    with pytest.raises(DataError, match=r"t\.model: is not a SentencePiece model \(a piece is not UTF-8\); give one"):
        load_tokenizer(path)


# Threads


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the limit is Linux's")
def test_threads_that_the_system_refuses(bytes_model, tmp_path):
    """In a process that may not map another stack; one that is asked for by Python's own means does not start."""
    path = tmp_path / "t.model"
    path.write_bytes(bytes_model.SerializeToString())
    program = f"""
import resource, sys, threading
from pathlib import Path
from megapoly.data import _index
if "libasan" in Path("/proc/self/maps").read_text():
    sys.exit()  # which has mapped all there is
encoder = _index.BpeEncoder(Path({str(path)!r}).read_bytes())
texts = [f"the data {{i}} für" * (i % 9) for i in range(500)]
wanted = encoder.encode(texts, 1)
encoder.encode(texts, 1)
mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (mapped + (6 << 20),) * 2)
try:
    threading.Thread(target=print).start()
except RuntimeError as error:
    print(error)
for threads in (2, 8, 500):
    for one, other in zip(wanted, encoder.encode(texts, threads)):
        assert one.tolist() == other.tolist()
print("the same")
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout in ("can't start new thread\nthe same\n", "")


# What follows an error


@pytest.fixture
def full(tmp_path):
    """A writer to a disk that is full, which notices when a block of 1 MiB is written out."""
    if not os.path.exists("/dev/full"):
        pytest.skip("there is no /dev/full")
    return _index.Writer("/dev/full", str(tmp_path / "d.idx"), 8, VOCABULARY)


def refused_from_now_on(writer):
    for call in (lambda: writer.append(np.array([1]), np.array([1])), writer.finish):
        with pytest.raises(
            DataError, match=r"/dev/full: could not be written before, and lacks a part; write it again"
        ):
            call()


def test_a_writer_that_failed_does_not_go_on(full):
    ids = np.ones(600_000, np.int64)
    with pytest.raises(DataError, match=r"/dev/full: cannot be written \(No space left"):
        full.append(ids, np.array([len(ids)]))
    refused_from_now_on(full)


def test_a_writer_that_failed_in_a_merge_does_not_go_on(full, tmp_path):
    part = IndexedDataset(write(tmp_path / "p", [np.ones(600_000, np.int64)])).part()
    with pytest.raises(DataError, match=r"/dev/full: cannot be written \(No space left"):
        part.hand_on(0, np.array([600_000]), None, full)
    refused_from_now_on(full)


def test_a_disk_that_is_full_at_the_end(full):
    full.append(np.array([1, 2]), np.array([2]))
    for message in ("cannot be written", "is finished already|cannot be written"):
        with pytest.raises(DataError, match=f"/dev/full: ({message})"):
            full.finish()


def broken_part(tmp_path):
    """A part whose second block is not what its checksum tells: a document that begins in the first cannot be whole."""
    documents = [np.full(size, 7) for size in (1000, 700_000)]
    for document in documents:
        document[-1] = 5
    prefix = write(tmp_path / "p", documents)
    content = bytearray(prefix.with_suffix(".bin").read_bytes())
    content[-1] ^= 1
    part = IndexedDataset(prefix).part()
    prefix.with_suffix(".bin").write_bytes(content)
    return part


def sinks(tmp_path):
    """What documents can be handed to, and what asks for the result."""
    writer = _index.Writer(str(tmp_path / "d.bin"), str(tmp_path / "d.idx"), 8, VOCABULARY)
    packer = _index.Packer(writer, 2000, 5)
    reorder = _index.Reorder(str(tmp_path / "r"), 10, 2_000_000, 2, 100 << 20)
    reorder.expect(np.arange(10))
    return {
        "writer": (writer, writer.finish),
        "packer": (packer, packer.flush),
        "reorder": (reorder, lambda: reorder.drain(0, writer)),
    }


@pytest.mark.parametrize("name", ["writer", "packer", "reorder"])
def test_half_a_document_ends_in_an_error(tmp_path, name):
    """Where reading fails inside of one, what it was handed to does not give the rest out as whole."""
    sink, result = sinks(tmp_path)[name]
    part = broken_part(tmp_path)
    with pytest.raises(DataError, match=r"p\.bin, bytes 1048576 to \d+: the content has changed"):
        part.hand_on(0, np.array([1000, 700_000]), None, sink)
    before = "could not be written before|a document before did not come whole|fewer documents came than places"
    with pytest.raises(DataError, match=before):
        result()
    with pytest.raises(DataError, match=before):
        part.hand_on(0, np.array([1000]), None, sink)


def test_packs_end_with_an_id_of_the_files_type(tmp_path):
    writer = _index.Writer(str(tmp_path / "d.bin"), str(tmp_path / "d.idx"), 8, VOCABULARY)
    for end in (-1, 65_536, 2**40):
        with pytest.raises(DataError, match=rf"d\.bin: id {end} is none of the file's type"):
            _index.Packer(writer, 8, end)


# Numbers that cannot be


def test_counts_that_cannot_be(tmp_path):
    write_megatron(tmp_path / "d", [[1, 2, 3], [4]])
    bin_path, idx_path = str(tmp_path / "d.bin"), str(tmp_path / "d.idx")
    bin_file, idx_file = os.open(bin_path, os.O_RDONLY), os.open(idx_path, os.O_RDONLY)
    try:
        for tokens, sequences, documents in (
            (4, 0, 2),
            (4, 2**60, 2),
            (4, 2, -1),
            (4, 2, 2**60),
            (-1, 2, 2),
            (2**60, 2, 2),
        ):
            with pytest.raises(
                DataError, match=rf"d\.idx: cannot have {sequences} sequences, {documents} documents and"
            ):
                _index.Dataset(bin_path, bin_file, 8, tokens, idx_path, idx_file, sequences, documents)
        with pytest.raises(DataError, match=r"d\.bin: cannot have -1 bytes"):
            _index.Part(bin_path, bin_file, -1, 8, [])
        with pytest.raises(DataError, match=r"d\.bin: has 1 blocks, and 2 checksums"):
            _index.Part(bin_path, bin_file, 8, 8, [1, 2])
        with pytest.raises(DataError, match="cannot have 1152921504606846976 tokens"):
            _index.gather(bin_path, bin_file, 8, 2**60, 10, np.array([2**60 - 8]), 8)
        with pytest.raises(ValueError, match=r"from 0 to 2\^42"):
            _index.scan(bin_path, bin_file, 8, 10, 2**62, 2**62)
        with pytest.raises(DataError, match="cannot be opened"):
            _index.Dataset(bin_path, -1, 8, 4, idx_path, idx_file, 2, 2)
    finally:
        os.close(bin_file)
        os.close(idx_file)


@pytest.mark.parametrize(
    ("first", "lengths"),
    [(-1, [1]), (5, [1]), (2**62, [1]), (0, [5]), (0, [3, 2**62]), (0, [-1]), (3, [2]), (0, [4, 2**63 - 1])],
)
def test_documents_that_a_part_does_not_hold(tmp_path, first, lengths):
    """Also those that are not to be kept, whose lengths would lead elsewhere."""
    write_megatron(tmp_path / "d", [[1, 2, 3], [4]])
    part = IndexedDataset(tmp_path / "d").part()
    for keep in (None, np.zeros(len(lengths), np.uint8)):
        seen = _index.Duplicates(str(tmp_path / "x"))
        with pytest.raises(
            DataError, match=r"d\.bin: (holds no token|a document of -?\d+ tokens from token \d+ on leaves)"
        ):
            part.hand_on(first, np.array(lengths), keep, seen)


def test_duplicates_are_asked_for_documents_that_were_compared(tmp_path):
    write_megatron(tmp_path / "d", [[1, 2], [1, 2], [3]])
    part = IndexedDataset(tmp_path / "d").part()
    seen = _index.Duplicates(str(tmp_path / "x"))
    lengths = np.array([2, 2, 1])
    part.hand_on(0, lengths, None, seen)
    with pytest.raises(DataError, match="are not of the 0 that were compared"):
        seen.kept(0, 1)
    for memory in (-(2**63), -1, 0):
        with pytest.raises(DataError, match="needs at least 1 MB of memory"):
            seen.find(memory)
    assert seen.find(1 << 20) == 1
    assert seen.kept(0, 3).tolist() == [1, 0, 1]
    for first, count in ((0, 4), (3, 1), (-1, 2), (2**62, 2**62), (0, -1), (0, 2**62)):
        for ask in (seen.kept, seen.count_kept):
            with pytest.raises(DataError, match="are not of the 3 that were compared"):
                ask(first, count)
    part.hand_on(0, lengths, None, seen)  # further ones are compared by another find()
    with pytest.raises(DataError, match="are not of the 0 that were compared"):
        seen.kept(0, 6)


@pytest.mark.parametrize(
    "numbers", [(-1, 8, 2, 1 << 20), (1, -8, 2, 1 << 20), (1, 8, 0, 1 << 20), (1, 8, 2, -1), (2**62, 2**62, 2, 2**62)]
)
def test_shuffles_that_cannot_be(tmp_path, numbers):
    with pytest.raises(DataError, match=r"r: cannot shuffle -?\d+ documents of -?\d+ bytes"):
        _index.Reorder(str(tmp_path / "r"), *numbers)


def test_sources_that_are_none_and_arrays_that_are_not_aligned(tmp_path):
    write_megatron(tmp_path / "d", random_documents())
    reader = IndexedDataset(tmp_path / "d").reader

    def fill(source, positions):
        _index.fill(
            [source],
            np.zeros(1, np.int32),
            np.zeros(1, np.int64),
            np.full(1, 9),
            1000,
            False,
            None,
            None,
            positions,
            _index.Progress(),
        )

    odd = np.frombuffer(bytearray(8 * 4 + 1), np.int64, 4, 1).reshape(1, 4)
    assert not odd.flags.aligned
    fill(reader, np.zeros((1, 4), np.int64))
    with pytest.raises(ValueError, match="a source is None"):
        fill(None, np.zeros((1, 4), np.int64))
    with pytest.raises(ValueError, match="has to be of the type and the shape"):
        fill(reader, odd)
    with pytest.raises(ValueError, match="ids has to be aligned"):
        _index.Writer(str(tmp_path / "w.bin"), str(tmp_path / "w.idx"), 8, 9).append(odd[0], np.array([4]))
