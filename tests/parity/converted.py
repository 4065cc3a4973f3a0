"""Logits of a folder of weights in the ranks of a layout. Without transformers, which takes seconds to load."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from megapoly.checkpoint.weights import fill, open_weights
from megapoly.context import ParallelContext
from megapoly.layers.call import Call, Place
from megapoly.mesh import Mesh
from megapoly.models.decoder import DecoderStage


@torch.no_grad()
def logits(
    rank: int, size: int, folder: str, pp: int, tp: int, dtype: torch.dtype, tokens: np.ndarray
) -> tuple[int, int, np.ndarray] | None:
    """On the last stage: its rank on tp, the first id of its part of the vocabulary, and logits [B, S, part]."""
    weights = open_weights(Path(folder))
    context = ParallelContext.create(Mesh(dp=size // (pp * tp), pp=pp, tp=tp))
    at, layers = context.pp.rank, weights.model.layers
    first, last = at == 0, at == pp - 1
    stage = DecoderStage(
        weights.model,
        layers=(layers * at // pp, layers * (at + 1) // pp),
        first=first,
        last=last,
        place=Place(tp=context.tp, dtype=dtype, sequence_parallel=tp > 1),
    )
    fill(weights, stage.parameters())
    tokens_SB = torch.from_numpy(tokens).t()
    positions_SB = torch.arange(len(tokens_SB)).unsqueeze(1).expand_as(tokens_SB)
    call = Call(positions_SB, tokens_SB=tokens_SB if first else None, sequence_parallel=tp > 1)
    x_sBH = None
    if not first:
        x_sBH = torch.empty(len(tokens_SB) // tp, tokens_SB.shape[1], weights.model.hidden, dtype=stage.residual_dtype)
        dist.recv(x_sBH, context.pp.ranks[at - 1])
    result = stage(x_sBH, call)
    if not last:
        dist.send(result.contiguous(), context.pp.ranks[at + 1])
    output = stage.embedding if stage.output is None else stage.output
    dist.barrier()  # one that closed its groups while another still connects to them would end it
    context.close()
    return (context.tp.rank, output.start, result.transpose(0, 1).numpy()) if last else None


def whole(ranks: list[tuple[int, int, np.ndarray] | None]) -> list[np.ndarray]:
    """The logits [B, S, vocabulary] of each replica."""
    parts = [each for each in ranks if each is not None]
    tp = 1 + max(rank for rank, _, _ in parts)
    replicas = [parts[i : i + tp] for i in range(0, len(parts), tp)]  # tp varies fastest
    for replica in replicas:
        assert [rank for rank, _, _ in replica] == list(range(tp))
        at = 0
        for _, start, part in replica:
            assert start == at
            at += part.shape[-1]
    return [np.concatenate([part for _, _, part in replica], axis=-1) for replica in replicas]
