"""The one-process model against transformers' GPT2LMHeadModel on the same weights, in float64."""

import pytest
import torch
from torch import Tensor

from megapoly.config import Model
from megapoly.layers.call import Call, Place
from megapoly.models.decoder import DecoderStage
from tests.models.documents import assert_each_document_alone

transformers = pytest.importorskip("transformers", reason="the oracle of these tests")

SHAPES = [
    Model(layers=2, hidden=24, heads=3, ffn=52, vocabulary=61, positions=32),
    Model(layers=3, hidden=40, heads=5, ffn=160, vocabulary=97, positions=17, init_std=0.006),
]


def oracle(model: Model) -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=model.vocabulary, n_positions=model.positions, n_embd=model.hidden, n_layer=model.layers,
        n_head=model.heads, n_inner=model.ffn, layer_norm_epsilon=model.norm_epsilon, resid_pdrop=0, embd_pdrop=0,
        attn_pdrop=0, activation_function="gelu_pytorch_tanh",
    )  # fmt: skip
    peer = transformers.GPT2LMHeadModel(config).double()
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    return peer


def logical(peer: torch.nn.Module, model: Model, *, gradients: bool = False) -> dict[str, Tensor]:
    """The peer's weights (or gradients) under megapoly's names and shapes."""
    raw = {name: p.grad if gradients else p.detach() for name, p in peer.named_parameters()}
    heads, dim = model.heads, model.head_dim
    result = {
        "embedding.weight": raw["transformer.wte.weight"],
        "positions.weight": raw["transformer.wpe.weight"],
        "final_norm.weight": raw["transformer.ln_f.weight"],
        "final_norm.bias": raw["transformer.ln_f.bias"],
    }
    for i in range(model.layers):
        old, new = f"transformer.h.{i}", f"layers.{i}"
        qkv = raw[f"{old}.attn.c_attn.weight"].t().reshape(3, heads, dim, model.hidden)
        result[f"{new}.attention.qkv.weight"] = qkv.transpose(0, 1).contiguous()
        bias = raw[f"{old}.attn.c_attn.bias"].reshape(3, heads, dim)
        result[f"{new}.attention.qkv.bias"] = bias.transpose(0, 1).contiguous()
        for ours, theirs in (
            ("attention.output", "attn.c_proj"),
            ("feedforward.up", "mlp.c_fc"),
            ("feedforward.down", "mlp.c_proj"),
        ):
            result[f"{new}.{ours}.weight"] = raw[f"{old}.{theirs}.weight"].t().contiguous()
            result[f"{new}.{ours}.bias"] = raw[f"{old}.{theirs}.bias"]
        for ours, theirs in (("attention_norm", "ln_1"), ("feedforward_norm", "ln_2")):
            for part in ("weight", "bias"):
                result[f"{new}.{ours}.{part}"] = raw[f"{old}.{theirs}.{part}"]
    return result


@pytest.mark.parametrize("model", SHAPES, ids=lambda m: f"h{m.hidden}")
def test_logits_loss_and_gradients_equal_transformers(model: Model) -> None:
    peer = oracle(model)
    stage = DecoderStage(model, place=Place(dtype=torch.float64))
    weights = logical(peer, model)
    assert {p.spec.name for p in stage.parameters()} == set(weights)
    with torch.no_grad():
        for parameter in stage.parameters():
            parameter.copy_(weights[parameter.spec.name])
    tokens = torch.randint(model.vocabulary, (3, model.positions))
    labels = torch.randint(model.vocabulary, (3, model.positions))
    labels[0, 5:9] = -1
    positions = torch.arange(model.positions).expand_as(tokens)

    expected = peer(tokens).logits
    call = Call(positions.t(), tokens_SB=tokens.t())
    torch.testing.assert_close(stage(None, call).transpose(0, 1), expected, rtol=0, atol=1e-9)

    loss = torch.nn.functional.cross_entropy(expected.flatten(0, 1), labels.flatten(), ignore_index=-1)
    loss.backward()
    losses = stage(None, Call(positions.t(), tokens_SB=tokens.t(), labels_SB=labels.t()))
    ours = losses.sum() / (labels >= 0).sum()
    ours.backward()
    torch.testing.assert_close(ours, loss, rtol=0, atol=1e-9)
    for name, gradient in logical(peer, model, gradients=True).items():
        mine = next(p.grad for p in stage.parameters() if p.spec.name == name)
        assert (mine - gradient).abs().max() <= 1e-9 * max(1.0, gradient.abs().max()), name


def test_separate_documents_equal_transformers_on_each_document_alone() -> None:
    model = SHAPES[0]
    peer = oracle(model)
    stage = DecoderStage(model, place=Place(dtype=torch.float64))
    with torch.no_grad():
        for parameter in stage.parameters():
            parameter.copy_(logical(peer, model)[parameter.spec.name])
    assert_each_document_alone(stage, peer, model.vocabulary)
