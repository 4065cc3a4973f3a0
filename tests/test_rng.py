"""Initial values: bit for bit the same slice of one logical tensor under every layout."""

import pytest
import torch

from megapoly import rng
from megapoly.spec import ParamSpec, shard


def filled(
    shape: tuple[int, ...], dim: int, rank: int, size: int, dtype: torch.dtype
) -> tuple[torch.Tensor, ParamSpec]:
    box, local = shard(shape, dim, rank, size, pad=True)
    spec = ParamSpec("some.weight", shape, box, local, std=0.02)
    parameter = torch.full(local, torch.nan, dtype=dtype)
    rng.fill(parameter, spec, seed=3)
    return parameter, spec


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("shape", "dim"), [((1009,), 0), ((130, 77), 0), ((64, 90), 1), ((6, 3, 5, 40), 0)])
def test_every_shard_is_a_slice_of_the_whole(shape: tuple[int, ...], dim: int, dtype: torch.dtype) -> None:
    whole, _ = filled(shape, 0, 0, 1, dtype)
    assert whole.isfinite().all()
    for size in (2, 3, 5, 8):
        if dim and shape[dim] % size:
            continue
        for rank in range(size):
            part, spec = filled(shape, dim, rank, size, dtype)
            inside = tuple(slice(0, n) for n in spec.box.shape)
            assert torch.equal(part[inside], whole[spec.box.slices((0,) * len(shape))])
            assert part.count_nonzero() == part[inside].count_nonzero()


def test_values_depend_on_name_and_seed_and_have_the_stated_deviation() -> None:
    def fill(name: str, seed: int) -> torch.Tensor:
        box, local = shard((400, 300), 0, 0, 1)
        out = torch.empty(local)
        rng.fill(out, ParamSpec(name, (400, 300), box, local, std=0.5), seed)
        return out

    a = fill("a", 1)
    assert not torch.equal(a, fill("b", 1))
    assert not torch.equal(a, fill("a", 2))
    assert torch.equal(a, fill("a", 1))
    assert abs(float(a.std()) - 0.5) < 0.01
    assert a.unique().numel() > 0.99 * a.numel()


def test_constants_need_no_random_numbers() -> None:
    box, local = shard((7,), 0, 0, 1)
    out = torch.full(local, torch.nan)
    rng.fill(out, ParamSpec("norm.weight", (7,), box, local, mean=1.0), 1)
    assert out.tolist() == [1.0] * 7
