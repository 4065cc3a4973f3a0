"""The norms in CUDA C++: compiled for GPUs, and run on a CPU by an emulator, since nothing here needs a GPU.

On a machine with a GPU and the extension, the same cases run there.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from megapoly_kernels import norm_cuda
from megapoly_kernels.norm import layer_norm, layer_norm_reference, rms_norm, rms_norm_reference
from tests.kernels.rule import GPU, check, gradients, kernels, needs_triton
from tests.kernels.test_norm import normal, parameters, within_ulps_of_the_terms

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "csrc/cuda").glob("*.cu"))
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
CODES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2, torch.float64: 3}


@needs_nvcc
def test_compiles_without_spills(tmp_path: Path) -> None:
    """For sm_80 and sm_90a; what ptxas says is printed."""
    assert len(SOURCES) == 2
    archs = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ("80", "90a")]
    command = [str(NVCC), "-c", "-std=c++17", "-O3", "-Xptxas", "-v", *archs]
    running = [
        subprocess.Popen([*command, str(file), "-o", str(tmp_path / file.stem)], stderr=subprocess.PIPE, text=True)
        for file in SOURCES
    ]
    said = "".join(each.communicate()[1] for each in running)
    assert not any(each.returncode for each in running), said
    print(table := list(_kernels(said)), sep="\n")
    assert len(table) == 2 * (12 + 12 + 2)  # dtypes and alignments, forward and backward, and the sums
    assert not [row for row in table if row[3]]


def _kernels(said: str) -> Iterator[tuple[str, str, int, int]]:
    """Name, architecture, registers and bytes spilled, of what ptxas says."""
    pattern = r"Compiling entry function '(\w+)' for '(\w+)'(.*?)Used (\d+) registers"
    for name, arch, middle, registers in re.findall(pattern, said, re.DOTALL):
        yield name, arch, int(registers), sum(int(each) for each in re.findall(r"(\d+) bytes spill", middle))


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _matrix(x: Tensor | None) -> tuple[int, int]:
    return (0, 0) if x is None else (x.data_ptr(), x.stride(0))


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    if NVCC is None:
        pytest.skip("nvcc, whose headers are needed, is not installed")
    made = tmp_path_factory.mktemp("emulator") / "emulator.so"
    flags = ["-std=c++17", "-O1", "-shared", "-cudart=none", "-Xcompiler=-fPIC,-w", f"-I{ROOT / 'csrc/cuda'}"]
    subprocess.run([NVCC, *flags, str(ROOT / "tests/kernels/cuda_emulator.cpp"), "-o", str(made)], check=True)
    return ctypes.CDLL(str(made))


def _forward(
    library: ctypes.CDLL,
    x: Tensor | None,
    base: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    h: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    epsilon: float,
) -> None:
    assert x is None or x.dtype == y.dtype
    rest = [_address(each) for each in (weight, bias, y, h, mean, rstd)]
    given = [CODES[y.dtype], CODES[base.dtype], *base.shape, *_matrix(x), *_matrix(base), *rest]
    library.emulate_forward((ctypes.c_int64 * len(given))(*given), ctypes.c_double(epsilon))


def _backward(library: ctypes.CDLL, dy: Tensor, h: Tensor, into: Tensor | None, *rest: Tensor | None) -> None:
    matrices = [*_matrix(dy), *_matrix(h), *_matrix(into)]
    given = [CODES[dy.dtype], CODES[h.dtype], *h.shape, *matrices, *(_address(each) for each in rest)]
    library.emulate_backward((ctypes.c_int64 * len(given))(*given))


@pytest.fixture(params=[232448, 20000, 1000] if not GPU else [0])
def cuda(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the tables say CUDA for all rows. With less shared memory, less is kept there."""
    if not GPU:
        library = request.getfixturevalue("emulator")
        library.emulate(ctypes.c_int64(request.param), ctypes.c_int64(0))
        made = SimpleNamespace(norm_forward=partial(_forward, library), norm_backward=partial(_backward, library))
        monkeypatch.setattr(norm_cuda, "_cuda", made)
    elif norm_cuda._cuda is None:
        pytest.skip("megapoly_kernels._cuda is not built")
    major, minor = torch.cuda.get_device_capability() if GPU else (9, 0)
    everything = frozenset((10 * major + minor, itemsize, 0) for itemsize in (2, 4, 8))
    monkeypatch.setattr(norm_cuda, "FORWARD", everything)
    monkeypatch.setattr(norm_cuda, "BACKWARD", everything)


@needs_triton
@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("shape", [(7, 127), (3, 1, 1024), (5, 2056), (3, 4097)])
def test_kernels(shape: tuple[int, ...]) -> None:
    """The emulator also gets bf16 right."""
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        x, (weight, bias) = 2 + 3 * normal(*shape, dtype=dtype), parameters(shape[-1], dtype)
        stream = normal(*shape, dtype=torch.promote_types(dtype, torch.float32), seed=4)
        check(layer_norm, layer_norm_reference, [x, weight, bias, stream])
        check(layer_norm, layer_norm_reference, [x, weight])
        check(rms_norm, rms_norm_reference, [x, weight, x])


@needs_triton
@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("columns", [2, 3, 5, 9])
def test_one_row_of_few_elements(columns: int) -> None:
    within_ulps_of_the_terms(columns, torch.float32)
    within_ulps_of_the_terms(columns, torch.float64)


@needs_triton
@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize(
    ("of_x", "of_residual", "of_weight"),
    [
        (torch.float32, torch.bfloat16, torch.bfloat16),
        (torch.float32, None, torch.float16),
        (torch.float16, None, torch.float32),
        (torch.float16, torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.float32, torch.float64, torch.float32),
        (torch.float32, None, torch.float64),
    ],
    ids=str,
)
def test_mixed_dtypes(of_x: torch.dtype, of_residual: torch.dtype | None, of_weight: torch.dtype) -> None:
    x, (weight, bias) = normal(3, 72, dtype=of_x), parameters(72, of_weight)
    residual = None if of_residual is None else normal(3, 72, dtype=of_residual, seed=4)
    check(layer_norm, layer_norm_reference, [x, weight, bias, residual])
    check(rms_norm, rms_norm_reference, [x, weight, residual])


@needs_triton
@pytest.mark.usefixtures("cuda")
def test_strides_and_alignment() -> None:
    weight, bias = normal(28)[::2], normal(14, 2)[:, 1]
    for x in (normal(3, 5, 3, 14)[:, :, 1], normal(5, 28)[:, ::2], normal(5, 15)[:, 1:], normal(1, 14).expand(5, 14)):
        check(layer_norm, layer_norm_reference, [x, weight, bias, x])
        check(rms_norm, rms_norm_reference, [x.float(), weight.float(), x])


@needs_triton
@pytest.mark.skipif(GPU, reason="the order of threads is the emulator's")
@pytest.mark.usefixtures("cuda")
def test_the_order_of_threads_is_nothing(emulator: ctypes.CDLL) -> None:
    """A race would show."""
    x, (weight, bias) = normal(3, 1100, dtype=torch.float32), parameters(1100, torch.float32)
    found = []
    for order in (0, 1):
        emulator.emulate(ctypes.c_int64(30000), ctypes.c_int64(order))
        with kernels():
            found.append(gradients(layer_norm, [x, weight, bias, x]))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_the_table_alone_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norm_cuda, "_cuda", SimpleNamespace())
    table = frozenset({(90, 2, 16384), (80, 4, 32768)})
    assert norm_cuda.takes(table, 90, 2, 16384)
    assert norm_cuda.takes(table, 90, 2, 65536)
    assert norm_cuda.takes(table, 80, 4, 65536)
    for arch, itemsize, columns in ((90, 2, 16383), (90, 4, 65536), (80, 2, 65536), (100, 2, 65536), (80, 4, 16384)):
        assert not norm_cuda.takes(table, arch, itemsize, columns)
    monkeypatch.setattr(norm_cuda, "_cuda", None)
    assert not norm_cuda.takes(table, 90, 2, 16384)
