"""Best-fit packs: against a search through all packs, by their properties, and as training reads them."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megapoly.data import _index
from megapoly.data.indexed import IndexedDataset
from megapoly.data.merge import Assembly, merge
from megapoly.data.samples import NOT_COUNTED, read, validation
from megapoly.data.sidecar import Sidecar
from megapoly.data.verify import verify
from megapoly.errors import DataError
from tests.data.ondisk import VOCABULARY, write
from tests.data.small import write_megatron
from tests.data.test_samples import make_plan

END = 2  # the id that ends documents
OPTIONS = {"vocabulary": VOCABULARY, "separate_documents": True, "with_tokens": True}
LENGTHS = st.integers(2, 40).flatmap(lambda pack: st.tuples(st.just(pack), st.lists(st.integers(1, pack), max_size=80)))


def searched_best_fit(lengths, pack):
    """The pack of every item: of all packs the fullest in which it fits, of several the one that was filled last."""
    rooms, filled, packs = [], [], [0] * len(lengths)
    for step, item in enumerate(sorted(range(len(lengths)), key=lambda i: -lengths[i])):
        fits = [number for number, room in enumerate(rooms) if room >= lengths[item]]
        if not fits:
            fits = [len(rooms)]
            rooms.append(pack)
            filled.append(0)
        chosen = min(fits, key=lambda number: (rooms[number], -filled[number]))
        rooms[chosen] -= lengths[item]
        filled[chosen] = step
        packs[item] = chosen
    return packs


def first_fit_count(lengths, pack):
    rooms = []
    for length in lengths:
        fits = [i for i, room in enumerate(rooms) if room >= length]
        if not fits:
            fits = [len(rooms)]
            rooms.append(pack)
        rooms[fits[0]] -= length
    return len(rooms)


def fit(lengths, pack):
    return _index.best_fit(np.array(lengths, np.int32), pack)


# The packing of lengths


@settings(deadline=None)
@given(LENGTHS)
def test_against_a_search(case):
    pack, lengths = case
    assert fit(lengths, pack).tolist() == searched_best_fit(lengths, pack)


@settings(deadline=None)
@given(LENGTHS)
def test_properties(case):
    pack, lengths = case
    packs = fit(lengths, pack)
    sums = np.bincount(packs, weights=lengths) if lengths else np.zeros(0)
    assert (sums <= pack).all()
    assert (sums > 0).all()  # no number is left out
    # No two packs would fit one, or the later would not have been begun; and so best-fit's bound of twice the least.
    assert all(a + b > pack for i, a in enumerate(sums) for b in sums[:i])
    # Johnson, 1973: best-fit decreasing needs at most 11/9 of the least number, and 4.
    assert len(sums) <= 11 / 9 * first_fit_count(lengths, pack) + 4


def test_long_packs_and_many_items():
    """Lengths of which the sets of rooms have several levels."""
    draw = np.random.default_rng(1)
    for pack in (63, 64, 65, 4095, 4096, 4097, 300_000):
        lengths = np.minimum(draw.geometric(5 / pack, 1500), pack).tolist()
        assert fit(lengths, pack).tolist() == searched_best_fit(lengths, pack)


def test_wrong_lengths():
    for lengths in ([0], [-1], [5, 9]):
        with pytest.raises(DataError, match="a length is not from 1 to that of a pack, 8"):
            fit(lengths, 8)


# Datasets of packs


def texts_of(lengths, seed=0):
    """Documents of these lengths, each ended by END, which they do not hold."""
    draw = np.random.default_rng(seed)
    return [[*draw.integers(3, VOCABULARY, length - 1).tolist(), END] for length in lengths]


def packed(folder, train, held, pack, **choices):
    parts = [write(folder / "one", [*train, *held], held_out=len(held))]
    made = merge(parts, folder / "m", Assembly(pack=pack, **choices), overwrite=True)
    return made, IndexedDataset(folder / "m")


def rows(dataset, first, stop):
    """Every pack as the list of its documents."""
    every = [dataset.document(i).tolist() for i in range(dataset.documents)]
    ends = np.cumsum([0, *map(len, every)])
    cuts = np.searchsorted(ends, np.arange(first, stop + 1, dataset.pack))
    assert (ends[cuts] == np.arange(first, stop + 1, dataset.pack)).all()  # no document crosses from pack to pack
    return [every[a:b] for a, b in pairwise(cuts)]


def pieces(texts, pack):
    return [text[i : i + pack] for text in texts for i in range(0, len(text), pack)]


def check_packs(made, dataset, train, held, pack):
    padding, cut = [], 0
    for side, first, stop in ((train, 0, dataset.train_tokens), (held, dataset.train_tokens, dataset.tokens)):
        found = rows(dataset, first, stop)
        real = []
        for row in found:
            last = row[-1]
            if len(row) > 1 and set(last) == {END} and last not in ([END],):
                padding.append(len(last))
                row = row[:-1]
            elif len(row) > 1 and last == [END]:  # one token of padding, or a document without text
                pass
            real += row
        # Nothing is lost, repeated or cut that fits a pack. A single END is padding or a document.
        wanted = Counter(map(tuple, pieces(side, pack)))
        extra = Counter(map(tuple, real)) - wanted
        assert not wanted - Counter(map(tuple, real))
        assert set(extra) <= {(END,)}
        padding += [1] * extra.total()
        cut += sum(len(text) > pack for text in side)
    assert (made.padding.id, made.padding.documents, made.padding.tokens) == (END, len(padding), sum(padding))
    assert made.padding.cut == cut
    total = sum(map(len, train)) + sum(map(len, held))
    assert made.tokens == dataset.tokens == total + sum(padding)
    assert made.pack == dataset.pack == pack
    assert made.bytes == total  # padding is no text


@settings(max_examples=30, deadline=None)
@given(
    pack=st.integers(2, 20),
    train=st.lists(st.integers(1, 70), min_size=1, max_size=40),
    held=st.lists(st.integers(1, 70), max_size=8),
    shuffle=st.none() | st.integers(0, 9),
)
def test_nothing_is_lost_repeated_or_cut_that_fits(tmp_path_factory, pack, train, held, shuffle):
    folder = tmp_path_factory.mktemp("packs")
    train, held = texts_of(train), texts_of(held, seed=1)
    made, dataset = packed(folder, train, held, pack, shuffle=shuffle)
    check_packs(made, dataset, train, held, pack)
    assert verify(folder / "m") == []


@pytest.mark.parametrize("vocabulary", [VOCABULARY, 100_000])
def test_packs_of_a_corpus(tmp_path, vocabulary):
    """Whatever the parts and the memory; documents of several blocks; and packs can be put one after another."""
    draw = np.random.default_rng(0)
    lengths = np.minimum(draw.geometric(1 / 300, 2000), 4000)
    lengths[5], lengths[900] = 900_000, 600_000
    texts = texts_of(lengths)
    train, held = texts[:1800], texts[1800:]
    results = []
    for name, count in (("a", 1), ("b", 3)):
        parts = []
        for i in range(count):
            first = train[1800 * i // count : 1800 * (i + 1) // count]
            last = held[200 * i // count : 200 * (i + 1) // count]
            parts.append(write(tmp_path / f"{name}{i}", [*first, *last], held_out=len(last), vocabulary=vocabulary))
        for memory_mb in (260, 1024):
            assembly = Assembly(shuffle=1, pack=256, memory_mb=memory_mb)
            made = merge(parts, tmp_path / "m", assembly, overwrite=True)
            results.append([(tmp_path / f"m{suffix}").read_bytes() for suffix in (".bin", ".idx", ".json")])
    assert all(result == results[0] for result in results)
    check_packs(made, IndexedDataset(tmp_path / "m"), train, held, 256)
    assert made.padding.tokens / made.tokens < 0.01

    merge([write(tmp_path / "c", train[:50], vocabulary=vocabulary)], tmp_path / "n", Assembly(pack=256))
    for name in ("m", "n"):
        path = tmp_path / f"{name}.json"
        side = Sidecar.read(path)
        alike = side.validation.model_copy(update={"fraction": 0.0})
        path.write_text(side.model_copy(update={"validation": alike}).text())
    both = merge([tmp_path / "n", tmp_path / "m"], tmp_path / "both")
    other = IndexedDataset(tmp_path / "n").sidecar
    assert (both.pack, both.tokens) == (256, made.tokens + other.tokens)
    assert both.padding.tokens == made.padding.tokens + other.padding.tokens
    assert verify(tmp_path / "both") == []
    for assembly in (Assembly(deduplicate=True), Assembly(shuffle=1), Assembly(pack=256)):
        with pytest.raises(DataError, match="is made of packs of 256 tokens, which can only be put one after another"):
            merge([tmp_path / "n", tmp_path / "m"], tmp_path / "x", assembly)


def test_packs_follow_their_earliest_document(tmp_path):
    texts = texts_of([3, 9, 5, 1, 2, 30, 4])
    _, dataset = packed(tmp_path, texts, [], 10)
    whole = [[texts[5][i : i + 10]] for i in (0, 10, 20)]  # written at once
    assert rows(dataset, 0, dataset.tokens) == [
        *whole,
        [texts[0], texts[4], [END] * 5],
        [texts[1], [END]],
        [texts[2], texts[3], texts[6]],
    ]


def test_what_cannot_be_packed(tmp_path):
    with pytest.raises(DataError, match="a document ends with id 7, and the first one with 2; packs are padded with"):
        packed(tmp_path, [[5, 2], [5, 7]], [], 8)
    with pytest.raises(DataError, match=r"begins with id 2, with which packs are padded; build without packs"):
        packed(tmp_path, [[5, 2], [2, 5, 2]], [], 8)
    assert not list(tmp_path.glob("m*"))


# As training reads them


def test_no_label_of_padding_is_counted_and_documents_are_separate(tmp_path):
    """Against the packs as lists: every label that counts is the next token of the same document, and all of those."""
    lengths = [3, 9, 5, 1, 2, 30, 4, 25, 7, 7, 1, 9]
    train, held = texts_of(lengths), texts_of([4, 13], seed=1)
    made, dataset = packed(tmp_path, train, held, 10)
    assert made.padding.documents >= 3
    plan = make_plan({"x": dataset}, 10)
    batch = read(plan, {"x": dataset}, np.arange(40), **OPTIONS)
    held_batch = validation(plan, {"x": dataset}, 0, windows=99, rows_multiple=1, **OPTIONS)
    found = rows(dataset, 0, dataset.train_tokens)
    listed = [found[number] for number in plan.locate(np.arange(40)).window.tolist()]
    listed += rows(dataset, dataset.train_tokens, dataset.tokens)
    padded = 0
    for row, one in zip(listed, [*batch.split(1), *held_batch.split(1)], strict=True):
        tokens, labels, positions = (x[0].tolist() for x in (one.tokens, one.labels, one.positions))
        wanted = []
        for text in row:
            is_padding = text is row[-1] and len(row) > 1 and set(text) == {END}
            wanted += [NOT_COUNTED] * len(text) if is_padding else [*text[1:], NOT_COUNTED]
        assert tokens == [token for text in row for token in text]
        assert labels == wanted
        assert positions == [place for text in row for place in range(len(text))]
        assert one.cu_seqlens.tolist() == np.cumsum([0, *map(len, row)]).tolist()
        padded += len(row[-1]) > 1 and set(row[-1]) == {END}
    assert padded >= 4


def test_an_epoch_is_every_pack_once(tmp_path):
    """A pack ends with its last token; unlike a window it has no label after it, so none is left over."""
    _, dataset = packed(tmp_path, texts_of([10] * 7), [], 10)
    plan = make_plan({"x": dataset}, 10)
    assert plan.windows.tolist() == [7]
    batch = read(plan, {"x": dataset}, np.arange(7), **OPTIONS)
    assert sorted(batch.tokens.tolist()) == sorted(rows(dataset, 0, dataset.tokens)[i][0] for i in range(7))


def test_padding_is_known_by_the_sidecar_alone(tmp_path):
    """In a stream, or in packs of another builder, a document that begins with the same id keeps its labels."""
    write_megatron(tmp_path / "d", [[5, 6, 7], [END, END, 9, 8, 7, 6, 5]])
    stream = IndexedDataset(tmp_path / "d")
    labels = read(make_plan({"x": stream}, 8), {"x": stream}, np.arange(1), **OPTIONS).labels[0].tolist()
    assert labels == [6, 7, NOT_COUNTED, END, 9, 8, 7, 6]
    texts = [[5, 6, 7, 8, END], [END, 9, END]] * 2
    path = write(tmp_path / "p", texts).with_suffix(".json")
    for padding, wanted in ((None, [9, END]), ({"id": END, "documents": 0, "tokens": 0, "cut": 0}, [NOT_COUNTED] * 2)):
        path.write_text(json.dumps({**json.loads(path.read_text()), "pack": 8, "padding": padding}))
        packs = IndexedDataset(tmp_path / "p")
        labels = read(make_plan({"x": packs}, 8), {"x": packs}, np.arange(1), **OPTIONS).labels[0].tolist()
        assert labels == [6, 7, 8, END, NOT_COUNTED, *wanted, NOT_COUNTED]
