"""Keyed permutations of any range, without a table: the shuffles of a data plan. No torch.

This is the reference, in numpy; csrc/index/permutation.cpp gives the same numbers.
"""

from __future__ import annotations

import hashlib
import json

import numpy as np
import numpy.typing as npt

Int64s = npt.NDArray[np.int64]
UInt64s = npt.NDArray[np.uint64]

_STEPS = np.array([[i * 0x9E3779B97F4A7C15 % (1 << 64)] for i in range(1, 9)], dtype=np.uint64)
_POWERS = np.array([1 << bit for bit in range(63)], dtype=np.int64)


def derive_key(seed: int, purpose: str, *parts: str | int) -> int:
    """A 64-bit key, independent for every (seed, purpose, parts): blake2b of their JSON."""
    text = json.dumps([seed, purpose, *parts]).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8, person=b"megapoly").digest(), "little")


def key_text(seed: int, purpose: str, *parts: str | int) -> str:
    """What C++ puts before a number and "]", and hashes, for the key of (seed, purpose, parts, number)."""
    return json.dumps([seed, purpose, *parts])[:-1] + ", "


def permute(key: int | UInt64s, index: Int64s, n: int | Int64s, *, inverse: bool = False) -> Int64s:
    """Where a keyed permutation of ``range(n)`` takes every ``index``; with ``inverse``, where it came from.

    A balanced Feistel network of 8 rounds on the smallest even number of bits, at least 6, that holds ``n``, applied
    again to what falls outside ``range(n)`` (cycle walking: fewer than 4 passes on average where n > 16, since the
    network's range is then less than 4 n). A Feistel network is a bijection whatever its round function is, and so is
    its walk. The round function is SplitMix64's finalizer of (half xor 64-bit round key), in which every input bit
    reaches every output bit; round keys are SplitMix64's outputs from ``key``. Four rounds of random functions already
    make a network hard to tell from a random permutation (Luby and Rackoff, 1988); eight leave a margin for short
    halves. The order of training data needs statistical mixing, not secrecy.

    Args:
        key: one key, or one per index [k].
        index: [k], in ``[0, n)``.
        n: size of the permuted range, 1 to 2^62; one, or one per index [k].
    """
    x = np.asarray(index, dtype=np.int64).astype(np.uint64)
    round_keys = _mix(np.atleast_1d(np.asarray(key, dtype=np.uint64)) + _STEPS)
    sizes = np.atleast_1d(np.asarray(n, dtype=np.int64))
    bits = np.searchsorted(_POWERS, sizes - 1, side="right")
    half = np.maximum(3, (bits + 1) // 2).astype(np.uint64)
    if inverse:
        round_keys = round_keys[::-1]
    x = _feistel(x, round_keys, half, inverse)
    limit = sizes.astype(np.uint64)
    while (outside := np.flatnonzero(x >= limit)).size:
        keys_there = round_keys if round_keys.shape[1] == 1 else round_keys[:, outside]
        half_there = half if half.size == 1 else half[outside]
        x[outside] = _feistel(x[outside], keys_there, half_there, inverse)
    return x.astype(np.int64)


def _feistel(x: UInt64s, round_keys: UInt64s, half: UInt64s, inverse: bool) -> UInt64s:
    """Once through the network. ``round_keys`` [rounds, k or 1]; its inverse is itself with the halves exchanged."""
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = x >> half, x & mask
    if inverse:
        left, right = right, left
    for round_key in round_keys:
        left, right = right, left ^ (_mix(right ^ round_key) & mask)
    if inverse:
        left, right = right, left
    return (left << half) | right


def _mix(z: UInt64s) -> UInt64s:
    """SplitMix64's finalizer (Steele, Lea, Flood 2014). Products are taken modulo 2^64."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
