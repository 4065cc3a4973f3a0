"""The layers of LLaMA and BLOOM, each by itself, against torch and closed formulas."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from megapoly.config import Model
from megapoly.context import Axis
from megapoly.layers.activation import ACTIVATIONS
from megapoly.layers.alibi import Alibi, slopes
from megapoly.layers.attention import document_mask
from megapoly.layers.call import Call, Deferred, Place
from megapoly.layers.norm import RMSNorm
from megapoly.layers.rotary import Rotary, rotate

CALL = Call(torch.zeros(1, 1, dtype=torch.long))


class Sink:
    """Adds up what comes."""

    defers = False

    def __init__(self) -> None:
        self.total: dict[int, torch.Tensor] = {}

    def add(self, parameter, accumulate) -> None:
        accumulate(self.total.setdefault(id(parameter), torch.zeros_like(parameter, dtype=torch.float64)))

    def before_forward(self, module: nn.Module) -> None:
        pass


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.03)]
)
def test_rms_norm_equals_torch(dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    ours, theirs = RMSNorm("n", 24, epsilon=1e-3, place=Place(dtype=dtype)), nn.RMSNorm(24, 1e-3).double()
    x = torch.randn(5, 2, 24, dtype=dtype)
    gradient = torch.randn(5, 2, 24, dtype=dtype)
    with torch.no_grad():
        ours.weight.copy_(torch.randn(24))
        theirs.weight.copy_(ours.weight)
    a, b = x.clone().requires_grad_(), x.double().requires_grad_()
    sink = Sink()
    later = Deferred(sink)
    y, expected = ours(a, Call(CALL.positions_SB, sink=later)), theirs(b)
    y.backward(gradient)
    assert not sink.total
    later.flush()
    expected.backward(gradient.double())
    assert y.dtype == dtype
    for found, wanted in ((y, expected), (a.grad, b.grad), (sink.total[id(ours.weight)], theirs.weight.grad)):
        torch.testing.assert_close(found.double(), wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_and_their_gradients_equal_autograd(name: str) -> None:
    activation = ACTIVATIONS[name]
    x = torch.randn(3, 2, 8, dtype=torch.float64, requires_grad=True)
    expected = (
        nn.functional.silu(x[..., :4]) * x[..., 4:] if name == "swiglu" else nn.functional.gelu(x, approximate="tanh")
    )
    y = activation(x)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-14)
    assert y.shape[-1] * activation.inputs == x.shape[-1]
    dy = torch.randn_like(y)
    (wanted,) = torch.autograd.grad(expected, x, dy)
    torch.testing.assert_close(torch.autograd.grad(y, x, dy)[0], wanted, rtol=0, atol=1e-14)
    torch.testing.assert_close(activation.backward(dy, x.detach()), wanted, rtol=0, atol=1e-14)


def test_rotary_turns_complex_numbers_and_leaves_the_value() -> None:
    """Channels i and i + D / 2 are the parts of a complex number that turns by position / base^(2 i / D)."""
    model = Model(layers=1, hidden=32, heads=4, key_value_heads=2, ffn=8, vocabulary=9, positions=99,
                  position="rope", rope_base=100.0)  # fmt: skip
    positions = torch.randint(0, 99, (6, 3))
    qkv = torch.randn(6, 3, 2 * 4 * 8, dtype=torch.float64, requires_grad=True)
    turned = rotate(qkv, Rotary(model, torch.device("cpu")).table(positions), 4)
    before, after = (x.detach().view(6, 3, 2, 4, 8) for x in (qkv, turned))
    assert torch.equal(after[..., 3, :], before[..., 3, :])
    angles = positions[..., None].double() * 100.0 ** (-torch.arange(4) / 4).double()
    factor = torch.polar(torch.ones_like(angles), angles)[:, :, None, None]
    expected = torch.complex(before[..., :3, :4], before[..., :3, 4:]) * factor
    torch.testing.assert_close(after[..., :3, :4], expected.real, rtol=0, atol=1e-4)  # angles are fp32
    torch.testing.assert_close(after[..., :3, 4:], expected.imag, rtol=0, atol=1e-4)
    gradient = torch.randn_like(qkv)
    turned.backward(gradient)  # of a rotation the gradient is the rotation back
    again = rotate(qkv.grad, Rotary(model, torch.device("cpu")).table(positions), 4)
    torch.testing.assert_close(again, gradient, rtol=0, atol=1e-6)


@pytest.mark.parametrize("heads", [1, 2, 3, 5, 7, 8, 12, 16, 20, 31, 40, 112])
def test_slopes_are_the_paper_s(heads: int) -> None:
    """As in its code: the powers of two are a geometric sequence, other counts take every other one of the next."""

    def geometric(n: int) -> list[float]:
        return [2 ** (-8 * i / n) for i in range(1, n + 1)]

    below = 2 ** math.floor(math.log2(heads))
    expected = geometric(below) + geometric(2 * below)[0::2][: heads - below]
    assert slopes(heads).tolist() == pytest.approx(expected, rel=1e-5)


def test_slopes_are_bit_for_bit_those_of_transformers() -> None:
    bloom = pytest.importorskip("transformers.models.bloom.modeling_bloom")
    ones = torch.ones(1, 2)
    for heads in range(1, 130):
        theirs = bloom.build_alibi_tensor(ones, heads, torch.float32)[:, 0, 1]
        assert torch.equal(slopes(heads), theirs), heads


def test_biases_of_ranks_and_documents() -> None:
    device = torch.device("cpu")
    whole = Alibi(6, Axis("tp", (0,), 0), torch.float64, device)
    scores = whole.scores(5, None)
    assert scores.shape == (1, 6, 5, 5)
    assert whole.scores(5, None) is scores
    assert whole.scores(4, None).shape == (1, 6, 4, 4)
    for head, slope in enumerate(slopes(6).tolist()):
        for query in range(5):
            expected = [-slope * (query - key) if key <= query else -math.inf for key in range(5)]
            assert scores[0, head, query].tolist() == expected
    for rank in range(2):
        part = Alibi(6, Axis("tp", (0, 1), rank), torch.float64, device)
        assert torch.equal(part.scores(5, None), scores.chunk(2, 1)[rank])
    mask = document_mask(torch.tensor([[0, 0, 1, 1, 1], [0, 0, 0, 0, 0]]))
    separate = whole.scores(5, mask)
    assert torch.equal(separate[1], scores[0])
    assert torch.equal(separate[0, :, 2:, 2:], scores[0, :, :3, :3])
    assert (separate[0, :, 2:, :2] == -math.inf).all()
