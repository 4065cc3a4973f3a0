"""AdamW over flat buffers: the kernel against the reference, the reference against PyTorch's and the engine's own."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megapoly.config import Optimizer
from megapoly.optim.adam import AdamW
from megapoly_kernels.adamw import adamw
from tests.kernels.rule import BACKWARD, DEVICE, DTYPES, close, kernels, needs_triton

SETTINGS = {"rate": 3e-3, "scale": 0.37, "beta1": 0.9, "beta2": 0.95, "epsilon": 1e-8, "weight_decay": 0.1}


def buffers(length: int, dtype: torch.dtype, gradient: torch.dtype | None = None) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(length)
    wide = torch.promote_types(dtype, torch.float32)

    def normal() -> Tensor:
        return torch.randn(length, generator=random, dtype=torch.float64).to(DEVICE)

    made = {"weights": normal().to(dtype).to(wide), "gradient": normal().to(gradient or wide)}
    made |= {"first": 0.1 * normal().to(wide), "second": 0.01 * normal().to(wide).square()}
    return made | ({"values": made["weights"].to(dtype)} if dtype != wide else {})


def updated(given: dict[str, Tensor], step: Any = 7, **changes: Any) -> dict[str, Tensor]:
    own = {name: tensor if name == "gradient" else tensor.clone() for name, tensor in given.items()}
    adamw(**own, step=step, **{**SETTINGS, **changes})  # type: ignore[arg-type]
    return own


def check(given: dict[str, Tensor], step: Any = 7, **changes: Any) -> None:
    with kernels():
        found, again = updated(given, step, **changes), updated(given, step, **changes)
    host = {name: tensor.cpu() for name, tensor in given.items()}
    plain = {n: float(v) if isinstance(v, Tensor) else v for n, v in {"step": step, **changes}.items()}
    same = updated(host, **plain)
    wide = {name: tensor.double() for name, tensor in host.items() if name != "values"}
    exact = updated(wide, **plain)
    exact["values"] = exact["weights"]
    for name, tensor in found.items():
        assert torch.equal(tensor, again[name])
        close(tensor.cpu(), same[name], exact[name], BACKWARD, None, name)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [0, 1, 127, 128, 1023, 1025, 5003])
def test_kernel(length: int, dtype: torch.dtype) -> None:
    check(buffers(length, dtype))
    check(buffers(length, dtype), step=1, weight_decay=0.0)


@needs_triton
def test_kernel_in_float64_with_exact_settings() -> None:
    given = buffers(601, torch.float64)
    for step in (1, 2, 1000, 10**7):
        check(given, step, beta2=0.999)
    check(given, beta1=0.0, beta2=0.0, epsilon=1e-3)


@needs_triton
def test_numbers_may_be_on_the_device_and_narrow() -> None:
    given = buffers(257, torch.float32, torch.float16)
    given["gradient"] = torch.stack((given["gradient"], given["gradient"]), 1)[:, 1]
    now = {"rate": torch.tensor(0.25), "scale": torch.tensor(0.5), "step": torch.tensor(3)}
    now = {name: value.to(DEVICE) for name, value in now.items()}
    check(given, **now)
    with kernels():
        assert torch.equal(
            updated(given, **now)["weights"], updated(given, rate=0.25, scale=0.5, step=3)["weights"]
        )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_reference_is_pytorch_s(dtype: torch.dtype) -> None:
    given = buffers(200, dtype)
    weights, gradient = given["weights"], given["gradient"]
    first, second = torch.zeros_like(weights), torch.zeros_like(weights)
    parameter = torch.nn.Parameter(weights.clone())
    peer = torch.optim.AdamW([parameter], lr=3e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for step in range(1, 6):
        g = gradient * step
        parameter.grad = 0.37 * g
        peer.step()
        adamw(weights, g, first, second, step=step, **SETTINGS)  # type: ignore[arg-type]
    torch.testing.assert_close(weights, parameter.detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_shards_have_the_bits_of_the_whole(dtype: torch.dtype) -> None:
    given = buffers(5003, dtype, torch.float32)
    whole, cuts = updated(given), [0, 1, 4, 68, 1031, 3100, 5003]
    parts = [updated({name: tensor[a:b] for name, tensor in given.items()}) for a, b in pairwise(cuts)]
    for name, tensor in whole.items():
        assert torch.equal(torch.cat([part[name] for part in parts]), tensor)


@pytest.mark.skipif(DEVICE != "cpu", reason="the reference runs on a CPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_engine_s_is_this_one(dtype: torch.dtype) -> None:
    given = buffers((1 << 16) + 77, dtype)
    values = given.get("values", given["weights"])
    bucket = SimpleNamespace(
        values=values.clone(), gradients=given["gradient"].clone(), mine=slice(None), plan=SimpleNamespace(decay=True)
    )
    engine = AdamW(
        SimpleNamespace(buckets=[bucket], gather=lambda number: None),  # type: ignore[arg-type]
        Optimizer(learning_rate=3e-3, beta1=0.9, beta2=0.95, epsilon=1e-8, weight_decay=0.1),
    )
    state = engine.states[0]
    own = {**given, "first": torch.zeros_like(state["first"]), "second": torch.zeros_like(state["second"])}
    for step in range(1, 4):
        bucket.gradients.copy_(given["gradient"])
        engine.step(3e-3, 0.37)
        adamw(**own, step=step, **SETTINGS)  # type: ignore[arg-type]
    assert torch.equal(own["first"], state["first"])
    assert torch.equal(own["second"], state["second"])
    assert torch.equal(own["weights"], state.get("master", bucket.values))
    assert torch.equal(own.get("values", own["weights"]), bucket.values)
    assert torch.equal(given["gradient"], buffers((1 << 16) + 77, dtype)["gradient"])  # not written


@pytest.mark.parametrize("interpret", [False, pytest.param(True, marks=needs_triton)])
def test_operator_is_registered_as_torch_wants(interpret: bool) -> None:
    numbers = [torch.tensor(each, device=DEVICE) for each in (3e-3, 0.37, 7)]
    for dtype in (torch.float32, torch.float16):
        given = buffers(9, dtype)
        tensors = (*(given[name] for name in ("weights", "gradient", "first", "second")), given.get("values"))
        with kernels() if interpret else nullcontext():
            torch.library.opcheck(torch.ops.megapoly.adamw, (*tensors, *numbers, 0.9, 0.95, 1e-8, 0.1))


def test_compiled_without_a_break_and_under_autocast() -> None:
    given = buffers(300, torch.float16)
    rate = torch.tensor(0.01, device=DEVICE)

    def update(own: dict[str, Tensor], rate: Tensor) -> None:
        adamw(**own, rate=rate, scale=0.5, step=3)

    def after(function: Callable[..., None]) -> dict[str, Tensor]:
        own = {name: tensor.clone() for name, tensor in given.items()}
        function(own, rate)
        return own

    eager, whole = after(update), after(torch.compile(update, fullgraph=True, backend="aot_eager"))
    with torch.autocast(DEVICE, torch.bfloat16):
        cast = after(update)
    for name, tensor in eager.items():
        assert torch.equal(tensor, whole[name])
        assert torch.equal(tensor, cast[name])
    assert not torch.equal(eager["values"], given["values"])


def test_parameters_may_need_gradients() -> None:
    given = buffers(5, torch.float32)
    given["weights"].requires_grad_()
    before = given["weights"].detach().clone()
    adamw(**given, rate=0.1, step=1)
    assert not torch.equal(given["weights"].detach(), before)
    assert given["weights"].is_leaf


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": torch.zeros(4, dtype=torch.bfloat16)}, "keep float32 master weights"),
        ({"gradient": torch.zeros(3)}, r"gradient has shape \[3\]"),
        ({"first": torch.zeros(8)[::2]}, "first has stride 2"),
        ({"second": torch.zeros(4, dtype=torch.float64)}, "second is torch.float64, expected torch.float32"),
        ({"beta2": 1.0}, r"beta2 1.0.*expected betas in \[0, 1\)"),
        ({"rate": torch.zeros(1)}, r"rate has shape \[1\] on"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], message: str) -> None:
    given = {name: torch.zeros(4) for name in ("weights", "gradient", "first", "second")}
    with pytest.raises(ValueError, match=message):
        adamw(**{**given, "rate": 0.1, "step": 1, **changes})
