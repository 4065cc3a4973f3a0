"""Runs that are killed, cut off or stopped at any moment go on: nothing is lost, and nothing is there twice."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.instruct import runs
from tests.instruct.runs import NEEDED, ROWS, go
from tests.instruct.server import Endpoint


def kill_and_resume(path: Path, kills: int, faulty: float, seed: int, undisturbed: dict[str, bytes]) -> None:
    """SIGKILL at random requests, when they come or have been answered, and a moment later."""
    pick = random.Random(seed)
    process: subprocess.Popen[bytes] | None = None
    due: tuple[int, str, float] | None = None

    def hook(number: int, phase: str) -> None:
        if process is not None and due is not None and number >= due[0] and phase == due[1]:
            time.sleep(due[2])
            process.kill()

    command = [sys.executable, "-m", "megapoly", "instruct", "generate", str(path), *(runs.SHORT if faulty else ())]
    with Endpoint(ROWS, faulty, hook=hook) as endpoint:
        path.write_text(path.read_text().replace("URL", endpoint.url))
        killed = 0
        for _ in range(kills):
            due = (
                endpoint.total + pick.randrange(6),
                pick.choice(("asked", "answered")),
                pick.choice((0, 0.004, 0.02)),
            )
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            killed += process.wait(timeout=100) == -signal.SIGKILL
        due = None
        assert killed
        assert subprocess.run(command, stdout=subprocess.DEVNULL, timeout=100).returncode == 0
    run = path.parent / "run"
    assert runs.files(run) == undisturbed
    found = runs.journal(run)
    assert len(found.answers) == NEEDED
    assert runs.lines(run)["ask"] == NEEDED + sum(found.faults.values())
    assert endpoint.total <= NEEDED + sum(found.faults.values())
    assert 0 < found.faults["interrupted"] <= killed * 4
    assert found.spent.total >= endpoint.billed


def test_killed_at_random_requests_it_goes_on(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    kill_and_resume(runs.write(tmp_path, "URL"), 2, 0.0, 1, undisturbed)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(4))
def test_killed_often_amid_faults_it_goes_on(tmp_path: Path, undisturbed: dict[str, bytes], seed: int) -> None:
    kill_and_resume(runs.write(tmp_path, "URL"), 15, 0.4, seed, undisturbed)


def test_a_journal_cut_at_any_byte_is_gone_on_with(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    """As a kill leaves it, in the middle of a line too."""
    with Endpoint(ROWS) as endpoint:
        path = runs.write(tmp_path, endpoint.url)
        assert go(path) == 0
        journal = tmp_path / "run/requests.es.jsonl"
        whole = journal.read_bytes()
        pick = random.Random(0)
        for _ in range(6):
            journal.write_bytes(whole[: pick.randrange(len(whole))])
            assert go(path) == 0
            assert runs.files(tmp_path / "run") == undisturbed
            assert len(runs.journal(tmp_path / "run").answers) == NEEDED


def test_ctrl_c_keeps_the_answers_under_way(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    process: subprocess.Popen[str] | None = None

    def hook(number: int, phase: str) -> None:
        if number == 9 and phase == "asked":
            assert process is not None
            process.send_signal(signal.SIGINT)
            time.sleep(0.1)

    command = [sys.executable, "-m", "megapoly", "instruct", "generate", str(runs.write(tmp_path, "URL"))]
    with Endpoint(ROWS, hook=hook) as endpoint:
        path = Path(command[-1])
        path.write_text(path.read_text().replace("URL", endpoint.url))
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        out, err = process.communicate(timeout=100)
        assert process.returncode == 1
        assert "Stopped. The same command goes on." in out
        assert "waits for the answers under way" in err
        assert runs.lines(tmp_path / "run")["answer"] == runs.lines(tmp_path / "run")["ask"] == endpoint.total < NEEDED
        assert go(path) == 0
        assert endpoint.total == NEEDED
    assert runs.files(tmp_path / "run") == undisturbed


def test_a_second_run_in_the_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def hook(number: int, phase: str) -> None:
        begun.set()
        go_on.wait(60)

    with Endpoint(ROWS, hook=hook) as endpoint:
        path = runs.write(tmp_path, endpoint.url)
        command = [sys.executable, "-m", "megapoly", "instruct", "generate", str(path)]
        first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        assert begun.wait(60)
        assert go(path) == 1
        assert f"another run works there (process {first.pid} on" in capsys.readouterr().err
        go_on.set()
        assert first.wait(100) == 0
    assert len(runs.journal(tmp_path / "run").answers) == NEEDED
