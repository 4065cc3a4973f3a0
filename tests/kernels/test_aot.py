"""Every kernel is compiled for sm_80 and sm_90 at its launch tables' settings, and is what it should be."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import megapoly_kernels
from megapoly_kernels import aot
from megapoly_kernels.launch import ARCHITECTURES
from tests.kernels.rule import needs_triton


def test_every_file_of_kernels_is_compiled() -> None:
    files = Path(megapoly_kernels.__path__[0]).glob("*.py")
    having = {file.stem for file in files if "\ndef variants(" in file.read_text()}
    assert having == set(aot.MODULES)


def test_the_import_leaves_the_compiler_alone() -> None:
    """It takes as long as all of torch, and every rank would wait for it."""
    code = "import sys, megapoly_kernels; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@needs_triton
@pytest.mark.parametrize("arch", [90, pytest.param(80, marks=pytest.mark.long)])
def test_compiles_without_spills(arch: int) -> None:
    """In a process of its own, which does not interpret."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "megapoly_kernels.aot", "--arch", str(arch)],
        env=environment,
        capture_output=True,
        text=True,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert arch in ARCHITECTURES
    expected = [len(list(variants(arch))) for variants in aot.MODULES.values()]
    assert all(expected)
    assert len(done.stdout.splitlines()) == sum(expected) + 1
