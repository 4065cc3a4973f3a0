"""Folders saved by transformers, imported under the layouts of 1, 2 and 4 ranks: the logits of transformers."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from megapoly.checkpoint.weights import open_weights
from megapoly.config import parse
from megapoly.errors import ConfigError
from tests.checkpoint import families
from tests.checkpoint.families import PEERS
from tests.parity import converted
from tests.ranks import run_cases

SIZES = (1, 2, 4)
LAYOUTS = {size: [(pp, tp) for pp, tp in itertools.product(SIZES, SIZES) if size % (pp * tp) == 0] for size in SIZES}
DTYPES = (torch.float64, torch.float32)
Case = tuple[str, int, int, torch.dtype]


def cases(size: int) -> list[Case]:
    return [(name, pp, tp, dtype) for name in PEERS for pp, tp in LAYOUTS[size] for dtype in DTYPES]


def fits(case: Case) -> bool:
    name, _, tp, _ = case
    return PEERS[name].groups % tp == 0


def sample(size: int) -> list[Case]:
    """Every family, every layout, both dtypes; a few of each."""
    allowed = [case for case in cases(size) if fits(case)]
    draw = random.Random(f"0 {size}")
    kinds = sorted({PEERS[case[0]].kind for case in allowed})
    chosen = [draw.choice([case for case in allowed if PEERS[case[0]].kind == kind]) for kind in kinds]
    return chosen + [draw.choice([case for case in allowed if case[1:3] == layout]) for layout in LAYOUTS[size]]


def check(size: int, chosen: list[Case], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = {}
    for name, dtype in {(case[0], case[3]) for case in chosen}:
        path = folder / f"{name} {dtype}"
        peer = families.save(name, path, dtype)
        expected[name, dtype] = families.logits(peer, families.tokens_of(name), monkeypatch)
    arguments = [
        (str(folder / f"{name} {dtype}"), pp, tp, dtype, families.tokens_of(name).numpy())
        for name, pp, tp, dtype in chosen
    ]
    for (name, pp, tp, dtype), ranks in zip(
        chosen, run_cases(size, converted.logits, arguments, timeout=600), strict=True
    ):
        wanted = expected[name, dtype].numpy()
        replicas = converted.whole(ranks)
        assert len(replicas) == size // (pp * tp)
        for found in replicas:
            assert found.dtype == wanted.dtype
            worst = np.abs(found - wanted).max() / (1 if dtype == torch.float64 else np.abs(wanted).max())
            assert worst <= (1e-9 if dtype == torch.float64 else 1e-5), (name, pp, tp, dtype, worst)


@pytest.mark.parametrize("size", SIZES)
def test_logits_equal_transformers(size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check(size, sample(size), tmp_path, monkeypatch)


@pytest.mark.long
@pytest.mark.parametrize("size", SIZES)
def test_logits_equal_transformers_under_all_layouts(
    size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(size, [case for case in cases(size) if fits(case)], tmp_path, monkeypatch)


@pytest.mark.parametrize("name", [name for name in PEERS if any(PEERS[name].groups % tp for tp in SIZES)])
def test_other_layouts_are_refused(name: str, tmp_path: Path) -> None:
    families.save(name, tmp_path)
    model = open_weights(tmp_path).model.model_dump(exclude_none=True)
    for tp in SIZES:
        if PEERS[name].groups % tp:
            with pytest.raises(ConfigError, match=rf"does not divide by layout.tp {tp}; choose layout.tp from"):
                parse(
                    {
                        "model": model,
                        "layout": {"tp": tp},
                        "data": {
                            "tokenizer": "none",
                            "sources": {"a": {"path": "a", "language": "en"}},
                            "stages": [{"name": "only", "tokens": 16, "weights": {"a": 1.0}}],
                        },
                        "train": {"directory": "none", "sequence": 4, "global_batch": 4},
                        "optimizer": {"learning_rate": 0.01},
                    }
                )
