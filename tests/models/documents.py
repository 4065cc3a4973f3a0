"""Separated documents against a peer that is given each alone."""

from __future__ import annotations

from typing import Any

import torch

from megapoly.layers.call import Call
from megapoly.models.decoder import DecoderStage


def assert_each_document_alone(stage: DecoderStage, peer: Any, vocabulary: int) -> None:
    """Four documents in a row give the logits that a model of transformers gives for each of them."""
    lengths = [1, 7, 2, 12]
    tokens = torch.randint(vocabulary, (1, sum(lengths)))
    ends = torch.tensor([0, *lengths]).cumsum(0).int()
    positions = torch.cat([torch.arange(n) for n in lengths]).unsqueeze(0)
    logits = stage(None, Call(positions.t(), cu_seqlens=ends, tokens_SB=tokens.t())).transpose(0, 1)
    for part, mine in zip(tokens.split(lengths, 1), logits.split(lengths, 1)):
        torch.testing.assert_close(mine, peer(part).logits, rtol=0, atol=1e-9)
