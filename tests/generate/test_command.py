"""``megapoly generate`` as it is typed, alone and under torchrun."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from megapoly.cli import main
from megapoly.errors import DataError
from megapoly.generate import Generator, Sampling
from megapoly.generate.prompts import read_prompts
from tests.training.torchrun import ROOT

models = pytest.importorskip("tests.generate.models", exc_type=ImportError)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("llama")
    models.save("llama", made)
    return made


def run(*arguments: str | Path, code: int = 0) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["generate", *map(str, arguments)])
    assert ended.value.code == code


def test_one_text_is_streamed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(folder, "--prompt", "hello", "--tokens", "9", "--seed", "3")
    (expected,) = Generator.open(folder).generate(["hello"], Sampling(tokens=9, seed=3))
    assert capsys.readouterr().out == f"hello|{expected.text}\n"


def test_several_texts_and_all_options(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prompts.jsonl").write_text('"or"\n{"prompt": "中文", "more": 1}\n')
    options = "--tokens 7 --temperature 0.7 --top-k 30 --top-p 0.9 --repetition-penalty 1.2 --stop e --stop w"
    options += " --samples 2 --seed 4 --batch 3 --dtype fp64 --device cpu"
    files = ("--prompts", tmp_path / "prompts.jsonl", "--jsonl", tmp_path / "a.jsonl")
    run(folder, "--prompt", "hello", *options.split(), *files)
    sampling = Sampling(7, 0.7, 30, 0.9, 1.2, ("e", "w"), 2, 4)
    expected = Generator.open(folder).generate(["hello", "or", "中文"], sampling)
    captured = capsys.readouterr()
    assert captured.out == "".join(f"{each.prompt}|{each.text}\n" for each in expected)
    assert captured.err.startswith(f"6 texts, {sum(len(each.tokens) for each in expected)} tokens in ")
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [(row["prompt"], row["text"], row["tokens"], row["finish_reason"]) for row in rows] == [
        (each.prompt, each.text, each.tokens, each.finish_reason) for each in expected
    ]


def test_many_prompts_in_rounds_are_numbered_through(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megapoly.cli.generate._ROUND", 1)
    prompts = ["hello", "or", "he", "hello"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts) + "\n\n")
    run(folder, "--prompts", tmp_path / "prompts.txt", "--tokens", "5", "--batch", "2", "--jsonl", "-")
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    expected = Generator.open(folder).generate(prompts, Sampling(tokens=5))
    assert [row["tokens"] for row in rows] == [each.tokens for each in expected]
    assert rows[0]["tokens"] != rows[3]["tokens"]


def test_a_stop_string_of_several_tokens(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Streamed and not, the text before it is shown and nothing of it."""
    generator = Generator.open(folder)
    (whole,) = generator.generate(["hello"], Sampling(tokens=20, seed=3))
    stop = whole.text[6:10]
    assert len(generator.vocabulary.encode(stop)) > 2
    options = ("--prompt", "hello", "--tokens", "20", "--seed", "3", f"--stop={stop}", "--stop", "never this")
    run(folder, *options)
    assert capsys.readouterr().out == f"hello|{whole.text[: whole.text.index(stop)]}\n"
    run(folder, *options, "--jsonl", "-")
    row = json.loads(capsys.readouterr().out)
    assert (row["text"], row["finish_reason"]) == (whole.text[: whole.text.index(stop)], "stop")
    assert len(row["tokens"]) < 20


def test_a_tokenizer_that_cannot_be_proven_is_told(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "tokenizer.json"
    other.write_bytes((folder / "tokenizer.json").read_bytes() + b"\n")
    run(folder, "--prompt", "a", "--tokens", "1", "--tokenizer", other)
    said = capsys.readouterr().err
    assert said.startswith(
        f"megapoly: {other}: cannot be proven to be the tokenizer that the weights were trained with"
    )
    assert said.count("\n") == 1
    run(folder, "--prompt", "a", "--tokens", "1", "--tokenizer", folder / "tokenizer.json")
    assert capsys.readouterr().err == ""


def test_prompts_from_the_input(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\ufeffhello\r\nสวัส\u2028ดี\n".encode())))
    run(folder, "--prompts", "-", "--tokens", "3", "--temperature", "0", "--jsonl", "-")
    lines = capsys.readouterr().out.strip().split("\n")
    assert [json.loads(line)["prompt"] for line in lines] == ["hello", "สวัส\u2028ดี"]


def test_a_file_keeps_the_rounds_before_an_interruption(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megapoly.cli.generate._ROUND", 1)
    out = tmp_path / "new" / "out.jsonl"
    arguments = (folder, "--prompt", "hello", "--prompt", "or", "--batch", "1", "--jsonl", out)
    run(*arguments, "--prompt", "a" * 60, "--tokens", "3", code=1)
    kept = [json.loads(line)["prompt"] for line in out.read_text().splitlines()]
    assert kept == ["hello", "or"]
    before = out.read_bytes()
    run(tmp_path, "--prompt", "a", "--jsonl", out, code=1)  # before any text: what is there stays
    assert out.read_bytes() == before
    run(*arguments, "--tokens", "4")  # replaces it
    assert [len(json.loads(line)["tokens"]) for line in out.read_text().splitlines()] == [4, 4]
    run(tmp_path, "--prompt", "a", "--jsonl", tmp_path / "none.jsonl", code=1)
    assert not (tmp_path / "none.jsonl").exists()


def torchrun(*arguments: str, ranks: int) -> subprocess.CompletedProcess[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [sys.executable, *launcher, "-m", "megapoly", "generate", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("", ["--prompt", "a" * 60], "prompt 0: has 60 tokens"),
        ("none", ["--prompt", "a"], "does not exist; check the path"),
    ],
)
def test_torchrun_says_an_error_once(folder: Path, name: str, options: list[str], message: str) -> None:
    done = torchrun(str(folder / name), *options, "--pp", "2", "--device", "cpu", ranks=2)
    assert done.returncode != 0
    (said,) = [line for line in done.stderr.splitlines() if line.startswith(("megapoly:", "error:"))]
    assert said.startswith("megapoly: ")
    assert message in said


@pytest.mark.long
def test_torchrun_gives_the_same_texts(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(folder), "--tokens", "6", "--prompt", "hello", "--prompt", "or", "--device", "cpu"]
    run(*arguments)
    expected = capsys.readouterr().out
    done = torchrun(*arguments, "--pp", "2", ranks=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout == expected


def test_errors_are_one_message(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        ((folder,), "megapoly: nothing to continue: give --prompt TEXT, --prompts FILE or --instruction TEXT"),
        ((folder, "--prompt", "a", "--top-p", "0"), "megapoly: sampling: top_p 0.0 is out of range"),
        ((folder, "--prompt", "a", "--tp", "2"), "megapoly: 1 process was started, which --tp 2 x --pp 1 = 2 does not"),
        ((tmp_path, "--prompt", "a"), f"megapoly: {tmp_path}"),
        ((folder, "--prompt", "a", "--tokenizer", "no.model"), "megapoly: no.model: cannot be read"),
        ((folder, "--prompt", "a" * 60), "megapoly: prompt 0: has 60 tokens, and the model 48 positions"),
        ((folder, "--prompt", "a", "--jsonl", "/dev/null/a"), "megapoly: /dev/null/a: cannot be written (Not a"),
        ((folder, "--prompts", tmp_path / "none.txt"), f"megapoly: {tmp_path}/none.txt: cannot be read (No such file"),
    ):
        run(*arguments, code=1)
        out, said = capsys.readouterr()
        assert out == ""
        assert said.startswith(message), said
        assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"\n \n", "has no prompt"),
        ("a.txt", b"ok\n\xff\n", "is not UTF-8"),
        ("a.jsonl", b'"a"\n{"text": "b"}\n', 'line 2 holds no prompt; expected a string, or {"prompt": "..."}'),
        ("a.jsonl", b'\n"a\n', "line 2 is not JSON"),
    ],
)
def test_files_of_prompts_that_are_none(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as error:
        read_prompts(tmp_path / name)
    assert message in str(error.value)
