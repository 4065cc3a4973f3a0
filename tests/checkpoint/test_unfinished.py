"""Folders that are written file by file: what an interruption keeps, what is discarded, what is refused."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megapoly.checkpoint.unfinished import Unfinished, fingerprint
from megapoly.errors import CheckpointError

IDENTITY = {"source": [["a", 3, 5]], "dtype": None}
ROOT = Path(__file__).resolve().parents[2]


def write(text):
    def to(path):
        assert not path.exists()
        path.write_text(text)
        return {"length": len(text)}

    return to


def test_a_folder_gets_its_name_when_it_is_whole(tmp_path):
    final = tmp_path / "new" / "out"
    with Unfinished(final, IDENTITY) as unfinished:
        assert unfinished.finish_file("a", write("aaa")) == {"length": 3}
        unfinished.finish_file("deep/er/b", write("bb"))
        assert unfinished.done("a") == {"length": 3}
        assert unfinished.done("c") is None
        assert not final.exists()
        assert unfinished.finish() == final
    assert {p.relative_to(final).as_posix(): p.read_text() for p in final.rglob("*") if p.is_file()} == {
        "a": "aaa",
        "deep/er/b": "bb",
    }
    assert [p.name for p in final.parent.iterdir()] == ["out"]


def interrupted(final, identity=IDENTITY):
    """As a kill in the middle of the second file leaves it."""
    with Unfinished(final, identity) as unfinished:
        unfinished.finish_file("a", write("aaa"))
        unfinished.finish_file("b", write("bb"))
    (unfinished.path / "deep").mkdir()
    (unfinished.path / "deep" / ".c.partial").write_text("half")
    return unfinished.path


def test_finished_files_stay_over_an_interruption(tmp_path):
    path = interrupted(tmp_path / "out")
    inode = (path / "a").stat().st_ino
    (path / "b").write_text("b")  # of another size than was noted: not finished
    with open(path / ".journal", "a") as journal:
        journal.write('{"name": "c", "byt')
    with Unfinished(tmp_path / "out", IDENTITY) as unfinished:
        assert unfinished.note == "goes on after the 1 file that an interrupted attempt has finished"
        assert unfinished.done("a") == {"length": 3}
        assert unfinished.done("b") is None
        unfinished.finish_file("b", write("bb"))
        unfinished.finish_file("deep/c", write("c"))
        final = unfinished.finish()
    assert (final / "a").stat().st_ino == inode
    assert sorted(p.name for p in final.rglob("*")) == ["a", "b", "c", "deep"]


@pytest.mark.parametrize(
    ("other", "keys"),
    [
        ({**IDENTITY, "dtype": "float16"}, "dtype"),
        ({**IDENTITY, "source": [["a", 3, 6]]}, "source"),
        ({}, "source"),
    ],
)
def test_other_work_is_discarded_with_a_note(tmp_path, other, keys):
    path = interrupted(tmp_path / "out")
    with Unfinished(tmp_path / "out", other) as unfinished:
        assert unfinished.note == f"discarded an interrupted attempt of other work ({keys})"
        assert unfinished.done("a") is None
    assert [p.name for p in path.iterdir()] == [".journal"]


def test_another_version_begins_anew(tmp_path):
    path = interrupted(tmp_path / "out")
    lines = (path / ".journal").read_text().splitlines(keepends=True)
    identity = {**json.loads(lines[0]), "megapoly": "0.0.0"}
    (path / ".journal").write_text(json.dumps(identity) + "\n" + "".join(lines[1:]))
    with Unfinished(tmp_path / "out", IDENTITY) as unfinished:
        assert "(megapoly)" in unfinished.note
        assert unfinished.done("a") is None


def test_what_exists_is_refused(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match="out: exists already"):
        Unfinished(tmp_path / "out", IDENTITY)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_parent_that_is_a_file_is_named(tmp_path):
    (tmp_path / "file").touch()
    for final in (tmp_path / "file" / "out", tmp_path / "file" / "deeper" / "out"):
        with pytest.raises(CheckpointError, match=r"out: cannot be made, since .*/file.* is a file and no folder"):
            Unfinished(final, IDENTITY)


def test_two_at_once_are_refused(tmp_path):
    with Unfinished(tmp_path / "out", IDENTITY) as unfinished:
        with pytest.raises(CheckpointError, match="another process is writing it"):
            Unfinished(tmp_path / "out", {})
        unfinished.finish_file("a", write("aaa"))
    Unfinished(tmp_path / "out", IDENTITY).__exit__()


def test_a_full_disk_leaves_the_finished_files(tmp_path):
    def full(path):
        path.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with Unfinished(tmp_path / "out", IDENTITY) as unfinished:
        unfinished.finish_file("a", write("aaa"))
        with pytest.raises(CheckpointError, match=r"b: could not be written \(No space left.*after the 1 finished"):
            unfinished.finish_file("b", full)
    assert sorted(p.name for p in unfinished.path.iterdir()) == [".journal", "a"]
    assert not (tmp_path / "out").exists()


def test_a_killed_process_leaves_what_it_has_finished(tmp_path):
    script = (
        "import os, sys; from pathlib import Path; from megapoly.checkpoint.unfinished import Unfinished\n"
        f"u = Unfinished(Path(sys.argv[1]), {IDENTITY!r})\n"
        "u.finish_file('a', lambda path: path.write_text('aaa'))\n"
        "u.finish_file('b', lambda path: (path.write_text('b'), os.kill(os.getpid(), 9)))\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    ran = subprocess.run([sys.executable, "-c", script, tmp_path / "out"], env=environment, check=False)
    assert ran.returncode == -signal.SIGKILL
    with Unfinished(tmp_path / "out", IDENTITY) as unfinished:  # the lock went with the process
        assert unfinished.done("a") == 3
        assert unfinished.done("b") is None
        unfinished.finish_file("b", write("bb"))
        final = unfinished.finish()
    assert sorted(p.name for p in final.iterdir()) == ["a", "b"]


def test_a_changed_file_has_another_fingerprint(tmp_path):
    file = tmp_path / "a"
    file.write_text("abc")
    first = fingerprint([file])
    assert fingerprint([file]) == first
    assert first[0][:2] == ["a", 3]
    os.utime(file, ns=(0, 1))
    assert fingerprint([file]) != first
