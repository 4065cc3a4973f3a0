"""What the meter counts, on computations whose memory is known."""

from __future__ import annotations

import torch
from torch.utils.checkpoint import checkpoint

from megapoly.context import ParallelContext
from megapoly.plan.measure import Meter, random_batches
from tests.plan.cases import config

MB = 1 << 20


def megabytes(n: int) -> torch.Tensor:
    return torch.zeros(n * MB // 4)


def test_temporaries_count_while_they_live() -> None:
    before = megabytes(8)
    with Meter(lambda: "", lambda shape: None) as meter:
        a = megabytes(2)
        b = a + 1
        del a
        c = megabytes(4)
        view = c[: MB // 8].view(2, -1)
        before.add_(1)
        del b, c
        d = megabytes(1)
    assert meter.peaks == {"activations": 0, "logits": 0, "workspace": 6 * MB, "total": 6 * MB}
    assert view.numel() + d.numel() > 0


def test_what_is_saved_for_the_backward_pass_is_an_activation() -> None:
    weight = torch.ones(MB // 4, requires_grad=True)
    with Meter(lambda: "", lambda shape: None) as meter:
        y = (weight * 2).exp()  # exp keeps its result, the product by a number nothing
    assert meter.peaks == {"activations": MB, "logits": 0, "workspace": 2 * MB, "total": 2 * MB}
    assert y.requires_grad


def test_what_a_checkpoint_makes_again_is_an_activation() -> None:
    x = torch.ones(MB // 4, requires_grad=True)
    with Meter(lambda: "", lambda shape: None) as meter:
        y = checkpoint(lambda x: x.exp().sin().cos(), x, use_reentrant=False)
        assert meter.peaks["activations"] == 0
        y.sum().backward()
    assert meter.peaks["activations"] == 2 * MB  # results of exp and sin


def test_what_outlives_its_action_is_an_activation() -> None:
    place = "first"
    with Meter(lambda: place, lambda shape: None) as meter:
        kept, gone = megabytes(2), megabytes(3)
        del gone
        place = "second"
        other = megabytes(1)
    assert meter.peaks == {"activations": 2 * MB, "logits": 0, "workspace": 5 * MB, "total": 5 * MB}
    assert kept.numel() > other.numel()


def test_sizes_that_are_known_stay_what_they_are() -> None:
    place = "first"
    components = {(MB,): "logits", (MB // 2,): "workspace"}
    with Meter(lambda: place, components.get) as meter:
        logits, copy = megabytes(4), megabytes(2)
        place = "second"
        other = megabytes(1)
    assert meter.peaks == {"activations": 0, "logits": 4 * MB, "workspace": 3 * MB, "total": 7 * MB}
    assert len({x.numel() for x in (logits, copy, other)}) == 3


def test_batches_are_those_of_the_layout() -> None:
    settings = config(documents=True, micro_batch=2).on(1)
    batches = random_batches(settings, ParallelContext.create())
    assert [tuple(batch.tokens.shape) for batch in batches] == [(2, 144)] * 2
    assert int(torch.cat([batch.tokens for batch in batches]).max()) in range(1000, 1500)
    assert batches[0].positions[1].tolist() == [*range(72), *range(72)]
    assert batches[0].documents is not None
    assert batches[0].documents[1].tolist() == [0] * 72 + [1] * 72
