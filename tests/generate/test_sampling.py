"""The distributions that tokens are drawn from, against transformers' processors; the draws, against their shares."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megapoly.errors import ConfigError
from megapoly.generate.sampling import Draws, Sampling, candidates, choose, penalise, uniforms

transformers: Any = pytest.importorskip("transformers", reason="the oracle of these tests")


def theirs(logits: Tensor, sampling: Sampling, ids: Tensor) -> Tensor:
    """Probabilities as transformers' generate makes them."""
    steps = [
        transformers.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty),
        transformers.TemperatureLogitsWarper(sampling.temperature),
    ]
    if sampling.top_k:
        steps.append(transformers.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        steps.append(transformers.TopPLogitsWarper(sampling.top_p))
    return transformers.LogitsProcessorList(steps)(ids, logits.clone()).softmax(-1)


def ours(logits: Tensor, sampling: Sampling, ids: Tensor) -> Tensor:
    seen = torch.zeros(logits.shape, dtype=torch.bool).scatter_(1, ids, True)
    probabilities, places = candidates(penalise(logits, seen, sampling.repetition_penalty), sampling)
    if places is not None:
        assert (probabilities.diff() <= 0).all()
        probabilities = torch.zeros(logits.shape, dtype=torch.float64).scatter_(1, places, probabilities)
    return probabilities / probabilities.sum(-1, keepdim=True)


@pytest.mark.parametrize("penalty", [1.0, 1.3, 0.8])
@pytest.mark.parametrize("temperature", [1.0, 0.3, 2.5])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.4, 1e-6])
@pytest.mark.parametrize("top_k", [0, 1, 7, 5000])
def test_the_distribution_is_that_of_transformers(top_k: int, top_p: float, temperature: float, penalty: float) -> None:
    random = torch.Generator().manual_seed(1)
    logits = torch.randn(6, 3000, dtype=torch.float64, generator=random) * torch.tensor([[0.1, 1, 2, 4, 8, 16]]).t()
    ids = torch.randint(3000, (6, 500), generator=random)
    sampling = Sampling(top_k=top_k, top_p=top_p, temperature=temperature, repetition_penalty=penalty)
    expected, found = theirs(logits, sampling, ids), ours(logits, sampling, ids)
    assert torch.equal(found > 0, expected > 0)  # in the flat rows top_p takes more than are sorted first
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-15)


def test_tokens_as_likely_as_the_last_of_top_k_stay() -> None:
    logits = torch.tensor([[3.0, 1.0, 2.0, 2.0, 0.0]])
    ids = torch.zeros(1, 0, dtype=torch.int64)
    for sampling in (Sampling(top_k=2), Sampling(top_k=2, top_p=0.99)):
        assert torch.equal(ours(logits, sampling, ids) > 0, theirs(logits, sampling, ids) > 0)


@pytest.mark.parametrize("options", [{}, {"top_k": 4}, {"top_p": 0.8}, {"temperature": 2.0, "top_p": 0.9}])
def test_every_token_is_drawn_for_its_share_of_the_numbers(options: dict[str, Any]) -> None:
    logits = torch.tensor([2.0, -1.0, 0.5, 1.5, 0.0, 3.0], dtype=torch.float64).expand(100_000, 6)
    grid = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    sampling = Sampling(**options)
    shares = torch.bincount(choose(logits, sampling, None, grid), minlength=6) / 100_000
    expected = ours(logits[:1], sampling, torch.zeros(1, 0, dtype=torch.int64))[0]
    assert (shares - expected).abs().max() <= 1.01e-5


def test_the_ends_of_the_interval_draw_tokens_that_may_be() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, 1.0, -torch.inf]])
    ends = (2.0**-53, 1 - 2.0**-53)
    for sampling in (Sampling(), Sampling(top_k=1), Sampling(top_p=0.5), Sampling(top_p=0.99)):
        drawn = [int(choose(logits, sampling, None, torch.tensor([end], dtype=torch.float64))) for end in ends]
        assert set(drawn) <= {1, 2}
    assert choose(logits, Sampling(temperature=0), None, torch.empty(0)).tolist() == [2]


@pytest.mark.parametrize("temperature", [1e-6, 1e-40, 5e-324])
@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.9}])
def test_the_least_temperatures_take_the_likeliest(temperature: float, options: dict[str, Any]) -> None:
    logits = torch.tensor([[1000.0, 1002.0, 1001.0, -1000.0, -torch.inf]])
    drawn = choose(logits, Sampling(temperature=temperature, **options), None, torch.tensor([0.999]).double())
    assert drawn.tolist() == [1]


def test_a_penalised_token_loses_whatever_its_sign() -> None:
    logits, seen = torch.tensor([[2.0, 1.9, -1.0, -1.1]]), torch.tensor([[True, False, True, False]])
    sampling = Sampling(temperature=0, repetition_penalty=1.5)
    assert choose(logits, sampling, seen, torch.empty(0)).tolist() == [1]
    assert choose(logits, sampling, torch.zeros_like(seen), torch.empty(0)).tolist() == [0]
    torch.testing.assert_close(penalise(logits, seen, 1.5), torch.tensor([[2 / 1.5, 1.9, -1.5, -1.1]]))


def test_numbers_are_functions_of_seed_prompt_sample_and_token() -> None:
    whole = uniforms(7, 3, 1, 0, 200)
    assert uniforms(7, 3, 1, 150, 50) == whole[150:]
    draws = Draws(7, 3, 1)
    assert [draws[i] for i in range(200)] == whole
    assert Draws(7, 3, 1)[130] == whole[130]
    others = [uniforms(*of, 0, 200) for of in ((8, 3, 1), (7, 4, 1), (7, 3, 2))]
    assert all(not set(whole) & set(other) for other in others)
    assert min(whole) > 0
    assert max(whole) < 1
    assert abs(sum(whole) / 200 - 0.5) < 0.06


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": 0}, "tokens 0 is out of range: it is at least 1"),
        ({"temperature": 0, "samples": 2}, "samples 2 of a prompt would be the same text"),
        ({"temperature": -1.0}, "temperature -1.0 is out of range: it is 0 or more"),
        ({"temperature": float("nan")}, "temperature nan"),
        ({"top_k": -1}, "top_k -1"),
        ({"top_p": 0}, "top_p 0 is out of range: it is above 0 and at most 1"),
        ({"top_p": 1.1}, "top_p 1.1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty 0.0"),
        ({"samples": 0}, "samples 0"),
        ({"stop": "end"}, "stop 'end' is out of range: it is a list of strings"),
        ({"stop": ["a", ""]}, "none of them empty"),
    ],
)
def test_values_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Sampling(**options)
