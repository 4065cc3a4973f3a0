"""``python -m``: the jobs of ``megapoly bench data``, done by megatron-core; see run_data_megapoly.py."""

from __future__ import annotations

import gzip
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import sentencepiece
import torch
from megatron.core.datasets import helpers
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder
from megatron.core.datasets.utils import Split

from megapoly.bench.data_job import Measured, repeated, serve, watch


class _Ends:
    """What its datasets ask of a tokenizer: the id that ends a document, and one that stands nowhere."""

    eod, pad = 0, -2
    unique_identifiers: ClassVar[dict[str, str]] = {"class": "ends"}


def _dataset(prefix: str, sequence: int, count: int, *, separate: bool = False, cache: str | None = None) -> GPTDataset:
    config = GPTDatasetConfig(
        random_seed=1, sequence_length=sequence, blend=([prefix], None), split="1,0,0", path_to_cache=cache,
        tokenizer=_Ends(), reset_position_ids=separate, reset_attention_mask=separate, eod_mask_loss=separate,
        create_attention_mask=separate,
    )  # fmt: skip
    indexed = IndexedDataset(prefix)
    documents = np.arange(len(indexed), dtype=np.int32)
    return GPTDataset(indexed, prefix, documents, count, Split.train, config)


def startup(prefix: str, sequence: int, epochs: int) -> Measured:
    tokens = Path(f"{prefix}.bin").stat().st_size // IndexedDataset(prefix).index.dtype_size
    with tempfile.TemporaryDirectory(dir=Path(prefix).parent) as cache:
        with watch() as result:
            made = _dataset(prefix, sequence, epochs * ((tokens - 1) // sequence), cache=cache)
            made.shuffle_index[:8]
        result.disk = sum(path.stat().st_size for path in Path(cache).rglob("*") if path.is_file())
    return result


def mixture(sources: int, count: int, sequence: int) -> Measured:
    """What its BlendedDataset builds."""
    shares = np.random.default_rng(4).dirichlet(np.ones(sources))
    with watch() as result:
        source, number = np.zeros(count, np.int16), np.zeros(count, np.int64)
        helpers.build_blending_indices(source, number, shares, sources, count, False)
    return result


def samples(prefix: str, sequence: int, vocabulary: int, separate: bool, seconds: float) -> Measured:
    """Samples in its random order, one by one, as a loader's worker asks for them."""
    torch.set_num_threads(1)
    made = _dataset(prefix, sequence, 1, separate=separate)

    def batch(number: int) -> int:
        made[number % len(made)]
        return 1

    return repeated(batch, seconds)


def index(prefix: str, documents: int, vocabulary: int) -> Measured:
    builder = IndexedDatasetBuilder(f"{prefix}.bin", DType.optimal_dtype(vocabulary))
    builder.sequence_lengths = [1] * documents
    builder.document_indices = list(range(documents + 1))
    with watch() as result:
        builder.finalize(f"{prefix}.idx")
    return result


def write(prefix: str, tokens: int, mean: int, vocabulary: int) -> Measured:
    """A document at a time, which is all that it has. It does not bring the files to the disk."""
    ids = np.random.default_rng(5).integers(0, vocabulary, mean, dtype=np.int32)
    rounds = -(-tokens // mean)
    with watch(rounds * mean) as result:
        builder = IndexedDatasetBuilder(f"{prefix}.bin", DType.optimal_dtype(vocabulary))
        for _ in range(rounds):
            builder.add_document(ids, [mean])
        builder.finalize(f"{prefix}.idx")
    return result


def encode(prefix: str, texts: Sequence[str], tokenizer: str, threads: int) -> Measured:
    """The loop of its tools/preprocess_data.py: a line, its ids by SentencePiece, a document."""
    model = sentencepiece.SentencePieceProcessor(model_file=tokenizer)
    end, size = model.piece_to_id("</s>"), 0
    with watch() as result:
        builder = IndexedDatasetBuilder(f"{prefix}.bin", DType.optimal_dtype(model.vocab_size()))
        for path in texts:
            with gzip.open(path, "rb") if path.endswith(".gz") else open(path, "rb") as lines:
                for line in lines:
                    text = json.loads(line)["text"]
                    size += len(text.encode())
                    ids = [*model.encode(text, num_threads=threads), end]
                    builder.add_document(torch.IntTensor(ids), [len(ids)])
        builder.finalize(f"{prefix}.idx")
    result.work = size
    return result


if __name__ == "__main__":
    jobs = (startup, mixture, samples, index, write, encode)
    serve({job.__name__: job for job in jobs})
