"""A training step whose every op is a Triton kernel, run by the interpreter, against the step by the references."""

from __future__ import annotations

import re
import sys
from typing import Any

import pytest
import torch

from megapoly.backends import detect
from megapoly.config import Kernels
from megapoly.engine import Engine
from megapoly.errors import ConfigError
from megapoly_kernels import apex_ops
from megapoly_kernels.attention_libraries import flash_attn_library
from tests.kernels.rule import GPU, kernels, needs_triton
from tests.kernels.stand_ins import Adam, Flash, Norms
from tests.parity import cases

pytestmark = [needs_triton, pytest.mark.skipif(GPU, reason="the interpreter is for machines without a GPU")]
CASES: dict[str, dict[str, Any]] = {
    "polylm": {"dropout": 0.1},
    "llama": {"family": "llama", "heads": 4, "key_value_heads": 2},
    "bloom": {"family": "bloom", "heads": 4},
}
LONG = {("polylm", "fp32"), ("llama", "fp64")}  # half a minute each


def steps(
    family: str, precision: str, documents: bool, backends: Kernels = Kernels()
) -> tuple[list[float], list[torch.Tensor]]:
    settings = cases.config(layers=1, micro_batch=8, **CASES[family])
    train = settings.train.model_copy(update={"precision": precision})
    built: Engine = cases.engine(1, settings.model_copy(update={"train": train, "kernels": backends}))
    result = built.step(cases.mine(cases.global_batch(0, documents=documents), built), rate=0.01, sources=2)
    return [result.loss, result.gradient_norm], [bucket.values.clone() for bucket in built.buffers.buckets]


@pytest.mark.parametrize(
    ("family", "precision", "tolerance"),
    [
        pytest.param(family, *precision, marks=pytest.mark.long if (family, precision[0]) in LONG else ())
        for family in CASES
        for precision in (("fp64", 1e-12), ("fp32", 3e-5))
    ],
)
def test_a_step_by_kernels_is_that_by_references(family: str, precision: str, tolerance: float) -> None:
    """In fp32 with documents, which the attention's kernel keeps apart; in float64 attention has no kernel."""
    documents = precision == "fp32"
    numbers, weights = steps(family, precision, documents)
    with kernels():
        by_kernels, their_weights = steps(family, precision, documents)
    assert by_kernels == pytest.approx(numbers, rel=tolerance)
    for mine, theirs in zip(weights, their_weights, strict=True):
        assert float((mine - theirs).abs().max()) <= 100 * tolerance * float(mine.abs().max())


@pytest.mark.parametrize(
    "family", ["llama", *(pytest.param(each, marks=pytest.mark.long) for each in ("polylm", "bloom"))]
)
def test_a_step_by_chosen_back_ends(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's attention in place of the kernel, with masks; and of flash-attn and apex, which others stand for."""
    numbers, weights = steps(family, "fp32", True)
    others = Flash(), Norms(), Adam()
    for each in others:
        monkeypatch.setitem(sys.modules, each.__name__, each)
    forget()
    for chosen in (
        Kernels(attention="sdpa", norm="triton", optimizer="triton"),
        Kernels(attention="flash_attn", norm="apex", optimizer="apex"),
    ):
        with kernels():
            found, their_weights = steps(family, "fp32", True, chosen)
        assert found == pytest.approx(numbers, rel=3e-5)
        for mine, theirs in zip(weights, their_weights, strict=True):
            assert float((mine - theirs).abs().max()) <= 3e-3 * float(mine.abs().max())
    forget()
    assert all(each.calls for each in others)


def test_what_computes_every_op_is_found_out() -> None:
    settings = cases.config(layers=1, family="llama", dropout=0.1)
    device = torch.device("cpu")
    plain = ("norm", "activation", "rotary", "dropout", "loss", "AdamW")
    assert detect(settings, device, torch.float32) == {"attention": "sdpa", **dict.fromkeys(plain, "torch")}
    with kernels():
        assert detect(settings, device, torch.float32) == dict.fromkeys(("attention", *plain), "triton")
        assert detect(settings, device, torch.float64)["attention"] == "sdpa"
    large = settings.model_copy(update={"model": settings.model.model_copy(update={"vocabulary": 1 << 26})})
    assert detect(large, device, torch.float32)["loss"] == "torch in chunks"
    dropped = {"attention_dropout": 0.1, "position": "learned", "dropout": 0.0}
    explicit = settings.model_copy(update={"model": settings.model.model_copy(update=dropped)})
    found = detect(explicit, device, torch.float32)
    assert found["attention"] == "torch with all probabilities"
    assert found.keys() == {"attention", "norm", "activation", "loss", "AdamW"}


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (Kernels(attention="triton"), "kernels.attention is 'triton': attention: the back end triton is for GPUs"),
        (Kernels(attention="flash_attn"), "kernels.attention is 'flash_attn': attention: the back end flash_attn is not"
         " installed: pip install flash-attn"),
        (Kernels(norm="apex"), "kernels.norm is 'apex': norm: the back end apex is for GPUs, and x is on cpu"),
        (Kernels(optimizer="apex"), "kernels.optimizer is 'apex': adamw: the back end apex is for GPUs"),
    ],
)  # fmt: skip
def test_a_chosen_back_end_that_is_missing_ends_the_run(
    chosen: Kernels, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    forget()
    settings = cases.config(layers=1).model_copy(update={"kernels": chosen})
    with pytest.raises(ConfigError, match=re.escape(message)):
        cases.engine(1, settings)


def forget() -> None:
    """What was found of packages."""
    for each in (apex_ops.norms, apex_ops.adam, flash_attn_library):
        each.cache_clear()
