"""Weights in memory, of random values: what conversions are given in tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megapoly.checkpoint import state
from megapoly.checkpoint.weights import Weights, fill
from megapoly.config import Model
from megapoly.layers.call import Call, Place
from megapoly.models.decoder import DecoderStage
from megapoly.spec import Box, Piece

LLAMA: dict[str, Any] = {"norm": "rms", "position": "rope", "activation": "swiglu", "biases": False, "tied": False}


class Given:
    """See :class:`megapoly.checkpoint.weights.Weights`. It fails after ``reads`` reads, where that is given."""

    def __init__(self, model: Model, dtype: torch.dtype = torch.float32, *, reads: int | None = None) -> None:
        self.path, self.model, self.reads = Path("given"), model, reads
        self.notes: list[str] = []
        self.tokenizer: tuple[Path, ...] = ()
        self.tokenizer_sha256: str | None = None
        self.files: tuple[Path, ...] = ()
        self.origin: dict[str, Any] = {"huggingface": {"config": {"x": 1}}}
        draw = torch.Generator().manual_seed(0)
        self.values = {
            name: (torch.randn(shape, generator=draw) * 0.2).to(dtype)
            for name, shape in state.logical_shapes(model).items()
        }
        self.tensors = {name: (tuple(value.shape), value.dtype) for name, value in self.values.items()}

    def read(self, name: str, piece: Piece, out: Tensor) -> None:
        if self.reads is not None:
            self.reads -= 1
            if self.reads < 0:
                raise KeyboardInterrupt
        for offset, box in piece.boxes():
            values = self.values[name][box.slices((0,) * len(box.start))]
            out[offset : offset + box.size].view(box.shape).copy_(values)

    def release(self) -> None:
        pass


def model(**keys: Any) -> Model:
    """Four layers; ``llama=True`` for that kind."""
    base = LLAMA if keys.pop("llama", False) else {}
    return Model(
        **{"layers": 4, "hidden": 48, "heads": 4, "ffn": 36, "vocabulary": 301, "positions": 20, **base, **keys}
    )


def read_all(weights: Weights) -> dict[str, Tensor]:
    """Every logical tensor."""
    result = {}
    for name, (shape, dtype) in weights.tensors.items():
        flat = torch.empty(Box.whole(shape).size, dtype=dtype)
        weights.read(name, Piece.of(Box.whole(shape)), flat)
        result[name] = flat.view(shape)
    return result


@torch.no_grad()
def logits(weights: Weights, tokens_BS: Tensor) -> Tensor:
    """Of our decoder in float64, ``[B, S, vocabulary]``."""
    stage = DecoderStage(weights.model, place=Place(dtype=torch.float64))
    fill(weights, stage.parameters())
    positions_BS = torch.arange(tokens_BS.shape[1]).expand_as(tokens_BS)
    result: Tensor = stage(None, Call(positions_BS.t(), tokens_SB=tokens_BS.t()))
    return result.transpose(0, 1)
