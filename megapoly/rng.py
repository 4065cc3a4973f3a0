"""Initial values and dropout masks from counters: the same numbers under every layout."""

from __future__ import annotations

import hashlib
import itertools

import torch
from torch import Tensor

from megapoly.spec import ParamSpec
from megapoly_kernels import philox
from megapoly_kernels.dropout import keep_reference

_ROWS = 1 << 20


def key(seed: int, *what: str) -> int:
    """A 64-bit Philox key for a purpose."""
    text = "\0".join((str(seed), *what))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def fill(parameter: Tensor, spec: ParamSpec, seed: int) -> None:
    """Write this rank's slice of the initial values into ``parameter`` (shape ``spec.local_shape``); padding is zero.

    Bit for bit the same under every layout on one kind of device. Needs a few hundred MB beside the tensor,
    or more where one row of its first dimension has millions of elements.
    """
    with torch.no_grad():
        parameter.zero_()
        box = spec.box
        if not box.size:
            return
        target = parameter[tuple(slice(0, n) for n in box.shape)]
        if spec.std == 0:
            target.fill_(spec.mean)
            return
        name_key = key(seed, "initial", spec.name)
        strides = [int(s) for s in itertools.accumulate(reversed(spec.shape[1:]), lambda a, b: a * b, initial=1)][::-1]
        index = torch.zeros((), dtype=torch.int64, device=parameter.device)
        for dim in range(1, len(box.shape)):
            along = torch.arange(box.start[dim], box.stop[dim], device=parameter.device) * strides[dim]
            index = index.unsqueeze(-1) + along
        per_row = max(1, index.numel())
        rows_at_once = max(1, _ROWS // per_row)
        for begin in range(0, box.shape[0], rows_at_once):
            rows = torch.arange(begin, min(box.shape[0], begin + rows_at_once), device=parameter.device)
            flat = ((rows + box.start[0]) * strides[0]).unsqueeze(-1) + index.reshape(1, -1)
            values = philox.normal(flat.reshape(-1), name_key) * spec.std + spec.mean
            target[begin : begin + len(rows)] = values.reshape(len(rows), *box.shape[1:]).to(parameter.dtype)


def keep(key: int, rate: float, samples: Tensor, rows: Tensor, channels: int) -> Tensor:
    """A mask that is False with probability ``rate``: [*broadcast(samples, rows), channels], bool.

    Every element is a function of (key, sample, row, channel) alone. ``samples`` and ``rows`` are int64.
    """
    return keep_reference(samples.to(rows.device), rows, channels, key, rate)
