"""Dropout and dropout + add: the mask is the engine's bit for bit, kernels against references."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from megapoly_kernels import philox
from megapoly_kernels.dropout import dropout, dropout_add, dropout_add_reference, keep_reference, random_words
from megapoly_kernels.launch import interpreted, jit, tl
from tests.kernels.rule import DEVICE, DTYPES, GPU, check, kernels, needs_triton

KEY = 0xFEDCBA9876543210  # the highest bit is set


def normal(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE, dtype)


def wanted_keep(key: int, rate: float, samples: Tensor, tokens: Tensor, channels: int) -> Tensor:
    """By the definition, one counter for four channels, at once."""
    blocks = -(-channels // 4)
    index = tokens.unsqueeze(-1) * blocks + torch.arange(blocks, device=tokens.device)
    index, streams = torch.broadcast_tensors(index, samples.unsqueeze(-1))
    return philox.words(index, key, streams).flatten(-2)[..., :channels] >= round(rate * 2**32)


def counters(s: int, b: int) -> tuple[Tensor, Tensor]:
    """Samples [1, B] and tokens [S, 1], on both sides of 2^32."""
    samples, tokens = 7 + (1 << 31) * torch.arange(b), 3 + (1 << 30) * torch.arange(s)
    return samples.unsqueeze(0).to(DEVICE), tokens.unsqueeze(1).to(DEVICE)


@jit
def _write_words(out_ptr, key, stream_ptr, index_ptr):
    words = random_words(key, tl.load(stream_ptr), tl.load(index_ptr + tl.arange(0, 2)))
    tl.store(out_ptr + tl.arange(0, 8), words.to(tl.int64))


@needs_triton
def test_known_answers_of_random123() -> None:
    def run(index: int, stream: int, key: int) -> list[int]:
        def signed(x: int) -> int:
            return x - (1 << 64) if x >> 63 else x

        out = torch.zeros(8, dtype=torch.int64, device=DEVICE)
        at, of = (torch.tensor([signed(x)] * 2, device=DEVICE) for x in (index, stream))
        with nullcontext() if GPU else interpreted():
            _write_words[(1,)](out, signed(key), of, at)
        assert out[:4].tolist() == out[4:].tolist()
        return out[:4].tolist()

    full = (1 << 64) - 1
    assert run(0, 0, 0) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert run(full, full, full) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    pi = 0x85A308D3243F6A88, 0x0370734413198A2E, 0x299F31D0A4093822
    assert run(*pi) == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


@pytest.mark.parametrize("interpret", [False, pytest.param(True, marks=needs_triton)])
@pytest.mark.parametrize("key", [KEY, 1, 48, (1 << 31) + 5, (1 << 64) - 3])
def test_the_mask_is_the_engine_s_bit_for_bit(interpret: bool, key: int) -> None:
    samples, tokens = counters(3, 2)
    for channels, rate in ((1, 0.5), (127, 0.1), (514, 0.37), (8, 1 - 2**-33)):
        wanted = wanted_keep(key, rate, samples, tokens, channels)
        assert torch.equal(keep_reference(samples, tokens, channels, key, rate), wanted)
        x = torch.ones(3, 2, channels, device=DEVICE)
        with kernels() if interpret else nullcontext():
            assert torch.equal(dropout(x, key, rate, samples, tokens) != 0, wanted)
            assert torch.equal(dropout_add(x, x, key, rate, samples, tokens) != 1, wanted)


def test_the_reference_takes_rows_in_parts() -> None:
    samples, tokens = counters(5, 3)
    channels = 20_001  # 3 rows at a time
    assert torch.equal(
        keep_reference(samples, tokens, channels, KEY, 0.2), wanted_keep(KEY, 0.2, samples, tokens, channels)
    )


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 2, 127), (2, 3, 129), (2, 1, 1025), (0, 2, 8), (2, 2, 0)])
def test_kernels(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, residual = normal(*shape, dtype=dtype), normal(*shape, dtype=dtype, seed=2)
    samples, tokens = counters(*shape[:2])

    def reference(x: Tensor, residual: Tensor | None) -> Tensor:
        return dropout_add_reference(x, residual, samples, tokens, KEY, 0.3, x.dtype)

    check(lambda x, y: dropout_add(x, y, KEY, 0.3, samples, tokens), reference, [x, residual])
    check(lambda x: dropout(x, KEY, 0.3, samples, tokens), lambda x: reference(x, None), [x])


@needs_triton
@pytest.mark.parametrize("lead", [(), (5,), (2, 3, 2)])
def test_any_number_of_dimensions(lead: tuple[int, ...]) -> None:
    x, samples = normal(*lead, 10, dtype=torch.float32), torch.tensor(9, device=DEVICE)
    tokens = torch.arange(lead[-1] if lead else 1, device=DEVICE)[0 if not lead else slice(None)]
    wanted = dropout(x, KEY, 0.3, samples, tokens)
    with kernels():
        assert torch.equal(dropout(x, KEY, 0.3, samples, tokens), wanted)


@needs_triton
def test_mixed_dtypes() -> None:
    """A branch in half precision, a residual stream in fp32."""
    samples, tokens = counters(3, 2)
    inputs = [normal(3, 2, 40, dtype=torch.float16), normal(3, 2, 40, dtype=torch.float32, seed=2)]

    def reference(x: Tensor, residual: Tensor) -> Tensor:
        return dropout_add_reference(x, residual, samples, tokens, KEY, 0.3, residual.dtype)

    check(lambda x, y: dropout_add(x, y, KEY, 0.3, samples, tokens), reference, inputs)
    assert dropout_add(*reversed(inputs), KEY, 0.3, samples, tokens).dtype == torch.float32


@needs_triton
def test_float64_and_strides() -> None:
    samples, tokens = counters(3, 2)
    x = normal(2, 3, 20).transpose(0, 1)[..., ::2]
    residual = normal(3, 1, 30)[..., 5:15].expand(3, 2, 10)

    def reference(x: Tensor, residual: Tensor) -> Tensor:
        return dropout_add_reference(x, residual, samples, tokens, KEY, 0.3, x.dtype)

    check(lambda x, y: dropout_add(x, y, KEY, 0.3, samples, tokens), reference, [x, residual])


@needs_triton
def test_rows_beyond_two_to_the_31() -> None:
    memory = torch.empty((1 << 31) + 512, dtype=torch.float16, device=DEVICE)  # on a CPU, of pages never touched
    x = memory.as_strided((2, 1, 16), (1 << 31, 16, 1))
    x.copy_(normal(2, 1, 16))
    samples, tokens = counters(2, 1)
    with kernels():
        found = dropout_add(x, x, KEY, 0.3, samples, tokens)
        assert torch.equal(found, dropout_add(x.contiguous(), x.contiguous(), KEY, 0.3, samples, tokens))


def test_the_reference_scales_and_sends_gradients_to_what_was_kept() -> None:
    samples, tokens = counters(3, 2)
    x, residual = normal(3, 2, 6).requires_grad_(), normal(3, 2, 6, seed=2).requires_grad_()
    kept = wanted_keep(KEY, 0.25, samples, tokens, 6)
    found = dropout_add(x, residual, KEY, 0.25, samples, tokens)
    torch.testing.assert_close(found, residual + torch.where(kept, x / 0.75, 0.0))
    assert torch.autograd.gradcheck(lambda x, y: dropout_add(x, y, KEY, 0.25, samples, tokens), (x, residual))
    assert torch.autograd.gradcheck(lambda x: dropout(x, KEY, 0.25, samples, tokens), (x,))
    assert torch.equal(dropout_add(x, residual, KEY, 0.0, samples, tokens), residual + x)
    assert dropout(x, KEY, 0.0, samples, tokens) is x


def test_the_backward_pass_keeps_no_mask() -> None:
    samples, tokens = counters(3, 2)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        x = normal(3, 2, 50).requires_grad_()
        dropout_add(x, x, KEY, 0.25, samples, tokens)
    assert sorted(each.numel() for each in kept) == [2, 3]


@pytest.mark.parametrize("interpret", [False, pytest.param(True, marks=needs_triton)])
def test_operator_is_registered_as_torch_wants(interpret: bool) -> None:
    samples, tokens = counters(3, 2)
    x = normal(3, 2, 9).requires_grad_()
    with kernels() if interpret else nullcontext():
        for residual in (x.detach().float().requires_grad_(), None):
            torch.library.opcheck(torch.ops.megapoly.dropout_add, (x, residual, samples, tokens, 5, 0.3, x.dtype))


def test_compiled_without_a_break_and_under_autocast() -> None:
    samples, tokens = counters(3, 2)
    x = normal(3, 2, 9, dtype=torch.float32)

    def function(x: Tensor) -> Tensor:
        return dropout_add(dropout(x, KEY, 0.3, samples, tokens), x, KEY, 0.1, samples, tokens)

    whole = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(whole(x), function(x))
    with torch.autocast(DEVICE, torch.bfloat16):
        assert function(x).dtype == torch.float32


def test_what_is_refused() -> None:
    samples, tokens = counters(3, 2)
    x = normal(3, 2, 9)
    with pytest.raises(ValueError, match=r"residual has shape \[2, 9\], expected \[3, 2, 9\]"):
        dropout_add(x, x[0], KEY, 0.1, samples, tokens)
    with pytest.raises(ValueError, match=r"rate is 1\.0, expected 0 or more and less than 1"):
        dropout(x, KEY, 1.0, samples, tokens)
    with pytest.raises(ValueError, match=r"tokens have shape \[2, 1\], which does not broadcast to \[3, 2\]"):
        dropout(x, KEY, 0.1, samples, tokens[:2])
    with pytest.raises(ValueError, match=r"samples are torch\.int32"):
        dropout(x, KEY, 0.1, samples.int(), tokens)
