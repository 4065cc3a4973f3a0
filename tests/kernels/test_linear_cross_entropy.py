"""Linear + cross-entropy in chunks: kernels against the reference with all logits, memory, and ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megapoly_kernels import linear_cross_entropy as public
from megapoly_kernels import linear_cross_entropy_chunks
from megapoly_kernels.launch import triton
from megapoly_kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from megapoly_kernels.linear_cross_entropy_chunks import chunk_rows, workspace
from tests.kernels.rule import BACKWARD, DEVICE, DTYPES, FORWARD, check, close, gradients, kernels, needs_triton
from tests.ranks import run_cases

INTERPRET = [False, pytest.param(True, marks=needs_triton)]


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 3 tokens at most, so that every test has several, but where it says otherwise."""
    monkeypatch.setattr(linear_cross_entropy_chunks, "_ROWS", 3)


def inputs(
    tokens: int, hidden: int, vocabulary: int, dtype: torch.dtype = torch.float64, seed: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """Every third label is not counted, but for the first."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, hidden, generator=random, dtype=torch.float64).to(DEVICE, dtype)
    weight = torch.randn(vocabulary, hidden, generator=random, dtype=torch.float64).to(DEVICE, dtype)
    labels = torch.randint(vocabulary, (tokens,), generator=random)
    labels[1::3] = -1
    return x, weight, labels.to(DEVICE)


def of(function: Callable[..., Tensor], labels: Tensor, **options: Any) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, weight: function(x, weight, labels, **options)


def upstream(losses: Tensor) -> Tensor:
    """The gradient that rule.gradients gives."""
    return torch.randn(losses.shape, generator=torch.Generator().manual_seed(0)).to(losses)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (7, 5, 127), (6, 8, 1024), (4, 16, 1025), (2, 3, 4099), (0, 4, 8)])
def test_kernels(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    x, weight, labels = inputs(*shape, dtype=dtype)
    reference = of(linear_cross_entropy_reference, labels)
    check(of(linear_cross_entropy, labels), reference, [x, weight])
    known = upstream(torch.empty(labels.shape, dtype=torch.promote_types(dtype, torch.float32), device=DEVICE))
    check(of(linear_cross_entropy, labels, token_gradient=known), reference, [x, weight])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("known", [False, True])
def test_the_reference_path(dtype: torch.dtype, known: bool) -> None:
    """What a CPU runs is chunked too; against all logits by the same rule."""
    x, weight, labels = inputs(11, 16, 997, dtype)
    x /= 4  # logits of about 1: bf16 rounds larger ones by more than the rule's RMSE, in PyTorch's own loss too
    wide = torch.promote_types(dtype, torch.float32)
    options = {"token_gradient": upstream(torch.empty(labels.shape, dtype=wide, device=DEVICE))} if known else {}
    found = gradients(of(linear_cross_entropy, labels, **options), [x, weight])
    reference = of(linear_cross_entropy_reference, labels)
    same, exact = gradients(reference, [x, weight]), gradients(reference, [x.double(), weight.double()])
    for number, values in enumerate(zip(found, same, exact, strict=True)):
        close(*values, BACKWARD if number else FORWARD, None, f"value {number}")


@pytest.mark.parametrize("interpret", INTERPRET)
@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
def test_a_caller_s_buffer_is_added_to(dtype: torch.dtype, known: bool, interpret: bool) -> None:
    x, weight, labels = inputs(8, 5, 130, dtype)
    wide = torch.promote_types(dtype, torch.float32)
    ones = torch.ones_like(weight, dtype=wide)
    with kernels() if interpret else nullcontext():
        _, dx, dweight = gradients(of(linear_cross_entropy, labels), [x, weight])
        for buffer in (ones.clone(), ones.double()):
            leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
            known_gradient = upstream(torch.empty(labels.shape, dtype=wide, device=DEVICE)) if known else None
            losses = linear_cross_entropy(*leaves, labels, weight_gradient=buffer, token_gradient=known_gradient)
            losses.backward(upstream(losses))
            assert leaves[1].grad is None
            assert torch.equal(leaves[0].grad, dx)
            added = buffer - 1
            assert not torch.equal(added, torch.zeros_like(added))
            close(added.to(dweight.dtype), dweight, dweight.double(), 1.0, 1e-3 if dtype == torch.float16 else 1e-6, "")


def test_sums_over_chunks_are_wide() -> None:
    """Of 3000 equal terms in fp16; added up in fp16 they would stay at 2048 times the term."""
    x, weight = torch.ones(3000, 1, dtype=torch.float16), torch.zeros(2, 1, dtype=torch.float16)
    weight = weight.requires_grad_()
    linear_cross_entropy(x, weight, torch.zeros(3000, dtype=torch.int64)).sum().backward()
    assert weight.grad is not None
    assert weight.grad.flatten().tolist() == [-1500.0, 1500.0]


@pytest.mark.parametrize("interpret", INTERPRET)
def test_known_gradients_are_scaled(interpret: bool) -> None:
    x, weight, labels = inputs(8, 5, 130, torch.float32)
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    with kernels() if interpret else nullcontext():
        for factor in (1.0, 0.5, -3.0):
            want = torch.autograd.grad(linear_cross_entropy(*leaves, labels).sum() * (0.25 * factor), leaves)
            losses = linear_cross_entropy(*leaves, labels, token_gradient=0.25)
            found = torch.autograd.grad((losses * 0.25).sum() * factor, leaves)
            for mine, theirs in zip(found, want, strict=True):
                torch.testing.assert_close(mine, theirs)


def test_known_gradients_do_not_fit_others() -> None:
    x, weight, labels = inputs(6, 5, 30)
    leaves = [x.cpu().requires_grad_(), weight.cpu().requires_grad_()]
    labels = labels.cpu()
    for token_gradient, given in [
        (0.5, torch.arange(6.0)),
        (torch.tensor([0.0, 1, 1, 1, 1, 1]), torch.ones(6)),
        (torch.ones(6), torch.tensor([torch.nan] * 6)),
        (0.0, torch.ones(6)),
    ]:
        losses = linear_cross_entropy(*leaves, labels, token_gradient=token_gradient)
        with pytest.raises(ValueError, match="not token_gradient times one number"):
            losses.backward(given.double())
    losses = linear_cross_entropy(*leaves, labels, token_gradient=0.5, weight_gradient=torch.zeros_like(weight.cpu()))
    with pytest.raises(ValueError, match=r"not token_gradient, for which"):
        losses.backward(torch.ones(6, dtype=torch.float64))
    losses = linear_cross_entropy(*leaves, labels, token_gradient=0.5)
    losses.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        losses.sum().backward()


@pytest.mark.parametrize("interpret", INTERPRET)
def test_no_token_is_counted(interpret: bool) -> None:
    x, weight, labels = inputs(6, 5, 30)
    with kernels() if interpret else nullcontext():
        for options in ({}, {"token_gradient": 1.0}):
            for each in gradients(of(linear_cross_entropy, labels * 0 - 7, **options), [x, weight]):
                assert each.numel()
                assert not each.any()


@pytest.mark.parametrize("interpret", INTERPRET)
def test_padding_and_inputs_of_any_strides(interpret: bool) -> None:
    x, weight, labels = inputs(12, 10, 90)
    labels %= 80
    want = gradients(of(linear_cross_entropy_reference, labels), [x[:, ::2], weight[:80, ::2]])
    weight[80:] = torch.nan
    with kernels() if interpret else nullcontext():
        for options in ({}, {"token_gradient": upstream(want[0])}):
            found = gradients(of(linear_cross_entropy, labels, count=80, **options), [x[:, ::2], weight[:, ::2]])
            torch.testing.assert_close(found[0], want[0])
            # NaN weights times gradients of 0 are NaN: what is padding is finite in a model.
            torch.testing.assert_close(found[2][:80], want[2])
            assert not found[2][80:].any()
    weight[80:] = 1e4
    with kernels() if interpret else nullcontext():
        shaped = of(linear_cross_entropy, labels.view(3, 4), count=80)
        found = gradients(shaped, [x[:, ::2].view(3, 4, 5), weight.t().contiguous().t()[:, ::2]])
    torch.testing.assert_close(found[1].view(12, 5), want[1])
    torch.testing.assert_close(found[0].flatten(), want[0])


def test_only_what_needs_a_gradient_gets_one() -> None:
    x, weight, labels = inputs(6, 5, 30)
    _, dx, dweight = gradients(of(linear_cross_entropy, labels), [x, weight])
    for options in ({}, {"token_gradient": upstream(labels.double())}):
        leaf = x.clone().requires_grad_()
        losses = linear_cross_entropy(leaf, weight, labels, **options)
        assert torch.equal(torch.autograd.grad(losses, leaf, upstream(losses))[0], dx)
        leaf = weight.clone().requires_grad_()
        losses = linear_cross_entropy(x, leaf, labels, **options)
        assert torch.equal(torch.autograd.grad(losses, leaf, upstream(losses))[0], dweight)
        with torch.no_grad():
            buffer = torch.zeros_like(weight)
            losses = linear_cross_entropy(x, leaf, labels, weight_gradient=buffer, **options)
        assert not losses.requires_grad
        assert not buffer.any()


def test_gradcheck() -> None:
    x, weight, labels = inputs(4, 3, 6)
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    assert torch.autograd.gradcheck(of(linear_cross_entropy, labels), leaves)
    labels = torch.where(labels < 0, labels, 2 + labels % 4)
    assert torch.autograd.gradcheck(of(linear_cross_entropy, labels, start=2, count=4), leaves)


@pytest.mark.parametrize("interpret", INTERPRET)
def test_operators_are_registered_as_torch_wants(interpret: bool) -> None:
    x, weight, labels = inputs(4, 3, 6)
    ops = torch.ops.megapoly
    with kernels() if interpret else nullcontext():
        torch.library.opcheck(ops.linear_cross_entropy, (x, weight, labels, 0, 5))
        losses, stats = ops.linear_cross_entropy(x, weight, labels, 0, 5)
        ones = torch.ones_like(losses)
        for buffer in (None, torch.zeros_like(weight)):
            rest = (0, 5, buffer, True, True)
            torch.library.opcheck(ops.linear_cross_entropy_backward, (ones, x, weight, labels, stats, *rest))
            torch.library.opcheck(ops.linear_cross_entropy_fused, (x, weight, labels, ones, *rest))
        torch.library.opcheck(ops.linear_cross_entropy_rescale, (x, weight, 2 * ones, ones, labels, False))


@pytest.mark.parametrize("options", [{}, {"token_gradient": 0.5}], ids=str)
@pytest.mark.parametrize("buffered", [False, True])
def test_compiled_without_a_break(options: dict[str, float], buffered: bool) -> None:
    x, weight, labels = inputs(7, 3, 20, torch.float32)

    def loss(function: Callable[..., Tensor]) -> list[Tensor]:
        leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        buffer = torch.zeros_like(weight) if buffered else None
        value = function(*leaves, labels, buffer)
        value.backward()
        return [value.detach(), leaves[0].grad, buffer if buffered else leaves[1].grad]

    def eager(x: Tensor, weight: Tensor, labels: Tensor, buffer: Tensor | None) -> Tensor:
        return 0.5 * public(x, weight, labels, weight_gradient=buffer, **options).sum()

    for mine, theirs in zip(loss(torch.compile(eager, fullgraph=True, backend="aot_eager")), loss(eager), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("options", [{}, {"token_gradient": 1.0}], ids=str)
def test_autocast_casts_as_for_linear(options: dict[str, float]) -> None:
    x, weight, labels = inputs(7, 16, 40, torch.float32)
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    with torch.autocast(DEVICE, torch.bfloat16):
        losses = linear_cross_entropy(*leaves, labels, **options)
        found = torch.autograd.grad(losses.sum(), leaves)
    narrow = [x.bfloat16(), weight.bfloat16()]
    with torch.no_grad():
        assert torch.equal(losses, linear_cross_entropy(*narrow, labels))
    assert losses.dtype == torch.float32
    want = torch.autograd.grad(linear_cross_entropy(*leaves, labels).sum(), leaves)
    for mine, theirs in zip(found, want, strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0.02 * float(theirs.abs().max()))


def test_what_is_refused() -> None:
    x, weight, labels = inputs(4, 3, 6)
    with pytest.raises(ValueError, match=r"x is \(4, 2\) and weight \(6, 3\)"):
        linear_cross_entropy(x[:, :2], weight, labels)
    with pytest.raises(ValueError, match=r"x is torch.float64 and weight torch.float32"):
        linear_cross_entropy(x, weight.float(), labels)
    with pytest.raises(ValueError, match=r"labels are \(3,\) torch.int64, expected \(4,\)"):
        linear_cross_entropy(x, weight, labels[:3])
    with pytest.raises(ValueError, match=r"start 0 and count 7"):
        linear_cross_entropy(x, weight, labels, count=7)
    for buffer in (torch.zeros_like(weight).float(), torch.zeros(6, 2, dtype=torch.float64)):
        with pytest.raises(ValueError, match=r"weight_gradient is .* expected \(6, 3\) of torch.float64 or wider"):
            linear_cross_entropy(x, weight, labels, weight_gradient=buffer)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_memory_by_the_formula(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """A vocabulary of 256K, 2048 hidden, 8192 tokens: under 768 MiB, and not more for more tokens."""
    monkeypatch.setattr(linear_cross_entropy_chunks, "_ROWS", 4096)
    monkeypatch.setattr(linear_cross_entropy_chunks, "runs_triton", lambda x: x.is_cuda)

    class OnGPU:
        """What the formula asks of a tensor, as if on a GPU."""

        is_cuda, device = True, torch.device("cuda")

        def __init__(self, *shape: int) -> None:
            self.shape, self.dtype = torch.Size(shape), dtype

        def numel(self) -> int:
            return self.shape.numel()

    weight = torch.empty(262_144, 2048, dtype=dtype, device="meta")
    on_gpu = [workspace(OnGPU(tokens, 2048), weight) for tokens in (8192, 1 << 20)]  # type: ignore[arg-type]
    assert on_gpu[0] == on_gpu[1] < 768 << 20
    assert chunk_rows(OnGPU(8192, 2048), 262_144) >= 512  # type: ignore[arg-type]
    assert chunk_rows(OnGPU(8192, 2048), 32_000) == 4096  # type: ignore[arg-type]
    assert workspace(torch.empty(8192, 2048, dtype=dtype, device="meta"), weight) <= 192 << 20


_MEASURED = """
import sys, torch
from megapoly_kernels import linear_cross_entropy

def high():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) << 10

torch.set_num_threads(1)
tokens, hidden, vocabulary = 256, 64, 262_144
x, weight = torch.randn(tokens, hidden, requires_grad=True), torch.randn(vocabulary, hidden).requires_grad_()
buffer, labels = torch.zeros(vocabulary, hidden), torch.arange(tokens)
buffer.add_(0.0)  # touches all of it
small = linear_cross_entropy(x[:1], weight[:256], labels[:1], weight_gradient=buffer[:256], token_gradient=1.0)
before = high()
known = {"token_gradient": 1.0} if sys.argv[1] == "known" else {}
linear_cross_entropy(x, weight, labels, weight_gradient=buffer, **known).sum().backward()
print(high() - before)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="the peak of memory is read from Linux's /proc")
@pytest.mark.parametrize("mode", ["known", "general"])
def test_memory_of_a_large_vocabulary_on_a_cpu(mode: str) -> None:
    """All logits would be 256 MiB, and as much their gradient; the chunk is 128 MiB, blocks of it in work a few."""
    done = subprocess.run([sys.executable, "-c", _MEASURED, mode], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 64 << 20 < int(done.stdout) < 160 << 20


def on_rank(
    rank: int, size: int, vocabulary: int, local: int, options: dict[str, Any], interpret: bool
) -> tuple[Tensor, Tensor, Tensor]:
    linear_cross_entropy_chunks._ROWS = 3
    x, weight, labels = (each.cpu() for each in inputs(8, 5, vocabulary))
    start = min(rank * local, vocabulary)
    count = min(local, vocabulary - start)
    mine = torch.full((local, 5), 1e4, dtype=torch.float64)
    mine[:count] = weight[start : start + count]
    split = {"group": dist.group.WORLD, "start": start, "count": count}
    with kernels() if interpret else nullcontext():
        losses, dx, dweight = gradients(of(linear_cross_entropy, labels, **split, **options), [x, mine])
    assert not dweight[count:].any()
    return losses, dx, dweight[:count]


@pytest.mark.parametrize(("size", "shards"), [(2, [(37, 19)]), (4, [(37, 10), (5, 2)])])
def test_ranks_equal_one(size: int, shards: list[tuple[int, int]]) -> None:
    """A vocabulary of 5 over 4 ranks leaves the last with padding only."""
    known = {"token_gradient": upstream(torch.empty(8, dtype=torch.float64)), "reduce_dx": True}
    cases = [
        (*shard, options, interpret)
        for shard in shards
        for options, interpret in (({}, False), (known, False), ({"reduce_dx": True}, triton is not None))
    ]
    for case, found in zip(cases, run_cases(size, on_rank, cases), strict=True):
        x, weight, labels = (each.cpu() for each in inputs(8, 5, case[0]))
        losses, dx, dweight = gradients(of(linear_cross_entropy, labels), [x, weight])
        if not case[2].get("reduce_dx"):
            torch.testing.assert_close(sum(each[1] for each in found), dx, rtol=0, atol=1e-12)
        for mine, its, _ in found:
            torch.testing.assert_close(mine, losses, rtol=1e-12, atol=1e-12)
            if case[2].get("reduce_dx"):
                torch.testing.assert_close(its, dx, rtol=0, atol=1e-12)
        torch.testing.assert_close(torch.cat([each[2] for each in found]), dweight, rtol=0, atol=1e-12)
