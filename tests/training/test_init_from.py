"""A new run that begins with the weights of a checkpoint: against the checkpoint, and the validation that made it."""

from __future__ import annotations

import json
import shutil
import struct
import zlib
from pathlib import Path

import pytest
import torch
from rich.console import Console

from megapoly import config
from megapoly.checkpoint import examine
from megapoly.checkpoint.convert import convert
from megapoly.checkpoint.folders import newest
from megapoly.checkpoint.state import model_differences
from megapoly.checkpoint.store import Reader
from megapoly.checkpoint.weights import Options, open_weights
from megapoly.cli import main
from megapoly.context import ParallelContext
from megapoly.errors import CheckpointError, ConfigError, DataError
from megapoly.run import Run, prepare
from megapoly.spec import Box, Piece
from megapoly.trainer import train
from tests.checkpoint.test_store import rewrite
from tests.corpus import lines
from tests.ranks import run_cases


def begin(toml: Path, folder: Path, source: Path | None, *sets: str, size: int = 1, resume: str = "never") -> Run:
    settings = config.load(toml, [f"train.directory={str(folder)!r}", *sets]).on(size)
    return prepare(settings, ParallelContext.create(settings.mesh), resume, source)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def source(toml: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 20 steps in float64, by one process."""
    folder = tmp_path_factory.mktemp("source") / "run"
    train(begin(toml, folder, None), Console(quiet=True))
    return folder


def values(reader: Reader, name: str) -> torch.Tensor:
    shape, dtype = reader.tensors[name]
    out = torch.zeros(torch.Size(shape).numel(), dtype=dtype)
    reader.read(name, Piece.of(Box.whole(shape)), out)
    return out


def save_and_step(rank: int, size: int, toml: Path, folder: Path, source: Path, layout: tuple[int, int, int]) -> None:
    """What the run begins with, as a checkpoint of step 0, and two steps of it."""
    sets = [f"layout.{axis}={n}" for axis, n in zip(("dp", "pp", "tp"), layout)]
    run = begin(toml, folder, source, *sets, size=size)
    run.save()
    train(run, Console(quiet=True), stop_step=2)
    run.context.close()


def test_any_layout_begins_with_the_same_weights(toml: Path, source: Path, tmp_path: Path) -> None:
    """Vocabularies padded for tp 2 and 4 too. Counters, moments and data begin anew."""
    layouts = [(1, 1, 4), (2, 1, 2), (2, 2, 1)]
    cases = [(toml, tmp_path / f"{number}", source, layout) for number, layout in enumerate(layouts)]
    run_cases(4, save_and_step, cases, timeout=300)
    saved = Reader(newest(source / "checkpoints"))
    (after,) = [event for event in lines(source, "validation") if event["at"] == "after"]
    first = None
    for _, folder, _, _ in cases:
        begun = Reader(folder / "checkpoints" / "step-00000000")
        compared = list(examine.compare(saved, begun, "weights/*"))
        assert len(compared) > 10
        assert all(each.same for each in compared)
        assert not any(values(begun, name).any() for name in begun.tensors if name.startswith("adam"))
        assert begun.meta["counters"] == {"step": 0, "sample": 0, "tokens": 0}
        assert begun.meta["optimizer_steps"] == 0
        (before,) = [event for event in lines(folder, "validation") if event["at"] == "before"]
        assert before["bits_per_byte"] == pytest.approx(after["bits_per_byte"], rel=1e-9)
        losses = [event["loss"] for event in lines(folder, "train")]
        first = first or losses
        assert losses == pytest.approx(first, rel=1e-9)


def test_a_folder_of_hugging_face(toml: Path, source: Path, tmp_path: Path) -> None:
    """A step under tp 2 and in one process: the losses of a run that begins with the checkpoint that it was made of."""
    weights = open_weights(source)
    convert(weights, tmp_path / "hf", "huggingface", Options(shard_bytes=50_000))
    run_cases(1, save_and_step, [(toml, tmp_path / "one", source, (1, 1, 1))], timeout=300)
    run_cases(2, save_and_step, [(toml, tmp_path / "tp", tmp_path / "hf", (1, 1, 2))], timeout=300)
    readers = [Reader(tmp_path / name / "checkpoints" / "step-00000000") for name in ("one", "tp")]
    compared = list(examine.compare(*readers, "weights/*"))
    assert len(compared) > 10
    assert all(each.same for each in compared)
    losses = [[event["loss"] for event in lines(tmp_path / name, "train")] for name in ("one", "tp")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-9)
    # It says what it is of, and asks for its tokenizer.
    run = begin(toml, tmp_path / "same", tmp_path / "hf")
    assert run.began[0] == f"begins with the weights of {tmp_path / 'hf'}"
    (tmp_path / "hf" / "tokenizer.model").write_bytes(b"another")
    with pytest.raises(DataError, match="is not the tokenizer that"):
        begin(toml, tmp_path / "other", tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.model").unlink()
    run = begin(toml, tmp_path / "unknown", tmp_path / "hf")
    assert run.began[0].endswith("hf, which does not tell the tokenizer that it was trained with")


def test_a_key_that_is_not_given_is_its_default(toml: Path) -> None:
    sets = ["model.position='rope'", "model.rope_scaling.kind='linear'", "model.rope_scaling.factor=2.0"]
    plain = config.load(toml, sets)
    given = {"rope_base": 10000.0, "key_value_heads": plain.model.heads, "qkv_biases": plain.model.biases}
    assert not model_differences(plain.model.model_copy(update=given), plain)
    other = plain.model.model_copy(update={**given, "rope_base": 5e5})
    assert model_differences(other, plain) == ["  model.rope_base: the checkpoint has 500000.0, the config has 10000.0"]


def test_other_precisions(toml: Path, source: Path, tmp_path: Path) -> None:
    """Rounded as torch does. From master weights, where there are any, so that no bit of them is lost."""
    saved = Reader(newest(source / "checkpoints"))
    half = begin(toml, tmp_path / "half", source, "train.precision='bf16'")
    train(half, Console(quiet=True), stop_step=2)
    trained = Reader(newest(tmp_path / "half" / "checkpoints"))
    cases = {"fp32": (saved, "weights"), "bf16": (saved, "weights"), "fp64": (trained, "adam.master")}
    for precision, (reader, kind) in cases.items():
        run = begin(toml, tmp_path / precision, reader.path, f"train.precision={precision!r}")
        begun = Reader(run.save())
        for name in [name for name in begun.tensors if name.startswith("weights/")]:
            found, wanted = values(begun, name), values(reader, name.replace("weights", kind))
            assert torch.equal(found, wanted.to(found.dtype))
            if precision == "bf16":
                assert torch.equal(values(begun, name.replace("weights", "adam.master")), wanted.float())
    # bf16 alone would have lost bits of what was trained
    name = next(name for name in trained.tensors if name.startswith("weights/") and name.endswith("weight"))
    assert not torch.equal(values(trained, name).float(), values(trained, name.replace("weights", "adam.master")))


def test_another_model_is_refused_by_tensor(toml: Path, source: Path, tmp_path: Path) -> None:
    layers = config.load(toml).model.layers
    with pytest.raises(CheckpointError) as error:
        begin(toml, tmp_path / "run", source, f"model.layers={layers + 1}")
    assert "a checkpoint of another model" in str(error.value)
    assert f"missing: layers.{layers}." in str(error.value)
    with pytest.raises(CheckpointError, match=rf"unexpected: layers\.{layers - 1}\."):
        begin(toml, tmp_path / "run", source, f"model.layers={layers - 1}")
    with pytest.raises(CheckpointError, match=r"of another shape: .*, expected \["):
        begin(toml, tmp_path / "run", source, f"model.ffn={2 * config.load(toml).model.ffn}")
    assert not (tmp_path / "run").exists()


def test_what_is_not_there_or_does_not_fit_never_becomes_random_weights(
    toml: Path, source: Path, tmp_path: Path
) -> None:
    for path, expected in ((tmp_path / "nowhere", "nowhere: does not exist"), (tmp_path, "holds no weights; expected")):
        with pytest.raises(CheckpointError, match=expected):
            begin(toml, tmp_path / "run", path)
    with pytest.raises(ConfigError, match="--resume goes on with a run, and --init-from begins a new one"):
        begin(toml, tmp_path / "run", source, resume="always")
    with pytest.raises(CheckpointError, match="holds a run already"):
        begin(toml, source, source)
    other = shutil.copytree(newest(source / "checkpoints"), tmp_path / "step-00000020")
    rewrite(other, meta={**Reader(other).meta, "tokenizer": "0" * 64})
    with pytest.raises(DataError, match="is not the tokenizer that"):
        begin(toml, tmp_path / "run", other)
    inf = shutil.copytree(newest(source / "checkpoints"), tmp_path / "inf" / "step-00000020")
    file = inf / "rank-00000.safetensors"
    raw = bytearray(file.read_bytes())
    header_bytes = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + header_bytes])
    name = next(name for name in header if name.startswith("weights/"))
    start = 8 + header_bytes + header[name]["data_offsets"][0]
    raw[start : start + 8] = struct.pack("<d", 1e300)  # fits float64 alone
    file.write_bytes(raw)
    crc32 = [zlib.crc32(raw[at : at + 2**20]) for at in range(0, len(raw), 2**20)]
    rewrite(inf, files={file.name: {"bytes": len(raw), "crc32": crc32}})
    logical = name.partition("@")[0].removeprefix("weights/")
    with pytest.raises(CheckpointError, match=rf"tensor {logical} has elements that are not finite in torch.float32"):
        begin(toml, tmp_path / "run", inf, "train.precision='fp32'")
    assert not (tmp_path / "run").exists()


def test_a_queued_job_begins_once_and_then_goes_on(
    toml: Path, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    words = ["train", str(toml), "--set", f"train.directory={str(folder)!r}", "--set", "model.dropout=0.125"]
    words += ["--init-from", str(source), "--resume-if-any", "--stop-step"]
    for step in ("2", "4"):
        with pytest.raises(SystemExit, match="0"):
            main([*words, step])
        out = capsys.readouterr().out
        assert (f"begins with the weights of {source}/checkpoints/step-00000020" in out) == (step == "2")
        assert ("model.dropout: the checkpoint has 0.0, the config has 0.125" in out) == (step == "2")
        assert ("goes on from step-00000002" in out) == (step == "4")
    assert [event["step"] for event in lines(folder, "train")] == [1, 2, 3, 4]
