"""Random damage to every file that is read: our error or a correct read, never a crash, a hang or a wrong token.

The cases are in fuzz.py and fuzz_text.py and run in a process of their own. One case again:
``PYTHONPATH=. python tests/data/fuzz.py FOLDER KIND:NUMBER:1``.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megapoly.data import _index

PROGRAM = Path(__file__).with_name("fuzz.py")

# Cases of a kind in `make test`, and in `make test-long`. A case of a dataset reads all of it many times.
KINDS = {
    ".bin": (20, 4000),
    ".idx": (40, 8000),
    ".json": (30, 8000),
    "jsonl": (20, 4000),
    "jsonl.gz": (50, 8000),
    "jsonl.zst": (40, 8000),
    "txt": (20, 4000),
    "file.txt": (40, 8000),
    "parquet": (50, 8000),
    "plain.parquet": (50, 8000),
    "model": (80, 8000),
}


def fuzz(folder: Path, jobs: list[str], program: Path = PROGRAM) -> dict[str, dict[str, int]]:
    """Run cases, each ``kind:first:count``; how often each outcome came, by kind."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run(
        [sys.executable, str(program), str(folder), *jobs], env=environment, capture_output=True, text=True, check=False
    )
    *cases, last = ended.stdout.splitlines() or ["none"]
    if ended.returncode != 0:
        how = signal.Signals(-ended.returncode).name if ended.returncode < 0 else f"status {ended.returncode}"
        pytest.fail(f"case {last}: {how}\n{ended.stderr[-5000:]}")
    assert len(cases) == sum(int(job.rsplit(":", 1)[1]) for job in jobs)
    return json.loads(last)


def check(counts: dict[str, int], kind: str) -> None:
    """The damage was seen, and some of it was more than a bad header."""
    assert set(counts) <= {"refused", "same", "told"}
    if kind not in ("jsonl", "txt", "file.txt"):  # in which much is text
        assert counts["refused"] > sum(counts.values()) // 4
    if not kind.startswith(("jsonl.", "parquet")):
        assert counts.get("told", 0) + counts.get("same", 0) > sum(counts.values()) // 20


def test_some_damage_of_every_kind(tmp_path):
    found = fuzz(tmp_path, [f"{kind}:0:{few}" for kind, (few, _) in KINDS.items()])
    assert list(found) == list(KINDS)
    for kind, counts in found.items():
        check(counts, kind)
    if os.environ.get("MEGAPOLY_SANITIZE") == "1":
        assert "sanitize" in str(_index.__file__)  # else `make sanitize` would look at the wrong build


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_much_damage(tmp_path, kind):
    few, many = KINDS[kind]
    counts = fuzz(tmp_path, [f"{kind}:{few}:{many}"])[kind]
    print(f"{kind}: {counts}")
    check(counts, kind)


@pytest.mark.parametrize(("end", "how"), [("os.abort()", "SIGABRT"), ("1 / 0", "status 1\n.*ZeroDivisionError")])
def test_the_end_of_the_process_is_a_failure_with_its_case(tmp_path, end, how):
    program = tmp_path / "program.py"
    program.write_text(f"import os\nprint('txt 2')\nprint('txt 3', flush=True)\n{end}\n")
    with pytest.raises(pytest.fail.Exception, match=f"(?s)case txt 3: {how}"):
        fuzz(tmp_path, ["txt:2:2"], program)
