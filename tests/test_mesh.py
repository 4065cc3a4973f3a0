"""Rank arithmetic, against numpy's row-major arrays."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megapoly.mesh import AXES, Mesh

sizes = st.integers(1, 4)
meshes = st.builds(Mesh, dp=sizes, pp=sizes, tp=sizes)


def ranks(mesh):
    """All ranks as an array [pp, dp, tp]."""
    return np.arange(mesh.pp * mesh.dp * mesh.tp).reshape(mesh.pp, mesh.dp, mesh.tp)


@given(meshes)
def test_coordinates_and_rank(mesh):
    array = ranks(mesh)
    assert mesh.world_size == array.size
    for (pp, dp, tp), rank in np.ndenumerate(array):
        assert mesh.coordinates(int(rank)) == {"pp": pp, "dp": dp, "tp": tp}
        assert mesh.rank(pp=pp, dp=dp, tp=tp) == rank
    assert mesh.rank(dp=mesh.dp - 1) == array[0, -1, 0]
    assert [mesh.size(axis) for axis in AXES] == list(array.shape)


@given(meshes)
def test_groups(mesh):
    """For every set of axes: the ranks of the array along them."""
    array = ranks(mesh)
    for n in range(4):
        for axes in itertools.permutations(AXES, n):
            inner = [i for i, axis in enumerate(AXES) if axis in axes]
            outer = [i for i in range(3) if i not in inner]
            rows = array.transpose(*outer, *inner).reshape(-1, np.prod([array.shape[i] for i in inner], dtype=int))
            expected = [tuple(row) for row in rows.tolist()]
            assert mesh.groups(axes) == sorted(expected)
            for group in expected:
                assert all(mesh.group(axes, rank) == group for rank in group)


def test_tensor_parallel_neighbours_are_adjacent():
    mesh = Mesh(dp=4, pp=2, tp=8)
    assert mesh.group(("tp",), 19) == tuple(range(16, 24))
    assert mesh.group(("pp",), 19) == (19, 51)
    assert mesh.group(("dp",), 19) == (3, 11, 19, 27)
    assert str(mesh) == "dp 4 x pp 2 x tp 8"


def test_what_is_outside_is_refused():
    with pytest.raises(ValueError, match="mesh axis pp has size 0"):
        Mesh(pp=0)
    mesh = Mesh(dp=2, tp=3)
    for rank in (-1, 6):
        with pytest.raises(ValueError, match=f"rank {rank} is outside a mesh of 6 ranks"):
            mesh.coordinates(rank)
    with pytest.raises(ValueError, match="coordinate tp=3 is outside its axis of size 3"):
        mesh.rank(tp=3)
    with pytest.raises(ValueError, match=r"unknown mesh axes: \['cp'\]"):
        mesh.rank(cp=0)
    with pytest.raises(ValueError, match=r"unknown mesh axes: \['cp'\]"):
        mesh.group(("dp", "cp"), 0)
