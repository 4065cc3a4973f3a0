"""Builds that are killed, or whose worker, disk or input is: nothing false is left, and what is whole is not lost."""

from __future__ import annotations

import fcntl
import json
import os
import resource
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from megapoly.data import encode, pieces
from megapoly.data.builder import Assembly, Options, Progress, build
from megapoly.data.indexed import IndexedDataset
from megapoly.data.load_tokenizer import load_tokenizer
from megapoly.errors import DataError
from tests.data.building import SUFFIXES, contents, documents, write_corpus, write_lines

LINES = Options(document="line", validation_fraction=0.1, processes=1)
TWO = replace(LINES, processes=2)

pytestmark = pytest.mark.usefixtures("small_pieces")


class Interrupted(BaseException):
    pass


@pytest.fixture(scope="module")
def one(tmp_path_factory, corpus, tokenizer):
    """The files of a build that is not disturbed, all in one piece."""
    prefix = tmp_path_factory.mktemp("one") / "d"
    build([corpus[0]], prefix, tokenizer, language="xx", options=LINES)
    return contents(prefix)


def interrupt(inputs, prefix, tokenizer, options=LINES, documents=300):
    """A build that ends in the middle."""

    def stop(state):
        if state.documents >= documents:
            raise Interrupted

    with pytest.raises(Interrupted):
        build(inputs, prefix, tokenizer, language="xx", options=options, progress=stop)
    assert not [suffix for suffix in SUFFIXES if prefix.with_name(prefix.name + suffix).exists()]
    return {path.name for path in prefix.with_name(prefix.name + ".build").glob("*.idx")}


# Going on


@pytest.mark.parametrize("options", [LINES, TWO])
def test_what_is_whole_is_not_encoded_again(tmp_path, corpus, tokenizer, one, monkeypatch, options):
    whole = interrupt([corpus[0]], tmp_path / "d", tokenizer, options)
    assert len(whole) > 2
    written = []
    write = encode.Encoder.write

    def noted(self, chunks, prefix, progress):
        written.append(f"{prefix.name}.idx")
        return write(self, chunks, prefix, progress)

    monkeypatch.setattr(encode.Encoder, "write", noted)
    seen: list[Progress] = []
    build([corpus[0]], tmp_path / "d", tokenizer, language="xx", options=LINES, progress=seen.append)
    assert contents(tmp_path / "d") == one
    assert written
    assert not whole & set(written)
    assert seen[-1].documents == len(corpus[1])
    assert 0 < seen[-1].kept_documents < len(corpus[1])
    assert seen[-1].input_read == seen[-1].input_size
    assert sorted(os.listdir(tmp_path)) == ["d.bin", "d.idx", "d.json"]


def test_another_build_does_not_go_on(tmp_path, corpus, tokenizer):
    given = {"inputs": ["a.jsonl", "b.jsonl.gz"], "language": "xx", "options": LINES}

    def make(name, inputs, language, options):
        build([corpus[0] / each for each in inputs], tmp_path / name, tokenizer, language=language, options=options)

    interrupt([corpus[0] / name for name in given["inputs"]], tmp_path / "d", tokenizer)
    for changes, told in (
        ({"language": "yy"}, r"language 'xx', now 'yy'"),
        ({"options": replace(LINES, seed=1)}, "seed 1234, now 1"),
        ({"options": replace(LINES, validation_fraction=0.2)}, r"validation_fraction 0\.1, now 0\.2"),
        ({"options": replace(LINES, document="paragraph")}, "document 'line', now 'paragraph'"),
        ({"options": replace(LINES, fields=("body",))}, r"fields \[\], now \['body'\]"),
        ({"inputs": ["a.jsonl", "d.jsonl"]}, r"input .*b\.jsonl\.gz of \d+ bytes at \d+, now .*d\.jsonl of"),
        ({"inputs": ["a.jsonl"]}, "2 input files, now 1"),
    ):
        with pytest.raises(DataError, match=rf"d\.build: holds an interrupted build with {told}.*--overwrite"):
            make("d", **(given | changes))
    assert list((tmp_path / "d.build").glob("*.idx"))
    changed = given | {"inputs": ["a.jsonl"], "language": "yy"}
    make("d", **(changed | {"options": replace(LINES, overwrite=True)}))
    make("e", **changed)
    assert contents(tmp_path / "d") == contents(tmp_path / "e")


def test_an_input_that_has_changed(tmp_path, tokenizer):
    path = write_corpus(tmp_path / "in")
    assert path
    interrupt([tmp_path / "in"], tmp_path / "d", tokenizer)
    with open(tmp_path / "in" / "d.jsonl", "a") as file:
        file.write('{"text": "more"}\n')
    with pytest.raises(DataError, match=r"interrupted build with input .*d\.jsonl of \d+ bytes"):
        build([tmp_path / "in"], tmp_path / "d", tokenizer, language="xx", options=LINES)

    def touch(state):
        os.utime(tmp_path / "in" / "a.jsonl", ns=(0, 0))

    options = replace(LINES, overwrite=True)
    with pytest.raises(DataError, match=r"input .*a\.jsonl of .*, which has changed while it was read"):
        build([tmp_path / "in"], tmp_path / "d", tokenizer, language="xx", options=options, progress=touch)


def test_bad_records_may_be_skipped_after_a_stop(tmp_path, tokenizer):
    """The parts that are whole hold none."""
    lines = [f'{{"text": "document {i}, {"word " * 20}"}}\n' for i in range(300)]
    (tmp_path / "a.jsonl").write_text("".join([*lines[:200], "{\n", *lines[200:]]))
    with pytest.raises(DataError, match=r"a\.jsonl, line 201: is not JSON"):
        build([tmp_path / "a.jsonl"], tmp_path / "d", tokenizer, language="xx", options=LINES)
    assert list((tmp_path / "d.build").glob("*.idx"))
    options = replace(LINES, bad_records="skip")
    side = build([tmp_path / "a.jsonl"], tmp_path / "d", tokenizer, language="xx", options=options)
    assert (side.documents, [each.records for each in side.skipped]) == (300, [1])
    interrupt([tmp_path / "a.jsonl"], tmp_path / "e", tokenizer, options, documents=250)
    with pytest.raises(DataError, match=r"bad records 'skip', now 'stop'"):
        build([tmp_path / "a.jsonl"], tmp_path / "e", tokenizer, language="xx", options=LINES)


def test_parts_that_were_damaged_meanwhile(tmp_path, corpus, tokenizer, one):
    whole = sorted(interrupt([corpus[0]], tmp_path / "d", tokenizer))
    (tmp_path / "d.build" / whole[0]).with_suffix(".json").write_text("{")
    path = (tmp_path / "d.build" / whole[1]).with_suffix(".bin")
    content = path.read_bytes()
    path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    with pytest.raises(DataError, match=rf"{path}.*; it is a part of this build: remove .*d\.build to begin anew"):
        build([corpus[0]], tmp_path / "d", tokenizer, language="xx", options=LINES)
    path.write_bytes(content)
    build([corpus[0]], tmp_path / "d", tokenizer, language="xx", options=LINES)
    assert contents(tmp_path / "d") == one


def test_a_dataset_that_came_meanwhile_is_kept(tmp_path, corpus, tokenizer):
    interrupt([corpus[0]], tmp_path / "d", tokenizer)
    build([corpus[0] / "a.jsonl"], tmp_path / "e", tokenizer, language="xx")
    for suffix in SUFFIXES:
        os.rename(tmp_path / f"e{suffix}", tmp_path / f"d{suffix}")
    with pytest.raises(DataError, match=r"d\.idx: exists already"):
        build([corpus[0]], tmp_path / "d", tokenizer, language="xx", options=LINES)
    assert len(documents(tmp_path / "d")) == 200


# One at a time


def test_two_builds_of_one_dataset(tmp_path, corpus, tokenizer, one):
    seen = []

    def second(state):
        with pytest.raises(DataError, match=rf"d\.build: a build is running there \(process {os.getpid()} on "):
            build([corpus[0]], tmp_path / "d", tokenizer, language="xx", options=LINES)
        seen.append(state)

    build([corpus[0]], tmp_path / "d", tokenizer, language="xx", options=LINES, progress=lambda s: seen or second(s))
    assert seen
    assert contents(tmp_path / "d") == one


# Workers


def test_a_worker_that_is_killed(tmp_path, corpus, tokenizer, one, workers):
    def kill(state):
        if state.documents > 100:
            workers[0].kill()

    wanted = (
        r"(/[abcd]\.|the next piece).*: worker process \d+, which was to encode this, was killed by signal 9; the"
        r" machine may be out of memory, of which fewer --processes need less; the same command goes on"
    )
    with pytest.raises(DataError, match=wanted):
        build([corpus[0]], tmp_path / "d", tokenizer, language="xx", options=TWO, progress=kill)
    assert all(process.poll() is not None for process in workers)
    assert not [suffix for suffix in SUFFIXES if (tmp_path / f"d{suffix}").exists()]
    build([corpus[0]], tmp_path / "d", tokenizer, language="xx", options=TWO)
    assert contents(tmp_path / "d") == one


def test_workers_end_with_the_build(tmp_path, corpus, tokenizer, workers):
    interrupt([corpus[0]], tmp_path / "d", tokenizer, TWO)
    assert len(workers) == 2
    assert all(process.poll() is not None for process in workers)


def test_a_model_that_changes_meanwhile(tmp_path, corpus, tokenizer):
    (tmp_path / "t.model").write_bytes(tokenizer.path.read_bytes())
    loaded = load_tokenizer(tmp_path / "t.model")
    (tmp_path / "t.model").write_bytes(tokenizer.path.read_bytes() + b"\x32\x00")
    with pytest.raises(DataError, match=r"t\.model: "):
        build([corpus[0]], tmp_path / "d", loaded, language="xx", options=TWO)
    assert sorted(os.listdir(tmp_path)) == ["t.model"]


@pytest.mark.parametrize(("end", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)])
def test_a_signal_leaves_no_process(tmp_path, corpus, tokenizer, one, end, code):
    """Sent to the command in the middle of a build, as a terminal or a job system does."""
    for i in range(400):  # the signal comes long before the end
        (tmp_path / f"{i}.jsonl").write_bytes((corpus[0] / "a.jsonl").read_bytes())
    line = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler);"  # tests in the background ignore it
        "from megapoly.data import pieces; from megapoly.cli import main; pieces.PIECE_BYTES = 5000;"
        f"main(['data', 'build', '--tokenizer', {str(tokenizer.path)!r}, '--language', 'xx', '--processes', '2',"
        f"'--output', {str(tmp_path / 'd')!r}, {str(tmp_path / '*.jsonl')!r}])"
    )
    command = subprocess.Popen([sys.executable, "-c", line], start_new_session=True, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list((tmp_path / "d.build").glob("*.idx")) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(command.pid, end)
    _, told = command.communicate(timeout=60)
    assert command.returncode == code
    assert "Traceback" not in told
    assert ("interrupted; the same command goes on" in told) == (end == signal.SIGINT)
    assert not (tmp_path / "d.idx").exists()
    with open(tmp_path / "d.build" / "lock") as lock:  # which every worker holds
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                assert end != signal.SIGINT
                assert time.monotonic() < deadline
                time.sleep(0.01)


# Disks


@contextmanager
def files_of_at_most(size):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    ("size", "options"),
    [(200, LINES), (2500, TWO), (30000, LINES), (30000, replace(LINES, assembly=Assembly(shuffle=1)))],
)
def test_a_full_disk(tmp_path, corpus, tokenizer, options, size):
    """At the job, a part, and the dataset."""
    build([corpus[0]], tmp_path / "e", tokenizer, language="xx", options=options)
    assert (tmp_path / "e.bin").stat().st_size > 30000
    with files_of_at_most(size), pytest.raises(DataError, match=rf"{tmp_path}/d.*(cannot be written|File too large)"):
        build([corpus[0]], tmp_path / "d", tokenizer, language="xx", options=options)
    left = {path.name for path in tmp_path.iterdir()} - {f"e{suffix}" for suffix in SUFFIXES}
    assert left <= {"d.build"}
    assert (left == {"d.build"}) == bool(list(tmp_path.glob("d.build/*.idx")))
    assert left or size < 30000
    assert not list(tmp_path.glob("d.build/*.partial"))
    build([corpus[0]], tmp_path / "d", tokenizer, language="xx", options=options)
    assert contents(tmp_path / "d") == contents(tmp_path / "e")


# Kills


def killed(tmp_path, corpus, tokenizer, **given):
    given = {"folder": tmp_path / "out", "inputs": corpus, "model": tokenizer.path, "piece": 6000, **given}
    script = Path(__file__).with_name("killing.py")
    arguments = [sys.executable, str(script), json.dumps(given, default=str)]
    ended = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)
    undisturbed = {each["kind"]: each["files"] for each in found if each["kills"] == 0}
    assert sorted(undisturbed) == [0, 1, 2]
    assert sorted(undisturbed[0]) == ["d.bin", "d.idx", "d.json"]
    assert undisturbed[0] == undisturbed[2] != undisturbed[1]
    assert len(found) == 3 + given["rounds"]
    assert all(each["kills"] > 0 for each in found[3:])
    assert all(each["files"] == undisturbed[each["kind"]] for each in found)
    return sum(each["kills"] for each in found)


def test_kills_at_random_moments(tmp_path, corpus, tokenizer):
    assert killed(tmp_path, corpus[0], tokenizer, rounds=5, seed=1) >= 5


@pytest.mark.long
def test_kills_at_many_random_moments(tmp_path, tokenizer):
    write_corpus(tmp_path / "in", 2000)
    kills = killed(tmp_path, tmp_path / "in", tokenizer, rounds=50, seed=2)
    print(f"{kills} kills")
    assert kills >= 50


KILLED_AT = """
import os, signal, sys
from pathlib import Path
from megapoly.data import encode
from megapoly.data.builder import Options, build
from megapoly.data.indexed import IndexedDataset
from megapoly.data.load_tokenizer import load_tokenizer
from megapoly.errors import DataError
inputs, prefix, model, before = sys.argv[1:]
prefix, tokenizer, replace = Path(prefix), load_tokenizer(model), os.replace
old = {suffix: prefix.with_suffix(suffix).read_bytes() for suffix in (".bin", ".idx", ".json")}
for killed in range(100):
    child = os.fork()
    if not child:
        done = []
        def counted(source, target):
            if len(done) == killed:
                os.kill(os.getpid(), signal.SIGKILL)
            done.append(target)
            replace(source, target)
        os.replace = counted
        build([inputs], prefix, tokenizer, language="xx", options=Options(overwrite=True, processes=1))
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status == 0:
        break
    assert status == -signal.SIGKILL
    now = {suffix: path.read_bytes() for suffix in old if (path := prefix.with_suffix(suffix)).exists()}
    assert ".idx" not in now or now == old or set(now) == set(old)
    begun = prefix.with_suffix(".build").joinpath("job.json").exists()  # and needs no overwrite to go on
    build([inputs], prefix, tokenizer, language="xx", options=Options(overwrite=not begun, processes=1))
    new = {suffix: prefix.with_suffix(suffix).read_bytes() for suffix in old}
    wanted = {suffix: Path(before).with_suffix(suffix).read_bytes() for suffix in old}
    assert new == wanted, killed
    assert len(list(prefix.parent.iterdir())) == 3
    for suffix, content in old.items():
        prefix.with_suffix(suffix).write_bytes(content)
print(killed)
"""


def test_a_kill_before_every_renaming(tmp_path, corpus, tokenizer, monkeypatch):
    """Over an old dataset, of which nothing may be taken for the new."""
    monkeypatch.setattr(pieces, "PIECE_BYTES", 32 << 20)
    (tmp_path / "out").mkdir()
    other = write_lines(tmp_path / "other.jsonl", [{"text": "other"}])
    build([other], tmp_path / "out" / "d", tokenizer, language="xx")
    build([corpus[0] / "a.jsonl"], tmp_path / "e", tokenizer, language="xx")
    arguments = [corpus[0] / "a.jsonl", tmp_path / "out" / "d", tokenizer.path, tmp_path / "e"]
    ended = subprocess.run(
        [sys.executable, "-c", KILLED_AT, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert int(ended.stdout) == 10  # the job, three of the part, the mark, two handed over, three of the dataset
    assert len(IndexedDataset(tmp_path / "out" / "d").lengths) == 200
