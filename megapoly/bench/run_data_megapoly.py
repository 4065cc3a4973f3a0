"""``python -m``: the jobs of ``megapoly bench data``, done by megapoly."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from megapoly.bench.data_job import Measured, repeated, serve, watch
from megapoly.data import _index
from megapoly.data.builder import Options, build
from megapoly.data.indexed import IndexedDataset, dtype_code
from megapoly.data.load_tokenizer import load_tokenizer
from megapoly.data.plan import Plan
from megapoly.data.samples import read
from megapoly.data.segments import Source

_ROWS = 256  # of a batch


def _plan(dataset: IndexedDataset, sequence: int, epochs: int) -> Plan:
    source = Source("en", "en", dataset.identity, dataset.train_tokens)
    count = epochs * ((dataset.train_tokens - 1) // sequence)
    return Plan.build([("all", count, {"en": 1.0})], [source], sequence, 1)


def startup(prefix: str, sequence: int, epochs: int) -> Measured:
    """Until the first batch is known."""
    with watch() as result:
        dataset = IndexedDataset(prefix)
        _plan(dataset, sequence, epochs).locate(np.arange(8))
    return result


def mixture(sources: int, count: int, sequence: int) -> Measured:
    """A plan of ``count`` samples, and where the first batch comes from."""
    shares = np.random.default_rng(4).dirichlet(np.ones(sources)).tolist()
    with watch() as result:
        made = [Source(f"s{i}", "en", f"{i:064x}", 10**10) for i in range(sources)]
        plan = Plan.build([("all", count, dict(zip((s.name for s in made), shares)))], made, sequence, 1)
        plan.locate(np.arange(8))
    return result


def samples(prefix: str, sequence: int, vocabulary: int, separate: bool, seconds: float) -> Measured:
    """Whole batches of tensors, in the plan's random order."""
    torch.set_num_threads(1)
    dataset = IndexedDataset(prefix)
    plan = _plan(dataset, sequence, 1000)

    def batch(number: int) -> int:
        rows = np.arange(number * _ROWS, (number + 1) * _ROWS) % plan.total_samples
        read(plan, {"en": dataset}, rows, vocabulary=vocabulary, separate_documents=separate, with_tokens=True)
        return _ROWS

    return repeated(batch, seconds)


def index(prefix: str, documents: int, vocabulary: int) -> Measured:
    """The index of ``documents`` documents of one token, brought to the disk."""
    writer = _index.Writer(f"{prefix}.bin", f"{prefix}.idx", dtype_code(vocabulary), vocabulary)
    for start in range(0, documents, 100_000):
        count = min(100_000, documents - start)
        writer.append(np.ones(count, np.int32), np.ones(count, np.int64))
    with watch() as result:
        writer.finish()
    return result


def write(prefix: str, tokens: int, mean: int, vocabulary: int) -> Measured:
    """Tokens as they come from the encoder, a million at a time, until all is on the disk."""
    lengths = np.full(1_000_000 // mean, mean)
    ids = np.random.default_rng(5).integers(0, vocabulary, int(lengths.sum()), dtype=np.int32)
    rounds = -(-tokens // ids.size)
    with watch(rounds * ids.size) as result:
        writer = _index.Writer(f"{prefix}.bin", f"{prefix}.idx", dtype_code(vocabulary), vocabulary)
        for _ in range(rounds):
            writer.append(ids, lengths)
        writer.finish()
    return result


def encode(prefix: str, texts: Sequence[str], tokenizer: str, threads: int) -> Measured:
    """A whole build, from JSON lines; the work is bytes of text."""
    loaded = load_tokenizer(tokenizer)
    options = Options(validation_fraction=0.0, processes=threads, threads=threads, overwrite=True)
    with watch() as result:
        made = build([Path(text) for text in texts], prefix, loaded, language="en", options=options)
    result.work = made.bytes
    return result


if __name__ == "__main__":
    jobs = (startup, mixture, samples, index, write, encode)
    serve({job.__name__: job for job in jobs})
