"""The one-process model as LLaMA, Qwen2, Mistral and BLOOM against transformers on the same weights, in float64.

transformers computes some parts in float32 whatever the model's dtype: RMSNorm and BLOOM's softmax, which torch's own
in float64 replace here, and the rotary angles, which are part of what the models are. In float32 nothing is replaced.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megapoly.config import Model, RopeScaling
from megapoly.layers.call import Call, Place
from megapoly.models.decoder import DecoderStage
from tests.models.documents import assert_each_document_alone

transformers = pytest.importorskip("transformers", reason="the oracle of these tests")

LLAMA: dict[str, Any] = {
    "norm": "rms", "norm_epsilon": 1e-6, "position": "rope", "activation": "swiglu", "biases": False, "tied": False,
}  # fmt: skip
BLOOM: dict[str, Any] = {"position": "alibi", "embedding_norm": True}
LLAMA3 = RopeScaling(kind="llama3", factor=8.0, original_positions=16)
LLAMA3_BOUNDS = RopeScaling(
    kind="llama3", factor=2.0, original_positions=20, low_frequency_factor=0.5, high_frequency_factor=3.0
)


def model(layers: int, hidden: int, heads: int, ffn: int, vocabulary: int, **keys: Any) -> Model:
    return Model(layers=layers, hidden=hidden, heads=heads, ffn=ffn, vocabulary=vocabulary, **{"positions": 24, **keys})


def bloom(layers: int, hidden: int, heads: int, vocabulary: int) -> Model:
    return model(layers, hidden, heads, 4 * hidden, vocabulary, **BLOOM)


SHAPES: dict[str, tuple[str, Model]] = {
    "llama": ("Llama", model(2, 24, 3, 50, 61, **LLAMA)),
    "llama, tied, grouped": ("Llama", model(3, 40, 10, 52, 97, **{**LLAMA, "tied": True}, key_value_heads=2)),
    "llama, one group": ("Llama", model(2, 40, 5, 17, 53, **LLAMA, key_value_heads=1, rope_base=500000.0)),
    "llama 3": ("Llama", model(2, 64, 4, 56, 61, **LLAMA, key_value_heads=2, rope_scaling=LLAMA3)),
    "llama 3, bounds": ("Llama", model(2, 32, 2, 40, 61, **{**LLAMA, "tied": True}, rope_scaling=LLAMA3_BOUNDS)),
    "llama, linear": ("Llama", model(2, 32, 4, 56, 61, **LLAMA, rope_scaling=RopeScaling(kind="linear", factor=4.0))),
    "qwen2": ("Qwen2", model(2, 36, 6, 70, 61, **{**LLAMA, "tied": True}, key_value_heads=3, qkv_biases=True)),
    "mistral": ("Mistral", model(2, 48, 6, 64, 59, **LLAMA, key_value_heads=2, rope_base=1e6)),
    "bloom": ("Bloom", bloom(2, 24, 3, 61)),
    "bloom, 5 heads": ("Bloom", bloom(3, 40, 5, 97)),
    "bloom, 8 heads": ("Bloom", bloom(2, 32, 8, 53)),
}


def rotary_peer(kind: str, ours: Model, dtype: torch.dtype) -> nn.Module:
    rope: dict[str, Any] = {"rope_theta": ours.rope_base or 10000.0, "rope_type": "default"}
    if ours.rope_scaling is not None:
        rope |= {"rope_type": ours.rope_scaling.kind, "factor": ours.rope_scaling.factor}
        if ours.rope_scaling.kind == "llama3":
            rope |= {
                "original_max_position_embeddings": ours.rope_scaling.original_positions,
                "low_freq_factor": ours.rope_scaling.low_frequency_factor or 1.0,
                "high_freq_factor": ours.rope_scaling.high_frequency_factor or 4.0,
            }
    keys = {"sliding_window": None} if kind == "Mistral" else {}
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=ours.vocabulary, hidden_size=ours.hidden, intermediate_size=ours.ffn,
        num_hidden_layers=ours.layers, num_attention_heads=ours.heads, num_key_value_heads=ours.groups,
        max_position_embeddings=ours.positions, rms_norm_eps=ours.norm_epsilon, rope_parameters=rope,
        tie_word_embeddings=ours.tied, attn_implementation="sdpa", **keys,
    )  # fmt: skip
    peer = getattr(transformers, f"{kind}ForCausalLM")(config).to(dtype)
    if dtype == torch.float32:
        return peer
    for parent in list(peer.modules()):
        for name, child in parent.named_children():
            if type(child).__name__ == f"{kind}RMSNorm":
                norm = nn.RMSNorm(ours.hidden, ours.norm_epsilon, dtype=torch.float64)
                setattr(parent, name, norm)
    return peer


def bloom_peer(ours: Model, dtype: torch.dtype) -> nn.Module:
    config = transformers.BloomConfig(
        vocab_size=ours.vocabulary, hidden_size=ours.hidden, n_layer=ours.layers, n_head=ours.heads,
        layer_norm_epsilon=ours.norm_epsilon, hidden_dropout=0, attention_dropout=0,
    )  # fmt: skip
    peer = transformers.BloomForCausalLM(config).to(dtype)
    for layer in peer.transformer.h if dtype == torch.float64 else ():  # the constants of BLOOM's own have nine digits
        layer.mlp.gelu_impl = nn.GELU(approximate="tanh")
    return peer


def oracle(kind: str, ours: Model, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    peer = bloom_peer(ours, dtype) if kind == "Bloom" else rotary_peer(kind, ours, dtype)
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    return peer


def rotary_weights(raw: dict[str, Tensor], ours: Model) -> dict[str, Tensor]:
    result = {"embedding.weight": raw["model.embed_tokens.weight"], "final_norm.weight": raw["model.norm.weight"]}
    if not ours.tied:
        result["output.weight"] = raw["lm_head.weight"]
    groups, dim = ours.groups, ours.head_dim
    for i in range(ours.layers):
        old, new = f"model.layers.{i}", f"layers.{i}"
        for part in ("weight", "bias") if ours.has_qkv_biases else ("weight",):
            q, k, v = (raw[f"{old}.self_attn.{x}_proj.{part}"] for x in "qkv")
            rest = q.shape[1:]
            parts = (q.view(groups, -1, dim, *rest), k.view(groups, 1, dim, *rest), v.view(groups, 1, dim, *rest))
            result[f"{new}.attention.qkv.{part}"] = torch.cat(parts, 1)
        result[f"{new}.attention.output.weight"] = raw[f"{old}.self_attn.o_proj.weight"]
        gate, up = (raw[f"{old}.mlp.{x}_proj.weight"] for x in ("gate", "up"))
        result[f"{new}.feedforward.gate_up.weight"] = torch.stack((gate, up))
        result[f"{new}.feedforward.down.weight"] = raw[f"{old}.mlp.down_proj.weight"]
        result[f"{new}.attention_norm.weight"] = raw[f"{old}.input_layernorm.weight"]
        result[f"{new}.feedforward_norm.weight"] = raw[f"{old}.post_attention_layernorm.weight"]
    return result


def bloom_weights(raw: dict[str, Tensor], ours: Model) -> dict[str, Tensor]:
    names = {"embedding": "word_embeddings", "embedding_norm": "word_embeddings_layernorm", "final_norm": "ln_f"}
    for i in range(ours.layers):
        for mine, theirs in (
            ("attention_norm", "input_layernorm"),
            ("attention.qkv", "self_attention.query_key_value"),
            ("attention.output", "self_attention.dense"),
            ("feedforward_norm", "post_attention_layernorm"),
            ("feedforward.up", "mlp.dense_h_to_4h"),
            ("feedforward.down", "mlp.dense_4h_to_h"),
        ):
            names[f"layers.{i}.{mine}"] = f"h.{i}.{theirs}"
    result = {}
    for mine, theirs in names.items():
        for part in ("weight", "bias"):
            x = raw.get(f"transformer.{theirs}.{part}")
            if x is not None:
                qkv = mine.endswith("qkv")
                result[f"{mine}.{part}"] = x.view(ours.heads, 3, ours.head_dim, *x.shape[1:]) if qkv else x
    return result


def logical(kind: str, peer: nn.Module, ours: Model, of: Callable[[Tensor], Any] = Tensor.detach) -> dict[str, Tensor]:
    """The peer's weights, or what ``of`` gives of them, under megapoly's names and shapes."""
    raw = {name: of(p) for name, p in peer.named_parameters()}
    return bloom_weights(raw, ours) if kind == "Bloom" else rotary_weights(raw, ours)


def loaded(kind: str, peer: nn.Module, ours: Model) -> DecoderStage:
    stage = DecoderStage(ours, place=Place(dtype=next(peer.parameters()).dtype))
    weights = logical(kind, peer, ours)
    assert {p.spec.name: p.spec.shape for p in stage.parameters()} == {k: tuple(v.shape) for k, v in weights.items()}
    with torch.no_grad():
        for parameter in stage.parameters():
            parameter.copy_(weights[parameter.spec.name])
    return stage


@pytest.fixture(autouse=True)
def softmax_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    module = transformers.models.bloom.modeling_bloom
    softmax = torch.nn.functional.softmax
    monkeypatch.setattr(module.F, "softmax", lambda x, dim, dtype=None: softmax(x, dim=dim))


@pytest.mark.parametrize(("kind", "ours"), SHAPES.values(), ids=SHAPES)
def test_logits_loss_and_gradients_equal_transformers(kind: str, ours: Model) -> None:
    peer = oracle(kind, ours)
    stage = loaded(kind, peer, ours)
    tokens = torch.randint(ours.vocabulary, (3, ours.positions))
    labels = torch.randint(ours.vocabulary, (3, ours.positions))
    labels[0, 5:9] = -1
    positions = torch.arange(ours.positions).expand_as(tokens)

    expected = peer(tokens).logits
    logits = stage(None, Call(positions.t(), tokens_SB=tokens.t())).transpose(0, 1)
    assert expected.abs().max() > 0.5
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-9)

    loss = nn.functional.cross_entropy(expected.flatten(0, 1), labels.flatten(), ignore_index=-1)
    loss.backward()
    losses = stage(None, Call(positions.t(), tokens_SB=tokens.t(), labels_SB=labels.t()))
    mine = losses.sum() / (labels >= 0).sum()
    mine.backward()
    torch.testing.assert_close(mine, loss, rtol=0, atol=1e-9)
    gradients = {p.spec.name: p.grad for p in stage.parameters()}
    for name, gradient in logical(kind, peer, ours, lambda p: p.grad).items():
        assert gradient.abs().max() > 0, name
        assert (gradients[name] - gradient).abs().max() <= 1e-9 * max(1.0, gradient.abs().max()), name


@pytest.mark.parametrize(("kind", "ours"), SHAPES.values(), ids=SHAPES)
def test_logits_equal_transformers_in_float32(kind: str, ours: Model) -> None:
    peer = oracle(kind, ours, torch.float32)
    tokens = torch.randint(ours.vocabulary, (3, ours.positions))
    positions = torch.arange(ours.positions).expand_as(tokens)
    logits = loaded(kind, peer, ours)(None, Call(positions.t(), tokens_SB=tokens.t())).transpose(0, 1)
    expected = peer(tokens).logits
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("name", ["llama 3", "bloom, 5 heads"])
def test_separate_documents_equal_transformers_on_each_document_alone(name: str) -> None:
    kind, ours = SHAPES[name]
    peer = oracle(kind, ours)
    assert_each_document_alone(loaded(kind, peer, ours), peer, ours.vocabulary)
