"""Weights of transformers through ``convert`` and back: logits, bytes, greedy tokens; and what is refused."""

from __future__ import annotations

import json
import math
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from megapoly.checkpoint.convert import convert, natural_format
from megapoly.checkpoint.weights import Native, Options, Weights, fill, open_weights
from megapoly.errors import CheckpointError
from megapoly.layers.call import Call, Place
from megapoly.models.decoder import DecoderStage
from megapoly.spec import Box, Piece
from tests.checkpoint import families
from tests.checkpoint.families import PEERS, transformers


def run(source: Path, target: Path, shard_bytes: int = 5_000_000_000) -> Weights:
    weights = open_weights(source)
    convert(weights, target, natural_format(weights), Options(shard_bytes=shard_bytes))
    return open_weights(target)


@torch.no_grad()
def logits(weights: Weights, tokens_BS: Tensor, dtype: torch.dtype) -> Tensor:
    stage = DecoderStage(weights.model, place=Place(dtype=dtype))
    fill(weights, stage.parameters())
    positions_BS = torch.arange(tokens_BS.shape[1]).expand_as(tokens_BS)
    result: Tensor = stage(None, Call(positions_BS.t(), tokens_SB=tokens_BS.t())).transpose(0, 1)
    return result


def greedy(model: nn.Module, tokens_BS: Tensor) -> Tensor:
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    result: Tensor = model.generate(tokens_BS, attention_mask=torch.ones_like(tokens_BS), **options)
    return result


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


BOTH = [(name, dtype) for name in PEERS for dtype in (torch.float64, torch.float32)]
SAMPLED = random.Random(0).sample(BOTH, 8)


@pytest.mark.parametrize(
    ("name", "dtype"), [case if case in SAMPLED else pytest.param(*case, marks=pytest.mark.long) for case in BOTH]
)
def test_there_and_back(name: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers -> megapoly -> transformers: its logits, its bytes, its config, its greedy tokens."""
    peer = families.save(name, tmp_path / "hf", dtype)
    weights = run(tmp_path / "hf", tmp_path / "own", 20_000)
    assert isinstance(weights, Native)
    back = run(tmp_path / "own", tmp_path / "back", 30_000)
    assert len(list((tmp_path / "own").glob("weights-*-of-*.safetensors"))) > 1
    assert (tmp_path / "back" / "model.safetensors.index.json").exists()
    assert back.model == weights.model
    assert_same(tensors(tmp_path / "back"), tensors(tmp_path / "hf"))
    configs = [json.loads((tmp_path / each / "config.json").read_text()) for each in ("hf", "back")]
    added = {"rope_theta", "rope_scaling"} if "rope_parameters" in configs[0] else set()  # for transformers 4
    assert configs[1] == configs[0] | {key: configs[1][key] for key in added}
    read = [transformers.AutoConfig.from_pretrained(tmp_path / each).to_diff_dict() for each in ("hf", "back")]
    if "rope_parameters" in read[1]:
        read[1]["rope_parameters"].pop("type", None)  # the old name of rope_type
    assert read[0] == read[1]

    tokens = families.tokens_of(name, length=12)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype=dtype).eval()
    assert torch.equal(greedy(loaded, tokens), greedy(peer, tokens))
    expected = families.logits(peer, families.tokens_of(name), monkeypatch)
    found = logits(weights, families.tokens_of(name), dtype)
    assert expected.abs().max() > 0.5
    bound = 1e-9 if dtype == torch.float64 else 1e-5 * float(expected.abs().max())
    assert (found - expected).abs().max() <= bound


@pytest.mark.parametrize("name", ["llama 3", "llama linear", "qwen2", "gpt2 untied", "bloom untied"])
def test_without_the_original_config_the_family_follows_from_the_model(name: str, tmp_path: Path) -> None:
    """As a model that megapoly has trained: the exported config is made of the model's keys alone."""
    families.save(name, tmp_path / "hf", torch.float32)
    run(tmp_path / "hf", tmp_path / "own")
    weights = open_weights(tmp_path / "own")
    weights.origin = {}
    convert(weights, tmp_path / "back", "huggingface", Options())
    assert_same(tensors(tmp_path / "back"), tensors(tmp_path / "hf"))
    models = [transformers.AutoModelForCausalLM.from_pretrained(tmp_path / each).eval() for each in ("hf", "back")]
    assert type(models[0]) is type(models[1])
    assert models[1].dtype == torch.float32
    tokens = families.tokens_of(name)
    with torch.no_grad():
        found, expected = models[1](tokens).logits, models[0](tokens).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)  # gelu_new is computed in another order


@pytest.mark.parametrize("name", ["llama grouped", "qwen2", "gpt2", "bloom"])
def test_any_piece_is_read_as_it_stands_in_the_whole(name: str, tmp_path: Path) -> None:
    families.save(name, tmp_path, torch.float32)
    weights = open_weights(tmp_path)
    draw = torch.Generator().manual_seed(0)
    for tensor, (shape, dtype) in weights.tensors.items():
        box = Box.whole(shape)
        whole = torch.empty(box.size, dtype=dtype)
        weights.read(tensor, Piece.of(box), whole)
        for _ in range(6):
            edges = [sorted(torch.randint(n + 1, (2,), generator=draw).tolist()) for n in shape]
            part = Box(tuple(a for a, _ in edges), tuple(b for _, b in edges))
            start, stop = sorted(torch.randint(part.size + 1, (2,), generator=draw).tolist())
            out = torch.full((stop - start,), 7.0, dtype=torch.float64)
            weights.read(tensor, Piece(part, start, stop), out)
            expected = whole.view(shape)[part.slices((0,) * len(shape))].flatten()[start:stop]
            assert torch.equal(out, expected.double()), (tensor, part)
        weights.release()


def test_shards_and_torch_files_hold_the_same(tmp_path: Path) -> None:
    """Shards of safetensors, one torch file, shards of torch files with names that lack the prefix."""
    families.save("gpt2", tmp_path / "one", torch.float32)
    raw = load_file(tmp_path / "one" / "model.safetensors")
    families.save("gpt2", tmp_path / "shards", torch.float32, max_shard_size="10KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 1
    for name in ("bin", "bins"):
        (tmp_path / name).mkdir()
        shutil.copy(tmp_path / "one" / "config.json", tmp_path / name)
    torch.save(raw, tmp_path / "bin" / "pytorch_model.bin")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in raw.items()}
    bare |= {f"h.{i}.attn.bias": torch.ones(1, 1, 24, 24, dtype=torch.bool) for i in range(3)}  # as files of old have
    bare |= {f"h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(3)}
    bare["lm_head.weight"] = bare["wte.weight"]
    names = sorted(bare)
    parts = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
    for file, held in parts.items():
        torch.save({name: bare[name] for name in held}, tmp_path / "bins" / file)
    index = {"metadata": {}, "weight_map": {name: file for file, held in parts.items() for name in held}}
    (tmp_path / "bins" / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    expected = open_weights(tmp_path / "one")
    for name in ("shards", "bin", "bins"):
        weights = open_weights(tmp_path / name)
        assert weights.tensors == expected.tensors
        for tensor, (shape, dtype) in expected.tensors.items():
            out, wanted = (torch.empty(Box.whole(shape).size, dtype=dtype) for _ in range(2))
            weights.read(tensor, Piece.of(Box.whole(shape)), out)
            expected.read(tensor, Piece.of(Box.whole(shape)), wanted)
            assert torch.equal(out, wanted), (name, tensor)


def change_config(folder: Path, **keys: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | keys
    path.write_text(json.dumps({key: value for key, value in config.items() if value != "remove"}))


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"model_type": "mixtral"}, "model_type is 'mixtral', expected one of llama, mistral"),
    ("llama", {"vocab_size": "remove"}, "has no key 'vocab_size'"),
    ("llama", {"attention_bias": True}, "attention_bias is True, expected False"),
    ("llama", {"mlp_bias": True}, "mlp_bias is True, expected False"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu', expected 'silu' or 'swish'"),
    ("llama", {"head_dim": 16}, "head_dim is 16, expected hidden_size / num_attention_heads = 24/3"),
    ("llama", {"quantization_config": {"bits": 4}}, "quantization_config is {'bits': 4}, expected None"),
    ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_type is 'yarn', expected 'default'"),
    ("llama", {"rope_parameters": {"rope_type": "linear"}}, "'linear' needs factor"),
    ("llama", {"rope_parameters": {"rope_theta": 1e4, "beta_fast": 1}}, "rope parameter beta_fast is 1"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5, expected 1"),
    ("llama", {"num_key_value_heads": 2}, "model.heads 3 does not divide by model.key_value_heads 2"),
    ("mistral", {"sliding_window": 8}, "sliding_window is 8, expected null or at least max_position_embeddings 24"),
    ("mistral", {"sliding_window": "remove", "max_position_embeddings": 8192}, "sliding_window is 4096, expected"),
    ("qwen2", {"use_sliding_window": True}, "use_sliding_window is True, expected False"),
    ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, r"layer_types is \['sliding_attention'\]"),
    ("gpt2", {"activation_function": "gelu"}, "activation_function is 'gelu', expected 'gelu_new' or"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
    ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights is False"),
    ("gpt2", {"add_cross_attention": True}, "add_cross_attention is True"),
    ("bloom", {"apply_residual_connection_post_layernorm": True}, "apply_residual_connection_post_layernorm is True"),
]  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("saved")
    for name in ("llama", "mistral", "qwen2", "gpt2", "bloom"):
        families.save(name, root / name, torch.float32)
    return root


@pytest.mark.parametrize(("name", "keys", "message"), REFUSED, ids=[f"{n} {next(iter(k))}" for n, k, _ in REFUSED])
def test_what_the_decoder_does_not_do_is_refused(
    name: str, keys: dict[str, Any], message: str, saved: Path, tmp_path: Path
) -> None:
    shutil.copytree(saved / name, tmp_path / "hf")
    change_config(tmp_path / "hf", **keys)
    with pytest.raises(CheckpointError, match=message) as error:
        open_weights(tmp_path / "hf")
    assert str(tmp_path / "hf" / "config.json") in str(error.value)


def test_both_forms_of_rotary_keys_are_read(saved: Path, tmp_path: Path) -> None:
    families.save("llama 3", tmp_path / "hf", torch.float32)
    expected = open_weights(tmp_path / "hf").model
    assert expected.rope_scaling is not None
    scaling = {key: value for key, value in families.LLAMA3.items() if key != "rope_theta"}
    change_config(tmp_path / "hf", rope_parameters="remove", rope_theta=500000.0, rope_scaling=scaling)
    assert open_weights(tmp_path / "hf").model == expected
    change_config(tmp_path / "hf", rope_scaling={"type": "linear", "factor": 2.0})
    scaled = open_weights(tmp_path / "hf").model.rope_scaling
    assert scaled is not None
    assert (scaled.kind, scaled.factor) == ("linear", 2.0)
    change_config(tmp_path / "hf", rope_scaling=None, rope_theta="remove")
    model = open_weights(tmp_path / "hf").model
    assert (model.wavelength_base, model.rope_scaling) == (10000.0, None)


def test_the_positions_of_bloom_are_said_to_be_assumed(saved: Path, tmp_path: Path) -> None:
    weights = open_weights(saved / "bloom")
    assert weights.model.positions == 2048
    assert "taken as 2048 positions" in weights.notes[0]
    shutil.copytree(saved / "bloom", tmp_path / "hf")
    change_config(tmp_path / "hf", seq_length=64)
    weights = open_weights(tmp_path / "hf")
    assert (weights.model.positions, weights.notes) == (64, [])


def change_tensors(folder: Path, change: dict[str, Tensor | None]) -> None:
    found: dict[str, Tensor | None] = {**load_file(folder / "model.safetensors"), **change}
    save_file({name: each for name, each in found.items() if each is not None}, folder / "model.safetensors")


def test_every_tensor_is_accounted_for(saved: Path, tmp_path: Path) -> None:
    def changed(number: int, change: dict[str, Tensor | None], name: str = "llama") -> Path:
        folder = Path(shutil.copytree(saved / name, tmp_path / str(number)))
        change_tensors(folder, change)
        return folder

    gone: dict[str, Tensor | None] = {"model.layers.1.self_attn.k_proj.weight": None, "lm_head.weight": None}
    with pytest.raises(CheckpointError, match=r"2 missing: model.layers.1.self_attn.k_proj.weight, lm_head.weight"):
        open_weights(changed(0, gone))
    more = torch.zeros(3)
    with pytest.raises(CheckpointError, match=r"1 unexpected: model.layers.0.self_attn.q_proj.bias"):
        open_weights(changed(1, {"model.layers.0.self_attn.q_proj.bias": more}))
    with pytest.raises(CheckpointError, match=r"1 of another shape: model.norm.weight \[3\], expected \[24\]"):
        open_weights(changed(2, {"model.norm.weight": more}))
    with pytest.raises(CheckpointError, match=r"model.norm.weight is torch.int8, expected floats"):
        open_weights(changed(3, {"model.norm.weight": torch.zeros(24, dtype=torch.int8)}))
    open_weights(changed(4, {"model.layers.0.self_attn.rotary_emb.inv_freq": more}))
    with pytest.raises(CheckpointError, match=r"tie_word_embeddings says .* but lm_head.weight is another tensor"):
        open_weights(changed(5, {"lm_head.weight": torch.zeros(61, 24)}, "gpt2"))


def test_damaged_and_missing_files_are_named(saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    families.save("llama", folder, torch.float32, max_shard_size="20KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    raw = shards[1].read_bytes()
    shards[1].write_bytes(raw[:-100])
    with pytest.raises(CheckpointError, match=rf"{shards[1].name}: cannot be read as a file of weights"):
        open_weights(folder)
    shards[1].unlink()
    with pytest.raises(CheckpointError, match=rf"1 of its \d+ files are missing: {shards[1].name}"):
        open_weights(folder)
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"index.json: is no index of weights"):
        open_weights(folder)
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no weights: none of model.safetensors, "):
        open_weights(folder)
    (folder / "pytorch_model.bin").write_bytes(b"not a file of torch")
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin: cannot be read as a file of torch.save"):
        open_weights(folder)


def test_a_torch_file_with_code_in_it_is_not_run(saved: Path, tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    folder = Path(shutil.copytree(saved / "llama", tmp_path / "hf"))
    (folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Attack()}, folder / "pytorch_model.bin")
    with pytest.raises(
        CheckpointError, match=r"pytorch_model.bin: holds 'model.norm.weight', .*expected tensors by name only"
    ):
        open_weights(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("zip_file", [True, False])
def test_a_flipped_bit_in_a_torch_file(saved: Path, tmp_path: Path, zip_file: bool) -> None:
    """Files since torch 1.6 have checksums; those before it are read, too."""
    folder = Path(shutil.copytree(saved / "llama", tmp_path / "hf"))
    stored = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    path = folder / "pytorch_model.bin"
    torch.save(stored, path, _use_new_zipfile_serialization=zip_file)
    weights, peer = open_weights(folder), open_weights(saved / "llama")

    def read(weights: Weights, name: str) -> torch.Tensor:
        out = torch.empty(math.prod(weights.tensors[name][0]), dtype=weights.tensors[name][1])
        weights.read(name, Piece.of(Box.whole(weights.tensors[name][0])), out)
        return out

    assert all(torch.equal(read(weights, name), read(peer, name)) for name in peer.tensors)
    if zip_file:
        content = bytearray(path.read_bytes())
        at = bytes(content).index(stored["model.layers.1.mlp.down_proj.weight"].numpy().tobytes())
        content[at + 5] ^= 1
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"pytorch_model.bin: .*CRC-32"):
            read(open_weights(folder), "layers.1.feedforward.down.weight")
