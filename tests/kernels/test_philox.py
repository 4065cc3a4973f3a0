"""Philox against the published known answers, and the normal values against their distribution."""

import math

import numpy as np
import torch

from megapoly_kernels import philox


def test_known_answers_of_random123() -> None:
    def run(counter: list[int], key: int) -> list[int]:
        words = tuple(torch.tensor([word]) for word in counter)
        return [int(word) for word in philox.philox_reference(words, key)]  # type: ignore[arg-type]

    full = 0xFFFFFFFF
    assert run([0] * 4, 0) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert run([full] * 4, (full << 32) | full) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    pi = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]
    assert run(pi, 0x299F31D0A4093822) == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


def test_words_use_all_64_bits_of_the_index_and_the_stream() -> None:
    index = torch.tensor([5, 5 + (1 << 32)])
    assert not torch.equal(*philox.words(index, 1))
    assert not torch.equal(philox.words(index, 1, 3), philox.words(index, 1, 3 + (1 << 32)))
    assert torch.equal(philox.words(index, 1, 3)[1], philox.words(index[1:], 1, 3)[0])


def test_normal_is_standard_and_uncorrelated() -> None:
    n = 1 << 18
    values = philox.normal(torch.arange(n), key=42).numpy()
    error = 5 / math.sqrt(n)
    assert abs(values.mean()) < error
    assert abs((values**2).mean() - 1) < error * math.sqrt(2)
    assert abs((values**4).mean() - 3) < error * math.sqrt(96)
    for lag in (1, 2, 3, 4, 8):
        assert abs((values[lag:] * values[:-lag]).mean()) < error
    # Kolmogorov-Smirnov distance to the normal distribution, at the 0.1 % level.
    grid = np.sort(values)
    exact = 0.5 * (1 + torch.erf(torch.from_numpy(grid) / math.sqrt(2)).numpy())
    assert np.abs(exact - (np.arange(n) + 0.5) / n).max() < 1.95 / math.sqrt(n)


def test_an_element_does_not_depend_on_its_neighbours() -> None:
    everything = philox.normal(torch.arange(50_000), key=7)
    for start, count, step in ((0, 1, 1), (13, 9_001, 1), (49_999, 1, 1), (3, 777, 61)):
        index = start + step * torch.arange(count)
        assert torch.equal(philox.normal(index, key=7), everything[index])
