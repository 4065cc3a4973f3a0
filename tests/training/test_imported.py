"""An imported model with a tokenizer.json, tuned on instructions and handed back. transformers is the oracle of its
loss, of the ids that it is asked with, and of its answers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from megapoly import config
from megapoly.checkpoint.convert import convert, use_tokenizer
from megapoly.checkpoint.weights import Options, open_weights
from megapoly.cli import main
from megapoly.context import ParallelContext
from megapoly.data import builder
from megapoly.data.indexed import IndexedDataset
from megapoly.data.load_tokenizer import load_tokenizer
from megapoly.data.templates import TEMPLATES
from megapoly.errors import DataError
from megapoly.generate import Generator, Sampling
from megapoly.run import prepare
from megapoly.trainer import train
from tests import tuning
from tests.corpus import lines
from tests.generate.models import save

transformers: Any = pytest.importorskip("transformers", reason="the oracle of these tests")
LENGTH = 96
QUESTION = {"role": "user", "content": "hello", "input": "world"}

TOML = """
[layout]
micro_batch = 2
device = "cpu"
[data]
tokenizer = "hf/tokenizer.json"
separate_documents = true
sources.es = {{ path = "es", language = "es" }}
[[data.stages]]
name = "tune"
epochs = 2
[train]
directory = "run"
sequence = {length}
global_batch = 4
precision = "fp64"
[optimizer]
learning_rate = {rate}
[validation]
windows = 99
[log]
tensorboard = false
[model]
"""


def say(value: Any) -> str:
    """A value of a config."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {say(each)}" for key, each in value.items() if each is not None) + " }"
    return json.dumps(value)


@pytest.fixture(scope="module", params=["gpt2", "llama", "qwen2", "bloom"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model in hf, which in LLaMA's case is given texts that begin with ``<s>``; tuned in run, and that in out."""
    made = tmp_path_factory.mktemp(request.param)
    rate = 0.01 if request.param == "bloom" else 0.001  # so that their answers differ
    (made / "hf").mkdir()
    save(request.param, made / "hf", LENGTH, begins=request.param == "llama")
    rows = [row for row in tuning.records("es") if "messages" not in row]
    source = tuning.write(made / "es.jsonl", rows)
    options = builder.Options(
        instructions=TEMPLATES["chat"],
        validation_fraction=0.2,
        threads=1,
        assembly=builder.Assembly(pack=LENGTH, shuffle=1),
        bad_records="skip",
    )
    tokenizer = load_tokenizer(made / "hf" / "tokenizer.json")
    builder.build([source], made / "es", tokenizer, language="es", options=options)
    model = open_weights(made / "hf").model.model_dump(mode="json", exclude_defaults=True)
    keys = "".join(f"{key} = {say(value)}\n" for key, value in model.items())
    (made / "run.toml").write_text(TOML.format(length=LENGTH, rate=rate) + keys)
    settings = config.load(made / "run.toml").on(1)
    train(prepare(settings, ParallelContext.create(settings.mesh), "never", made / "hf"), Console(quiet=True))
    convert(open_weights(made / "run"), made / "out", "huggingface", Options())
    return made


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "es.jsonl").read_text().splitlines()]


def by_hand(peer: Any, row: dict[str, Any]) -> tuple[list[int], int]:
    """Ids of an example by transformers, and how many are the prompt's."""
    prompt = peer(TEMPLATES["chat"].turn(row["instruction"], row["input"])).input_ids
    return [*prompt, *peer(row["output"].strip(), add_special_tokens=False).input_ids, peer.eos_token_id], len(prompt)


@pytest.mark.parametrize(("at", "source"), [("before", "hf"), ("after", "out")])
def test_the_loss_of_held_out_answers(folder: Path, at: str, source: str) -> None:
    peer = transformers.AutoTokenizer.from_pretrained(folder / "hf")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / source, dtype=torch.float64).requires_grad_(
        False
    )
    loss, counted, size = 0.0, 0, 0
    for row in rows_of(folder):
        ids, given = by_hand(peer, row)
        if builder.held_out(row["instruction"].strip(), 1234, 0.2) and len(ids) <= LENGTH:
            logits = model(torch.tensor([ids])).logits[0, given - 1 : -1]
            loss += float(torch.nn.functional.cross_entropy(logits, torch.tensor(ids[given:]), reduction="sum"))
            counted += len(ids) - given
            size += len(row["output"].strip().encode())
    (event,) = [event for event in lines(folder / "run", "validation") if event["at"] == at]
    assert counted > 100
    assert event["loss"]["es"] == pytest.approx(loss / counted, rel=1e-8)  # transformers has single precision in places
    assert event["bits_per_byte"]["es"] == pytest.approx(
        loss / size / math.log(2), rel=1e-8
    )  # transformers has single precision in places


def test_the_chat_template(folder: Path) -> None:
    """Ids of the data are those that the tokenizer handed back makes of the messages."""
    peer = transformers.AutoTokenizer.from_pretrained(folder / "out")
    dataset = IndexedDataset(folder / "es")
    packed = [dataset.document(i).tolist() for i in range(dataset.documents) if not dataset.learned(i).all()]
    expected = []
    for row in rows_of(folder):
        messages = [{"role": "user", "content": row["instruction"], "input": row["input"]}]
        answered = [*messages, {"role": "assistant", "content": row["output"]}]
        ids = peer.apply_chat_template(answered, return_dict=False)
        asked = peer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert (ids, len(asked)) == by_hand(transformers.AutoTokenizer.from_pretrained(folder / "hf"), row)
        expected += [ids] if len(ids) <= LENGTH else []
    assert sorted(packed) == sorted(expected)
    assert peer.eos_token == "</s>"
    assert peer.bos_token == "<s>"


def test_answers(folder: Path) -> None:
    """The likeliest texts of the run, of what it was converted to, and of transformers."""
    peer = transformers.AutoTokenizer.from_pretrained(folder / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "out", dtype=torch.float64)
    assert model.generation_config.eos_token_id == peer.eos_token_id
    convert(open_weights(folder / "run"), folder / "own", "megapoly", Options())
    convert(open_weights(folder / "own"), folder / "again", "huggingface", Options())
    messages = [[{**QUESTION, "content": row["instruction"]}] for row in rows_of(folder)[:8]]
    prompts = [TEMPLATES["chat"].turn(each[0]["content"], each[0]["input"]) for each in messages]
    expected = []
    for each in messages:
        ids = torch.tensor([peer.apply_chat_template(each, add_generation_prompt=True, return_dict=False)])
        with torch.no_grad():
            found = model.generate(ids, do_sample=False, max_new_tokens=12, pad_token_id=1)[0, ids.shape[1] :]
        expected.append(peer.decode(found, skip_special_tokens=True))
    assert len(set(expected)) > 1
    for source in ("run", "own", "again", "out"):
        generator = Generator.open(folder / source)
        assert generator.template == TEMPLATES["chat"]
        made = [each.text for each in generator.generate(prompts, Sampling(tokens=12, temperature=0))]
        assert made == expected


def test_another_tokenizer(folder: Path, tmp_path: Path) -> None:
    """Is refused: for training by its file, for answers when that of the run has changed."""
    path = folder / "hf" / "tokenizer.json"
    content = path.read_bytes()
    (tmp_path / "other.json").write_bytes(content + b" ")
    (tmp_path / "tokenizer_config.json").write_bytes(path.with_name("tokenizer_config.json").read_bytes())
    rows = tuning.write(tmp_path / "x.jsonl", [{"text": f"hello {i}"} for i in range(99)])
    options = builder.Options(threads=1, validation_fraction=0.0)
    builder.build([rows], tmp_path / "es", load_tokenizer(tmp_path / "other.json"), language="es", options=options)
    sets = [f"data.tokenizer={str(tmp_path / 'other.json')!r}", f"data.sources.es.path={str(tmp_path / 'es')!r}"]
    settings = config.load(folder / "run.toml", [*sets, f"train.directory={str(tmp_path / 'run')!r}"]).on(1)
    with pytest.raises(DataError, match=r"other\.json: is not the tokenizer that .*hf was trained with"):
        prepare(settings, ParallelContext.create(settings.mesh), "never", folder / "hf")
    # A tokenizer of any name is handed on as tokenizer.json.
    (tmp_path / "hf").mkdir()
    for file in (folder / "hf").iterdir():
        if "tokenizer" not in file.name:
            (tmp_path / "hf" / file.name).write_bytes(file.read_bytes())
    run = prepare(settings, ParallelContext.create(settings.mesh), "never", tmp_path / "hf")
    assert run.began[0].endswith("hf, which does not tell the tokenizer that it was trained with")
    train(run, Console(quiet=True), stop_step=1)
    convert(open_weights(tmp_path / "run"), tmp_path / "out", "huggingface", Options())
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == content + b" "
    if "gpt2" in folder.name:
        convert(open_weights(tmp_path / "run"), tmp_path / "megatron", "megatron", Options(tp=2))
        assert (tmp_path / "megatron" / "tokenizer" / "tokenizer.json").read_bytes() == content + b" "
    assert "chat_template" not in json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert len(Generator.open(tmp_path / "run").generate(["hello"], Sampling(tokens=3))) == 1
    (tmp_path / "other.json").write_bytes(content)
    with pytest.raises(DataError, match=r"other\.json: is not the tokenizer that"):
        Generator.open(tmp_path / "run")


@pytest.mark.parametrize("folder", ["llama"], indirect=True)
def test_what_ends_a_text_is_handed_on(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Known from a config.json, or beside a null: through every format, to transformers and to answers."""
    content = (folder / "hf" / "tokenizer.json").read_bytes()
    for name, settings in (("config", None), ("null", '{"eos_token": null, "tokenizer_class": "LlamaTokenizer"}')):
        place = tmp_path / name
        place.mkdir()
        (place / "my.json").write_bytes(content)
        (place / "config.json").write_text('{"eos_token_id": 1}')
        if settings:
            (place / "tokenizer_config.json").write_text(settings)
        rows = tuning.write(place / "x.jsonl", [{"instruction": f"hello {i}", "output": "world"} for i in range(99)])
        options = builder.Options(
            instructions=TEMPLATES["chat"], threads=1, validation_fraction=0.0, assembly=builder.Assembly(pack=LENGTH)
        )
        builder.build([rows], place / "es", load_tokenizer(place / "my.json"), language="es", options=options)
        sets = [f"data.tokenizer={str(place / 'my.json')!r}", f"data.sources.es.path={str(place / 'es')!r}"]
        settings_of = config.load(folder / "run.toml", [*sets, f"train.directory={str(place / 'run')!r}"]).on(1)
        train(prepare(settings_of, ParallelContext.create(settings_of.mesh)), Console(quiet=True), stop_step=1)
        convert(open_weights(place / "run"), place / "own", "megapoly", Options())
        convert(open_weights(place / "run"), place / "megatron", "megatron", Options())
        for source in ("run", "own", "megatron"):
            convert(open_weights(place / source), place / f"{source}-hf", "huggingface", Options())
            peer = transformers.AutoTokenizer.from_pretrained(place / f"{source}-hf")
            assert (peer.eos_token, type(peer).__name__) == ("</s>", "TokenizersBackend")
            assert peer.apply_chat_template([QUESTION], tokenize=False).startswith("<s><|user|>\nhello\nworld")
            assert json.loads((place / f"{source}-hf" / "config.json").read_text())["eos_token_id"] == 1
            for each in (place / source, place / f"{source}-hf"):
                assert Generator.open(each).vocabulary.ends == {1}
    # The same file by another name without any settings is the run's own.
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "b.json").write_bytes(content)
    use_tokenizer(weights := open_weights(tmp_path / "null" / "run"), tmp_path / "bare" / "b.json")
    assert weights.tokenizer == (tmp_path / "bare" / "b.json",)
    (tmp_path / "bare" / "b.json").write_bytes(content + b" ")
    with pytest.raises(DataError, match=r"b\.json: is not the tokenizer that"):
        Generator.open(tmp_path / "null" / "run", tmp_path / "bare" / "b.json")
    (tmp_path / "null" / "my.json").rename(tmp_path / "moved.json")
    with pytest.raises(DataError, match=r"comes with no tokenizer.*my\.json: the run's tokenizer is not"):
        Generator.open(tmp_path / "null" / "run")
    with pytest.raises(SystemExit):
        main(["convert", str(tmp_path / "null" / "run"), str(tmp_path / "without")])
    assert "my.json: the run's tokenizer is not there any more" in "".join(capsys.readouterr().out.split("\n"))


def test_what_transformers_reads_otherwise_is_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a Qwen2, whose splitting of text it has in its code."""
    with pytest.raises(SystemExit):
        main(["convert", str(folder / "run"), str(folder / "told"), "--to", "huggingface", "--verify"])
    told = " ".join(capsys.readouterr().out.split())
    assert ("by Qwen's rule for every model of this kind" in told) == ("qwen2" in folder.name)
    tokenizer, text = load_tokenizer(folder / "told" / "tokenizer.json"), "Año 1984: los programas\n\nestán aquí."
    auto, plain = (
        each.from_pretrained(folder / "told")(text, add_special_tokens=False).input_ids
        for each in (transformers.AutoTokenizer, transformers.PreTrainedTokenizerFast)
    )
    assert plain == tokenizer.encode(text)
    if auto != plain:
        assert "makes other ids of" in told
