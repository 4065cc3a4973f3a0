"""Vocabulary-parallel cross-entropy against torch's, in one process and on ranks."""

import pytest
import torch

from megapoly.context import Axis, ParallelContext
from megapoly.layers.loss import cross_entropy
from megapoly.mesh import Mesh
from megapoly.spec import shard
from tests.ranks import run_ranks


def inputs(dtype: torch.dtype = torch.float64, vocabulary: int = 37) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 3, vocabulary, generator=random, dtype=torch.float64) * 8
    logits[0, 0] += 700  # exp would overflow without the maximum
    labels = torch.randint(vocabulary, (5, 3), generator=random)
    labels[1, 1] = labels[4, 2] = -1
    weights = torch.randn(5, 3, generator=random, dtype=torch.float64)
    return logits.to(dtype), labels, weights


def expected(logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    logits = logits.double().requires_grad_()
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=-1, reduction="none"
    )
    losses = losses.view(labels.shape)
    (losses * weights).sum().backward()
    assert logits.grad is not None
    return losses.detach(), logits.grad


@pytest.mark.parametrize("padding", [0, 3])
def test_equals_torch(padding: int) -> None:
    logits, labels, weights = inputs()
    padded = torch.nn.functional.pad(logits, (0, padding), value=1e4).requires_grad_()
    losses = cross_entropy(padded.clone(), labels, 0, 37, Axis("tp"))
    (losses * weights).sum().backward()
    want_losses, want_gradient = expected(logits, labels, weights)
    torch.testing.assert_close(losses, want_losses, rtol=0, atol=1e-11)
    assert padded.grad is not None
    torch.testing.assert_close(padded.grad[..., :37], want_gradient, rtol=0, atol=1e-12)
    assert not padded.grad[..., 37:].any()


def test_bf16_logits_give_fp32_losses() -> None:
    logits, labels, weights = inputs(torch.bfloat16)
    losses = cross_entropy(logits, labels, 0, 37, Axis("tp"))
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses.double(), expected(logits, labels, weights)[0], rtol=1e-5, atol=1e-4)


def on_rank(rank: int, size: int, vocabulary: int) -> tuple[torch.Tensor, torch.Tensor, tuple[int, int]]:
    tp = ParallelContext.create(Mesh(tp=size)).tp
    logits, labels, weights = inputs(vocabulary=vocabulary)
    box, (local, _) = shard((vocabulary, 1), 0, rank, size, pad=True)
    mine = torch.full((*labels.shape, local), 1e4, dtype=torch.float64)
    mine[..., : box.shape[0]] = logits[..., box.start[0] : box.stop[0]]
    mine.requires_grad_()
    losses = cross_entropy(mine.clone(), labels, box.start[0], box.shape[0], tp)
    (losses * weights).sum().backward()
    assert mine.grad is not None
    assert not mine.grad[..., box.shape[0] :].any()
    return losses.detach(), mine.grad[..., : box.shape[0]], (box.start[0], box.stop[0])


@pytest.mark.parametrize(("size", "vocabulary"), [(2, 37), (4, 37), (4, 5)])
def test_ranks_equal_torch(size: int, vocabulary: int) -> None:
    """A vocabulary of 5 over 4 ranks leaves the last with padding only."""
    want_losses, want_gradient = expected(*inputs(vocabulary=vocabulary))
    for losses, gradient, (start, stop) in run_ranks(size, on_rank, vocabulary):
        torch.testing.assert_close(losses, want_losses, rtol=0, atol=1e-11)
        torch.testing.assert_close(gradient, want_gradient[..., start:stop], rtol=0, atol=1e-12)
