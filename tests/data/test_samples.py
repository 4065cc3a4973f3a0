"""Batches against lists made token by token in plain Python."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import json
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megapoly.data import _index
from megapoly.data.indexed import IndexedDataset
from megapoly.data.plan import Plan
from megapoly.data.samples import read, validation
from megapoly.data.segments import Source
from megapoly.errors import DataError
from tests.data.ondisk import write
from tests.data.small import CODES, FakeDataset, expected_row, write_megatron

VOCABULARY = 50


def make_plan(datasets, sequence, samples=40, seed=3):
    sources = [Source(name, name, data.identity, data.train_tokens, data.pack) for name, data in datasets.items()]
    weights = {s.name: float(s.windows(sequence) > 0) for s in sources}
    weights = {name: weight / sum(weights.values()) for name, weight in weights.items()}
    return Plan.build([("only", samples, weights)], sources, sequence, seed)


def check_rows(batch, documents, starts, ends, separate):
    for row, (start, end) in enumerate(zip(starts, ends, strict=True)):
        tokens, labels, positions, numbers = expected_row(
            documents[row], start, end, batch.positions.shape[1], separate
        )
        assert batch.positions[row].tolist() == positions
        if batch.tokens is not None:
            assert batch.tokens[row].tolist() == tokens
            assert batch.labels[row].tolist() == labels
        if separate:
            assert batch.documents[row].tolist() == numbers


documents = st.lists(st.lists(st.integers(0, VOCABULARY - 1), max_size=9), min_size=1, max_size=12)


@st.composite
def corpora(draw, minimum=2):
    """One to three sources of short documents, some of them empty; the first has a window at least."""
    named = {}
    for i in range(draw(st.integers(1, 3))):
        texts = draw(documents)
        if i == 0:
            texts.append(draw(st.lists(st.integers(0, VOCABULARY - 1), min_size=minimum, max_size=30)))
        named[f"s{i}"] = FakeDataset(texts, identity=f"{i}")
    return named


@given(corpora(minimum=8), st.integers(1, 7), st.booleans(), st.booleans())
@settings(max_examples=60)
def test_rows_token_by_token(datasets, length, separate, with_tokens):
    plan = make_plan(datasets, length)
    samples = np.array([3, 1, 39, 0, 17, 18, 19])
    batch = read(plan, datasets, samples, vocabulary=VOCABULARY, separate_documents=separate, with_tokens=with_tokens)
    located = plan.locate(samples)
    names = list(datasets)
    sources = [datasets[names[s]] for s in located.source]
    check_rows(
        batch,
        [source.texts for source in sources],
        (located.window * length).tolist(),
        [source.train_tokens for source in sources],
        separate,
    )
    assert batch.samples.tolist() == samples.tolist()
    assert batch.source.tolist() == located.source.tolist()
    assert batch.token_source.tolist() == [[source] * length for source in located.source.tolist()]
    assert (batch.tokens is None) == (batch.labels is None) == (not with_tokens)
    assert (batch.documents is None) == (not separate)


@pytest.mark.parametrize("ids", [torch.int64, torch.int32])
def test_types_and_shapes(ids):
    datasets = {"x": FakeDataset([[1, 2, 3, 4, 5, 6, 7]])}
    batch = read(
        make_plan(datasets, 3), datasets, np.arange(5), vocabulary=VOCABULARY, separate_documents=True,
        with_tokens=True, ids=ids,
    )  # fmt: skip
    kinds = {"samples": torch.int64, "source": torch.int32, "cu_seqlens": torch.int32}
    shapes = {"samples": (5,), "source": (5,), "cu_seqlens": (6,)}
    for field in dataclasses.fields(batch):
        tensor = getattr(batch, field.name)
        assert tensor.dtype == kinds.get(field.name, ids)
        assert tensor.shape == shapes.get(field.name, (5, 3))
    assert batch.documents.dtype == torch.int32
    assert batch.max_seqlen == 3


def test_a_stage_without_tokens_reads_none():
    texts = [[1, 2, 3], [4, 5], [6, 7, 8, 9], [1, 2, 3], [4, 4]]
    options = {"vocabulary": VOCABULARY, "separate_documents": True}
    data = {"x": FakeDataset(texts, 2)}
    plan = make_plan(data, 3)
    progress = _index.Progress()
    full = read(plan, data, np.arange(9), with_tokens=True, progress=progress, **options)
    assert progress.bytes == 9 * 4 * 2
    whole = validation(plan, data, 0, windows=9, rows_multiple=4, with_tokens=True, **options)
    bare = read(plan, data, np.arange(9), with_tokens=False, progress=progress, **options)
    assert progress.bytes == 9 * 4 * 2
    part = validation(plan, data, 0, windows=9, rows_multiple=4, with_tokens=False, **options)
    for one, other in [(full, bare), (whole, part)]:
        assert other.tokens is None
        assert other.labels is None
        for name in ("samples", "source", "positions", "cu_seqlens"):
            assert torch.equal(getattr(one, name), getattr(other, name))


@given(documents, documents, st.integers(1, 7), st.integers(0, 9), st.integers(1, 5), st.booleans())
@settings(max_examples=80)
def test_validation_token_by_token(training, held_out, length, windows, multiple, separate):
    training = [*training, [1] * 8]
    dataset = FakeDataset([*training, *held_out], held_out=len(held_out))
    plan = make_plan({"x": dataset}, length)
    batch = validation(
        plan,
        {"x": dataset},
        0,
        windows=windows,
        rows_multiple=multiple,
        vocabulary=VOCABULARY,
        separate_documents=separate,
        with_tokens=True,
    )
    tokens = sum(map(len, held_out))
    count = min(windows, len(range(0, max(0, tokens - 1), length)))  # a window for every start with a token after it
    rows = len(batch.samples)
    assert rows % multiple == 0
    assert count <= rows < count + multiple
    assert batch.samples.tolist() == [*range(count), *[-1] * (rows - count)]
    assert batch.source.tolist() == [0] * rows
    starts = [dataset.train_tokens + i * length for i in range(count)]
    check_rows(batch.rows(0, count), [dataset.texts] * count, starts, [dataset.tokens] * count, separate)
    assert (batch.labels[count:] == -1).all()
    assert (batch.tokens[count:] == 0).all()
    if not separate:  # every held-out token is predicted once, except the first
        stream = [token for text in held_out for token in text]
        assert batch.labels[batch.labels >= 0].tolist() == stream[1 : 1 + count * length]


def test_split_and_rows():
    datasets = {"x": FakeDataset([[1, 2, 3, 4, 5, 6, 7], [8, 9]])}
    batch = read(
        make_plan(datasets, 3), datasets, np.arange(6), vocabulary=VOCABULARY, separate_documents=True, with_tokens=True
    ).to("cpu")
    parts = batch.split(2)
    for field in dataclasses.fields(batch):
        if field.name != "cu_seqlens":
            joined = torch.cat([getattr(part, field.name) for part in parts])
            assert torch.equal(joined, getattr(batch, field.name))
    assert torch.equal(torch.cat([part.documents for part in parts]), batch.documents)
    joined = torch.cat([part.cu_seqlens[part.cu_seqlens > 0] + 6 * i for i, part in enumerate(parts)])
    assert [0, *joined.tolist()] == batch.cu_seqlens.tolist()
    assert [len(part.samples) for part in parts] == [2, 2, 2]
    with pytest.raises(ValueError, match="6 rows do not divide into micro-batches of 4"):
        batch.split(4)
    assert batch.rows(4, 9).cu_seqlens.tolist() == parts[2].cu_seqlens.tolist()


# The C++ on files of every kind


def fill(readers, which, starts, limits, length, *, separate, vocabulary=VOCABULARY, kind=np.int64, with_tokens=True):
    """Columns, filled with rubbish before: tokens, labels, positions, cu_seqlens."""
    tokens, labels, positions = np.full((3, len(which), length), 7, kind)
    if not with_tokens:
        tokens = labels = None
    ends = _index.fill(
        readers, np.array(which, np.int32), np.array(starts, np.int64), np.array(limits, np.int64), vocabulary,
        separate, tokens, labels, positions, _index.Progress(),
    )  # fmt: skip
    return tokens, labels, positions, ends


def lengths_of(numbers):
    """Lengths of the documents of rows of document numbers."""
    return [sum(1 for _ in group) for row in numbers for _, group in itertools.groupby(row)]


@pytest.mark.parametrize("kind", [np.int32, np.int64])
@pytest.mark.parametrize("separate", [False, True])
def test_batches_of_several_files_token_by_token(tmp_path, separate, kind):
    """Every type of token, few and many documents, empty and long ones, every place, short windows, rows of padding."""
    draw = np.random.default_rng(11)
    for case in range(20):
        texts, readers = [], []
        for i, dtype in enumerate(CODES):
            sizes = draw.integers(0, [2, 9, 90][case % 3], [10, 300][case % 2])
            texts.append([draw.integers(0, VOCABULARY, size).tolist() for size in sizes] + [[1]])
            write_megatron(tmp_path / f"{case}-{i}", texts[i], dtype)
            readers.append(IndexedDataset(tmp_path / f"{case}-{i}").reader)
        tokens = [sum(map(len, each)) for each in texts]
        length = int(draw.integers(1, [30, 500][case % 2]))
        which = draw.integers(-1, len(texts), 40).tolist()
        limits = [int(draw.integers(1, tokens[s] + 1)) if s >= 0 else 0 for s in which]
        starts = [int(draw.integers(0, limit)) if limit else -9 for limit in limits]
        expected = [
            expected_row(texts[s] if s >= 0 else [], start if s >= 0 else 0, limit, length, separate)
            for s, start, limit in zip(which, starts, limits, strict=True)
        ]
        want = [list(column) for column in zip(*expected, strict=True)]
        got = fill(readers, which, starts, limits, length, separate=separate, kind=kind)
        for ours, theirs in zip(got[:3], want[:3], strict=True):
            assert ours.dtype == kind
            np.testing.assert_array_equal(ours, theirs)
        if separate:
            assert got[3].dtype == np.int32
            assert got[3].tolist() == [0, *itertools.accumulate(lengths_of(want[3]))]
        else:
            assert got[3] is None
        bare = fill(readers, which, starts, limits, length, separate=separate, kind=kind, with_tokens=False)
        np.testing.assert_array_equal(bare[2], got[2])
        assert separate == (bare[3] is not None and np.array_equal(bare[3], got[3]))


def test_documents_of_several_sequences(tmp_path):
    """As other tools write them: no, one or many sequences a document, empty ones among them, over several cells."""
    draw = np.random.default_rng(2)
    for case in range(20):
        sequences = [draw.integers(0, VOCABULARY, size).tolist() for size in draw.integers(0, 4, 400)] + [[1]]
        cuts = np.sort(draw.integers(0, len(sequences) + 1, draw.integers(1, 300)))
        indices = np.array([0, *cuts, len(sequences)], "<i8")
        write_megatron(tmp_path / f"{case}", sequences)
        path = tmp_path / f"{case}.idx"
        content = bytearray(path.read_bytes()[: 34 + 12 * len(sequences)])
        content[26:34] = struct.pack("<Q", len(indices))
        path.write_bytes(content + indices.tobytes())
        dataset = IndexedDataset(tmp_path / f"{case}")
        begins = np.cumsum([0, *map(len, sequences)])[indices[:-1]]
        for _ in range(20):
            start, stop = np.sort(draw.integers(0, dataset.tokens, 2)).tolist()
            expected = np.unique(begins[(begins > start) & (begins < stop)])
            np.testing.assert_array_equal(dataset.boundaries(start, stop), expected)


def test_many_documents_and_few_cells(tmp_path):
    """Documents of very unequal lengths, so that no proportion tells where one is."""
    draw = np.random.default_rng(4)
    sizes = np.concatenate([np.full(3000, 1), draw.integers(1, 3000, 50), np.full(3000, 2), [20_000], np.full(999, 1)])
    texts = [np.ones(size, np.int64) for size in draw.permutation(sizes)]
    write_megatron(tmp_path / "d", texts)
    dataset = IndexedDataset(tmp_path / "d")
    begins = np.cumsum([0, *map(len, texts)])[:-1]
    for start in draw.integers(0, dataset.tokens, 500).tolist():
        expected = begins[(begins > start) & (begins < start + 700)]
        np.testing.assert_array_equal(dataset.boundaries(start, start + 700), expected)


# Packs


def write_packs(prefix, packs, pack, held_out=0):
    """A dataset of packs, each a list of documents with ``pack`` tokens in all; the last ``held_out`` are held out."""
    texts = [np.array(text) for each in packs for text in each]
    held = sum(len(each) for each in packs[len(packs) - held_out :])
    write(prefix, texts, held_out=held, vocabulary=VOCABULARY)
    path = prefix.with_suffix(".json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "pack": pack}))
    return IndexedDataset(prefix)


PACKS = [[[1, 2, 3, 4, 5]], [[6, 7], [8, 9], [0]], [[1, 1, 1, 0], [0]], [[2, 3], [4, 5, 6]], [[3], [4], [5], [6], [7]]]


def test_packs_are_windows_whose_last_label_is_not_counted(tmp_path):
    dataset = write_packs(tmp_path / "d", PACKS, 5, held_out=2)
    assert dataset.pack == 5
    plan = make_plan({"x": dataset}, 5)
    options = {"vocabulary": VOCABULARY, "separate_documents": True, "with_tokens": True}
    trained = read(plan, {"x": dataset}, np.arange(12), **options)
    held = validation(plan, {"x": dataset}, 0, windows=9, rows_multiple=3, **options)
    assert held.samples.tolist() == [0, 1, -1]
    packs = [*plan.locate(np.arange(12)).window.tolist(), 3, 4]
    rows = list(trained.split(1)) + held.split(1)[:2]
    for number, row in zip(packs, rows, strict=True):
        tokens, labels, positions, numbers = expected_row(PACKS[number], 0, 5, 5, True)
        assert row.tokens.tolist() == [tokens]
        assert row.labels.tolist() == [labels]
        assert row.positions.tolist() == [positions]
        assert row.documents.tolist() == [numbers]
        assert row.labels[0, -1] == -1
        assert row.max_seqlen == max(map(len, PACKS[number]))
    assert held.labels[2].tolist() == [-1] * 5


def test_packs_that_do_not_fit_are_refused(tmp_path):
    dataset = write_packs(tmp_path / "d", PACKS, 5)
    options = {"vocabulary": VOCABULARY, "with_tokens": True}
    for call in (
        lambda plan, separate: read(plan, {"x": dataset}, np.arange(2), separate_documents=separate, **options),
        lambda plan, separate: validation(
            plan, {"x": dataset}, 0, windows=1, rows_multiple=1, separate_documents=separate, **options
        ),
    ):
        with pytest.raises(DataError, match=r"source 'x' .* packs of 5 tokens, but train.sequence is 4; set it to 5"):
            call(make_plan({"x": dataset}, 4), True)
        with pytest.raises(DataError, match=r"set data\.separate_documents to true"):
            call(make_plan({"x": dataset}, 5), False)
    with pytest.raises(DataError, match=r"d\.json: its 25 training and 0 held-out tokens are not whole packs of 4"):
        write_packs(tmp_path / "d", PACKS, 4)


# What is damaged


@pytest.fixture
def written(tmp_path):
    write_megatron(tmp_path / "d", [[i % 40] * (1 + i % 7) for i in range(500)])
    return tmp_path / "d"


def read_all(reader, tokens, vocabulary=VOCABULARY, length=50):
    starts = list(range(0, tokens - length, length))
    return fill(
        [reader], [0] * len(starts), starts, [tokens] * len(starts), length, separate=True, vocabulary=vocabulary
    )


def test_an_id_outside_the_vocabulary_names_its_token(tmp_path):
    for dtype in ("<i2", "<i4", "<i8", "i1"):
        write_megatron(tmp_path / dtype[-2:], [[1, 2, 3], [4, -1, 6, 7]], dtype)
        with pytest.raises(DataError, match=r"\.bin: token 4 has id -1, outside the vocabulary of 50"):
            read_all(IndexedDataset(tmp_path / dtype[-2:]).reader, 7, length=6)
    write_megatron(tmp_path / "d", [[1, 2, 3], [4, 49]])
    reader = IndexedDataset(tmp_path / "d").reader
    read_all(reader, 5, length=4)
    with pytest.raises(DataError, match=r"d\.bin: token 4 has id 49, outside the vocabulary of 49"):  # a label only
        read_all(reader, 5, vocabulary=49, length=4)


def test_windows_that_leave_the_file_are_refused(written):
    dataset = IndexedDataset(written)
    for start, limit in ((-1, 5), (5, 5), (0, dataset.tokens + 1), (dataset.tokens, dataset.tokens)):
        with pytest.raises(DataError, match=r"d\.bin: the window from token .* leaves the file"):
            fill([dataset.reader], [0], [start], [limit], 4, separate=True)


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_a_file_cut_under_a_reader_is_an_error(written, suffix):
    dataset = IndexedDataset(written)
    path = written.with_name("d" + suffix)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 3)
    with pytest.raises(DataError, match=rf"d\{suffix}: ends at byte \d+, earlier than when it was opened"):
        read_all(dataset.reader, dataset.tokens)


def test_a_reader_outlives_its_dataset_and_its_files(written):
    dataset = IndexedDataset(written)
    reader, tokens = dataset.reader, dataset.tokens
    before = read_all(reader, tokens)
    del dataset
    gc.collect()
    for suffix in (".bin", ".idx"):
        written.with_name("d" + suffix).unlink()
    for one, other in zip(read_all(reader, tokens), before, strict=True):
        np.testing.assert_array_equal(one, other)


def test_damage_to_the_index_is_an_error_or_harmless(written):
    """One flipped bit behind the header: no wrong boundary, except where an index names another sequence."""
    path = written.with_name("d.idx")
    content = path.read_bytes()
    begins = np.cumsum([0, *(1 + i % 7 for i in range(500))])
    draw = np.random.default_rng(6)
    refused = 0
    for bit in draw.integers(8 * 34, 8 * len(content), 1500).tolist():
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            dataset = IndexedDataset(written)
            found = [dataset.boundaries(start, start + 60).tolist() for start in range(0, dataset.tokens, 50)]
        except DataError as error:
            assert "d.idx" in str(error)  # noqa: PT017
            refused += 1
            continue
        number = (bit // 8 - 34 - 12 * 500) // 8  # of an index, the only part that no other tells of
        kept = begins[:-1]
        if number >= 0:
            kept = begins[np.frombuffer(damaged, "<i8", 501, 34 + 12 * 500)[:-1]]
        for start, got in zip(range(0, dataset.tokens, 50), found, strict=True):
            assert got == np.unique(kept[(kept > start) & (kept < start + 60)]).tolist()
    assert refused > 800  # pointers inside a cell are not read, and harm nothing


def test_wrong_calls_are_refused(written):
    reader, whole = IndexedDataset(written).reader, np.zeros((1, 4), np.int64)
    one, start, limit = np.zeros(1, np.int32), np.zeros(1, np.int64), np.full(1, 9)

    def call(**changes):
        names = dict(
            sources=[reader], source=one, starts=start, limits=limit, vocabulary=50, separate=False, tokens=whole,
            labels=whole.copy(), positions=whole.copy(), progress=_index.Progress(),
        )  # fmt: skip
        _index.fill(**{**names, **changes})

    call()
    for changes, problem in [
        ({"source": one + 1}, "of no source"),
        ({"source": one - 2}, "of no source"),
        ({"starts": np.zeros(2, np.int64)}, "one length"),
        ({"labels": None}, "tokens go with labels"),
        ({"tokens": whole.astype(np.int32)}, "tokens has to be of the type and the shape"),
        ({"labels": np.zeros((1, 5), np.int64)}, "labels has to be of the type and the shape"),
        ({"labels": np.zeros((4, 2), np.int64).T[:1]}, "labels has to be of the type and the shape"),
        ({"positions": np.zeros((1, 0), np.int64)}, "from 1 token a row"),
        ({"positions": np.zeros((1, 4))}, "int32 or int64"),
        ({"vocabulary": 0}, "a vocabulary of 0 does not fit"),
    ]:
        with pytest.raises(ValueError, match=problem):
            call(**changes)
    small = [np.zeros((1, 4), np.int32) for _ in range(3)]
    with pytest.raises(ValueError, match="a vocabulary of 2147483649 does not fit"):
        call(tokens=small[0], labels=small[1], positions=small[2], vocabulary=2**31 + 1)
    read_only = np.zeros((1, 4), np.int64)
    read_only.flags.writeable = False
    with pytest.raises(ValueError, match="not writeable"):
        call(positions=read_only)
