"""Loss on held-out documents, of every source, over all ranks."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from megapoly import comm
from megapoly.data.indexed import IndexedDataset
from megapoly.data.plan import Plan
from megapoly.data.samples import Batch, validation
from megapoly.data.tokenizer import Tokenizer
from megapoly.engine import Engine

_BATCHES = 32  # micro-batches of one pass, which bounds what is on the device


def validate(
    engine: Engine, plan: Plan, datasets: Mapping[str, IndexedDataset], tokenizer: Tokenizer
) -> tuple[list[float], list[float], list[float]]:
    """Sums of token losses in nats, counted tokens, and bytes of their text, by source.

    Of the first ``validation.windows`` held-out windows of every source. Collective.
    """
    config, context = engine.config, engine.context
    sources = len(plan.sources)
    totals = torch.zeros(3, sources, dtype=torch.float64)
    token_bytes = torch.zeros(config.model.vocabulary, dtype=torch.int64)
    token_bytes[: tokenizer.vocabulary] = torch.from_numpy(tokenizer.byte_lengths().astype(np.int64))
    for source in range(sources):
        batches = _batches(engine, plan, datasets, source)
        for begin in range(0, len(batches), _BATCHES):
            chunk = batches[begin : begin + _BATCHES]
            for losses_SB, batch in zip(engine.evaluate(chunk), chunk):
                assert batch.labels is not None
                counted = batch.labels >= 0
                values = (losses_SB.double().sum(), counted.sum(), token_bytes[batch.labels[counted]].sum())
                for row, value in enumerate(values):
                    totals[row, source] += float(value)
    if context.tp.rank > 0:
        totals.zero_()
    totals = totals.to(context.device)
    comm.all_reduce(totals, context.dp)
    comm.all_reduce(totals, context.model)
    sums, counts, sizes = totals.tolist()
    return sums, counts, sizes


def _batches(engine: Engine, plan: Plan, datasets: Mapping[str, IndexedDataset], source: int) -> list[Batch]:
    """This data-parallel rank's micro-batches of one source's held-out windows."""
    config, dp = engine.config, engine.context.dp
    return validation(
        plan,
        datasets,
        source,
        windows=config.validation.windows,
        rows_multiple=config.layout.micro_batch * dp.size,
        part=(dp.rank, dp.size),
        vocabulary=config.model.vocabulary,
        separate_documents=config.data.separate_documents,
        with_tokens=engine.needs_tokens,
    ).split(config.layout.micro_batch)
