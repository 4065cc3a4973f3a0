"""One dataset of several: against a list of the documents, whatever the parts and the memory; and what is refused."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
from itertools import chain, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megapoly.cli import main
from megapoly.data import _index
from megapoly.data.indexed import IndexedDataset
from megapoly.data.merge import Assembly, merge
from megapoly.data.parts import find_parts
from megapoly.data.permutation import derive_key, permute
from megapoly.data.sidecar import Duplicates
from megapoly.data.verify import verify
from megapoly.errors import ConfigError, DataError
from tests.data.ondisk import VOCABULARY, patch, random_documents, write
from tests.data.small import write_megatron

POINT = 0xC1985C4B2E17B71B6392993717637EE  # where the hash evaluates
SUFFIXES = (".bin", ".idx", ".json")


def contents(prefix):
    return [prefix.with_name(prefix.name + suffix).read_bytes() for suffix in SUFFIXES]


def documents(prefix):
    """The training documents and the held-out ones, as lists."""
    dataset = IndexedDataset(prefix)
    every = [dataset.document(i).tolist() for i in range(dataset.documents)]
    return every[: dataset.train_documents], every[dataset.train_documents :]


def write_parts(folder, train, held, cuts, name="p"):
    """Parts whose training and held-out documents are the pieces of both lists between ``cuts`` (shares of them)."""
    prefixes = []
    for i, (a, b) in enumerate(zip([0, *cuts], [*cuts, 1])):
        first = train[round(a * len(train)) : round(b * len(train))]
        last = held[round(a * len(held)) : round(b * len(held))]
        if first or last:
            prefixes.append(write(folder / f"{name}{i}", [*first, *last], held_out=len(last)))
    return prefixes


def change_sidecar(prefix, **changes):
    path = prefix.with_suffix(".json")
    side = json.loads(path.read_text())
    for key, value in changes.items():
        side[key] = {**side[key], **value} if isinstance(value, dict) else value
    path.write_text(json.dumps(side))


@pytest.fixture(scope="module")
def corpus():
    """Documents of which many are repeated, also across the split."""
    draw = np.random.default_rng(3)
    different = random_documents(700, seed=1)
    return [different[i] for i in draw.integers(0, 700, 2000)], [different[i] for i in draw.integers(0, 700, 200)]


# One after another


def test_merging_shards_is_one_build(tmp_path):
    texts = random_documents(300)
    train, held = texts[:250], texts[250:]
    write(tmp_path / "whole", texts, held_out=50)
    parts = write_parts(tmp_path, train, held, [0.1, 0.4, 0.41, 0.8])
    made = merge(parts, tmp_path / "merged")
    assert contents(tmp_path / "merged")[:2] == contents(tmp_path / "whole")[:2]
    whole = IndexedDataset(tmp_path / "whole").sidecar
    assert made == IndexedDataset(tmp_path / "merged").sidecar == whole.model_copy(update={"tool": made.tool})
    assert verify(tmp_path / "merged") == []
    # Associative, in every bit of all three files; and one part alone is itself.
    merge(parts[:2], tmp_path / "left")
    merge(parts[3:], tmp_path / "right")
    merge([tmp_path / "left", parts[2], tmp_path / "right"], tmp_path / "again")
    merge([tmp_path / "merged"], tmp_path / "alone")
    assert contents(tmp_path / "again") == contents(tmp_path / "alone") == contents(tmp_path / "merged")


def test_parts_of_one_side_only(tmp_path):
    texts = random_documents(6)
    write(tmp_path / "a", texts[:2], held_out=2)
    write(tmp_path / "b", texts[2:4])
    write(tmp_path / "c", texts[4:], held_out=2)
    merge([tmp_path / name for name in "abc"], tmp_path / "m")
    wanted = [text.tolist() for text in texts]
    assert documents(tmp_path / "m") == (wanted[2:4], wanted[:2] + wanted[4:])


def test_over_several_blocks(tmp_path):
    """Documents that cross blocks of the checksums, and one of several blocks."""
    draw = np.random.default_rng(0)
    texts = [draw.integers(0, VOCABULARY, size) for size in (400_000, 300_000, 5, 1_300_000, 100_000, 700_000)]
    parts = [write(tmp_path / "a", texts[:3], held_out=1), write(tmp_path / "b", texts[3:], held_out=1)]
    for assembly in (Assembly(), Assembly(deduplicate=True), Assembly(shuffle=0, memory_mb=2)):
        merge(parts, tmp_path / "m", assembly, overwrite=True)
        assert verify(tmp_path / "m") == []
        train, held = documents(tmp_path / "m")
        wanted = [texts[i].tolist() for i in (0, 1, 3, 4)], [texts[i].tolist() for i in (2, 5)]
        assert (sorted(train), sorted(held)) == (sorted(wanted[0]), sorted(wanted[1]))
        if assembly.shuffle is None:
            assert (train, held) == wanted


@pytest.mark.parametrize("dtype", ["u1", "<i4", "<i8"])
def test_datasets_of_another_tool(tmp_path, dtype):
    """Without a .json; documents of several sequences, some of them empty, and documents without any."""
    draw = np.random.default_rng(2)
    sequences = [draw.integers(0, 120, size).tolist() for size in draw.integers(0, 4, 400)] + [[1]]
    cuts = np.sort(draw.integers(0, len(sequences) + 1, 150))
    indices = np.array([0, *cuts, len(sequences)], "<i8")
    write_megatron(tmp_path / "a", sequences, dtype)
    content = bytearray((tmp_path / "a.idx").read_bytes()[: 34 + 12 * len(sequences)])
    content[26:34] = struct.pack("<Q", len(indices))
    (tmp_path / "a.idx").write_bytes(content + indices.tobytes())
    write_megatron(tmp_path / "b", [[7, 8, 9], [5]], dtype)
    joined = [list(chain(*sequences[i:j])) for i, j in pairwise(indices)]
    wanted = [document for document in joined if document] + [[7, 8, 9], [5]]

    made = merge([tmp_path / "a", tmp_path / "b"], tmp_path / "m")
    assert documents(tmp_path / "m") == (wanted, [])
    assert not (tmp_path / "m.json").exists()
    assert (made.documents, made.tokens, made.language) == (len(wanted), sum(map(len, wanted)), "")
    different = {tuple(document): None for document in wanted}
    merge([tmp_path / "a", tmp_path / "b"], tmp_path / "d", Assembly(deduplicate=True, shuffle=4))
    assert sorted(documents(tmp_path / "d")[0]) == sorted(map(list, different))


def test_a_dataset_with_a_sidecar_is_replaced_by_one_without(tmp_path):
    write(tmp_path / "m", random_documents(5))
    write_megatron(tmp_path / "a", [[1, 2]])
    merge([tmp_path / "a"], tmp_path / "m", overwrite=True)
    assert documents(tmp_path / "m") == ([[1, 2]], [])


def test_megatron_opens_what_merge_writes(tmp_path, corpus):
    megatron = pytest.importorskip("megatron.core.datasets.indexed_dataset", reason="megatron-core is not installed")
    train = [np.append(np.maximum(text, 3), 2) for text in corpus[0]]  # as the builder ends them
    parts = write_parts(tmp_path, train, [], [0.3, 0.5])
    for assembly in (Assembly(), Assembly(deduplicate=True, shuffle=1, pack=64)):
        merge(parts, tmp_path / "m", assembly, overwrite=True)
        theirs = megatron.IndexedDataset(str(tmp_path / "m"))
        assert [theirs[i].tolist() for i in range(len(theirs))] == documents(tmp_path / "m")[0]


def test_thousands_of_parts_with_few_descriptors(tmp_path):
    """In a process of its own, which may open few files at a time."""
    for i in range(300):
        write(tmp_path / f"p{i}", [np.array([i, 500]), np.array([900, i])], held_out=1)
    code = (
        "import resource, sys; from megapoly.data.merge import *; from megapoly.data.parts import find_parts\n"
        "parts = find_parts([sys.argv[1] + '/p*'])\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (32, 32))\n"
        "merge(parts, sys.argv[1] + '/m', Assembly(deduplicate=True, shuffle=None))"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    assert documents(tmp_path / "m") == ([[i, 500] for i in range(300)], [[900, i] for i in range(300)])


# Duplicates


def test_the_hash_is_the_polynomial():
    """Against whole numbers of Python, whatever the pieces that the bytes come in."""
    prime, draw = 2**127 - 1, np.random.default_rng(0)
    for size in (0, 1, 14, 15, 16, 29, 30, 31, 200, 1000):
        data = draw.bytes(size) if size != 30 else b"\xff" * 30
        wanted = 0
        for word in [*(data[i : i + 15] for i in range(0, size, 15)), size.to_bytes(8, "little")]:
            wanted = (wanted + int.from_bytes(word, "little")) * POINT % prime
        cuts = np.sort(draw.integers(0, size + 1, 5))
        pieces = [data[i:j] for i, j in zip([0, *cuts], [*cuts, size])]
        assert _index.polynomial_hash([data]) == _index.polynomial_hash(pieces) == wanted


@pytest.mark.parametrize("memory_mb", [1, 1024])
@pytest.mark.parametrize("cuts", [[], [0.2, 0.25, 0.9]])
def test_the_first_of_every_content_is_kept(tmp_path, corpus, cuts, memory_mb):
    train, held = corpus
    parts = write_parts(tmp_path, train, held, cuts)
    made = merge(parts, tmp_path / "m", Assembly(deduplicate=True, memory_mb=memory_mb))
    seen = set()
    wanted = []
    for side in (train, held):
        wanted.append([])
        for text in map(tuple, side):
            if text not in seen:
                wanted[-1].append(list(text))
            seen.add(text)
    assert documents(tmp_path / "m") == tuple(wanted)
    lengths = [sum(map(len, side)) for side in wanted]
    assert 0 < len(wanted[1]) < 50
    assert made.duplicates == Duplicates(
        documents=len(train) + len(held) - len(wanted[0]) - len(wanted[1]),
        tokens=sum(map(len, train)) + sum(map(len, held)) - sum(lengths),
    )
    assert (made.validation.documents, made.validation.tokens, made.tokens) == (
        len(wanted[1]),
        lengths[1],
        sum(lengths),
    )
    assert (made.bytes, made.validation.bytes) == (sum(lengths), lengths[1])  # the parts say a byte a token
    assert verify(tmp_path / "m") == []
    again = merge([tmp_path / "m"], tmp_path / "again", Assembly(deduplicate=True))
    assert again == made


def test_tables_of_any_size_find_the_same(tmp_path, corpus):
    """From one table for all documents to one that goes through their hashes many times."""
    texts = [text for side in corpus for text in side] * 2
    prefix = write(tmp_path / "d", texts)
    dataset = IndexedDataset(prefix)
    lengths = np.array([len(text) for text in texts])
    firsts = {tuple(text): i for i, text in reversed(list(enumerate(texts)))}
    wanted = [firsts[tuple(text)] == i for i, text in enumerate(texts)]
    passes = []
    for memory in (1 << 20, 60_000, 20_000, 18_000):
        seen = _index.Duplicates(str(prefix))
        dataset.part().hand_on(0, lengths, None, seen)
        passes.append(seen.find(memory))
        assert seen.kept(0, len(texts)).tolist() == wanted
        assert seen.count_kept(100, 1000) == sum(wanted[100:1100])
    assert passes[0] == 1
    assert passes == sorted(passes)
    assert passes[-1] > 20
    with pytest.raises(DataError, match="among 4400 documents needs at least 1 MB of memory"):
        seen.find(1000)


def test_documents_that_differ_in_length_or_zeros_only(tmp_path):
    """Where a hash that forgets the length, or what is zero, would take them for the same."""
    texts = [[0] * size for size in range(1, 40)] + [[0] * size + [1] for size in range(1, 40)] + [[1] + [0] * 9, [1]]
    merge([write(tmp_path / "d", texts)], tmp_path / "m", Assembly(deduplicate=True))
    assert documents(tmp_path / "m")[0] == texts


# Shuffle


@pytest.mark.parametrize("deduplicate", [False, True])
def test_the_shuffle_is_the_permutation_whatever_the_parts_and_the_memory(tmp_path, deduplicate):
    """Enough for many buckets of small memory: 2 MB of tokens, and one document as large as several buckets."""
    draw = np.random.default_rng(8)
    texts = [draw.integers(0, VOCABULARY, size) for size in draw.integers(1, 100, 15_000)]
    texts[77] = draw.integers(0, VOCABULARY, 300_000)
    texts[5000:5500] = texts[:500]
    train, held = texts[:14_000], texts[14_000:]
    kept = []
    for side in (train, held):
        lists = [text.tolist() for text in side]
        kept.append(list({tuple(text): text for text in lists}.values()) if deduplicate else lists)
    expected = []
    for side, purpose in zip(kept, ("training", "held out")):
        places = permute(derive_key(11, "documents", purpose), np.arange(len(side)), len(side))
        placed = dict(zip(places.tolist(), side))
        expected.append([placed[i] for i in range(len(side))])

    results = []
    for number, cuts in enumerate([[], [0.1, 0.5, 0.52]]):
        parts = write_parts(tmp_path, train, held, cuts, name=f"p{number}-")
        for memory_mb in (1, 2, 64):
            assembly = Assembly(deduplicate=deduplicate, shuffle=11, memory_mb=memory_mb)
            made = merge(parts, tmp_path / "m", assembly, overwrite=True)
            assert made.validation.documents == len(kept[1])
            results.append(contents(tmp_path / "m"))
    assert all(result == results[0] for result in results)
    assert documents(tmp_path / "m") == tuple(expected)
    assert verify(tmp_path / "m") == []
    assert not [name for name in os.listdir(tmp_path) if not name.endswith(SUFFIXES)]


def test_a_shuffle_mixes_the_parts(tmp_path):
    """Each stretch of the result holds about as much of either half."""
    parts = [write(tmp_path / name, [[i] * 3] * 2000) for i, name in enumerate("ab")]
    merge(parts, tmp_path / "m", Assembly(shuffle=5))
    firsts = np.array([text[0] for text in documents(tmp_path / "m")[0]]).reshape(20, 200)
    assert (np.abs(firsts.sum(1) - 100) < 5 * np.sqrt(200) / 2).all()  # five standard deviations
    merge(parts, tmp_path / "other", Assembly(shuffle=6))
    assert contents(tmp_path / "m")[0] != contents(tmp_path / "other")[0]


def test_the_memory_that_a_shuffle_needs(tmp_path):
    _index.Reorder(str(tmp_path / "d"), 1000, 3 << 20, 2, 1 << 20)
    with pytest.raises(DataError, match=r"to shuffle 1073773824 bytes needs at least 18 MB of memory; raise memory_mb"):
        _index.Reorder(str(tmp_path / "d"), 1000, 1 << 30, 2, 1 << 20)
    assert _index.Reorder(str(tmp_path / "d"), 1000, 1 << 30, 2, 18 << 20).buckets > 100


def test_places_that_are_wrong(tmp_path):
    part = IndexedDataset(write(tmp_path / "d", random_documents(4))).part()
    lengths = np.array([len(text) for text in random_documents(4)])
    reorder = _index.Reorder(str(tmp_path / "d"), 4, 1000, 2, 1 << 20)
    with pytest.raises(DataError, match="a place is not among the 4 documents"):
        reorder.expect(np.array([4]))
    reorder.expect(np.array([2, 0, 1]))
    with pytest.raises(DataError, match="more documents came than places"):
        part.hand_on(0, lengths, None, reorder)
    reorder = _index.Reorder(str(tmp_path / "d"), 4, 1000, 2, 1 << 20)
    reorder.expect(np.array([2, 0, 1, 3]))
    with pytest.raises(DataError, match="fewer documents came than places"):
        reorder.drain(0, reorder)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_everything_together(tmp_path_factory, data):
    """Any documents, parts and choices: the multiset of documents is as it should be, and the parts do not matter."""
    folder = tmp_path_factory.mktemp("all")
    text = st.lists(st.integers(3, 5), max_size=12).map(lambda ids: [*ids, 2])
    train = data.draw(st.lists(text, min_size=1, max_size=30))
    held = data.draw(st.lists(text, max_size=10))
    cuts = sorted(data.draw(st.lists(st.floats(0, 1), max_size=4)))
    assembly = Assembly(data.draw(st.booleans()), data.draw(st.none() | st.integers(0, 2**64 - 1)))
    merge(write_parts(folder, train, held, cuts), folder / "m", assembly)
    merge([write(folder / "one", [*train, *held], held_out=len(held))], folder / "n", assembly)
    assert contents(folder / "m") == contents(folder / "n")
    got = documents(folder / "m")
    if assembly.deduplicate:
        first = {tuple(each) for each in train}
        assert sorted(got[0]) == sorted(map(list, first))
        assert sorted(got[1]) == sorted(map(list, {tuple(each) for each in held} - first))
    else:
        assert (sorted(got[0]), sorted(got[1])) == (sorted(train), sorted(held))


# What is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"language": "yy"}, r"b: has language yy, but .*a has xx; merge datasets of one language"),
        ({"tokenizer": {"sha256": "1" * 64}}, "a tokenizer of SHA-256 1111"),
        ({"tokenizer": {"vocabulary": 999}}, "a vocabulary of 999, but .* has 1000"),
        ({"validation": {"fraction": 0.2}}, r"a validation fraction of 0\.2, but .* has 0\.1; build all with the same"),
        ({"validation": {"seed": 7}}, "a validation seed of 7"),
        ({"pack": 2}, "packs of 2, but .* has 0; merge packs of one length"),
    ],
)
def test_parts_that_do_not_go_together(tmp_path, changes, message):
    for name in "ab":
        write(tmp_path / name, [np.array([1, 2]), np.array([3, 2])], held_out=1)
    change_sidecar(tmp_path / "b", **changes)
    with pytest.raises(DataError, match=message):
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "m")
    assert not list(tmp_path.glob("m*"))


def test_other_parts_that_do_not_go_together(tmp_path):
    a = write(tmp_path / "a", random_documents(5))
    write(tmp_path / "b", random_documents(5), sidecar=False)
    with pytest.raises(DataError, match=r"b: has \.json none, but .*a has one; parts with a \.json and without"):
        merge([a, tmp_path / "b"], tmp_path / "m")
    write_megatron(tmp_path / "c", [[1]], "<i4")
    with pytest.raises(DataError, match=r"c: has tokens of type int32, but .*b has uint16"):
        merge([tmp_path / "b", tmp_path / "c"], tmp_path / "m")
    with pytest.raises(DataError, match="no dataset to merge"):
        merge([], tmp_path / "m")
    with pytest.raises(DataError, match="is given twice, also as"):
        merge([a, tmp_path / ".." / tmp_path.name / "a"], tmp_path / "m")
    with pytest.raises(DataError, match="is one of the parts"):
        merge([a, write(tmp_path / "d", random_documents(5))], a, overwrite=True)
    with pytest.raises(DataError, match=r"absent\.bin: cannot be read"):
        merge([a, tmp_path / "absent"], tmp_path / "m")
    with pytest.raises(DataError, match=r"b: has no \.json, which tells of packs"):
        merge([tmp_path / "b"], tmp_path / "m", Assembly(pack=8))


@pytest.mark.parametrize("assembly", [Assembly(), Assembly(deduplicate=True), Assembly(shuffle=1)])
def test_a_part_that_is_damaged_is_named_and_nothing_is_left(tmp_path, assembly):
    texts = random_documents(300)
    good = write(tmp_path / "a", texts)
    for suffix, offset, data, message in (
        (".bin", 700, b"\xff", r"b\.bin, bytes 0 to \d+: the content has changed since it was built \(checksum\)"),
        (".idx", 34 + 40, b"\xff", r"b\.idx: is damaged at a block whose checksum differs"),
    ):
        write(tmp_path / "b", texts)
        patch(tmp_path / f"b{suffix}", offset, data)
        with pytest.raises(DataError, match=message):
            merge([good, tmp_path / "b"], tmp_path / "m", assembly)
    for offset, value in ((34 + 4 * 300 + 8 * 25, 2**40), (34 + 12 * 300 + 8 * 25, 1000), (34 + 12 * 300 + 8 * 25, -3)):
        write(tmp_path / "c", texts, sidecar=False)
        (tmp_path / "c.json").unlink(missing_ok=True)
        patch(tmp_path / "c.idx", offset, struct.pack("<q", value))
        with pytest.raises(DataError, match=r"c\.idx: is damaged at the (indices|lengths or pointers) of documents 0"):
            merge([tmp_path / "c"], tmp_path / "m", assembly)
    assert not list(tmp_path.glob("m*"))


@pytest.mark.parametrize(
    "options",
    [{"pack": 1}, {"pack": -5}, {"pack": 2**23}, {"shuffle": -1}, {"memory_mb": 0}, {"pack": 8, "memory_mb": 9}],
)
def test_wrong_choices(options):
    with pytest.raises(ConfigError):
        Assembly(**options)


# Whole or absent


def test_a_dataset_is_kept_unless_told(tmp_path):
    parts = [write(tmp_path / "a", random_documents(9))]
    write(tmp_path / "m", random_documents(5, seed=1))
    before = contents(tmp_path / "m")
    with pytest.raises(DataError, match=r"m\.bin, .*m\.idx: exists already"):
        merge(parts, tmp_path / "m")
    patch(tmp_path / "a.bin", 3, b"\xff")
    with pytest.raises(DataError, match="checksum"):
        merge(parts, tmp_path / "m", overwrite=True)
    assert contents(tmp_path / "m") == before


KILLED = """
import os, signal, sys
from megapoly.data import merge, naming
folder, when = sys.argv[1:]
die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
steps, replace = [], os.replace
def progress(done, total):
    steps.append(done)
    if f"step {len(steps)}" == when:
        die()
names = []
def counted(source, target):
    if f"name {len(names)}" == when:
        die()
    names.append(target)
    replace(source, target)
os.replace = counted
assembly = merge.Assembly(deduplicate=True, shuffle=3, memory_mb=1)
merge.merge([f"{folder}/p{i}" for i in range(3)], f"{folder}/out/m", assembly, overwrite=True, progress=progress)
"""


@pytest.mark.parametrize("when", ["step 2", "step 8", "step 14", "name 0", "name 1", "name 2"])
def test_a_killed_merge_leaves_the_old_or_nothing_and_can_be_run_again(tmp_path, when):
    """Killed while it compares, distributes and puts in order, and before each of its files has its name."""
    draw = np.random.default_rng(8)
    texts = [draw.integers(0, VOCABULARY, 150) for _ in range(4000)]
    for i in range(3):
        write(tmp_path / f"p{i}", texts[i * 1300 : i * 1300 + 1400], held_out=9)
    old = write(tmp_path / "m", random_documents(5))
    (tmp_path / "out").mkdir()
    for suffix in SUFFIXES:
        old.with_suffix(suffix).rename(tmp_path / "out" / f"m{suffix}")
    prefix = tmp_path / "out" / "m"
    before = contents(prefix)
    ended = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), when], check=False, timeout=120)
    assert ended.returncode == -signal.SIGKILL
    if when.startswith("step"):
        assert contents(prefix) == before
    else:
        with pytest.raises(DataError, match=r"m\.idx: cannot be read \(No such file"):
            IndexedDataset(prefix)
    names = {f"m{suffix}{end}" for suffix in SUFFIXES for end in ("", ".partial")}
    assert set(os.listdir(tmp_path / "out")) <= names  # and no file of the shuffle
    assembly = Assembly(deduplicate=True, shuffle=3)
    parts = [tmp_path / f"p{i}" for i in range(3)]
    merge(parts, prefix, assembly, overwrite=when.startswith("step"))  # what was interrupted need not be told
    merge(parts, tmp_path / "fresh", assembly)
    assert contents(prefix) == contents(tmp_path / "fresh")
    assert sorted(os.listdir(tmp_path / "out")) == sorted(f"m{suffix}" for suffix in SUFFIXES)


def test_progress_reaches_the_end(tmp_path, corpus):
    parts = write_parts(tmp_path, *corpus, [0.5])
    size = sum(prefix.with_suffix(".bin").stat().st_size for prefix in parts)
    for assembly, passes in ((Assembly(), 1), (Assembly(deduplicate=True), 2), (Assembly(True, 1), 3)):
        seen = []

        def show(*state, seen=seen):
            seen.append(state)

        merge(parts, tmp_path / "m", assembly, overwrite=True, progress=show)
        assert seen[-1] == (passes * size, passes * size)
        assert seen == sorted(seen)


# Commands


def test_patterns_and_files(tmp_path):
    for i in (1, 2, 10):
        write(tmp_path / f"en-{i}", random_documents(3))
    wanted = [tmp_path / f"en-{i}" for i in (1, 2, 10)]
    assert find_parts([str(tmp_path / "en-*")]) == wanted
    files = sorted(map(str, tmp_path.iterdir()))
    assert find_parts(files) == [wanted[i] for i in (0, 2, 1)]  # in the order given
    assert find_parts([wanted[2], str(tmp_path / "en-[12]")]) == [wanted[2], *wanted[:2]]
    with pytest.raises(DataError, match=r"fr-\*: fits no dataset"):
        find_parts([str(tmp_path / "fr-*")])


def test_the_command(tmp_path, capsys):
    draw = np.random.default_rng(0)
    texts = [np.append(draw.integers(3, VOCABULARY, size), 2) for size in draw.integers(1, 90, 500)]
    texts += texts[:100]
    for i in range(3):
        write(tmp_path / f"p-{i}", texts[i * 200 : i * 200 + 200], held_out=10)
    arguments = ["--deduplicate", "--shuffle", "3", "--pack", "64", "--output", str(tmp_path / "m")]
    with pytest.raises(SystemExit) as ended:
        main(["data", "merge", *arguments, str(tmp_path / "p-*")])
    assert ended.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    side = IndexedDataset(tmp_path / "m").sidecar
    assert f"m: 3 parts, {side.documents:,} documents ({side.validation.documents:,} held out)" in shown
    assert f"left out: 100 duplicates with {sum(map(len, texts[:100])):,} tokens" in shown
    assert f"{side.tokens // 64:,} packs of 64 tokens" in shown
    assert f"{side.padding.cut} documents longer than a pack were cut" in shown
    assert verify(tmp_path / "m") == []
    with pytest.raises(SystemExit) as ended:
        main(["data", "merge", *arguments, str(tmp_path / "p-*")])
    assert ended.value.code == 1
    assert "exists already; choose another name or overwrite it" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["data", "merge", "--help"])
    assert "Example: megapoly data merge" in " ".join(capsys.readouterr().out.split())
