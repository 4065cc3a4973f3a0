"""Files of Megatron: against megatron-core's own model, against files put together by hand, and there and back."""

from __future__ import annotations

import importlib.util
import math
import random
import re
import shutil
import zipfile
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megapoly import config
from megapoly.checkpoint import torch_writer
from megapoly.checkpoint.convert import convert
from megapoly.checkpoint.weights import Options, open_weights
from megapoly.cli import main
from megapoly.config import Model, RopeScaling
from megapoly.data.load_tokenizer import load_tokenizer
from megapoly.errors import CheckpointError
from megapoly.spec import Box, Piece
from tests.checkpoint.given import Given, logits, model, read_all
from tests.checkpoint.test_pickles import edited
from tests.ranks import run_ranks

MODELS: dict[str, Model] = {
    "polylm": model(),
    "odd": model(layers=2, hidden=30, heads=6, ffn=18, vocabulary=257, positions=7, tied=False),
    "llama": model(llama=True, key_value_heads=2, rope_base=500000.0),
    "qwen": model(llama=True, tied=True, qkv_biases=True, ffn=20, vocabulary=256, norm_epsilon=1e-6),
    "stretched": model(llama=True, rope_scaling=RopeScaling(kind="linear", factor=2.0)),
    "llama 3": model(llama=True, rope_scaling=RopeScaling(kind="llama3", factor=32.0, original_positions=8192)),
}
NAMINGS = ("core", "core-te", "legacy")


def export(weights: Given, path: Path, tp: int = 1, pp: int = 1, naming: str = "core") -> Path:
    return convert(weights, path, "megatron", Options(tp=tp, pp=pp, naming=naming)).path


def assert_same(path: Path, weights: Given) -> None:
    found = open_weights(path)
    assert (found.model, found.notes, found.origin) == (weights.model, [], weights.origin)
    values = read_all(found)
    assert list(values) == list(weights.values)
    assert all(values[name].dtype == each.dtype for name, each in weights.values.items())
    assert all(torch.equal(values[name], each) for name, each in weights.values.items())


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("kind", "naming"),
    [
        pytest.param(kind, naming, marks=[] if number % 3 == at else pytest.mark.long)
        for number, kind in enumerate(MODELS)
        for at, naming in enumerate(NAMINGS)
    ],
)
def test_there_and_back(kind: str, naming: str, tmp_path: Path) -> None:
    given = Given(MODELS[kind], torch.bfloat16 if naming == "legacy" else torch.float32)
    there = export(given, tmp_path / "megatron", 2, 2, naming)
    assert sorted(path.parent.name for path in there.rglob("*.pt")) == [
        f"mp_rank_{tp:02d}_{pp:03d}" for tp in range(2) for pp in range(2)
    ]
    assert_same(there, given)
    assert_same(there / "release", given)
    back = convert(open_weights(there), tmp_path / "own", "megapoly", Options()).path
    assert_same(back, given)


@pytest.mark.parametrize(("kind", "naming"), [("polylm", "core"), ("polylm", "legacy"), ("qwen", "core-te")])
def test_another_layout_of_megatron_files_is_that_of_the_weights(kind: str, naming: str, tmp_path: Path) -> None:
    given, path = Given(MODELS[kind]), tmp_path / "0"
    export(given, path, 2, 2, naming)
    for number, (tp, pp) in enumerate(((1, 1), (4, 1), (1, 4), (2, 2))):
        after = tmp_path / str(number + 1)
        convert(open_weights(path), after, "megatron", Options(tp=tp, pp=pp, naming=naming))
        assert contents(after) == contents(export(given, tmp_path / "direct" / str(number), tp, pp, naming))
        path = after
    assert contents(path) == contents(tmp_path / "0")


def test_pieces(tmp_path: Path) -> None:
    """Any piece of any box, in another dtype."""
    given, draw = Given(MODELS["llama"]), random.Random(0)
    found = open_weights(export(given, tmp_path / "megatron", 2, 2))
    for name, value in given.values.items():
        for _ in range(5):
            ends = [sorted(draw.sample(range(n + 1), 2)) for n in value.shape]
            box = Box(tuple(a for a, _ in ends), tuple(b for _, b in ends))
            start, stop = sorted(draw.sample(range(box.size + 1), 2))
            out = torch.empty(stop - start, dtype=torch.float64)
            found.read(name, Piece(box, start, stop), out)
            assert torch.equal(out, value[box.slices((0,) * value.dim())].reshape(-1)[start:stop].double()), name
        found.release()


def test_torch_and_zipfile_read_the_files(tmp_path: Path) -> None:
    given = Given(MODELS["polylm"])
    export(given, tmp_path / "megatron", 2, 2)
    for path in (tmp_path / "megatron").rglob("*.pt"):
        with zipfile.ZipFile(path) as archive:
            assert archive.testzip() is None
            members = [member for member in archive.infolist() if "/data/" in member.filename]
        raw = path.read_bytes()
        with torch.serialization.safe_globals([Namespace]):
            found = torch.load(path, weights_only=True, mmap=True)
        assert found["checkpoint_version"] == 3.0
        assert len(found["model"]) == len(members) > 20
        for member, value in zip(members, found["model"].values(), strict=True):
            at = (
                member.header_offset
                + 30
                + sum(int.from_bytes(raw[member.header_offset + i :][:2], "little") for i in (26, 28))
            )
            assert at % 64 == 0
            assert raw[at : at + value.nbytes] == value.contiguous().numpy().tobytes()
    assert (tmp_path / "megatron" / "latest_checkpointed_iteration.txt").read_text() == "release\n"


def test_tensors_of_gigabytes_have_the_headers_of_large_members(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_writer, "_LARGE", 1000)
    given = Given(MODELS["polylm"])
    export(given, tmp_path / "megatron")
    assert_same(tmp_path / "megatron", given)
    path = tmp_path / "megatron" / "release" / "mp_rank_00" / "model_optim_rng.pt"
    assert path.read_bytes().count(b"\x01\x00\x10\x00") > 10  # the extra field of zip64, of 16 bytes
    found = load(tmp_path / "megatron", "mp_rank_00")["model"]
    assert torch.equal(found["embedding.position_embeddings.weight"], given.values["positions.weight"])


def test_padding_is_of_zeros_at_the_end(tmp_path: Path) -> None:
    given = Given(MODELS["odd"])
    export(given, tmp_path / "megatron", 3, 1)
    files = [load(tmp_path / "megatron", f"mp_rank_{rank:02d}") for rank in range(3)]
    for name, logical in (("embedding.word_embeddings", "embedding"), ("output_layer", "output")):
        table = torch.cat([file["model"][f"{name}.weight"] for file in files])
        assert table.shape == (384, 30)  # the next multiple of 128 x 3
        assert torch.equal(table[:257], given.values[f"{logical}.weight"])
        assert not table[257:].any()
    assert (files[0]["args"].padded_vocab_size, files[0]["args"].vocab_size) == (384, 257)


def load(folder: Path, rank: str) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(folder / "release" / rank / "model_optim_rng.pt", weights_only=False)
    return found


def change(folder: Path, rank: str, edit: Callable[[dict[str, Any]], Any]) -> Path:
    """Save a rank's file again, edited."""
    value = load(folder, rank)
    edit(value)
    torch.save(value, folder / "release" / rank / "model_optim_rng.pt")
    return folder


# --- megatron-core ---

PEERS: dict[str, tuple[Model, int, int]] = {
    "polylm": (MODELS["polylm"], 1, 1),
    "polylm, tp 2": (MODELS["odd"], 2, 1),
    "polylm, pp 2": (MODELS["polylm"], 1, 2),
    "llama": (MODELS["llama"], 1, 1),
    "llama, tp 2": (MODELS["llama"], 2, 1),
    "llama, pp 2": (MODELS["llama"], 1, 2),
    "llama 3": (MODELS["llama 3"], 1, 1),
    "stretched": (MODELS["stretched"], 2, 1),
    "qwen, tp 2": (MODELS["qwen"], 2, 1),
}


def again(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}-again")


def megatron_logits(
    rank: int, size: int, folders: list[Path], tokens_BS: Tensor
) -> tuple[list[Tensor | None], dict[str, str]]:
    from tests.checkpoint import megatron_peer

    found = [megatron_peer.logits(folder, again(folder), tokens_BS) for folder in folders]
    return found, megatron_peer.te_names()


@pytest.mark.skipif(importlib.util.find_spec("megatron") is None, reason="megatron-core is the oracle of this test")
def test_megatron_core_loads_the_files_strictly_and_has_our_logits(tmp_path: Path) -> None:
    tokens_BS = torch.randint(256, (3, 7), generator=torch.Generator().manual_seed(0))
    folders = []
    for number, (shape, tp, pp) in enumerate(PEERS.values()):
        given = Given(shape, torch.float64)
        folders.append(export(given, tmp_path / str(number), tp, pp))
        shutil.copytree(folders[-1], again(folders[-1]), ignore=shutil.ignore_patterns("*.pt"))
    ranks = run_ranks(2, megatron_logits, folders, tokens_BS, timeout=300)
    (one, te_names), (other, _) = ranks
    for (name, (shape, tp, pp)), folder, first, second in zip(PEERS.items(), folders, one, other, strict=True):
        expected = torch.cat([first, second], -1) if tp == 2 else second if pp == 2 else first
        mine = logits(Given(shape, torch.float64), tokens_BS)
        assert mine.abs().max() > 0.3, name
        assert (expected[..., : shape.vocabulary] - mine).abs().max() < 1e-12, name
        # The file that megatron-core's own state makes is read, too.
        assert_same(again(folder), Given(shape, torch.float64))
    # And with TransformerEngine, which runs on GPUs only, the norms are part of the linear layers, by its own table.
    export(Given(MODELS["polylm"]), tmp_path / "te", naming="core-te")
    expected_names = set(load(folders[0], "mp_rank_00")["model"])
    for old, new in te_names.items():
        layer = re.compile(rf"(decoder\.layers\.\d+\.){re.escape(old)}")
        expected_names = {layer.sub(rf"\1{new}", key) for key in expected_names}
    assert set(load(tmp_path / "te", "mp_rank_00")["model"]) == expected_names


# --- files put together by hand ---


def old_rows(version: float, heads: int, dim: int) -> list[tuple[int, int, int]]:
    """Head, kind and channel of every row of a rank's queries, keys and values: Megatron's _transpose_first_dim."""
    if version == 0:
        return [(head, kind, c) for kind in range(3) for head in range(heads) for c in range(dim)]
    if version == 1:
        return [(head, kind, c) for head in range(heads) for c in range(dim) for kind in range(3)]
    return [(head, kind, c) for head in range(heads) for kind in range(3) for c in range(dim)]


def old_stage(values: dict[str, Tensor], version: float, rank: int, early: bool) -> dict[str, Any]:
    """What rank ``rank`` of tp 2 saved of a PolyLM model, in the names of 2023, or the ``early`` ones before."""
    heads, hidden, ffn = 2, 48, 18  # of this rank, but the hidden size
    a, b, n, m, f = (
        ("attention", "transformer", "input_norm", "post_attention_norm", "final_norm")
        if early
        else ("self_attention", "encoder", "input_layernorm", "post_attention_layernorm", "final_layernorm")
    )
    block: dict[str, Any] = {}
    for i in range(4):
        mine, layer = f"layers.{i}", f"layers.{i}"
        for part in ("weight", "bias"):
            block[f"{layer}.{n}.{part}"] = values[f"{mine}.attention_norm.{part}"]
            block[f"{layer}.{m}.{part}"] = values[f"{mine}.feedforward_norm.{part}"]
            qkv = values[f"{mine}.attention.qkv.{part}"]
            rows = [qkv[rank * heads + head, kind, c] for head, kind, c in old_rows(version, heads, 12)]
            block[f"{layer}.{a}.query_key_value.{part}"] = torch.stack(rows)
            block[f"{layer}.mlp.dense_h_to_4h.{part}"] = values[f"{mine}.feedforward.up.{part}"][rank * ffn :][:ffn]
        block[f"{layer}.{a}.dense.weight"] = values[f"{mine}.attention.output.weight"][:, rank * 24 :][:, :24]
        block[f"{layer}.{a}.dense.bias"] = values[f"{mine}.attention.output.bias"]
        block[f"{layer}.mlp.dense_4h_to_h.weight"] = values[f"{mine}.feedforward.down.weight"][:, rank * ffn :][:, :ffn]
        block[f"{layer}.mlp.dense_4h_to_h.bias"] = values[f"{mine}.feedforward.down.bias"]
        block[f"{layer}.self_attention._extra_state"] = None
    for part in ("weight", "bias"):
        block[f"{f}.{part}"] = values[f"final_norm.{part}"]
    table = torch.cat([values["embedding.weight"], torch.full((512 - 301, hidden), 9.0)])[rank * 256 :][:256]
    embedding: dict[str, Any] = {
        "word_embeddings": {"weight": table},
        "position_embeddings": {"weight": values["positions.weight"]},
    }
    if early:
        flat = {f"{name}.weight": each["weight"] for name, each in embedding.items()}
        return {"language_model": {**flat, b: block} if version == 0 else {"embedding": flat, b: block}}
    return {"language_model": {"embedding": embedding, b: block}}


def old_checkpoint(folder: Path, version: float, early: bool, **keys: Any) -> Given:
    """A file of tp 2 as Megatron-LM saved them, with all else that it holds."""
    given = Given(MODELS["polylm"])
    args = Namespace(
        num_layers=4, hidden_size=48, num_attention_heads=4, ffn_hidden_size=36, max_position_embeddings=20,
        layernorm_epsilon=1e-5, padded_vocab_size=512, make_vocab_size_divisible_by=128, tensor_model_parallel_size=2,
        pipeline_model_parallel_size=1, hidden_dropout=0.1, bias_gelu_fusion=True, params_dtype=torch.float32,
        **keys,
    )  # fmt: skip
    for rank in range(2):
        path = folder / "iter_0001000" / f"mp_rank_{rank:02d}" / "model_optim_rng.pt"
        path.parent.mkdir(parents=True)
        value = {
            "args": args, "checkpoint_version": version, "iteration": 1000,
            "model": old_stage(given.values, version, rank, early),
            "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]},
            "rng_state": [{"random_rng_state": random.getstate(), "torch_rng_state": torch.get_rng_state()}],
        }  # fmt: skip
        if version == 0:
            del value["checkpoint_version"]
            vars(args)["model_parallel_size"] = vars(args).pop("tensor_model_parallel_size", 2)
        torch.save(value, path, _use_new_zipfile_serialization=not early)
    (folder / "latest_checkpointed_iteration.txt").write_text("1000")
    return given


@pytest.mark.parametrize(("version", "early"), [(0, True), (1.0, True), (2.0, False), (3.0, False), (3.0, True)])
def test_files_of_2023_and_before(version: float, early: bool, tmp_path: Path) -> None:
    given = old_checkpoint(tmp_path, version, early)
    found = open_weights(tmp_path, 301)
    assert found.model == given.model
    assert all(torch.equal(value, given.values[name]) for name, value in read_all(found).items())
    unknown = open_weights(tmp_path / "iter_0001000")
    assert unknown.model.vocabulary == 512
    assert "all 512 rows were taken" in unknown.notes[0]
    with pytest.raises(CheckpointError, match="has 512 rows, and 513 were given"):
        open_weights(tmp_path, 513)


def test_the_vocabulary_of_a_tokenizer(toml: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = config.load(toml, []).data.tokenizer
    old_checkpoint(tmp_path / "old", 3.0, False)
    with pytest.raises(SystemExit) as ended:
        main(["convert", str(tmp_path / "old"), str(tmp_path / "own"), "--tokenizer", str(tokenizer), "--verify"])
    assert ended.value.code == 0, capsys.readouterr().err
    assert open_weights(tmp_path / "own").model.vocabulary == load_tokenizer(tokenizer).vocabulary < 512


def test_the_vocabulary_of_a_tokenizer_that_adds_the_end_of_documents(tmp_path: Path) -> None:
    old_checkpoint(tmp_path, 3.0, False, vocab_size=300, tokenizer_type="NullTokenizer")
    assert (open_weights(tmp_path).model.vocabulary, open_weights(tmp_path).notes) == (301, [])


def test_virtual_stages(tmp_path: Path) -> None:
    """Rank p of a pipeline holds stages p and p + pp, each with layers from 0 on."""
    given = Given(MODELS["polylm"])
    plain = export(given, tmp_path / "plain", 1, 4)
    for rank in range(2):
        value = load(plain, f"mp_rank_00_{rank:03d}")
        value["args"].pipeline_model_parallel_size, value["args"].virtual_pipeline_model_parallel_size = 2, 2
        value["model0"], value["model1"] = value.pop("model"), load(plain, f"mp_rank_00_{rank + 2:03d}")["model"]
        path = tmp_path / "virtual" / f"mp_rank_00_{rank:03d}" / "model_optim_rng.pt"
        path.parent.mkdir(parents=True)
        torch.save(value, path)
    values = read_all(open_weights(tmp_path / "virtual"))
    assert all(torch.equal(values[name], each) for name, each in given.values.items())


# --- what is not as it should be ---


def refuse(path: Path, message: str, read: bool = False) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        read_all(open_weights(path)) if read else open_weights(path)
    assert str(path) in str(caught.value)


def test_every_tensor_is_accounted_for(tmp_path: Path) -> None:
    given = Given(MODELS["polylm"])
    whole = export(given, tmp_path / "whole", 2, 2)

    def edited(rank: str, edit: Callable[[dict[str, Any]], Any]) -> Path:
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        return change(shutil.copytree(whole, tmp_path / "copy"), rank, edit)

    norm, linear = "decoder.layers.1.input_layernorm.bias", "decoder.layers.0.mlp.linear_fc1.weight"
    refuse(
        edited("mp_rank_01_000", lambda value: value["model"].pop(norm)),
        rf"of its tensors 1 missing: mp_rank_01_000: {norm}\. Take a checkpoint of a GPT model",
    )
    refuse(
        edited("mp_rank_00_001", lambda value: value["model"].update({"decoder.new.weight": torch.ones(2)})),
        r"1 unexpected: mp_rank_00_001: decoder\.new\.weight",
    )
    refuse(
        edited("mp_rank_00_001", lambda value: value["model"].update({linear: torch.ones(3, 48)})),
        rf"1 of another shape: mp_rank_00_001: {linear} \[3, 48\], expected \[18, 48\]",
    )
    refuse(
        edited("mp_rank_00_001", lambda value: value["model"].update({linear: torch.ones(18, 48).int()})),
        "is torch.int32, expected floats",
    )
    refuse(
        edited("mp_rank_01_001", lambda value: value["model"].update({linear: torch.ones(18, 48).half()})),
        "is torch.float16, and torch.float32 in mp_rank_00_001",
    )
    refuse(
        edited("mp_rank_01_000", lambda value: value["model"][norm].__setitem__(3, 0.5)),
        rf"mp_rank_01_000/.*: {norm} has to be the same as {norm} in mp_rank_00_000, and differs by up to 0\.",
        read=True,
    )
    refuse(
        edited("mp_rank_01_001", lambda value: value["model"]["output_layer.weight"].__setitem__((3, 4), 7.0)),
        "output_layer.weight has to be the same as embedding.word_embeddings.weight in mp_rank_01_000",
        read=True,
    )
    refuse(
        edited("mp_rank_01_001", lambda value: value.update(iteration=7)), "has iteration 7, and mp_rank_00_000 has 0"
    )
    refuse(edited("mp_rank_00_000", lambda value: value.pop("args")), "has no arguments")
    refuse(edited("mp_rank_00_000", lambda value: value.pop("model")), "has no 'model'")
    refuse(
        edited("mp_rank_00_000", lambda value: setattr(value["args"], "num_layers", 5)),
        "hold 4 layers, and num_layers is 5",
    )
    refuse(
        edited("mp_rank_00_000", lambda value: setattr(value["args"], "tensor_model_parallel_size", 4)),
        r"lacks 4 of the 8 files of tp 4 x pp 2: mp_rank_02_000/model_optim_rng\.pt, ",
    )
    refuse(
        edited("mp_rank_00_000", lambda value: setattr(value["args"], "tensor_model_parallel_size", 10**9)),
        "more than 65536",
    )
    shutil.rmtree(tmp_path / "copy" / "release" / "mp_rank_01_001")
    change(tmp_path / "copy", "mp_rank_00_000", lambda value: setattr(value["args"], "tensor_model_parallel_size", 2))
    refuse(tmp_path / "copy", r"lacks 1 of the 4 files of tp 2 x pp 2: mp_rank_01_001/model_optim_rng\.pt;")


def test_a_copy_of_the_embedding_may_be_left_out(tmp_path: Path) -> None:
    given = Given(MODELS["polylm"])
    folder = export(given, tmp_path / "megatron", 1, 2)
    assert_same(change(folder, "mp_rank_00_001", lambda value: value["model"].pop("output_layer.weight")), given)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("num_experts", 8, "argument num_experts is 8, expected None or 0"),
        ("normalization", "L2", "argument normalization is 'L2', expected 'LayerNorm' or 'RMSNorm'"),
        ("apply_layernorm_1p", True, "argument apply_layernorm_1p is True, expected False"),
        ("kv_channels", 7, "argument kv_channels is 7, expected hidden_size / num_attention_heads = 48/4"),
        ("bias_gelu_fusion", False, "argument bias_gelu_fusion is False, expected true"),
        ("position_embedding_type", "alibi", "argument position_embedding_type is 'alibi'"),
        ("position_embedding_type", Namespace(), "argument position_embedding_type is Record, expected a number or"),
        ("window_size", (4, 4), "argument window_size is tuple"),
        ("hidden_size", "48", "argument hidden_size is '48', expected a positive whole number"),
        ("hidden_size", None, "have no hidden_size"),
        ("num_attention_heads", 5, "expected hidden_size / num_attention_heads"),
        ("layernorm_epsilon", -1.0, "do not describe a model"),
    ],
)
def test_arguments_that_are_not_ours_are_refused(name: str, value: Any, message: str, tmp_path: Path) -> None:
    folder = export(Given(MODELS["polylm"]), tmp_path / "megatron")

    def edit(found: dict[str, Any]) -> None:
        vars(found["args"]).pop("norm_epsilon")
        setattr(found["args"], name, value)
        if name == "num_attention_heads":
            del found["args"].kv_channels

    refuse(change(folder, "mp_rank_00", edit), message)


def test_folders_that_are_not_ours_are_refused(tmp_path: Path) -> None:
    tracker = tmp_path / "latest_checkpointed_iteration.txt"
    for text in ("", "../../x", "-1", "1000\n2000"):
        tracker.write_text(text)
        refuse(tmp_path, "expected the number of an iteration or 'release'")
    tracker.write_text("12")
    refuse(tmp_path, "iter_0000012: is missing")
    (tmp_path / "iter_0000012").mkdir()
    refuse(tmp_path, "has no files of ranks")
    (tmp_path / "iter_0000012" / "metadata.json").write_text("{}")
    refuse(tmp_path, "is a distributed checkpoint of Megatron")
    (tmp_path / "iter_0000012" / "mp_rank_00_000_001").mkdir()
    refuse(tmp_path, "mp_rank_00_000_001 are of expert parallelism")
    (tmp_path / "iter_0000012" / "mp_rank_00_000_001").rename(tmp_path / "iter_0000012" / "mp_rank_00")
    refuse(tmp_path, r"mp_rank_00/model_optim_rng\.pt: is missing")
    torch.save([1], tmp_path / "iter_0000012" / "mp_rank_00" / "model_rng.pt")
    refuse(tmp_path, "holds no dictionary")


@pytest.mark.parametrize(
    ("keys", "tp", "pp", "message"),
    [
        ({"position": "alibi", "embedding_norm": True}, 1, 1, "no form of this model: model.position is 'alibi'"),
        ({"embedding_norm": True}, 1, 1, "model.embedding_norm is true"),
        ({"qkv_biases": False}, 1, 1, "model.qkv_biases is false beside model.biases"),
        ({"biases": False}, 1, 1, "model.activation is 'gelu' without model.biases"),
        (
            {"llama": True, "rope_scaling": RopeScaling(kind="llama3", factor=8.0, original_positions=64)},
            1, 1, "model.rope_scaling is of original_positions 64",
        ),
        ({}, 3, 1, "model.heads 4 does not divide by --tp 3; choose it from 1, 2, 4"),
        ({"key_value_heads": 2}, 4, 1, "model.key_value_heads 2 does not divide by --tp 4"),
        ({"ffn": 34}, 4, 1, "model.ffn 34 does not divide by --tp 4"),
        ({}, 1, 3, "model.layers 4 does not divide by --pp 3"),
    ],
)  # fmt: skip
def test_models_that_megatron_has_not_are_refused(
    keys: dict[str, Any], tp: int, pp: int, message: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=message):
        export(Given(model(**keys)), tmp_path / "megatron", tp, pp)
    assert not (tmp_path / "megatron").exists()


def test_gelu_without_biases_has_a_form_in_the_old_models(tmp_path: Path) -> None:
    given = Given(model(biases=False))
    assert_same(export(given, tmp_path / "megatron", naming="legacy"), given)


@pytest.mark.parametrize("zipped", [True, False])
def test_damaged_files_are_refused_or_read(tmp_path: Path, zipped: bool) -> None:
    given, draw = Given(model(layers=1, hidden=8, heads=2, ffn=4, vocabulary=5, positions=3)), random.Random(1)
    folder = export(given, tmp_path / "megatron")
    path = folder / "release" / "mp_rank_00" / "model_optim_rng.pt"
    if not zipped:
        torch.save(torch.load(path, weights_only=False), path, _use_new_zipfile_serialization=False)
    raw, refused, wrong = path.read_bytes(), 0, 0
    for number in range(150):
        damaged = bytearray(raw)
        if number % 5 == 0:
            del damaged[draw.randrange(len(raw)) :]
        else:
            damaged[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        try:
            values = read_all(open_weights(folder))
        except CheckpointError:
            refused += 1
        else:
            wrong += any(not torch.equal(value, given.values.get(name)) for name, value in values.items())
    assert refused > 50
    assert wrong == 0 or not zipped  # old files have no checksums


@pytest.mark.parametrize("count", [150, pytest.param(5000, marks=pytest.mark.long)])
def test_edited_files_are_refused_or_read(tmp_path: Path, count: int) -> None:
    """Whole zip archives, with checksums, of pickles that say something else than Megatron does."""
    given, draw = Given(model(layers=2, hidden=8, heads=2, ffn=4, vocabulary=5, positions=3)), random.Random(2)
    folder = export(given, tmp_path / "megatron", 2)
    path = folder / "release" / "mp_rank_00" / "model_optim_rng.pt"
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    refused = 0
    for _ in range(count):
        with zipfile.ZipFile(path, "w") as archive:
            for name, raw in members.items():
                archive.writestr(name, edited(raw, draw) if name.endswith("data.pkl") else raw)
        try:
            read_all(open_weights(folder))
        except CheckpointError:
            refused += 1
    assert count // 2 < refused < count


# --- interruptions, and the command ---


def test_an_interrupted_export_goes_on_to_the_same_files(tmp_path: Path) -> None:
    shape = MODELS["polylm"]
    undisturbed = contents(export(Given(shape), tmp_path / "whole", 2, 2))
    target, partial = tmp_path / "resumed", tmp_path / ".resumed.partial"
    seen = set()
    for _ in range(100):
        try:
            export(Given(shape, reads=40), target, 2, 2)
            break
        except KeyboardInterrupt:
            assert not target.exists()
            seen.add(len([path for path in partial.rglob("*.pt") if not path.name.startswith(".")]))
    assert seen == {1, 2, 3}
    assert contents(target) == undisturbed
    assert not partial.exists()


def test_progress_is_of_the_model(tmp_path: Path) -> None:
    given, heard = Given(MODELS["polylm"]), []
    convert(given, tmp_path / "megatron", "megatron", Options(tp=2, pp=2), progress=heard.append)
    assert sum(heard) == sum(math.prod(shape) * 4 for shape, _ in given.tensors.values())


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = Given(MODELS["llama"])
    own = convert(given, tmp_path / "own", "megapoly", Options()).path

    def command(*words: str | Path) -> str:
        with pytest.raises(SystemExit) as ended:
            main(list(map(str, words)))
        out, err = capsys.readouterr()
        assert ended.value.code == 0, err
        return out

    there, back = tmp_path / "megatron", tmp_path / "back"
    out = command("convert", own, there, "--to", "megatron", "--tp", "2", "--pp", "2", "--verify")
    assert "Megatron-LM loads it with --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2" in out
    assert "the logits of 80 random tokens are equal" in out
    assert f"{there}: megatron, 27 tensors in 6 files" in out
    command("convert", there, back, "--verify")
    assert "all 27 tensors are the same" in command("checkpoint", "diff", own, back)
    small = tmp_path / "small"
    out = command("convert", there, small, "--vocabulary", "300", "--verify")
    assert open_weights(small).model.vocabulary == 300
    with pytest.raises(SystemExit):
        main(["convert", str(own), str(tmp_path / "x"), "--vocabulary", "300"])
    assert "leave --vocabulary out" in capsys.readouterr().err
