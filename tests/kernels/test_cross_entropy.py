"""Cross-entropy, also of a split vocabulary: kernels against the reference, the reference against PyTorch's own."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import cross_entropy as torch_cross_entropy

from megapoly_kernels.cross_entropy import (
    cross_entropy,
    cross_entropy_forward,
    cross_entropy_reference,
    row_statistics,
    write_gradient,
)
from megapoly_kernels.launch import triton
from tests.kernels.rule import DEVICE, DTYPES, check, gradients, kernels, needs_triton
from tests.ranks import run_cases

INTERPRET = [False, pytest.param(True, marks=needs_triton)]


def logits_and_labels(
    *shape: int, dtype: torch.dtype = torch.float64, scale: float = 4.0, seed: int = 1
) -> tuple[Tensor, Tensor]:
    """Every third label is not counted, but for the first."""
    random = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(*shape, generator=random, dtype=torch.float64)
    labels = torch.randint(shape[-1], shape[:-1], generator=random)
    labels.view(-1)[1::3] = -1
    return logits.to(DEVICE, dtype), labels.to(DEVICE)


def of(function: Callable[..., Tensor], labels: Tensor, **options: object) -> Callable[[Tensor], Tensor]:
    return lambda logits: function(logits, labels, **options)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        (1, 1),
        (3, 2),
        (7, 127),
        (2, 3, 128),
        (4, 1023),
        (4, 1025),
        (2, 4096),
        (2, 4097),
        (2, 10_007),
        (0, 8),
        (2, 40_961),
    ],
)
def test_kernels(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    logits, labels = logits_and_labels(*shape, dtype=dtype)
    check(of(cross_entropy, labels), of(cross_entropy_reference, labels), [logits])


@needs_triton
def test_the_largest_vocabulary() -> None:
    logits, labels = logits_and_labels(2, 262_144, dtype=torch.float16)
    labels[0] = 262_143
    check(of(cross_entropy, labels), of(cross_entropy_reference, labels), [logits])


@needs_triton
def test_float64_and_strides() -> None:
    logits, labels = logits_and_labels(5, 6, 1100)
    for each, theirs in [
        (logits.transpose(0, 1)[:, ::2], labels.t()[:, ::2]),  # rows apart
        (logits[..., 3:1050], labels % 1047),
        (logits[..., :7].transpose(0, 2), torch.arange(42, device=DEVICE).view(7, 6) % 5),  # copied
    ]:
        check(of(cross_entropy, theirs), of(cross_entropy_reference, theirs), [each])


@pytest.mark.parametrize("interpret", INTERPRET)
@pytest.mark.parametrize("shape", [(5, 3, 37), (2, 5000)])
def test_equals_torch(shape: tuple[int, ...], interpret: bool) -> None:
    logits, labels = logits_and_labels(*shape)
    logits.view(-1, shape[-1])[0] += 700  # exp would overflow without the maximum
    logits.view(-1, shape[-1])[1:] -= 1e5

    def torch_s(logits: Tensor) -> Tensor:
        flat = logits.reshape(-1, shape[-1])
        return torch_cross_entropy(flat, labels.flatten(), ignore_index=-1, reduction="none").view(labels.shape)

    with kernels() if interpret else nullcontext():
        found = gradients(of(cross_entropy, labels), [logits])
    for mine, theirs in zip(found, gradients(torch_s, [logits]), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("interpret", INTERPRET)
@pytest.mark.parametrize("columns", [40, 3000])
def test_padding_is_not_read(columns: int, interpret: bool) -> None:
    logits, labels = logits_and_labels(4, columns)
    count = columns - 9
    labels %= count
    logits[:, count:] = torch.nan
    want = gradients(of(cross_entropy_reference, labels), [logits[:, :count].contiguous()])
    with kernels() if interpret else nullcontext():
        losses, gradient = gradients(of(cross_entropy, labels, count=count), [logits])
    torch.testing.assert_close(losses, want[0])
    torch.testing.assert_close(gradient[:, :count], want[1])
    assert not gradient[:, count:].any()


@pytest.mark.parametrize("interpret", INTERPRET)
def test_extremes(interpret: bool) -> None:
    """Tokens that are not counted give zeros whatever their logits; -inf is probability 0; NaN is not hidden."""
    logits, labels = logits_and_labels(6, 2000)
    labels[:] = 7
    labels[0] = labels[1] = -1
    logits[0] = torch.nan
    logits[1] = -torch.inf
    logits[2, 1:] = -torch.inf
    logits[2, 7] = 1.0
    logits[3, 7] = -torch.inf
    logits[4, 1999] = torch.nan
    labels[5] = 2000  # which no rank has
    leaf = logits.requires_grad_()
    with kernels() if interpret else nullcontext():
        losses = cross_entropy(leaf, labels)
        (gradient,) = torch.autograd.grad(losses.sum(), leaf)
    assert losses[:2].tolist() == [0.0, 0.0]
    assert not gradient[:2].any()
    expected = torch_cross_entropy(logits[2:4], labels[2:4], reduction="none")
    torch.testing.assert_close(losses[2:4], expected)
    assert losses[3] == torch.inf
    torch.testing.assert_close(gradient[2:4], torch.autograd.grad(expected.sum(), leaf)[0][2:4])
    assert losses[4].isnan()
    assert losses[5] == torch.inf


@pytest.mark.parametrize("interpret", INTERPRET)
def test_no_token_is_counted(interpret: bool) -> None:
    logits = logits_and_labels(3, 50, dtype=torch.float16)[0].requires_grad_()
    with kernels() if interpret else nullcontext():
        losses = cross_entropy(logits, torch.full((3,), -5, device=DEVICE))
        (gradient,) = torch.autograd.grad(losses.sum(), logits)
    assert losses.dtype == torch.float32
    assert gradient.dtype == torch.float16
    assert not losses.any()
    assert not gradient.any()


@pytest.mark.parametrize("interpret", INTERPRET)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_in_place(dtype: torch.dtype, interpret: bool) -> None:
    logits, labels = logits_and_labels(3, 2, 1500, dtype=dtype)
    with kernels() if interpret else nullcontext():
        want = gradients(of(cross_entropy, labels), [logits])
        own = logits.clone().requires_grad_()
        losses = cross_entropy(own, labels, inplace=True)
        upstream = torch.randn(3, 2, generator=torch.Generator().manual_seed(0)).to(losses)
        (gradient,) = torch.autograd.grad(losses, own, upstream, retain_graph=True)
        assert gradient.data_ptr() == own.data_ptr()
        assert torch.equal(gradient[..., :5], want[1][..., :5])
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(losses, own, upstream)
    assert torch.equal(losses, want[0])
    assert torch.equal(gradient, want[1])


@needs_triton
@pytest.mark.parametrize("columns", [1, 37, 1024, 4099, 9001])
def test_a_narrow_gradient_in_the_place_of_wide_logits(columns: int) -> None:
    logits, labels = logits_and_labels(5, columns, dtype=torch.float32)
    count = max(1, columns - 3)
    labels = labels.clamp(max=count - 1)
    buffer = torch.full((5, columns + 7), torch.nan, device=DEVICE)
    buffer[:, :columns] = logits
    mine = buffer[:, :columns]
    out, apart = buffer.view(torch.float16)[:, :columns], torch.empty(5, columns, device=DEVICE)
    with kernels():
        stats, ones = row_statistics(mine, labels, 0, count), torch.ones(5, device=DEVICE)
        write_gradient(apart, mine, labels, stats, ones, 0, count)
        write_gradient(out, mine, labels, stats, ones, 0, count)
    assert torch.equal(out, apart.half())


@needs_triton
def test_rows_beyond_32_bits() -> None:
    """Two rows that lie 2^31 elements apart; of the memory between them none is touched."""
    logits = torch.empty(2**31 + 64, dtype=torch.float16, device=DEVICE).as_strided((2, 40), (2**31, 1))
    values, labels = logits_and_labels(2, 40, dtype=torch.float16)
    labels[:] = torch.tensor([3, 39])
    logits.copy_(values)
    with kernels():
        losses, stats = cross_entropy_forward(logits, labels, None, 0, 40)
        write_gradient(logits, logits, labels, stats, torch.ones(2, device=DEVICE), 0, 40)
        same = gradients(of(cross_entropy, labels), [values])
        want = torch.autograd.grad(cross_entropy(leaf := values.clone().requires_grad_(), labels).sum(), leaf)[0]
    assert torch.equal(losses, same[0])
    assert torch.equal(logits, want)


def test_gradcheck() -> None:
    logits, labels = logits_and_labels(4, 6)
    assert torch.autograd.gradcheck(of(cross_entropy, labels), [logits.requires_grad_()])
    labels = torch.where(labels < 0, labels, 2 + labels % 4)
    assert torch.autograd.gradcheck(of(cross_entropy, labels, start=2, count=4), [logits])


@pytest.mark.parametrize("interpret", INTERPRET)
def test_operators_are_registered_as_torch_wants(interpret: bool) -> None:
    logits, labels = logits_and_labels(2, 3, 5)
    with kernels() if interpret else nullcontext():
        torch.library.opcheck(torch.ops.megapoly.cross_entropy, (logits, labels, 0, 4))
        losses, stats = torch.ops.megapoly.cross_entropy(logits, labels, 0, 4)
        torch.library.opcheck(
            torch.ops.megapoly.cross_entropy_backward, (torch.ones_like(losses), logits, labels, stats, 0, 4)
        )


@pytest.mark.parametrize("inplace", [False, True])
def test_compiled_without_a_break_and_under_autocast(inplace: bool) -> None:
    logits, labels = logits_and_labels(2, 3, 50, dtype=torch.float16)
    function = of(cross_entropy, labels, inplace=inplace)
    whole = torch.compile(function, fullgraph=True, backend="aot_eager")
    for mine, eager in zip(gradients(whole, [logits]), gradients(of(cross_entropy, labels), [logits]), strict=True):
        assert torch.equal(mine, eager)
    with torch.autocast(DEVICE, torch.bfloat16):
        losses, gradient = gradients(function, [logits.float()])
    assert losses.dtype == gradient.dtype == torch.float32
    torch.testing.assert_close(losses, cross_entropy(logits.float(), labels))


def test_what_is_refused() -> None:
    logits, labels = logits_and_labels(2, 3, 5)
    with pytest.raises(ValueError, match=r"labels are \(2, 2\) torch.int64, expected \(2, 3\) torch.int64"):
        cross_entropy(logits, labels[:, :2])
    with pytest.raises(ValueError, match=r"labels are \(2, 3\) torch.int32"):
        cross_entropy(logits, labels.int())
    for options in ({"start": -1}, {"count": 6}, {"count": -1}):
        with pytest.raises(ValueError, match=r"how many of its 5 entries are not padding"):
            cross_entropy(logits, labels, **options)


def extreme(vocabulary: int) -> tuple[Tensor, Tensor]:
    logits, labels = (each.cpu() for each in logits_and_labels(5, 3, vocabulary))
    logits[0, 0] += 700
    logits[2, 2, : vocabulary // 2] = -torch.inf
    return logits, labels


def on_rank(rank: int, size: int, vocabulary: int, local: int, interpret: bool) -> tuple[Tensor, Tensor]:
    """Losses, and the gradient of this rank's entries, which lie before padding of NaN."""
    logits, labels = extreme(vocabulary)
    start = min(rank * local, vocabulary)
    count = min(local, vocabulary - start)
    mine = torch.full((5, 3, local), torch.nan, dtype=torch.float64)
    mine[..., :count] = logits[..., start : start + count]
    function = of(cross_entropy, labels, group=dist.group.WORLD, start=start, count=count, inplace=rank == 1)
    with kernels() if interpret else nullcontext():
        losses, gradient = gradients(lambda x: function(x.clone()), [mine])
    assert not gradient[..., count:].any()
    return losses, gradient[..., :count]


@pytest.mark.parametrize(("size", "cases"), [(2, [(37, 19)]), (4, [(37, 10), (5, 2)])])
def test_ranks_equal_one(size: int, cases: list[tuple[int, int]]) -> None:
    """A vocabulary of 5 over 4 ranks leaves the last with padding only."""
    all_cases = [(*case, interpret) for case in cases for interpret in ([False, True] if triton else [False])]
    for case, found in zip(all_cases, run_cases(size, on_rank, all_cases), strict=True):
        logits, labels = extreme(case[0])
        losses, gradient = gradients(of(cross_entropy, labels), [logits])
        for mine, _ in found:
            torch.testing.assert_close(mine, losses, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(torch.cat([part for _, part in found], -1), gradient, rtol=0, atol=1e-12)
