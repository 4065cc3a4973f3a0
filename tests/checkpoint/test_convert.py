"""``megapoly convert``: interruptions, memory, the command, and checkpoints that hold weights only."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from megapoly import config
from megapoly.checkpoint import convert as conversions
from megapoly.checkpoint.folders import newest
from megapoly.checkpoint.store import Reader
from megapoly.checkpoint.verification import verify
from megapoly.checkpoint.weights import open_weights
from megapoly.cli import main
from megapoly.config import Model
from megapoly.config_file import read_toml
from megapoly.context import ParallelContext
from megapoly.data.load_tokenizer import load_tokenizer
from megapoly.errors import CheckpointError
from megapoly.run import prepare
from megapoly.spec import Box, Piece
from megapoly.trainer import train
from tests.checkpoint import conversion

ROOT = Path(__file__).resolve().parents[2]


def run_script(name: str, given: dict[str, Any], timeout: float) -> dict[str, Any]:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "tests" / "checkpoint" / name), json.dumps(given)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, check=False)
    assert ran.returncode == 0, ran.stderr
    result: dict[str, Any] = json.loads(ran.stdout)
    return result


def test_killed_and_on_a_full_disk_at_random_points(tmp_path: Path) -> None:
    found = run_script("conversion.py", {"folder": str(tmp_path), "count": 3, "seed": 1}, 300)
    for ends in found.values():
        assert len(ends["kill"]) == len(ends["full"]) == 3


@pytest.mark.long
def test_killed_and_on_a_full_disk_at_a_hundred_random_points(tmp_path: Path) -> None:
    found = run_script("conversion.py", {"folder": str(tmp_path), "count": 50, "seed": 2}, 1200)
    for to, ends in found.items():
        assert len(ends["kill"]) == len(ends["full"]) == 50
        assert len({each["files"] for each in ends["kill"]}) > 5  # at many places
        # Of Megatron's files the first is the largest: a bound on their size stops there.
        assert len({each["files"] for each in ends["full"]}) > (0 if to == "megatron" else 2)


@pytest.mark.long
@pytest.mark.parametrize(
    ("source", "to"),
    [
        (None, "huggingface"),
        ("huggingface", "megapoly"),
        (None, "megatron"),
        ("megatron", "megapoly"),
        ("megatron", "megatron"),
    ],
)
def test_memory_is_that_of_a_few_parts(source: str | None, to: str, tmp_path: Path) -> None:
    """Of a model of 430 MB with tensors of up to 130 MB, no more than 200 MB is held at any time."""
    found = run_script("conversion_memory.py", {"folder": str(tmp_path), "source": source, "to": to}, 600)
    assert found["model"] > 430
    assert found["peak"] - found["before"] < 200, found


@pytest.fixture(scope="module")
def run(toml: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 2 steps, in bf16, so with master weights."""
    folder = tmp_path_factory.mktemp("source") / "run"
    sets = [f"train.directory={str(folder)!r}", "train.precision='bf16'"]
    settings = config.load(toml, sets).on(1)
    train(prepare(settings, ParallelContext.create(settings.mesh)), Console(quiet=True), stop_step=2)
    return folder


def command(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as ended:
        main(list(map(str, arguments)))
    return int(ended.value.code or 0)


def values(path: Path, kind: str) -> dict[str, torch.Tensor]:
    reader, result = Reader(path), {}
    for name, (shape, dtype) in reader.tensors.items():
        if name.startswith(f"{kind}/"):
            result[name.removeprefix(f"{kind}/")] = torch.empty(shape, dtype=dtype)
            reader.read(name, Piece.of(Box.whole(shape)), result[name.removeprefix(f"{kind}/")].view(-1))
    return result


def test_a_run_to_hugging_face_and_back(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hf, own = tmp_path / "hf", tmp_path / "own"
    assert command("convert", run, hf, "--shard-size", "20KB", "--verify") == 0
    out = capsys.readouterr().out
    assert f"verified {run} and {hf}: the logits of 64 random tokens are equal" in out
    assert f"verified {hf} with transformers' own: the logits of 64 random tokens differ by" in out
    assert f"{hf}: huggingface, 52 tensors in" in out
    assert "Next: AutoModelForCausalLM.from_pretrained" in out
    assert command("convert", hf, own, "--verify") == 0
    assert f"Next: megapoly train CONFIG --init-from {own}" in capsys.readouterr().out
    trained, found = values(newest(run / "checkpoints"), "weights"), values(own, "weights")
    assert found.keys() == trained.keys()
    assert all(found[name].dtype == torch.bfloat16 and torch.equal(found[name], trained[name]) for name in trained)
    model = open_weights(run).model
    assert open_weights(own).model == model
    # A checkpoint to a checkpoint of weights only is the same again, with the tokenizer.
    assert command("convert", run, tmp_path / "light", "--to", "megapoly") == 0
    light = open_weights(tmp_path / "light")
    assert (light.model, light.tokenizer_sha256) == (model, open_weights(run).tokenizer_sha256)
    assert [path.name for path in light.tokenizer] == ["tokenizer.model"]


def test_another_dtype_is_taken_from_the_master_weights(run: Path, tmp_path: Path) -> None:
    masters = values(newest(run / "checkpoints"), "adam.master")
    for short, dtype in (("fp32", torch.float32), ("fp16", torch.float16)):
        assert command("convert", run, tmp_path / short, "--to", "megapoly", "--dtype", short, "--verify") == 0
        found = values(tmp_path / short, "weights")
        assert all(torch.equal(found[name], masters[name].to(dtype)) for name in masters)


def test_a_changed_tensor_is_seen_by_verify_though_the_dtype_changes(run: Path, tmp_path: Path) -> None:
    assert command("convert", run, tmp_path / "hf", "--dtype", "bf16") == 0
    path = tmp_path / "hf" / "model.safetensors"
    stored = load_file(path)
    bias = stored["transformer.h.1.ln_2.bias"]
    bias[0] += 1e-3
    save_file(stored, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match="are not the same model"):
        list(verify(run, tmp_path / "hf", print))


@pytest.mark.parametrize("option", [("--tp", "2"), ("--pp", "2"), ("--naming", "legacy")])
def test_an_option_that_the_format_has_nothing_for(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: tuple[str, str]
) -> None:
    assert command("convert", run, tmp_path / "hf", *option) == 1
    assert f"{' '.join(option)}: files of huggingface have nothing for it" in capsys.readouterr().err
    assert command("convert", run, tmp_path / "mg", "--to", "megatron", "--shard-size", "1GB") == 1
    assert "--shard-size 1GB: files of megatron have nothing for it" in capsys.readouterr().err


def test_inspect_says_the_model_as_a_config_has_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    transformers = pytest.importorskip("transformers", reason="makes the model of this test")
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "original_max_position_embeddings": 16}
    keys = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 2}
    rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    peer = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=50, rope_parameters=rope, **keys))
    peer.save_pretrained(tmp_path / "hf")
    assert command("convert", tmp_path / "hf", tmp_path / "own") == 0
    capsys.readouterr()
    assert command("checkpoint", "inspect", tmp_path / "own") == 0
    text = capsys.readouterr().out.partition("[model]")[2].partition("\n")[2].partition("\n ")[0]
    (tmp_path / "model.toml").write_text(text)
    model = Model.model_validate(read_toml(tmp_path / "model.toml"))
    assert model == open_weights(tmp_path / "hf").model


def test_transformers_has_the_same_tokens(run: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="the oracle of this test")
    assert command("convert", run, tmp_path / "hf") == 0
    own = load_tokenizer(tmp_path / "hf" / "tokenizer.model")
    assert own.sha256 == open_weights(run).tokenizer_sha256
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    for text in ("abc  bad\n", " вадж abc", "日本 ①\t", "", "a" * 99):
        ids = theirs(text).input_ids
        assert ids == own.encode(text)
        assert theirs.decode(ids) == own.decode(ids) == text
    assert theirs.eos_token_id == theirs.bos_token_id == own.eod
    settings = transformers.AutoConfig.from_pretrained(tmp_path / "hf")
    assert settings.eos_token_id == settings.bos_token_id == own.eod
    assert settings.dtype == torch.bfloat16


def test_files_of_transformers_are_handed_on(run: Path, tmp_path: Path) -> None:
    """Tokenizer, generation_config.json and config.json of a folder that came through a checkpoint of megapoly."""
    hf = tmp_path / "hf"
    assert command("convert", run, hf) == 0
    (hf / "tokenizer.model").unlink()
    (hf / "special_tokens_map.json").write_text('{"eos_token": "</s>"}')
    (hf / "chat_template.jinja").write_text("{{ messages }}")
    (hf / "generation_config.json").write_text('{"temperature": 0.6}')
    settings = json.loads((hf / "config.json").read_text()) | {"bos_token_id": 1, "summary_type": "mean"}
    (hf / "config.json").write_text(json.dumps(settings))
    assert command("convert", hf, tmp_path / "own") == 0
    assert command("convert", tmp_path / "own", tmp_path / "back") == 0
    files = {path.name for path in hf.iterdir()}
    assert {path.name for path in (tmp_path / "back").iterdir()} == files
    for name in files:
        first, second = hf / name, tmp_path / "back" / name
        if name.endswith(".json"):
            assert json.loads(second.read_text()) == json.loads(first.read_text()), name
        else:
            assert second.read_bytes() == first.read_bytes(), name
    # A tokenizer that is given takes their place.
    (given,) = open_weights(run).tokenizer
    shutil.copy(given, tmp_path / "spm.model")
    assert command("convert", hf, tmp_path / "given", "--tokenizer", tmp_path / "spm.model") == 0
    assert [path.name for path in (tmp_path / "given" / "tokenizer").iterdir()] == ["tokenizer.model"]
    assert open_weights(tmp_path / "given").tokenizer_sha256 == load_tokenizer(given).sha256


def test_a_checkpoint_of_weights_only(
    toml: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "own"
    assert command("convert", run, own, "--to", "megapoly") == 0
    capsys.readouterr()
    assert command("checkpoint", "inspect", own) == 0
    assert f"{own}: weights only; 1 file of tensors" in capsys.readouterr().out
    assert command("checkpoint", "diff", run, own, "--only", "weights/*") == 0
    assert "all 52 tensors are the same" in capsys.readouterr().out
    assert command("checkpoint", "verify", own) == 0
    # It is nothing to go on with.
    other = tmp_path / "other"
    shutil.copytree(own, other / "checkpoints" / "step-00000002")
    settings = config.load(toml, [f"train.directory={str(other)!r}"]).on(1)
    with pytest.raises(CheckpointError, match=r"holds weights only, and no run to go on with; .* --init-from"):
        prepare(settings, ParallelContext.create(settings.mesh), "always")
    # The tokenizer's files are the ones that were written.
    (own / "tokenizer" / "tokenizer.model").write_bytes(b"another")
    with pytest.raises(CheckpointError, match=r"tokenizer.model: is not the file that was written"):
        open_weights(own)
    (own / "tokenizer" / "tokenizer.model").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer.model: is missing"):
        open_weights(own)


def test_interrupted_it_says_how_to_go_on(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(conversions, "_account", interrupt)  # when the files are written
        assert command("convert", run, tmp_path / "new") == 130
    assert capsys.readouterr().err == "interrupted; the same command goes on after the finished files\n"
    assert command("convert", run, tmp_path / "new") == 0
    assert "that an interrupted attempt has finished" in capsys.readouterr().out


def test_what_holds_no_weights_says_what_was_looked_for(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    forms = "expected a run of megapoly .* or a whole checkpoint .* a folder of Hugging Face .* or one of Megatron"
    with pytest.raises(CheckpointError, match=f"folder: holds no weights; {forms}"):
        open_weights(folder)
    (folder / "config.json").write_text('{"vocab_size": 5}')
    with pytest.raises(CheckpointError, match=f"folder: holds no weights; {forms}"):
        open_weights(folder)
    with pytest.raises(CheckpointError, match=f"json: is no folder; {forms}"):
        open_weights(folder / "config.json")
    (folder / "config.json").write_text('{"model_type": "llama",}')
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read as JSON \(.*line 1 column 24"):
        open_weights(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"config\.json: holds list, expected an object"):
        open_weights(folder)
    # A run that has no checkpoint yet.
    (folder / "checkpoints").mkdir()
    with pytest.raises(CheckpointError, match=r"checkpoints: no whole checkpoint"):
        open_weights(folder)


def test_what_is_refused_is_one_message(
    toml: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def message(*arguments: str | Path) -> str:
        assert command("convert", *arguments) == 1
        return capsys.readouterr().err.removeprefix("error: ").strip()

    (tmp_path / "there").mkdir()
    assert message(run, tmp_path / "there").startswith(f"{tmp_path / 'there'}: exists already")
    assert message(tmp_path / "nothing", tmp_path / "new") == f"{tmp_path / 'nothing'}: does not exist; check the path"
    assert "expected a size such as 5GB" in message(run, tmp_path / "new", "--shard-size", "5XB")
    other = tmp_path / "other.model"
    other.write_bytes(b"none")
    assert "is not a SentencePiece model" in message(run, tmp_path / "new", "--tokenizer", other)
    mixed = conversion.make(
        tmp_path / "mixed", Model(layers=1, hidden=8, heads=2, ffn=16, vocabulary=11, positions=8, norm="rms")
    )
    assert message(mixed, tmp_path / "new").startswith("model.norm is 'rms', and GPT-2, the models in transformers")
    (small,) = open_weights(run).tokenizer
    vocabulary = load_tokenizer(small).vocabulary
    assert f"has {vocabulary} tokens, and the vocabulary of" in message(mixed, tmp_path / "new", "--tokenizer", small)
    assert not (tmp_path / "new").exists()


def test_shards_are_as_large_as_asked_for(tmp_path: Path) -> None:
    source = conversion.make(tmp_path / "run")
    assert command("convert", source, tmp_path / "hf", "--shard-size", "200KB") == 0
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    names = sorted(path.name for path in (tmp_path / "hf").glob("*.safetensors"))
    assert names == [f"model-{i:05d}-of-{len(names):05d}.safetensors" for i in range(1, len(names) + 1)]
    held = {name: load_file(tmp_path / "hf" / name) for name in names}
    assert index["weight_map"] == {tensor: name for name in names for tensor in held[name]}
    sizes = [sum(tensor.nbytes for tensor in each.values()) for each in held.values()]
    assert index["metadata"]["total_size"] == sum(sizes)
    assert all(size <= 200_000 or len(each) == 1 for size, each in zip(sizes, held.values(), strict=True))
    assert len(names) > 2
