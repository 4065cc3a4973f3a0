"""Compile every kernel at its launch tables' settings with no GPU: ``python -m megapoly_kernels.aot``.

Prints registers, spilled bytes and shared memory, as ptxas reports them, and whether tensor cores and wide loads are
used. Compiling enforces no limit of shared memory; :func:`problems` does.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from megapoly_kernels.activation import variants as activation
from megapoly_kernels.adamw import variants as adamw
from megapoly_kernels.attention_tiles import variants as attention_tiles
from megapoly_kernels.attention_tiles_backward import variants as attention_tiles_backward
from megapoly_kernels.attention_tiles_forward import variants as attention_tiles_forward
from megapoly_kernels.cross_entropy import variants as cross_entropy
from megapoly_kernels.dropout import variants as dropout
from megapoly_kernels.launch import ARCHITECTURES, Variant
from megapoly_kernels.linear_cross_entropy import variants as linear_cross_entropy
from megapoly_kernels.norm_triton import variants as norm_triton
from megapoly_kernels.rotary import variants as rotary

MODULES: dict[str, Callable[[int], Iterable[Variant]]] = {
    "activation": activation,
    "adamw": adamw,
    "attention_tiles": attention_tiles,
    "attention_tiles_forward": attention_tiles_forward,
    "attention_tiles_backward": attention_tiles_backward,
    "cross_entropy": cross_entropy,
    "dropout": dropout,
    "linear_cross_entropy": linear_cross_entropy,
    "norm_triton": norm_triton,
    "rotary": rotary,
}
SHARED = {80: 166_912, 90: 232_448}  # bytes a program may have


@dataclass(frozen=True)
class Compiled:
    """What a variant was compiled to.

    Attributes:
        spills: bytes stored and loaded since registers did not suffice.
        shared: bytes a program.
        wgmma, wide: numbers of instructions for sm_90's tensor cores, and of loads of 16 bytes.
    """

    variant: str
    arch: int
    warps: int
    registers: int
    spills: int
    shared: int
    wgmma: int
    wide: int
    problems: tuple[str, ...] = ()


def compile_variant(variant: Variant, arch: int) -> Compiled:
    """Compile for an architecture. Neither a GPU nor its driver is needed."""
    from triton import compile as compile_kernel
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = {**variant.constants, **variant.launch.constants}
    order = list(variant.kernel.arg_names)
    signature = {name: variant.types.get(name, "constexpr") for name in order}
    whole = [name for name, kind in variant.types.items() if kind[0] in "*iu" and name not in variant.odd]
    source = ASTSource(
        fn=variant.kernel,
        signature=signature,
        constexprs={(order.index(name),): value for name, value in constants.items()},
        attrs={(order.index(name),): [["tt.divisibility", 16]] for name in whole},
    )
    options = {"num_warps": variant.launch.warps, "num_stages": variant.launch.stages}
    compiled = compile_kernel(source, target=GPUTarget("cuda", arch, 32), options=options)
    ptx = compiled.asm["ptx"]
    registers, spills = _resources(ptx)
    found = Compiled(
        variant.name, arch, variant.launch.warps, registers, spills, compiled.metadata.shared,
        len(re.findall(r"wgmma\.mma_async", ptx)), len(re.findall(_WIDE, ptx)),
    )  # fmt: skip
    return Compiled(**{**found.__dict__, "problems": tuple(problems(variant, found))})


_WIDE = (
    r"ld\.global\S*\.v4\.[bfus]32|ld\.global\S*\.v2\.[bfus]64|ld\.global\S*\.v8\.[bfus]16"
    r"|cp\.async\.c[ag]\.shared\.global \[[^]]+\], \[[^]]+\], 0x10|cp\.async\.bulk"
)


def problems(variant: Variant, found: Compiled) -> Iterator[str]:
    """What a compiled kernel may not be."""
    if found.spills:
        yield f"spills {found.spills} bytes"
    if found.shared > SHARED[found.arch]:
        yield f"needs {found.shared} bytes of shared memory, the limit is {SHARED[found.arch]}"
    if variant.wgmma and found.arch >= 90 and not found.wgmma:
        yield "does not use wgmma"
    if variant.wide and not found.wide:
        yield "has no loads of 16 bytes"


def _resources(ptx: str) -> tuple[int, int]:
    """Registers of a thread and spilled bytes, as ptxas says."""
    from triton import knobs

    target = re.search(r"\.target (sm_\w+)", ptx)
    assert target
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.ptx"
        file.write_text(ptx)
        command = [knobs.nvidia.ptxas.path, "-v", f"-arch={target[1]}", str(file), "-o", str(file) + ".cubin"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = max(int(each) for each in re.findall(r"Used (\d+) registers", said))
    return registers, sum(int(each) for each in re.findall(r"(\d+) bytes spill", said))


def _compile(task: tuple[str, int, int]) -> Compiled:
    module, number, arch = task
    return compile_variant(list(MODULES[module](arch))[number], arch)


def compile_all(archs: Sequence[int] = ARCHITECTURES, chosen: str = "", processes: int = 2) -> Iterator[Compiled]:
    """Every variant of one module, or of all."""
    found = [name for name in MODULES if chosen in ("", name)]
    tasks = [(name, i, arch) for name in found for arch in archs for i, _ in enumerate(MODULES[name](arch))]
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        yield from pool.map(_compile, tasks)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("chosen", nargs="?", default="", choices=["", *MODULES], help="one module; all where not given")
    parser.add_argument("--arch", type=int, nargs="+", default=list(ARCHITECTURES), choices=ARCHITECTURES)
    parser.add_argument("--processes", type=int, default=2)
    given = parser.parse_args()
    print(f"{'kernel':58} {'arch':>5} {'warps':>5} {'regs':>5} {'spill':>6} {'shared':>7} {'wgmma':>5} {'16 B':>5}")
    failed = 0
    for row in compile_all(given.arch, given.chosen, given.processes):
        numbers = f"{row.warps:5} {row.registers:5} {row.spills:6} {row.shared:7} {row.wgmma:5} {row.wide:5}"
        print(f"{row.variant:58} sm_{row.arch} {numbers}  {'; '.join(row.problems)}", flush=True)
        failed += bool(row.problems)
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
