"""Verification finds every kind of damage, and says where it is."""

from __future__ import annotations

import json
import os
import struct

import numpy as np
import pytest

from megapoly.data import _index
from megapoly.data import verify as module
from megapoly.data.indexed import IndexedDataset
from megapoly.data.verify import verify
from megapoly.errors import DataError
from tests.data.ondisk import VOCABULARY, patch, random_documents, write


@pytest.fixture
def large(tmp_path):
    """Four blocks in the .bin: 40 documents of 50,000 tokens."""
    rng = np.random.default_rng(2)
    return write(tmp_path / "d", [rng.integers(0, VOCABULARY, 50_000) for _ in range(40)])


def test_a_whole_dataset_verifies(large):
    seen = []
    assert verify(large, progress=lambda done, total: seen.append((done, total))) == []
    assert seen[-1][0] == seen[-1][1] == sum(large.with_suffix(suffix).stat().st_size for suffix in (".bin", ".idx"))


def test_verify_locates_a_changed_byte(large):
    at = 2_500_000  # in block 2 (bytes 2,097,152 to 3,145,727), document 25
    value = large.with_suffix(".bin").read_bytes()[at]
    patch(large.with_suffix(".bin"), at, bytes([value ^ 1]))
    (found,) = verify(large)
    assert (found.start, found.stop) == (2 << 20, 3 << 20)
    assert found.documents == (20, 31)
    assert "checksum" in str(found)
    assert f"{large}.bin, bytes 2097152 to 3145727, documents 20 to 31" in str(found)


def test_verify_locates_a_wrong_id(large):
    patch(large.with_suffix(".bin"), 2_500_000, struct.pack("<H", 60_000))
    (found,) = verify(large)
    assert (found.start, found.stop, found.documents) == (2 << 20, 3 << 20, (20, 31))
    assert "bytes 2500000 to 2500001: token 1250000 has id 60000, outside the vocabulary of 1000" in found.what
    large.with_suffix(".json").unlink()
    (found,) = verify(large, vocabulary=VOCABULARY)
    assert (found.start, found.stop, found.documents) == (2_500_000, 2_500_002, (25, 25))


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
@pytest.mark.parametrize("share", [0.1, 0.35, 0.6, 0.9])
def test_one_changed_bit_is_one_damage(tmp_path, suffix, share):
    """Wherever it stands, in one or several blocks: whatever else it makes wrong is told with it."""
    rng = np.random.default_rng(3)
    prefix = write(tmp_path / "d", np.split(rng.integers(0, VOCABULARY, 600_000), np.arange(4, 600_000, 4)))
    path = prefix.with_suffix(suffix)
    at = int(path.stat().st_size * share)
    value = path.read_bytes()[at]
    patch(path, at, bytes([value ^ 64]))
    (found,) = verify(prefix)
    assert found.path == path
    assert found.start <= at < found.stop


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads_finds_the_same(tmp_path, threads):
    """More blocks than a thread takes at a time."""
    prefix = write(tmp_path / "d", [np.full(500_000, 7)] * 40)
    for at in (5, (16 << 20) - 1, 16 << 20, 39_999_998):
        patch(prefix.with_suffix(".bin"), at, b"\x05")
    seen = []
    found = verify(prefix, threads=threads, progress=lambda done, total: seen.append(done))
    assert [(each.start >> 20, each.stop) for each in found] == [(0, 1 << 20), (15, 17 << 20), (38, 40_000_000)]
    assert seen == sorted(seen)


def test_verify_joins_neighbouring_blocks(large):
    for block in (0, 1, 3):
        patch(large.with_suffix(".bin"), block << 20, b"\x00\x00\x01\x00\x02")
    assert [(found.start, found.stop) for found in verify(large)] == [(0, 2 << 20), (3 << 20, 4_000_000)]


@pytest.mark.parametrize(
    ("offset", "data", "what"),
    [
        (34 + 4 * 3, struct.pack("<i", -5), "negative length of sequence 3"),
        (34 + 4 * 40 + 8 * 7, struct.pack("<q", 12), "pointer that does not follow from the lengths, of sequence 7"),
        (34 + 12 * 40 + 8 * 9, struct.pack("<q", 30), "document index that runs backwards, of document 10"),
    ],
)
@pytest.mark.parametrize("sidecar", [True, False])
def test_verify_locates_damage_in_the_index(large, offset, data, what, sidecar):
    patch(large.with_suffix(".idx"), offset, data)
    if not sidecar:
        large.with_suffix(".json").unlink()
    found = verify(large)
    assert any(what in str(damage) and damage.start <= offset + 8 for damage in found)
    assert any("checksum" in damage.what for damage in found) is sidecar


def test_verify_reads_every_byte_of_the_sidecar(tmp_path):
    """What no other file tells of, such as the language, and what JSON does not mind, such as a space."""
    prefix = write(tmp_path / "d", random_documents())
    path = prefix.with_suffix(".json")
    text = path.read_text()
    for old, new in (('"xx"', '"xy"'), ("\n ", "\n  "), ('"test"', '"tesu"'), ('"crc32": "', '"crc32": "0')):
        path.write_text(text.replace(old, new, 1))
        (found,) = verify(prefix)
        assert (found.path, found.start, found.stop) == (path, 0, path.stat().st_size)
        assert "checksum" in found.what
    without = json.loads(text)
    del without["crc32"]
    path.write_text(json.dumps(without))  # as an older tool wrote it
    assert verify(prefix) == []


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_a_file_that_changes_while_it_is_verified(large, monkeypatch, suffix):
    path = large.with_suffix(suffix)
    opened = IndexedDataset(large)
    monkeypatch.setattr(module, "IndexedDataset", lambda prefix: opened)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(DataError, match=rf"d\{suffix}: had \d+ bytes when it was opened"):
        verify(large)
    path.unlink()
    with pytest.raises(DataError, match=rf"d\{suffix}: cannot be read any more \(No such file"):
        verify(large)


def test_a_file_that_is_cut_between_two_reads(large, monkeypatch):
    scan = _index.scan

    def cut(path, descriptor, *arguments):
        if path.endswith(".bin"):
            os.truncate(path, 1 << 20)
        return scan(path, descriptor, *arguments)

    monkeypatch.setattr(_index, "scan", cut)
    with pytest.raises(DataError, match=r"d\.bin: became shorter than its 4000000 bytes while it was read"):
        verify(large)


def test_verify_of_a_foreign_dataset_finds_negative_ids(tmp_path):
    prefix = write(tmp_path / "d", random_documents(), vocabulary=100_000, sidecar=False)
    assert verify(prefix) == []
    patch(prefix.with_suffix(".bin"), 40, struct.pack("<i", -7))
    (found,) = verify(prefix)
    assert (found.start, found.stop) == (40, 44)
    assert "id -7" in found.what
