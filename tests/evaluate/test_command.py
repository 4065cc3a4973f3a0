"""``megapoly evaluate`` as it is typed, alone and under torchrun."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megapoly.cli import main
from megapoly.data.templates import TEMPLATES
from tests.evaluate import benchmark
from tests.training.torchrun import ROOT

models = pytest.importorskip("tests.generate.models", exc_type=ImportError)
TaskManager = pytest.importorskip("lm_eval.tasks", reason="the harness").TaskManager


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return benchmark.make(tmp_path_factory.mktemp("benchmarks"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    made = [tmp_path_factory.mktemp("models") / family for family in ("gpt2", "bloom")]
    for folder in made:
        models.save(folder.name, folder, 256)
    return made


def run(*arguments: str | Path, code: int = 0) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", *map(str, arguments)])
    assert (ended.value.code or 0) == code


def test_the_whole_of_it(folders: list[Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two models on tasks of all kinds, and their files; then these beside each other."""
    files = [tmp_path / name for name in ("a.json", "a.md", "a.svg", "a.jsonl")]
    options = ["--data", data, "--tasks", "xcopa,wmt20,bits_per_byte", "--text", f"en={data / 'text.en.jsonl'}"]
    written = ["--json", files[0], "--markdown", files[1], "--picture", files[2], "--samples", files[3]]
    run(*folders, *options, "--languages", "zh", "--max-tokens", "8", "--limit", "3", "--covered", "zh", *written)
    captured = capsys.readouterr()
    heads, *lines = [line.split() for line in captured.out.splitlines() if line.strip()]
    assert heads == ["task", "language", "records", "gpt2", "bloom"]
    assert lines[1][:4] == ["xcopa,", "accuracy", "zh", "3"]
    assert "gpt2: 12 records in " in captured.err
    assert "--languages is of the benchmark's tasks; measured in all that they have: bits_per_byte\n" in captured.err
    assert "it/s" not in captured.err  # none of the harness's bars
    rows = json.loads(files[0].read_text())["rows"]
    names = ["xcopa/zh", "wmt20/zh-en", "wmt20/en-zh", "bits_per_byte/en"]
    own = ["xcopa/average", "xcopa/covered", "wmt20/X-en", "wmt20/en-X", "bits_per_byte/average"]
    assert [row["name"] for row in rows if row["model"] == "gpt2"] == [*names, *own]
    assert 7 < rows[3]["value"] < 12  # bits of a byte, by a model that knows nothing
    samples = [json.loads(line) for line in files[3].read_text().splitlines()]
    assert len(samples) == 24
    right = [sample["acc"] for sample in samples if (sample["model"], sample["task"]) == ("bloom", "xcopa/zh")]
    assert [row["value"] for row in rows if (row["model"], row["name"]) == ("bloom", "xcopa/zh")] == [
        pytest.approx(100 * sum(right) / 3)
    ]
    assert files[2].read_text().lstrip().startswith("<?xml")
    assert "| xcopa, accuracy | zh | 3 |" in files[1].read_text()

    other = tmp_path / "b.json"
    run(
        folders[0], *options[:2], "--tasks", "pawsx", "--languages", "en", "--tuned", "--few-shot", "1", "--json", other
    )
    assert json.loads(other.read_text())["rows"][0]["shots"] == 1
    capsys.readouterr()
    run("--compare", files[0], other)
    out = capsys.readouterr().out
    assert out.index("xcopa, accuracy") < out.index("pawsx, accuracy")
    assert "pawsx: dev, 1 example, as a tuned model; chance gets 50.0" in out
    run(files[0], files[0], code=1)
    assert "gpt2: has xcopa/zh twice" in capsys.readouterr().err


def test_tasks_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    run("--list-tasks")
    out = capsys.readouterr().out
    assert all(name in out for name in ("xnli", "tydiqa_goldp", "mtg_story", "bits_per_byte", "zh"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--tasks: nothing is asked for; give names such as xnli,xcopa"),
        (["--tasks", "xnli,xcopa", "--languages", "ht"], "--languages ht: xnli has none of them; it has ar, bg, de"),
        (["--tasks", "xcopa", "--languages", "th,zz"], "--languages zz: is a language of none of xcopa; they have et"),
        (
            ["--tasks", "xcopa", "--languages", "zh", "--covered", "yy"],
            "--covered yy: nothing here is in it; there are zh",
        ),
        (["--tasks", "xcopa", "--languages", "it"], "has no xcopa/test.it.jsonl or xcopa/val.it.jsonl, also with .gz"),
        (["--tasks", "mtg_story"], "has no mtg/story.de.jsonl, also with .gz or .zst, for mtg_story in de"),
        (["--tasks", "bits_per_byte"], "has no text; give --text LANGUAGE=FILE, once for each language"),
        (["--tasks", "xcopa", "--text", "en=x"], "--text: is for the task bits_per_byte"),
        (["--tasks", "bits_per_byte", "--text", "x.jsonl"], "--text 'x.jsonl': expected LANGUAGE=FILE"),
        (["--tasks", "bits_per_byte", "--text", "en=no.jsonl"], "no.jsonl"),
        (
            ["--tasks", "wmt20"],
            "leave no prompt in the model's 256 positions; give --max-tokens 128",
        ),
        (["--tasks", "wmt20", "--few-shot", "4"], "wmt20 in de-en: has no 4 examples"),
        (["--tasks", "xcopa", "--picture", "a.gif"], "--picture a.gif: a picture is one of"),
        (["--tasks", "xcopa", "--data", "none"], "--data none: is no folder; give one with xnli/, xcopa/"),
        (["--tasks", "xcopa", "--include-path", "none"], "--include-path none: is no folder"),
        (["--tasks", "xcopa", "--tp", "2"], "1 process was started, which --tp 2"),
    ],
)
def test_errors_are_one_message(
    folders: list[Path], data: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run(folders[0], "--data", data, *options, code=1)
    out, said = capsys.readouterr()
    assert out == ""
    assert message in said
    assert said.count("\n") == 1


def test_an_unknown_task_has_a_nearest_name(
    folders: list[Path], data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_module = pytest.importorskip("megapoly.evaluate.run")
    # To list the harness's own takes many seconds.
    monkeypatch.setattr(run_module, "TaskManager", lambda **_: TaskManager(include_defaults=False))
    run(folders[0], "--data", data, "--tasks", "xcopa,xwinogrande", code=1)
    assert "--tasks: 'xwinogrande' is no task; nearest: 'xwinograd'; --list-tasks" in capsys.readouterr().err
    run(code=1)
    assert "nothing to evaluate: give a MODEL and --tasks, or .json files" in capsys.readouterr().err


@pytest.mark.long
def test_torchrun_prints_one_table(folders: list[Path], data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(folders[0]), "--data", str(data), "--tasks", "xcopa,wmt20", "--max-tokens", "8", "--device", "cpu"]
    run(*arguments)
    expected = capsys.readouterr().out
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4"]
    command = [sys.executable, *launcher, "-m", "megapoly", "evaluate", *arguments, "--tp", "2"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout == expected
    command = [*command, "--few-shot", "9"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=240)
    (said,) = [line for line in done.stderr.splitlines() if line.startswith(("megapoly:", "error:"))]
    assert "has no 9 examples" in said


def test_what_can_be_seen_first_is_said_first(
    folders: list[Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything is measured, of which standard error would tell."""
    asked = ["--data", data, "--tasks", "xcopa", "--languages", "zh"]
    taken = tmp_path / "taken"
    taken.write_text("")
    for arguments, message in (
        ([folders[0], f"{folders[0]}/"], "gpt2: is given twice"),
        ([f"a={folders[0]}", f"a={folders[1]}"], "a: is the name of two models"),
        ([folders[0], tmp_path / "none"], "none: does not exist"),
        ([folders[0], "--compare", taken], "taken: is no file of megapoly evaluate --json"),
        ([folders[0], "--json", tmp_path], "cannot be written"),
        ([folders[0], "--markdown", taken / "a.md"], "a.md: cannot be written"),
        ([folders[0], "--json", tmp_path / "a", "--samples", tmp_path / "a"], "a: is to be written twice"),
    ):
        run(*arguments, *asked, code=1)
        said = capsys.readouterr().err
        assert message in said
        assert said.count("\n") == 1


def test_a_later_failure_loses_nothing(
    folders: list[Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken, file = tmp_path / "broken", tmp_path / "a.json"
    shutil.copytree(folders[1], broken)
    for weights in broken.glob("*.safetensors"):
        weights.write_bytes(b"none")
    asked = ["--data", data, "--tasks", "xcopa", "--languages", "zh"]
    run(f"first={folders[0]}", f"second={broken}", *asked, "--json", file, code=1)
    rows = json.loads(file.read_text())["rows"]
    assert {row["model"] for row in rows} == {"first"}
    capsys.readouterr()
    run(f"first={folders[1]}", "--compare", file, *asked, code=1)
    assert "first: has xcopa/zh in a file of before, too; give the model another name" in capsys.readouterr().err


def test_what_is_too_long_loses_its_beginning(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Options of more tokens than the model has positions; texts, too."""
    models.save("gpt2", tmp_path / "short", 16)
    run(tmp_path / "short", "--data", data, "--tasks", "xcopa,wmt20", "--languages", "zh", "--max-tokens", "4")
    out = capsys.readouterr().out
    assert "xcopa/zh: 4 of 4 records are longer than the positions of short; their beginning was left out" in out
    assert "wmt20/zh-en: 4 of 4 records" in out


def test_a_tuned_model_is_asked_in_its_own_form(
    folders: list[Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    generator, file = pytest.importorskip("megapoly.generate.generator"), tmp_path / "a.jsonl"
    own = {folders[1].name: TEMPLATES["chat"]}
    monkeypatch.setattr(generator, "template_of", lambda weights: own.get(Path(weights.path).name))
    asked = ["--data", data, "--tasks", "wmt20", "--languages", "de-en", "--max-tokens", "4", "--limit", "1", "--tuned"]
    run(*folders, *asked, "--samples", file)
    out = capsys.readouterr().out
    prompts = [json.loads(line)["arguments"][0][0] for line in file.read_text().splitlines()]
    assert prompts[0].endswith(" Translate this sentence from German to English.\n\n")
    assert prompts[1].startswith("<|user|>\n")
    assert prompts[1].endswith(" Translate this sentence from German to English.\n<|assistant|>\n")
    assert "as a tuned model in the form of multialpaca (gpt2)" in out
    assert "as a tuned model in the form of chat (bloom)" in out
