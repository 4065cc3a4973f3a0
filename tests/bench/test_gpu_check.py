"""``make gpu-check``: what it says without a GPU, how it goes on after parts that fail, and that its commands exist."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch
import typer

from megapoly.bench import kernels
from megapoly.cli.bench import bench_app

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_check.py"


@pytest.fixture(scope="module")
def check() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so_in_one_line() -> None:
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith(f"gpu-check: PyTorch {torch.__version__} of {sys.executable} finds no GPU. ")
    assert done.stderr.count("\n") == 1


def test_a_missing_package_is_named(check: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "NEEDED", {"json": "json", "no_such_module": "no-such-package"})
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--device=cpu"])
    with pytest.raises(SystemExit, match=r"not installed: no-such-package\. Install them: .* -m pip install no-such-p"):
        check.main()


def test_parts_that_fail_or_are_late_do_not_stop_the_others(
    check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    begun, wait = tmp_path / "begun", subprocess.Popen.wait
    waits = f"import time; print('begins', flush=True); open({str(begun)!r}, 'w'); time.sleep(600)"

    def patient(process: subprocess.Popen[str], timeout: float | None = None) -> int:
        """What is late has begun when it is interrupted, on a slow machine, too."""
        while timeout == 2 and not begun.exists() and process.poll() is None:
            time.sleep(0.05)
        return wait(process, timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", patient)
    results = tmp_path / "results"
    parts = [
        check.Part("works", 60, ["-c", "import megapoly_kernels; print('found')"]),
        check.Part("breaks", 60, ["-c", "raise SystemExit('it broke')"]),
        check.Part("waits", 2, ["-c", waits]),
        check.Part("last", 60, ["-c", "print('the end')"]),
    ]
    monkeypatch.setattr(check, "parts", lambda device, results: parts)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--device=cpu", f"--results={results}"])
    assert check.main() == 1
    out = capsys.readouterr().out
    for text in ("    found", "    it broke", "    begins", "KeyboardInterrupt", "    the end"):
        assert text in out
    assert [path.suffix for path in sorted(results.iterdir())] == [".json", ".md"]
    document = json.loads(next(results.glob("gpu-check-cpu-*.json")).read_text())
    states = [(row["name"], row["state"]) for row in document["rows"]]
    assert states == [("works", "ok"), ("breaks", "failed"), ("waits", "timed out"), ("last", "ok")]
    assert document["versions"]["torch"] == torch.__version__
    assert "| waits | timed out |" in out
    monkeypatch.setattr(check, "parts", lambda device, results: parts[:1])
    assert check.main() == 0


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_its_commands_are_those_of_megapoly_and_fit_into_its_time(check: ModuleType, device: str) -> None:
    parts = check.parts(device, Path("results"))
    assert sum(part.limit for part in parts) <= check.SECONDS < 9 * 60 - check.GRACE
    commands = [part.arguments[3:] for part in parts if part.arguments[:3] == ["-m", "megapoly", "bench"]]
    assert [name for name, *_ in commands] == ["kernels", "step"]
    for name, *arguments in commands:
        command = typer.main.get_command(bench_app).commands[name]  # type: ignore[attr-defined]
        values = command.make_context(name, list(arguments)).params  # an unknown option raises
        assert (values["device"], values["save"]) == (device, Path("results"))
    assert all((SCRIPT.parents[1] / path).exists() for path in check.gpu_tests())


def test_every_op_of_the_kernels_is_measured(check: ModuleType) -> None:
    assert sorted(check.OPS) == kernels.known_ops()
