"""The loader under every layout, its thread, and the opening of datasets."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import json
import re
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from megapoly import config as configuration
from megapoly.data import loader as loading
from megapoly.data.builder import Options, build
from megapoly.data.indexed import IndexedDataset
from megapoly.data.loader import DEPTH, Loader, open_datasets
from megapoly.data.plan import plan_from_config
from megapoly.data.samples import read
from megapoly.data.tokenizer_training import train_tokenizer
from megapoly.errors import DataError
from tests.data.small import FakeDataset, make_config, write_megatron

ROOT = Path(__file__).parents[2]


def make_datasets(kind=FakeDataset):
    random = np.random.default_rng(1)
    return {
        name: kind([random.integers(0, 100, size).tolist() for size in random.integers(1, 30, 20)], identity=name)
        for name in ("en", "fr")
    }


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "megapoly-loader"]


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize(("dp", "micro_batch"), [(1, 1), (1, 12), (2, 3), (3, 2), (4, 1), (12, 1)])
def test_ranks_together_give_the_global_batches_in_order(dp, micro_batch, separate):
    config = make_config(global_batch=12, separate=separate, dp=dp, micro_batch=micro_batch)
    datasets = make_datasets()
    plan = plan_from_config(config, datasets)
    by_rank = []
    for rank in range(dp):
        with Loader(config, plan, datasets, start=24, rank=rank, with_tokens=True) as loader:
            by_rank.append(list(loader))
    steps = range(24, plan.total_samples, 12)
    assert [len(steps)] * dp == [len(part) for part in by_rank]
    for i, sample in enumerate(steps):
        batches = [batch for part in by_rank for batch in part[i]]
        assert [len(batch.samples) for batch in batches] == [micro_batch] * (12 // micro_batch)
        expected = read(
            plan,
            datasets,
            np.arange(sample, sample + 12),
            vocabulary=100,
            separate_documents=separate,
            with_tokens=True,
            ids=torch.int32,
        )
        assert [batch.max_seqlen for batch in batches] == [part.max_seqlen for part in expected.split(micro_batch)]
        for field in dataclasses.fields(expected):
            if field.name == "cu_seqlens":
                continue
            parts = [getattr(batch, field.name) for batch in batches]
            whole = getattr(expected, field.name)
            assert parts == [None] * len(parts) if whole is None else torch.equal(torch.cat(parts), whole)
        if separate:
            assert torch.equal(torch.cat([batch.documents for batch in batches]), expected.documents)
        else:
            assert expected.cu_seqlens is None


@pytest.mark.parametrize("start", [0, 14, 30, 48])
@pytest.mark.parametrize("dp", [1, 2])
def test_batches_of_a_ramp(dp, start):
    tree = make_config(global_batch=8, dp=dp).document()
    tree["train"]["batch_ramp"] = {"start": 2, "increment": 2, "tokens": 40 * 8}
    config = configuration.parse(tree)
    datasets = make_datasets()
    plan = plan_from_config(config, datasets)
    sizes = [2] * 7 + [4] * 4 + [6] * 3 + [8] * 9
    starts = [0, *itertools.accumulate(sizes)]
    assert starts[-1] == plan.total_samples == 120
    by_rank = []
    for rank in range(dp):
        with Loader(config, plan, datasets, start=start, rank=rank) as loader:
            by_rank.append(list(loader))
    for parts, first, size in zip(
        zip(*by_rank, strict=True), starts[starts.index(start) : -1], sizes[starts.index(start) :], strict=True
    ):
        assert [len(part) for part in parts] == [size // dp] * dp
        samples = torch.cat([batch.samples for part in parts for batch in part])
        assert samples.tolist() == list(range(first, first + size))


@pytest.mark.parametrize(("start", "steps"), [(0, 15), (4, 14), (3, 14), (56, 1), (57, 0), (60, 0), (64, 0)])
def test_it_ends_where_less_than_a_global_batch_is_left(start, steps):
    config, datasets = make_config(), make_datasets()
    loader = Loader(config, plan_from_config(config, datasets), datasets, start=start, rank=0)
    assert len(list(loader)) == steps
    with pytest.raises(StopIteration):
        next(loader)
    assert not threads()


def test_it_reads_ahead_and_not_without_bound(monkeypatch):
    reads, samples_read = threading.Semaphore(0), []

    def telling(plan, datasets, samples, **options):
        samples_read.append(samples)
        reads.release()
        return read(plan, datasets, samples, **options)

    monkeypatch.setattr(loading, "read", telling)
    datasets = make_datasets()
    config = make_config(global_batch=1)
    with Loader(config, plan_from_config(config, datasets), datasets, start=0, rank=0) as loader:
        for _ in range(DEPTH + 1):  # so many are read before any is asked for
            assert reads.acquire(timeout=60)
        assert not reads.acquire(timeout=0.2)
        for taken in range(5):
            assert len(samples_read) <= taken + DEPTH + 1
            next(loader)
    assert len(samples_read) <= 5 + DEPTH + 1


@pytest.mark.parametrize("error", [DataError("fr.bin: damaged at token 7"), MemoryError("no more")])
def test_an_error_in_the_thread_is_raised_here(monkeypatch, error):
    def breaking(plan, datasets, samples, **options):
        if samples[0] == 20:
            raise error
        return read(plan, datasets, samples, **options)

    monkeypatch.setattr(loading, "read", breaking)
    config, datasets = make_config(), make_datasets()
    with Loader(config, plan_from_config(config, datasets), datasets, start=0, rank=0) as loader:
        assert len(list(itertools.islice(loader, 5))) == 5
        for _ in range(2):
            with pytest.raises(type(error), match=str(error)):
                next(loader)


def waiting_config(slow, timeout):
    tree = make_config().document()
    tree["data"].update(slow_seconds=slow, timeout_seconds=timeout)
    return configuration.parse(tree)


def test_a_read_that_hangs_is_an_error_with_its_samples(monkeypatch):
    answer = threading.Event()

    def hanging(plan, datasets, samples, **options):
        answer.wait()
        return read(plan, datasets, samples, **options)

    monkeypatch.setattr(loading, "read", hanging)
    config, datasets, said = waiting_config(10.0, 0.05), make_datasets(), []
    plan = plan_from_config(config, datasets)
    with Loader(config, plan, datasets, start=8, rank=0, say=said.append) as loader:
        for _ in range(2):
            with pytest.raises(
                DataError, match=r"samples 8 to 11 were not read within 0\.05 s \(nothing was read yet\)"
            ):
                next(loader)
        answer.set()
    assert said == []
    assert not threads()


def test_a_slow_read_is_said_with_its_source_and_speed(monkeypatch):
    said, answer = [], threading.Event()

    def say(text):
        said.append(text)
        if len(said) == 3:
            answer.set()

    def slow(plan, datasets, samples, **options):
        batch = read(plan, datasets, samples, **options)
        answer.wait()  # as if the last bytes did not come
        return batch

    monkeypatch.setattr(loading, "read", slow)
    config, datasets = waiting_config(0.1, 300.0), make_datasets()
    plan = plan_from_config(config, datasets)
    last = plan.sources[plan.locate(np.arange(4)).source[-1]].name
    with Loader(config, plan, datasets, start=0, rank=0, say=say) as loader:
        (batch,) = next(loader)[:1]
        assert batch.samples.tolist() == [0]
    seconds = [0.1, 0.2, 0.4]
    assert len(said) == 3
    for text, waited in zip(said, seconds, strict=True):
        assert re.fullmatch(
            rf"slow data: {waited:g} s of waiting for samples 0 to 3 \(at \d+\.\d\d MB/s, source '{last}' \(fake\)\)",
            text,
        )


def test_a_disk_that_stops_midway_is_an_error_with_its_source(monkeypatch):
    answer = threading.Event()

    def stopping(plan, datasets, samples, **options):
        batch = read(plan, datasets, samples, **options)
        answer.wait()
        return batch

    monkeypatch.setattr(loading, "read", stopping)
    config, datasets = waiting_config(0.02, 0.05), make_datasets()
    plan = plan_from_config(config, datasets)
    with Loader(config, plan, datasets, start=0, rank=0) as loader:
        with pytest.raises(DataError, match=r"not read within 0\.05 s \(at .* MB/s, source '(en|fr)' \(fake\)\)"):
            next(loader)
        answer.set()


def test_close_ends_the_thread_and_the_iteration():
    config, datasets = make_config(), make_datasets()
    plan = plan_from_config(config, datasets)
    loader = Loader(config, plan, datasets, start=0, rank=0)
    next(loader)
    assert len(threads()) == 1
    loader.close()
    loader.close()
    assert not threads()
    with pytest.raises(StopIteration):
        next(loader)
    forgotten = Loader(config, plan, datasets, start=0, rank=0)
    next(forgotten)
    del forgotten
    gc.collect()
    assert not threads()


def test_an_interpreter_ends_with_an_open_loader():
    code = (
        "from tests.data.test_loader import *\n"
        "config, datasets = make_config(), make_datasets()\n"
        "loader = Loader(config, plan_from_config(config, datasets), datasets, start=0, rank=0)\n"
        "print(len(next(loader)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False, timeout=300
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "4\n", "")


def test_a_plan_of_another_length_is_refused():
    config, datasets = make_config(), make_datasets()
    with pytest.raises(DataError, match=r"train.sequence is 16, but .* 8 tokens"):
        Loader(make_config(sequence=16), plan_from_config(config, datasets), datasets, start=0, rank=0)


def test_packs_of_another_length_are_refused():
    config, datasets = make_config(), make_datasets()
    packed = FakeDataset(datasets["en"].texts, identity="en", pack=16)
    with pytest.raises(DataError, match=r"source 'en' \(fake\) is made of packs of 16 tokens, but train.sequence is 8"):
        Loader(config, plan_from_config(config, datasets), {**datasets, "en": packed}, start=0, rank=0)


# ------------------------------------------------------------------------------------------------ real files


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tokenizer and two datasets with held-out documents, built by megapoly from JSON lines."""
    path = tmp_path_factory.mktemp("corpus")
    random = np.random.default_rng(2)
    words = ["river", "stone", "cloud", "eau", "pierre", "nuage", "42", "und", "da"]
    for language in ("en", "fr"):
        lines = [{"text": " ".join(random.choice(words, random.integers(3, 40)))} for _ in range(80)]
        (path / f"{language}.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    files = {language: [path / f"{language}.jsonl"] for language in ("en", "fr")}
    tokenizer = train_tokenizer(files, path / "t.model", vocabulary=320)
    for language, inputs in files.items():
        build(inputs, path / language, tokenizer, language=language, options=Options(validation_fraction=0.2))
    return path, tokenizer


def data_section(path, **sources):
    tree = {name: {"path": str(path / at), "language": language} for name, (at, language) in sources.items()}
    weights = {name: 1 / len(tree) for name in tree}
    return {
        "tokenizer": str(path / "t.model"),
        "sources": tree,
        "stages": [{"name": "one", "tokens": 16 * 4 * 25, "weights": weights}],
        "separate_documents": True,
    }


def real_config(path, **sources):
    tree = make_config(sequence=16).document()
    tree["model"]["vocabulary"] = 320
    return configuration.parse({**tree, "data": data_section(path, **sources)})


def test_from_text_to_batches(folder):
    path, tokenizer = folder
    config = real_config(path, en=("en", "en"), fr=("fr", "fr"))
    datasets = open_datasets(config.data, tokenizer)
    assert list(datasets) == list(config.data.sources)
    plan = plan_from_config(config, datasets)
    streams = {}
    for name, dataset in datasets.items():
        assert 0 < dataset.train_tokens < dataset.tokens
        texts = [dataset.document(i).tolist() for i in range(dataset.train_documents)]
        streams[name] = [token for text in texts for token in text]
        assert all(text[-1] == tokenizer.eod for text in texts)
    with Loader(config, plan, datasets, start=0, rank=0) as loader:
        batches = [batch for step in loader for batch in step]
    assert torch.cat([batch.samples for batch in batches]).tolist() == list(range(100))
    for batch in batches:
        located = plan.locate(batch.samples.numpy())
        stream = streams[plan.sources[located.source[0]].name]
        start = int(located.window[0]) * 16
        row = stream[start : start + 17]
        assert batch.tokens[0].tolist() == row[:16]
        # a document ends with </s>, and that token has nothing to predict
        expected = [-1 if token == tokenizer.eod else after for token, after in itertools.pairwise(row)]
        assert batch.labels[0].tolist() == expected


def test_datasets_that_do_not_fit_are_refused(folder, tmp_path):
    path, tokenizer = folder

    def opened(**sources):
        return open_datasets(real_config(path, **sources).data, tokenizer)

    with pytest.raises(DataError, match="nowhere"):
        opened(en=("en", "en"), xx=("nowhere", "xx"))
    with pytest.raises(DataError, match=r"source 'fr' has language 'fr', but .* was built as 'en'"):
        opened(fr=("en", "fr"))
    other = train_tokenizer({"en": [path / "en.jsonl"]}, tmp_path / "other.model", vocabulary=300)
    with pytest.raises(DataError, match="300"):
        open_datasets(real_config(path, en=("en", "en")).data, other)


def test_a_dataset_with_nothing_to_train_on_is_refused(folder, tmp_path):
    path, tokenizer = folder
    for suffix in (".bin", ".idx"):
        (tmp_path / f"en{suffix}").write_bytes((path / f"en{suffix}").read_bytes())
    sidecar = json.loads((path / "en.json").read_text(encoding="utf-8"))
    sidecar["validation"].update(documents=sidecar["documents"], tokens=sidecar["tokens"])
    (tmp_path / "en.json").write_text(json.dumps(sidecar), encoding="utf-8")
    with pytest.raises(DataError, match=r"source 'en' .* found 80 documents and no training tokens"):
        open_datasets(real_config(tmp_path, en=("en", "en")).data, tokenizer)


def test_foreign_datasets_open(folder):
    path, tokenizer = folder
    write_megatron(path / "foreign", [[1, 2, 3], [4, 5]])
    (dataset,) = open_datasets(real_config(path, en=("foreign", "en")).data, tokenizer).values()
    assert isinstance(dataset, IndexedDataset)
    assert dataset.train_tokens == dataset.tokens == 5
