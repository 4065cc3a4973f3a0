"""Passes with a cache of keys and values against one pass over the whole text."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megapoly.config import Model
from megapoly.layers.cache import KeyValueCache
from megapoly.layers.call import Call, Place
from megapoly.models.decoder import DecoderStage

SIZES: dict[str, Any] = {"layers": 2, "hidden": 32, "heads": 4, "ffn": 40, "vocabulary": 61, "positions": 24}
LLAMA: dict[str, Any] = {"norm": "rms", "position": "rope", "activation": "swiglu", "biases": False, "tied": False}
MODELS = {
    "gpt2": Model(**SIZES, init_std=0.3),
    "llama, grouped": Model(**SIZES, **LLAMA, key_value_heads=2, init_std=0.3),
    "bloom": Model(**SIZES, position="alibi", embedding_norm=True, init_std=0.3),
    "alibi, grouped": Model(**SIZES, position="alibi", key_value_heads=2, init_std=0.3),
}
LENGTHS = (9, 4, 1, 9)


def stage_of(model: Model, dtype: torch.dtype = torch.float64) -> DecoderStage:
    stage = DecoderStage(model, place=Place(dtype=dtype))
    stage.initialise(3)
    return stage


def alone(stage: DecoderStage, ids: Tensor) -> Tensor:
    """Logits ``[S, V]`` of one text, in one pass."""
    positions = torch.arange(len(ids)).unsqueeze(1)
    return stage(None, Call(positions, tokens_SB=ids.unsqueeze(1)))[:, 0]


def advance(stage: DecoderStage, cache: KeyValueCache, tokens_SB: Tensor) -> Tensor:
    call = Call(cache.positions(len(tokens_SB)), tokens_SB=tokens_SB, cache=cache)
    logits = stage.logits(stage.run_layers(None, call), call)
    cache.advance(len(tokens_SB))
    return logits


@pytest.mark.parametrize("chunk", [100, 4, 1])
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_logits_of_unequal_rows_are_those_of_each_alone(model: Model, chunk: int) -> None:
    stage = stage_of(model)
    texts = [torch.randint(model.vocabulary, (n + 6,), generator=torch.Generator().manual_seed(n)) for n in LENGTHS]
    expected = [alone(stage, text) for text in texts]
    longest = max(LENGTHS)
    starts = [longest - n for n in LENGTHS]
    prompts = torch.stack([torch.cat((torch.full((s,), 7), t[:n])) for s, t, n in zip(starts, texts, LENGTHS)])
    cache = KeyValueCache(starts, longest + 6, torch.float64, torch.device("cpu"))
    with torch.no_grad():
        for part in prompts.t().split(chunk):
            logits = advance(stage, cache, part)
        kept = [0, 1, 2, 3]
        for step in range(6):
            for row, i in enumerate(kept):
                torch.testing.assert_close(logits[-1, row], expected[i][LENGTHS[i] - 1 + step], rtol=0, atol=1e-10)
            if step == 3:
                kept = [3, 1]  # the others have ended: the last row moves to the place of the first
                cache.keep(kept)
            logits = advance(stage, cache, torch.stack([texts[i][LENGTHS[i] + step] for i in kept]).unsqueeze(0))
    assert cache.length == longest + 6


@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize("name", ["gpt2", "llama, grouped", "bloom"])
def test_lower_precision_with_both_kinds_of_softmax(name: str, wide: bool) -> None:
    model = MODELS[name].model_copy(update={"fp32_softmax": wide, "init_std": 0.1})
    stage = stage_of(model, torch.bfloat16)
    ids = torch.randint(model.vocabulary, (10,), generator=torch.Generator().manual_seed(0))
    cache = KeyValueCache([0], 10, torch.bfloat16, torch.device("cpu"))
    with torch.no_grad():
        expected = alone(stage, ids)
        found = torch.cat([advance(stage, cache, part.unsqueeze(1))[:, 0] for part in ids.split([4, 3, 1, 1, 1])])
    assert (found - expected).abs().max() <= 0.03 * expected.abs().max()


def test_memory_is_that_of_the_groups_and_taken_once() -> None:
    stage = stage_of(MODELS["llama, grouped"])
    cache = KeyValueCache([0, 2], 8, torch.float64, torch.device("cpu"))
    places = set()
    with torch.no_grad():
        for count in (3, 1, 1):
            advance(stage, cache, torch.ones(count, 2, dtype=torch.int64))
            keys, values = cache._buffers["layers.1.attention"]
            assert keys.shape == values.shape == (2, 2, 8, 8)
            places.add((keys.data_ptr(), values.data_ptr()))
    assert len(places) == 1
    assert len(cache._buffers) == 2
