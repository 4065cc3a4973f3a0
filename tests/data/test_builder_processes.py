"""Builds of many pieces, by several processes and in shards: the same bytes, and all bad records counted."""

from __future__ import annotations

import gzip
import os
import shutil
from dataclasses import replace

import pytest

from megapoly.data import pieces
from megapoly.data.builder import Assembly, Options, Shard, build, held_out
from megapoly.data.indexed import IndexedDataset
from megapoly.data.merge import merge
from megapoly.data.skipped import describe_skipped
from megapoly.data.verify import verify
from megapoly.errors import ConfigError, DataError
from tests.data.building import contents, documents

LINES = Options(document="line", validation_fraction=0.1, processes=1)

pytestmark = pytest.mark.usefixtures("small_pieces")


def test_any_number_of_processes_makes_the_same_bytes(tmp_path, corpus, tokenizer, workers):
    folder, texts = corpus
    build([folder], tmp_path / "one", tokenizer, language="xx", options=LINES)
    assert workers == []
    seen = []
    options = replace(LINES, processes=3)
    build([folder], tmp_path / "three", tokenizer, language="xx", options=options, progress=seen.append)
    assert len(workers) == 3
    assert contents(tmp_path / "one") == contents(tmp_path / "three")
    assert verify(tmp_path / "one") == []
    held = [text for text in texts if held_out(text, 1234, 0.1)]
    train = [text for text in texts if not held_out(text, 1234, 0.1)]
    assert documents(tmp_path / "three") == [[*tokenizer.encode(text), tokenizer.eod] for text in train + held]
    assert sorted(os.listdir(tmp_path)) == sorted(
        f"{name}{s}" for name in ("one", "three") for s in (".bin", ".idx", ".json")
    )

    size = sum(file.stat().st_size for file in folder.iterdir())
    read = [state.input_read for state in seen]
    assert read == sorted(read)
    assert {state.input_size for state in seen} == {size}
    assert (read[-1], seen[-1].documents) == (size, len(texts))
    assert seen[-1].assembled == seen[-1].to_assemble > 0
    assert all(process.poll() is not None for process in workers)


def test_a_single_piece_is_not_copied(tmp_path, corpus, tokenizer, monkeypatch, workers):
    """This process encodes it, and its files become those of the dataset."""
    monkeypatch.setattr(pieces, "PIECE_BYTES", 32 << 20)
    parts = []

    def rename(source, target, rename=os.replace):
        if ".build" in str(target):
            parts.append(os.stat(source).st_ino)
        rename(source, target)

    monkeypatch.setattr(os, "replace", rename)
    build([corpus[0] / "a.jsonl"], tmp_path / "d", tokenizer, language="xx", options=replace(LINES, processes=4))
    assert workers == []
    assert {(tmp_path / name).stat().st_ino for name in ("d.bin", "d.idx")} < set(parts)
    assert len(documents(tmp_path / "d")) == 200


@pytest.mark.parametrize("count", [3, 7])
def test_shards_merge_to_one_build(tmp_path, corpus, tokenizer, count):
    folder = corpus[0]
    build([folder], tmp_path / "one", tokenizer, language="xx", options=LINES)
    parts = [tmp_path / f"shard-{i}" for i in range(1, count + 1)]
    for i, prefix in enumerate(parts, 1):
        build([folder], prefix, tokenizer, language="xx", options=replace(LINES, shard=Shard(i, count)))
    assert all(IndexedDataset(prefix).sidecar.documents > 0 for prefix in parts)
    merge(parts, tmp_path / "merged")
    assert contents(tmp_path / "merged") == contents(tmp_path / "one")


@pytest.mark.parametrize("text", ["0/3", "4/3", "1", "a/b", "1/0", "-1/2", "1/2/3"])
def test_wrong_shards(text):
    with pytest.raises(ConfigError, match="shard"):
        Shard.parse(text)


def test_more_shards_than_there_is_to_share(tmp_path, corpus, tokenizer):
    with pytest.raises(DataError, match=r"shard 2/3: the input has 1 files and chunks.*build at most 1 shards"):
        build([corpus[0] / "b.jsonl.gz"], tmp_path / "d", tokenizer, language="xx", options=Options(shard=Shard(2, 3)))
    with pytest.raises(ConfigError, match=r"shard 1/2: duplicates, shuffle and packs .* `megapoly data merge`"):
        Options(shard=Shard(1, 2), assembly=Assembly(shuffle=1))


@pytest.mark.parametrize(
    "assembly",
    [Assembly(deduplicate=True), Assembly(deduplicate=True, shuffle=5, pack=64, memory_mb=300)],
)
@pytest.mark.parametrize("copies", [1, 3])
def test_documents_are_put_together_as_merge_does(tmp_path, corpus, tokenizer, assembly, copies):
    """Of one piece, and of many with duplicates."""
    files = [corpus[0] / "a.jsonl"]
    for i in range(1, copies):
        files.append(tmp_path / f"copy{i}.jsonl")
        files[-1].write_bytes(files[0].read_bytes())
    build(files, tmp_path / "plain", tokenizer, language="xx", options=LINES)
    merge([tmp_path / "plain"], tmp_path / "merged", assembly)
    made = build(files, tmp_path / "d", tokenizer, language="xx", options=replace(LINES, assembly=assembly))
    assert contents(tmp_path / "d") == contents(tmp_path / "merged")
    assert made.duplicates.documents == (200 * (copies - 1) if assembly.deduplicate else 0)


def test_bad_records_of_all_pieces_are_counted_with_their_lines(tmp_path, tokenizer):
    """In files that are cut, compressed and together in a piece, by one process and by several."""
    folder = tmp_path / "in"
    folder.mkdir()
    kinds = {"a.jsonl": ("{", "not JSON"), "b.jsonl.gz": ('{"text": 5}', "no text"), "c.jsonl": ("[]", "not an object")}
    bad = range(7, 300, 50)
    for name, (line, _) in kinds.items():
        lines = [line if i in bad else f'{{"text": "{name} {i}: {"word " * 9}"}}' for i in range(1, 301)]
        content = "".join(f"{line}\n" for line in lines).encode()
        (folder / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    (folder / "d.jsonl").write_text("[]\n")
    for processes in (1, 2):
        options = replace(LINES, bad_records="skip", processes=processes, overwrite=True)
        side = build([folder], tmp_path / "d", tokenizer, language="xx", options=options)
        assert side.documents == 3 * (300 - len(bad))
        assert {each.kind: each.records for each in side.skipped} == {"not JSON": 6, "no text": 6, "not an object": 7}
        told = "\n".join(describe_skipped(side.skipped))
        for name in kinds:
            assert [i for i in bad if f"{name}, line {i}: " in told] == list(bad[:3])
    options = replace(LINES, processes=2, overwrite=True)
    with pytest.raises(DataError, match=r"(a|b|c|d)\.jsonl(\.gz)?, line \d*[05]?[71]: (is|field)"):
        build([folder], tmp_path / "stopped", tokenizer, language="xx", options=options)
    assert not list(tmp_path.glob("stopped.*[!d]"))


def test_a_dataset_among_its_text(tmp_path, corpus, tokenizer):
    folder = tmp_path / "text"
    shutil.copytree(corpus[0], folder)
    (folder / "out").mkdir()
    for prefix in (folder / "d", folder / "out" / ".." / "d", folder / "out" / "d"):
        with pytest.raises(DataError, match=r"/d: lies in .*text, all of which is read; choose another place"):
            build([folder], prefix, tokenizer, language="xx", options=LINES)
    build([folder / "a.jsonl"], folder / "d", tokenizer, language="xx", options=LINES)
    assert len(documents(folder / "d")) == 200


def test_nothing_but_bad_records(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text("{\n{\n")
    with pytest.raises(DataError, match=r"no document in .*a\.jsonl.*; all 2 records are bad"):
        build([tmp_path / "a.jsonl"], tmp_path / "d", tokenizer, language="xx", options=Options(bad_records="skip"))
    assert os.listdir(tmp_path) == ["a.jsonl"]
