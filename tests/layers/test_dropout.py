"""Dropout: its share, its independence of the layout, its gradient, and the explicit attention that it needs."""

from __future__ import annotations

import pytest
import torch

from megapoly import rng
from megapoly.config import Model
from megapoly.context import Axis
from megapoly.layers.attention import Attention, document_mask
from megapoly.layers.call import Call, Place
from megapoly.layers.dropout import Dropout

POSITIONS = torch.arange(8).unsqueeze(1).expand(8, 3)
SAMPLES = torch.tensor([5, 1 << 40, 7])


def test_the_share_of_what_is_dropped() -> None:
    keep = rng.keep(1, 0.3, torch.arange(50).unsqueeze(1), torch.arange(400).unsqueeze(0), 50)
    assert keep.shape == (50, 400, 50)
    n = keep.numel()
    assert abs(float((~keep).double().mean()) - 0.3) < 4 * (0.3 * 0.7 / n) ** 0.5
    for dim in range(3):  # no row, sample or channel is alike
        spread = (~keep).double().mean(tuple(d for d in range(3) if d != dim))
        assert float((spread - 0.3).abs().max()) < 6 * (0.3 * 0.7 * keep.shape[dim] / n) ** 0.5
    assert not torch.equal(keep[0], keep[1])
    assert rng.keep(1, 0.0, torch.arange(2), torch.arange(2), 9).all()


@pytest.mark.parametrize("channels", [1, 6, 8])
def test_a_part_has_the_numbers_of_the_whole(channels: int) -> None:
    rows, samples = torch.arange(8).unsqueeze(1), SAMPLES.unsqueeze(0)
    whole = rng.keep(3, 0.5, samples, rows, channels)
    assert torch.equal(rng.keep(3, 0.5, samples, rows[4:6], channels), whole[4:6])
    assert torch.equal(rng.keep(3, 0.5, samples[:, 1:2], rows, channels), whole[:, 1:2])
    assert not torch.equal(rng.keep(4, 0.5, samples, rows, channels), whole)


def test_slices_of_the_sequence_and_heads_of_a_rank() -> None:
    whole = Dropout("site", 0.4, Place(seed=1))
    call = Call(POSITIONS, samples_B=SAMPLES)
    x, p = torch.ones(8, 3, 5), torch.ones(3, 4, 8, 8)
    for rank in range(2):
        place = Place(Axis("tp", (0, 1), rank), seed=1, sequence_parallel=True)
        part = Dropout("site", 0.4, place)
        sliced = part.hidden(x[:4], Call(POSITIONS, samples_B=SAMPLES, sequence_parallel=True))
        assert torch.equal(sliced, whole.hidden(x, call).chunk(2)[rank])
        assert torch.equal(part.probabilities(p[:, :2], call), whole.probabilities(p, call).chunk(2, 1)[rank])


def test_values_and_gradient() -> None:
    x = torch.full((8, 3, 5), 2.0, requires_grad=True)
    y = Dropout("site", 0.2, Place()).hidden(x, Call(POSITIONS, samples_B=SAMPLES))
    assert set(y.unique().tolist()) == {0.0, 2.5}
    y.backward(torch.full_like(y, 3.0))
    assert torch.equal(x.grad, torch.where(y > 0, 3.75, 0.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
def test_added_to_a_residual_it_is_the_sum_of_both(dtype: torch.dtype, wide: torch.dtype) -> None:
    torch.manual_seed(0)
    dropout, call = Dropout("site", 0.2, Place()), Call(POSITIONS, samples_B=SAMPLES)
    x, residual = torch.randn(8, 3, 5).to(dtype).requires_grad_(), torch.randn(8, 3, 5).to(wide).requires_grad_()
    found, wanted = dropout.hidden(x, call, residual), residual + dropout.hidden(x, call)
    assert found.dtype == wide
    assert torch.equal(found, wanted)
    dy = torch.randn_like(found)
    for mine, theirs in zip(*(torch.autograd.grad(y, (x, residual), dy) for y in (found, wanted)), strict=True):
        assert mine.dtype == theirs.dtype
        assert torch.equal(mine, theirs)
    assert torch.equal(dropout.hidden(x, Call(POSITIONS), residual), residual + x)


def test_without_samples_or_a_rate_nothing_is_dropped() -> None:
    x = torch.randn(8, 3, 5)
    assert Dropout("site", 0.9, Place()).hidden(x, Call(POSITIONS)) is x
    assert Dropout("site", 0.0, Place()).hidden(x, Call(POSITIONS, samples_B=SAMPLES)) is x


def attention(dtype: torch.dtype, **model: object) -> Attention:
    shape = {"layers": 1, "hidden": 32, "heads": 4, "key_value_heads": 2, "ffn": 8, "vocabulary": 9, "positions": 8}
    built = Attention("a", Model(**{**shape, **model}, init_std=0.5), output_std=0.5, place=Place(dtype=dtype))
    for parameter in built.parameters():
        rng.fill(parameter, parameter.spec, 0)
    return built


@pytest.mark.parametrize("separate", [False, True])
def test_the_explicit_attention_equals_the_fused_one(separate: bool) -> None:
    documents = torch.tensor([[0, 0, 1, 1, 1, 2, 2, 2]] * 3)
    mask = document_mask(documents) if separate else None
    x = torch.randn(8, 3, 32, dtype=torch.float64)
    fused, explicit = attention(torch.float64), attention(torch.float64, attention_dropout=1e-12)
    expected = fused(x, Call(POSITIONS, mask, samples_B=SAMPLES))
    torch.testing.assert_close(explicit(x, Call(POSITIONS, mask, samples_B=SAMPLES)), expected, rtol=0, atol=1e-10)


def test_large_scores_keep_their_differences_in_an_fp32_softmax() -> None:
    torch.manual_seed(0)
    query, key, value = (5 * torch.randn(2, 4, 8, 8).bfloat16() for _ in range(3))
    exact = torch.nn.functional.scaled_dot_product_attention(
        query.double(), key.double(), value.double(), is_causal=True
    )
    call = Call(POSITIONS)
    errors = []
    for wide in (True, False):
        out = attention(torch.bfloat16, key_value_heads=4, fp32_softmax=wide)._explicit(query, key, value, call)
        errors.append(float((out.double() - exact).abs().max()))
    assert errors[0] < 0.2 * errors[1]
