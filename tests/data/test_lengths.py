"""Lengths of documents, and the commands that look into datasets: against plain lists, and what is refused."""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megapoly.cli import main
from megapoly.data import parts
from megapoly.data.builder import Options, build
from megapoly.data.indexed import HEADER, IndexedDataset
from megapoly.data.lengths import Lengths, count_lengths
from megapoly.data.load_tokenizer import load_tokenizer
from megapoly.data.merge import Assembly, merge
from megapoly.errors import DataError
from tests.data.ondisk import patch, random_documents, write
from tests.data.small import write_megatron


def expected_bins(lengths):
    """By the number of binary digits, for every one from the fewest to the most."""
    digits = [length.bit_length() for length in lengths]
    found = []
    for number in range(min(digits), max(digits) + 1):
        inside = [length for length, each in zip(lengths, digits, strict=True) if each == number]
        found.append((2**number // 2, 2**number - 1, len(inside), sum(inside)))
    return found


@given(st.lists(st.integers(0, 2**40) | st.integers(0, 9), min_size=1, max_size=60), st.integers(1, 60))
def test_bins_against_binary_digits(lengths, cut):
    counted = Lengths()
    for first in range(0, len(lengths), cut):
        counted.add(first, np.array(lengths[first : first + cut]))
    assert counted.bins() == expected_bins(lengths)
    assert (counted.shortest, counted.longest) == (min(lengths), max(lengths))
    assert counted.longest_document == lengths.index(max(lengths))


def test_powers_of_two_begin_a_bin():
    for power in range(53):
        for length in (2**power - 1, 2**power):
            counted = Lengths()
            counted.add(0, np.array([length]))
            assert counted.bins() == expected_bins([length])


def test_no_document_has_no_bin():
    counted = Lengths()
    counted.add(0, np.array([], np.int64))
    assert counted.bins() == []


def test_lengths_of_a_dataset_in_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "_CHUNK", 7)
    documents = random_documents()
    dataset = IndexedDataset(write(tmp_path / "d", documents, held_out=5))
    lengths = [len(document) for document in documents]
    assert count_lengths(dataset).bins() == expected_bins(lengths)
    held = count_lengths(dataset, dataset.train_documents)
    assert held.bins() == expected_bins(lengths[45:])
    assert held.longest_document == 45 + lengths[45:].index(max(lengths[45:]))


def test_documents_of_several_sequences_or_none(tmp_path):
    """Sequences of 3, 0, 2 and 4 tokens, of which a document has the first three, one none, and one the last."""
    write_megatron(tmp_path / "d", [[1, 2, 3], [], [4, 5], [6, 7, 8, 9]])
    path = tmp_path / "d.idx"
    content = path.read_bytes()
    ends = HEADER.size + 12 * 4
    header = content[:26] + struct.pack("<Q", 4)
    path.write_bytes(header + content[HEADER.size : ends] + struct.pack("<4q", 0, 3, 3, 4))
    assert count_lengths(IndexedDataset(tmp_path / "d")).bins() == expected_bins([5, 0, 4])


def test_damage_to_the_index_is_an_error(tmp_path):
    prefix = write(tmp_path / "d", random_documents())
    patch(prefix.with_suffix(".idx"), HEADER.size + 4 * 20, struct.pack("<i", 1000))
    with pytest.raises(DataError, match=r"d\.idx: is damaged at the lengths or pointers of documents 0 to 49"):
        count_lengths(IndexedDataset(prefix))


# Commands


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        main(list(map(str, arguments)))
    return ended.value.code, capsys.readouterr()


@pytest.fixture(scope="module")
def english(toml, tmp_path_factory):
    """A dataset of sentences, their tokenizer, and the documents as they stand in the file."""
    folder = tmp_path_factory.mktemp("english")
    tokenizer = load_tokenizer(toml.parent / "poly.model")
    build([toml.parent / "en.jsonl"], folder / "en", tokenizer, language="en", options=Options(validation_fraction=0.1))
    dataset = IndexedDataset(folder / "en")
    texts = [json.loads(line)["text"] for line in (toml.parent / "en.jsonl").read_text().splitlines()]
    ids = [[*tokenizer.encode(text), tokenizer.eod] for text in texts]
    order = [ids.index(dataset.document(i).tolist()) for i in range(dataset.documents)]
    return folder / "en", toml.parent / "poly.model", [texts[i] for i in order], [ids[i] for i in order]


def test_inspect_counts_lengths_and_shows_documents(english, tmp_path, capsys):
    prefix, model, texts, ids = english
    lengths = list(map(len, ids))
    options = ("--tokenizer", model, "--document", 299, "--documents", "3..4", "--json", tmp_path / "rows.json")
    code, shown = run(capsys, "data", "inspect", prefix, *options)
    assert code == 0
    lines = shown.out.splitlines()
    for least, _, documents, tokens in expected_bins(lengths):
        (line,) = (line.split() for line in lines if line.startswith(f" {least:,}+ "))
        share = documents / 300
        assert line[:3] == [f"{least:,}+", f"{documents:,}", f"{share:.1%}"]
        assert len(line[3]) == pytest.approx(16 * share, abs=1) if share > 0.1 else True
        assert f"{tokens:,}" in line
        assert f"{tokens / sum(lengths):.1%}" in line
    longest = lengths.index(max(lengths))
    assert (
        f"  from {min(lengths)} to {max(lengths)} tokens (document {longest}), {sum(lengths) / 300:.1f} in the mean"
        in lines
    )
    held = IndexedDataset(prefix).sidecar.validation
    assert f"  held out: the last {held.documents} documents with {held.tokens:,} tokens" in shown.out
    shown_documents = [i for i, line in enumerate(lines) if ", document " in line]
    assert [lines[i + 1] for i in shown_documents] == [texts[299], texts[3], texts[4]]
    assert lines[shown_documents[0]] == f"{prefix}, document 299, {lengths[299]} tokens, held out:"

    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    values = {row["name"].removeprefix(f"{prefix}: "): row["value"] for row in rows}
    assert (values["documents"], values["documents held out"], values["tokens"]) == (300, held.documents, sum(lengths))
    assert values["text"] == sum(len(text.encode()) for text in texts)
    assert values["bytes per token"] == values["text"] / values["tokens"]
    assert (values["shortest document"], values["longest document"]) == (min(lengths), max(lengths))
    for least, most, documents, tokens in expected_bins(lengths):
        (row,) = (row for row in rows if row["name"] == f"{prefix}: documents of {least} to {most} tokens")
        assert (row["value"], row["tokens"]) == (documents, tokens)


def test_inspect_of_packs_and_of_foreign_datasets(english, tmp_path, capsys):
    prefix, _, _, ids = english
    made = merge([prefix], tmp_path / "packs", Assembly(pack=64))
    write_megatron(tmp_path / "foreign", ids)
    code, shown = run(capsys, "data", "inspect", tmp_path / "packs", tmp_path / "foreign", "--no-lengths")
    assert code == 0
    assert f"  {made.tokens // 64} packs of 64 tokens" in shown.out
    assert f"  {tmp_path / 'foreign'}.json is not there: nothing is known to be held out" in shown.out
    assert "in the mean" not in shown.out


def test_inspect_says_that_a_sidecar_has_changed(tmp_path, capsys):
    path = write(tmp_path / "d", random_documents()).with_suffix(".json")
    assert "has changed" not in run(capsys, "data", "inspect", tmp_path / "d")[1].out
    path.write_text(path.read_text().replace('"xx"', '"yy"'))
    code, shown = run(capsys, "data", "inspect", tmp_path / "d")
    assert code == 0
    assert f"  {path} has changed since the dataset was built (checksum)" in shown.out


def test_head(english, capsys):
    prefix, model, texts, ids = english
    code, shown = run(capsys, "data", "head", prefix, "-n", 2, "--tokenizer", model)
    titles = [f"{prefix}, document {i}, {len(ids[i])} tokens:" for i in range(2)]
    assert (code, shown.out.splitlines()) == (0, [titles[0], texts[0], titles[1], texts[1]])
    code, shown = run(capsys, "data", "head", prefix, "-n", 1)
    assert (code, shown.out.splitlines()) == (0, [titles[0], str(ids[0])])
    assert run(capsys, "data", "head", prefix, "-n", 1000)[1].out.count("tokens") == 300
    assert "held out:" in run(capsys, "data", "head", prefix, "-n", 300)[1].out.splitlines()[-2]


@pytest.mark.parametrize("command", ["inspect", "head"])
def test_looking_is_refused_with_another_tokenizer(english, tmp_path, capsys, command):
    prefix, model, _, _ = english
    (tmp_path / "other.model").write_bytes(model.read_bytes() + b"\x78\x01")
    code, shown = run(capsys, "data", command, prefix, "--tokenizer", tmp_path / "other.model")
    assert (code, shown.out) == (1, "")
    assert f"error: {prefix}: was built with a tokenizer of 323 ids, SHA-256" in shown.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--document", 300), "document 300 of 300; the first is 0"),
        (("--document", -1), "document -1 of 300"),
        (("--documents", "298..300"), "document 300 of 300"),
        (("--documents", "5..4"), "--documents 5..4: expected A..B, such as 10..19"),
        (("--documents", "5-9"), "--documents 5-9: expected A..B"),
    ],
)
def test_documents_that_are_not_there(english, capsys, options, message):
    code, shown = run(capsys, "data", "inspect", english[0], *options)
    assert (code, shown.out) == (1, "")
    assert message in shown.err


def test_help_of_head_has_an_example(capsys):
    assert "Example: megapoly data head " in " ".join(run(capsys, "data", "head", "--help")[1].out.split())
