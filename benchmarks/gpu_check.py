"""``make gpu-check``: build, test, benchmark and train on a machine with an NVIDIA GPU, in under 9 minutes.

    python benchmarks/gpu_check.py [--device cpu] [--results FOLDER]

Runs with the interpreter whose PyTorch has CUDA, and fetches and installs nothing: extensions are built in place. Every
part is a process of its own with a limit; one that fails or is late does not stop those after it. Ends with a table of
the parts and writes it beside what they measured; the exit status is 1 where a part failed. ``--device cpu`` tries the
commands with tiny sizes.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 520  # of all parts
GRACE = 8  # between asking a late part to end, and ending it
# What the parts import, by the names to install it by.
NEEDED = {
    "numpy": "numpy", "orjson": "orjson", "sentencepiece": "sentencepiece", "safetensors": "safetensors",
    "pydantic": "pydantic", "typer": "typer", "rich": "rich", "tensorboard": "tensorboard", "pybind11": "pybind11",
    "setuptools": "setuptools", "pytest": "pytest", "hypothesis": "hypothesis", "matplotlib": "matplotlib",
}  # fmt: skip
POLYLM = {"layers": 24, "hidden": 2048, "heads": 16, "sequence": 2048, "vocabulary": 256_000, "micro-batch": 4}
TINY = {"layers": 2, "hidden": 64, "heads": 2, "sequence": 32, "vocabulary": 500, "micro-batch": 1}
# The most wanted first: what the time does not reach is left out.
OPS = ["norm", "attention", "linear_cross_entropy", "cross_entropy", "adamw", "activation", "rotary", "dropout"]


@dataclass(frozen=True)
class Part:
    """A command of this interpreter, and its limit in seconds."""

    name: str
    limit: int
    arguments: Sequence[str]


@dataclass(frozen=True)
class Outcome:
    """How a part ended: ok, failed or timed out."""

    part: str
    state: str
    seconds: float


def parts(device: str, results: Path) -> list[Part]:
    gpu = device == "cuda"
    bench = ["-m", "megapoly", "bench"]
    sizes = [f"--{name}={value}" for name, value in (POLYLM if gpu else TINY).items()]
    tests = ["tests/kernels", *gpu_tests()] if gpu else ["tests/kernels/test_philox.py", *gpu_tests()]
    workers = ["-n", "8", "--dist", "worksteal"] if gpu and importlib.util.find_spec("xdist") else []
    kernels = [*OPS, "--seconds=115"] if gpu else ["rotary", "--quick"]
    found = [
        Part("build", 140, ["setup.py", "-q", "build_ext", "--inplace"]),
        Part("tests", 150, ["-m", "pytest", "-q", "-m", "not long", *workers, *tests]),
        Part("kernels", 135, [*bench, "kernels", *kernels, f"--device={device}", f"--save={results}"]),
        Part(
            "train", 80,
            [*bench, "step", f"--against={'transformers' if gpu else ''}", "--layouts=", *sizes, f"--device={device}",
             "--steps=3" if gpu else "--steps=1", f"--save={results}"],
        ),
    ]  # fmt: skip
    if gpu:
        found.insert(1, Part("CUDA kernels", 15, ["-c", "import torch, megapoly_kernels._cuda"]))
    return found


def gpu_tests() -> list[str]:
    """Files with tests that need a GPU, outside of those of the kernels."""
    found = (path for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in path.read_text("utf-8"))
    return [str(path.relative_to(ROOT)) for path in found if path.parent.name != "kernels"]


def run(part: Part, limit: float, log: Path) -> Outcome:
    """Run a part with its output in ``log``; one that is late is interrupted, so that it can say what it has."""
    paths = [str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    begin, state = time.monotonic(), "ok"
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            [sys.executable, *part.arguments], cwd=ROOT, env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            state = "failed" if process.wait(max(1.0, limit)) else "ok"
        except subprocess.TimeoutExpired:
            state = "timed out"
            os.killpg(process.pid, signal.SIGINT)
            try:
                process.wait(GRACE)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return Outcome(part.name, state, time.monotonic() - begin)


def gpu_name() -> str:
    """Of the first GPU.

    Raises:
        SystemExit: there is none, or no PyTorch that finds it.
    """
    how = "gpu-check needs an NVIDIA GPU and a PyTorch with CUDA; name their interpreter with PYTHON=..."
    try:
        import torch
    except ImportError:
        raise SystemExit(f"gpu-check: {sys.executable} has no PyTorch. {how}") from None
    if not torch.cuda.is_available():
        raise SystemExit(f"gpu-check: PyTorch {torch.__version__} of {sys.executable} finds no GPU. {how}")
    return torch.cuda.get_device_name()


def commit() -> str:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def write(results: Path, device: str, outcomes: Sequence[Outcome], at: str) -> Path:
    """The table of the parts as ``gpu-check-DEVICE-DATE``, JSON and Markdown; the path of the latter."""
    import torch

    today = date.today().isoformat()
    versions = {"torch": torch.__version__, "CUDA": torch.version.cuda, "python": platform.python_version()}
    rows = [{"name": o.part, "value": o.seconds, "unit": "s", "state": o.state} for o in outcomes]
    document = {"device": device, "versions": versions, "date": today, "commit": at, "rows": rows}
    name = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    path = results / f"gpu-check-{name}-{today}.md"
    path.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    numbers = ", ".join(f"{name} {number}" for name, number in versions.items() if number)
    lines = ["# make gpu-check", "", f"{device}; {numbers}; {today}; {at}", "", "| part | state | seconds |"]
    lines += ["| --- | --- | ---: |", *(f"| {o.part} | {o.state} | {o.seconds:.0f} |" for o in outcomes)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: try the commands, tiny")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results", metavar="FOLDER")
    given = parser.parse_args()
    device = gpu_name() if given.device == "cuda" else "CPU"
    missing = [package for module, package in NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing:
        install = f"{sys.executable} -m pip install {' '.join(missing)}"
        raise SystemExit(f"gpu-check: not installed: {', '.join(missing)}. Install them: {install}")
    at, results = commit(), given.results.resolve()
    logs = ROOT / "build/gpu-check"
    for folder in (logs, results):
        folder.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # started in the background, parts would ignore it
    end, outcomes = time.monotonic() + SECONDS, []
    for part in parts(given.device, results):
        print(f"{part.name}: python {shlex.join(part.arguments)}", flush=True)
        log = logs / f"{part.name.replace(' ', '-')}.log"
        outcomes.append(run(part, min(part.limit, end - time.monotonic()), log))
        text = log.read_text(encoding="utf-8", errors="replace").rstrip().splitlines()
        print("\n".join(f"    {line}" for line in (text if part.name in ("kernels", "train") else text[-15:])))
        print(f"{part.name}: {outcomes[-1].state}, {outcomes[-1].seconds:.0f} s; {log.relative_to(ROOT)}", flush=True)
    page = write(results, device, outcomes, at)
    print("\n".join(page.read_text(encoding="utf-8").splitlines()[2:]), page, sep="\n")
    return int(any(outcome.state != "ok" for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
