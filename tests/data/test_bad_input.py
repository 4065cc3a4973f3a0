"""Bad input of which other engines make wrong tokens or a crash: here an error, as early as can be.

What is wrong with one part stands with the tests of that part: files that are cut, before or while they are open, wrong
headers, counts and sidecars in test_indexed.py; a flipped byte, which ``data verify`` locates, in test_verify.py; wrong
lines, bytes that are not UTF-8 and damaged files of text in test_readers.py; tokenizers in test_tokenizer.py; weights
and quotas of a plan in test_plan.py; windows, ids and datasets that are gone in test_samples.py; damage to the parts of
a merge in test_merge.py. Here is the rest, and what takes several of them together.
"""

from __future__ import annotations

import gc
import math
import os
import struct

import numpy as np
import pytest

from megapoly import config as configuration
from megapoly.data import _index
from megapoly.data.builder import Options, build
from megapoly.data.indexed import DTYPES, HEADER, IndexedDataset
from megapoly.data.load_tokenizer import load_tokenizer
from megapoly.data.loader import Loader, open_datasets
from megapoly.data.merge import merge
from megapoly.data.plan import Plan, plan_from_config
from megapoly.data.segments import Source
from megapoly.data.tokenizer import check_matches
from megapoly.data.verify import verify
from megapoly.errors import ConfigError, DataError
from tests import corpus
from tests.data.ondisk import patch, random_documents, write
from tests.data.small import write_megatron

LENGTHS, POINTERS = HEADER.size, HEADER.size + 4 * 50  # of 50 sequences


@pytest.fixture
def dataset(tmp_path):
    return write(tmp_path / "d", random_documents())


# The index


@pytest.mark.parametrize(("written", "claimed"), [("<u2", 3), ("u1", 2)])
def test_a_dtype_of_the_same_width_and_another_sign(tmp_path, written, claimed):
    """Opening cannot know; ids that the type makes negative are refused where they are read."""
    most = np.iinfo(written).max
    write_megatron(tmp_path / "d", [[1, 2, most], [3, most - 1, 4]], written)
    patch(tmp_path / "d.idx", 17, bytes([claimed]))
    opened = IndexedDataset(tmp_path / "d")
    assert opened.dtype.name == DTYPES[claimed]
    with pytest.raises(DataError, match=r"d\.bin: token 2 has id -1, outside the vocabulary of .*data verify"):
        opened.gather(np.array([0]), 6, most + 1)
    assert [(found.start, found.stop) for found in verify(tmp_path / "d")] == [
        (2 * opened.dtype.itemsize, 3 * opened.dtype.itemsize)
    ]


@pytest.mark.parametrize("code", [code for code, name in DTYPES.items() if not name.startswith("float") and code != 8])
def test_any_other_dtype_of_an_index_is_refused_or_found(dataset, code):
    patch(dataset.with_suffix(".idx"), 17, bytes([code]))
    if np.dtype(DTYPES[code]).itemsize != 2:
        with pytest.raises(DataError, match=r"d\.bin: has \d+ bytes, but by d\.idx its tokens run from byte 0 to byte"):
            IndexedDataset(dataset)
    else:
        (found,) = verify(dataset)
        assert (found.path.name, found.start) == ("d.idx", 0)


@pytest.mark.parametrize("by", [2, -2, -(2**62)], ids=["forwards", "backwards", "negative"])
@pytest.mark.parametrize("first", [0, 20, 49])
def test_pointers_that_are_shifted(dataset, first, by):
    """All, those of the second half, or the last: the ends do not fit."""
    path = dataset.with_suffix(".idx")
    pointers = np.frombuffer(path.read_bytes(), "<i8", 50, POINTERS).copy()
    pointers[first:] += by
    patch(path, POINTERS, pointers.tobytes())
    with pytest.raises(DataError, match=r"d\.bin: has \d+ bytes, but by d\.idx .* another dataset"):
        IndexedDataset(dataset)


@pytest.mark.parametrize("pointer", [-2, -(2**63), 3, 2**62, 2**63 - 1])
@pytest.mark.parametrize("number", [64, 70])
def test_a_pointer_that_is_wrong_between_right_ones(tmp_path, number, pointer):
    """Boundaries are found by the pointer of every 64th sequence, and read no other."""
    documents = random_documents(200)
    prefix = write(tmp_path / "d", documents)
    patch(prefix.with_suffix(".idx"), HEADER.size + 4 * 200 + 8 * number, struct.pack("<q", pointer))
    opened = IndexedDataset(prefix)
    begins = np.cumsum([len(document) for document in documents])[:-1]
    if number == 64:
        with pytest.raises(DataError, match=r"d\.idx: is damaged at the (pointer|length|lengths or pointers)"):
            opened.boundaries(0, opened.tokens)
    else:
        np.testing.assert_array_equal(opened.boundaries(0, opened.tokens), begins)
    for document in (number - 1, number):
        with pytest.raises(DataError, match=r"d\.idx: is damaged at the lengths or pointers of document"):
            opened.document(document)
    np.testing.assert_array_equal(opened.document(number + 1), documents[number + 1])
    (found,) = verify(prefix)
    assert f"pointer that does not follow from the lengths, of sequence {number}" in str(found)


def test_a_sidecar_that_has_been_changed(dataset, tmp_path):
    """A vocabulary that cannot be is refused at once; that the language is another one, verify and a merge see."""
    path = dataset.with_suffix(".json")
    text = path.read_text()
    for vocabulary, message in (
        (10**30, "tokenizer.vocabulary: Input should be less than or equal to 2147483648"),
        (70_000, "tells of a vocabulary of 70000, and ids of the .idx's type uint16 are at most 65535"),
    ):
        path.write_text(text.replace('"vocabulary": 1000', f'"vocabulary": {vocabulary}'))
        with pytest.raises(DataError, match=rf"d\.json.*{message}.*build the dataset again"):
            IndexedDataset(dataset)
    path.write_text(text.replace('"xx"', '"yy"'))
    assert IndexedDataset(dataset).sidecar.language == "yy"
    assert [found.path for found in verify(dataset)] == [path]
    with pytest.raises(DataError, match=r"d\.json: the content has changed since it was built \(checksum\)"):
        merge([dataset], tmp_path / "m")
    assert not list(tmp_path.glob("m*"))


def test_files_that_hold_nothing(tmp_path):
    for suffix in (".bin", ".idx"):
        (tmp_path / f"d{suffix}").touch()
    with pytest.raises(DataError, match=r"d\.idx: is cut short: 0 bytes, fewer than its header of 34"):
        IndexedDataset(tmp_path / "d")
    write_megatron(tmp_path / "d", [[], []])  # documents, and none with a token
    with pytest.raises(DataError, match=r"d\.bin: holds no token"):
        IndexedDataset(tmp_path / "d")
    (tmp_path / "d.idx").write_bytes((tmp_path / "d.idx").read_bytes()[: HEADER.size])
    with pytest.raises(
        DataError, match=r"d\.idx: .* 2 sequences and 3 document indices need 82 bytes, and there are 34"
    ):
        IndexedDataset(tmp_path / "d")


# Ids


@pytest.mark.parametrize(("code", "largest"), [(1, 2**8), (2, 2**7), (3, 2**15), (4, 2**31), (8, 2**16)])
def test_ids_never_wrap(tmp_path, code, largest):
    """The largest id of every type is written as it is, and no larger vocabulary is taken."""
    names = str(tmp_path / "d.bin"), str(tmp_path / "d.idx")
    with pytest.raises(
        DataError, match=rf"d\.bin: a vocabulary of {largest + 1} does not fit .* at most {largest - 1}"
    ):
        _index.Writer(*names, code, largest + 1)
    writer = _index.Writer(*names, code, largest)
    for wrong in (largest, -1, 2**62):
        with pytest.raises(DataError, match=rf"d\.bin: token 0: id {wrong} is outside the vocabulary of {largest}"):
            writer.append(np.array([wrong]), np.array([1]))
    writer.append(np.array([largest - 1, 0]), np.array([2]))
    writer.finish()
    assert IndexedDataset(tmp_path / "d").document(0).tolist() == [largest - 1, 0]


@pytest.mark.parametrize("ids", [np.array([2**63], np.uint64), np.array([1.0]), np.array(["1"])])
def test_arrays_of_other_types_are_not_made_to_fit(tmp_path, ids):
    writer = _index.Writer(str(tmp_path / "d.bin"), str(tmp_path / "d.idx"), 5, 2**62)
    with pytest.raises((TypeError, DataError)):
        writer.append(ids, np.array([1]))
    assert writer.tokens == 0


# Weights


@pytest.mark.parametrize(
    "weights",
    [
        {"x": math.nan, "y": 0.5},
        {"x": math.inf, "y": 0.5},
        {"x": -math.inf, "y": math.inf},
        {"x": -0.5, "y": 1.5},
        {"x": 0.0, "y": 0.0},
        {"x": -0.0},
        {},
    ],
)
def test_weights_that_are_no_shares(weights):
    sources = [Source(name, "xx", "h", 1000) for name in "xy"]
    with pytest.raises(DataError, match=r"stage 'a': weights have to be in \[0, 1\] and sum to 1; found"):
        Plan.build([("a", 10, weights)], sources, 8, 1)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("{ en = nan, ru = 0.3 }", r"weights\.en"),
        ("{ en = inf, ru = 0.3 }", r"weights\.en"),
        ("{ en = -0.7, ru = 0.3 }", r"weights\.en"),
        ("{ en = 0.0, ru = 0.0 }", "the weights sum to 0, not 1; give a source a weight"),
        ("{ en = 0.5, ru = 0.3, th = 0.2 }", "weight of an unknown source 'th'; there are: en, ru"),
        ("{ }", "weights"),
    ],
)
def test_weights_in_a_config(tmp_path, weights, message):
    sizes = {"vocabulary": 323, "first": 12 * corpus.STEP, "second": 8 * corpus.STEP, "step": corpus.STEP}
    text = corpus.TOML.format(**sizes).replace("{ en = 0.7, ru = 0.3 }", weights)
    (tmp_path / "run.toml").write_text(text)
    with pytest.raises(ConfigError, match=rf"data\.stages\.0.*{message}"):
        configuration.load(tmp_path / "run.toml")


# From files to batches


@pytest.fixture
def run(toml, tmp_path):
    """A config of which the dataset ``en`` may be damaged, and its tokenizer."""
    folder = toml.parent
    for suffix in (".bin", ".idx", ".json"):
        (tmp_path / f"en{suffix}").write_bytes((folder / f"en{suffix}").read_bytes())
    config = configuration.load(toml, [f'data.sources.en.path="{tmp_path / "en"}"'])
    return config, load_tokenizer(folder / "poly.model")


def read_all(config, datasets):
    config = config.on(1)
    with Loader(config, plan_from_config(config, datasets), datasets, start=0, rank=0) as loader:
        return list(loader)


def test_ids_beyond_the_vocabulary_stop_the_loader(run, tmp_path):
    """Where megatron-core's fail in the model, or not at all where they are labels only."""
    config, tokenizer = run
    patch(tmp_path / "en.bin", 0, np.full(4000, tokenizer.vocabulary, "<u2").tobytes())
    with pytest.raises(DataError, match=r"en\.bin: token \d+ has id 323, outside the vocabulary of 323; .* verify"):
        read_all(config, open_datasets(config.data, tokenizer))


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_files_that_are_cut_under_the_loader(run, tmp_path, suffix):
    config, tokenizer = run
    datasets = open_datasets(config.data, tokenizer)
    os.truncate(tmp_path / f"en{suffix}", 40)
    with pytest.raises(
        DataError, match=rf"en\{suffix}: ends at byte \d+, earlier than when it was opened; build it again"
    ):
        read_all(config, datasets)


def test_batches_outlive_their_datasets(run, tmp_path):
    config, tokenizer = run
    datasets = open_datasets(config.data, tokenizer)
    batches = read_all(config, datasets)
    before = [batch.tokens.clone() for step in batches for batch in step]
    row = datasets["en"].gather(np.array([0]), 100, tokenizer.vocabulary)
    kept = row.copy()
    del datasets
    gc.collect()
    for suffix in (".bin", ".idx", ".json"):
        os.truncate(tmp_path / f"en{suffix}", 0)
    assert all(map(np.array_equal, before, (batch.tokens for step in batches for batch in step)))
    np.testing.assert_array_equal(row, kept)


# The tokenizer


def test_a_tokenizer_of_the_same_size_and_another_content(toml, tmp_path):
    """The hash alone tells: a field that SentencePiece does not know changes nothing else."""
    model = (toml.parent / "poly.model").read_bytes()
    (tmp_path / "other.model").write_bytes(model + b"\x78\x01")
    other = load_tokenizer(tmp_path / "other.model")
    assert other.encode("abc") == load_tokenizer(toml.parent / "poly.model").encode("abc")
    config = configuration.load(toml)
    with pytest.raises(
        DataError, match=r"en: was built with a tokenizer of 323 ids, SHA-256 .* give the tokenizer that"
    ):
        open_datasets(config.data, other)
    with pytest.raises(DataError, match=r"ru: was built with .*other\.model has 323, SHA-256"):
        check_matches(other, IndexedDataset(toml.parent / "ru"))


def test_text_of_another_encoding_is_not_built(toml, tmp_path):
    """Latin-1, UTF-16 with and without its mark, and UTF-8 that was cut inside of a character."""
    tokenizer = load_tokenizer(toml.parent / "poly.model")
    text = '{"text": "für alle"}\n'
    for number, content in enumerate(
        (text.encode("latin-1"), text.encode("utf-16"), text.encode("utf-16-le"), text.encode()[:12] + b'"}\n')
    ):
        path = tmp_path / f"{number}.jsonl"
        path.write_bytes(content)
        with pytest.raises(DataError, match=rf"{number}\.jsonl, line 1: is not (UTF-8|JSON).*; (convert|expected)"):
            build([path], tmp_path / "d", tokenizer, language="de", options=Options(threads=1))
        assert not list(tmp_path.glob("d*"))
