"""Batches against lists made token by token in plain Python."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megapoly.data.indexed import IndexedDataset
from megapoly.data.plan import Plan, Source
from megapoly.data.samples import read, validation
from megapoly.errors import DataError
from tests.data.small import FakeDataset, write_megatron

VOCABULARY = 50


def make_plan(datasets, sequence, samples=40, seed=3):
    sources = [Source(name, name, data.identity, data.train_tokens) for name, data in datasets.items()]
    weights = {s.name: float(s.tokens > sequence) for s in sources}
    weights = {name: weight / sum(weights.values()) for name, weight in weights.items()}
    return Plan.build([("only", samples, weights)], sources, sequence, seed)


def expected_row(documents, start, end, length, separate):
    """Tokens, labels, positions and documents of the window at ``start``, of a stream that ends at ``end``."""
    stream = [
        (token, document, offset) for document, text in enumerate(documents) for offset, token in enumerate(text)
    ][:end]
    tokens, labels, positions, numbers = [], [], [], []
    for i in range(start, start + length):
        here = stream[i] if i < end else None
        after = stream[i + 1] if i + 1 < end else None
        tokens.append(here[0] if here else 0)
        counted = after and not (separate and after[1] != here[1])
        labels.append(after[0] if counted else -1)
        begins = i > start and here is not None and here[2] == 0
        if not separate or i == start:
            positions.append(i - start)
            numbers.append(0)
        else:
            positions.append(0 if begins else positions[-1] + 1)
            numbers.append(numbers[-1] + begins)
    return tokens, labels, positions, numbers


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
    assert (batch.tokens is None) == (batch.labels is None) == (not with_tokens)
    assert (batch.documents is None) == (not separate)


def test_types_and_shapes():
    datasets = {"x": FakeDataset([[1, 2, 3, 4, 5, 6, 7]])}
    batch = read(
        make_plan(datasets, 3), datasets, np.arange(5), vocabulary=VOCABULARY, separate_documents=True, with_tokens=True
    )
    kinds = {"samples": torch.int64, "source": torch.int32, "documents": torch.int32}
    for field in dataclasses.fields(batch):
        tensor = getattr(batch, field.name)
        assert tensor.dtype == kinds.get(field.name, torch.int64)
        assert tensor.shape == ((5,) if field.name in ("samples", "source") else (5, 3))


def test_one_call_per_source():
    class Counting(FakeDataset):
        calls = 0

        def fill(self, rows, starts, limit, vocabulary, columns):
            self.calls += 1
            assert vocabulary == VOCABULARY
            return super().fill(rows, starts, limit, vocabulary, columns)

    datasets = {name: Counting([[1] * 50]) for name in "abc"}
    read(
        make_plan(datasets, 4),
        datasets,
        np.arange(40),
        vocabulary=VOCABULARY,
        separate_documents=False,
        with_tokens=True,
    )
    assert [data.calls for data in datasets.values()] == [1, 1, 1]


class WithoutTokens(FakeDataset):
    """What a rank has that sees no .bin."""

    def fill(self, rows, starts, limit, vocabulary, columns):
        assert columns[:2] == (None, None)
        super().fill(rows, starts, limit, vocabulary, columns)


def test_a_stage_without_tokens_reads_none():
    texts = [[1, 2, 3], [4, 5], [6, 7, 8, 9], [1, 2, 3], [4, 4]]
    options = {"vocabulary": VOCABULARY, "separate_documents": True}
    seen, blind = {"x": FakeDataset(texts, 2)}, {"x": WithoutTokens(texts, 2)}
    plan = make_plan(seen, 3)
    full = read(plan, seen, np.arange(9), with_tokens=True, **options)
    bare = read(plan, blind, np.arange(9), with_tokens=False, **options)
    whole = validation(plan, seen, 0, windows=9, rows_multiple=4, with_tokens=True, **options)
    part = validation(plan, blind, 0, windows=9, rows_multiple=4, with_tokens=False, **options)
    for one, other in [(full, bare), (whole, part)]:
        assert other.tokens is None
        assert other.labels is None
        for name in ("samples", "source", "positions", "documents"):
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
        joined = torch.cat([getattr(part, field.name) for part in parts])
        assert torch.equal(joined, getattr(batch, field.name))
    assert [len(part.samples) for part in parts] == [2, 2, 2]
    with pytest.raises(ValueError, match="6 rows do not divide into micro-batches of 4"):
        batch.split(4)


def test_files_give_what_memory_gives(tmp_path):
    random = np.random.default_rng(5)
    texts = [random.integers(0, VOCABULARY, size).tolist() for size in random.integers(1, 40, 60)]
    write_megatron(tmp_path / "x", texts)
    memory, files = {"x": FakeDataset(texts)}, {"x": IndexedDataset(tmp_path / "x")}
    plan = make_plan(memory, 16)
    for separate in (False, True):
        one, other = (
            read(plan, data, np.arange(40), vocabulary=VOCABULARY, separate_documents=separate, with_tokens=True)
            for data in (memory, files)
        )
        for field in dataclasses.fields(one):
            a, b = getattr(one, field.name), getattr(other, field.name)
            assert (a is b is None) or torch.equal(a, b)
    with pytest.raises(DataError, match=r"x\.bin"):
        read(plan, files, np.arange(40), vocabulary=10, separate_documents=False, with_tokens=True)
