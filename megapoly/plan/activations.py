"""What one micro-batch takes on a stage from its forward to its backward pass. No torch.

Summed over the sites of the layers, each with the tensors that its autograd function saves (megapoly/layers).

Shapes: S sequence, s the slice of it outside of attention and feed-forward (S / tp under sequence parallelism), B
micro-batch. Sizes are in bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

from megapoly.config import Config
from megapoly.models.cost import in_chunks
from megapoly.pipeline.actions import Kind

Device = Literal["cpu", "cuda"]
PARAMETER_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp64": 8}
# Of an element's random word: for every four Philox has 18 int64 at once (counters, words, products, new words).
PHILOX_BYTES = 36
PHILOX_WORDS = 1 << 16  # at a time on a CPU
CHUNK_BYTES = {"cpu": 128 << 20, "cuda": 640 << 20}  # of the logits of a chunk, see megapoly_kernels
PRODUCT_BYTES = 64 << 20
UPDATED = 1 << 22  # elements whose gradients AdamW scales at a time on a CPU


class Live(NamedTuple):
    """Bytes beside weights, gradients and optimizer."""

    activations: int = 0
    logits: int = 0
    workspace: int = 0

    def plus(self, other: Live) -> Live:
        return Live(*(a + b for a, b in zip(self, other)))

    def minus(self, other: Live) -> Live:
        return Live(*(a - b for a, b in zip(self, other)))


@dataclass(frozen=True)
class Sizes:
    """Bytes of the tensors of one micro-batch on one rank."""

    config: Config
    device: Device

    @cached_property
    def parameter(self) -> int:
        return PARAMETER_BYTES[self.config.train.precision]

    @cached_property
    def wide(self) -> int:
        """Of an element of gradients, optimizer state, statistics and probabilities."""
        return max(4, self.parameter)

    @cached_property
    def tokens(self) -> int:
        return self.config.train.sequence * self.config.layout.micro_batch

    @cached_property
    def slice_tokens(self) -> int:
        return self.tokens // self.config.layout.sequence_shards

    @cached_property
    def local_vocabulary(self) -> int:
        return -(-self.config.model.vocabulary // self.config.layout.tp)

    @cached_property
    def residual(self) -> int:
        """The residual stream, [s, B, hidden]; also what stages send each other."""
        width = self.wide if self.config.model.fp32_residual else self.parameter
        return self.slice_tokens * self.config.model.hidden * width

    @cached_property
    def hidden(self) -> int:
        """A layer's input or output in the parameters' dtype, [s, B, hidden]."""
        return self.slice_tokens * self.config.model.hidden * self.parameter

    @cached_property
    def gathered(self) -> int:
        """The same of the whole sequence, [S, B, hidden], where it is another tensor; else 0."""
        split = self.config.layout.sequence_shards > 1
        return self.tokens * self.config.model.hidden * self.parameter if split else 0

    @cached_property
    def heads(self) -> int:
        """Queries, or what attention gives, of this rank's heads, [S, B, hidden / tp]."""
        return self.tokens * self.config.model.hidden // self.config.layout.tp * self.parameter

    @cached_property
    def key_value(self) -> int:
        """Keys and values of this rank's groups."""
        model = self.config.model
        return 2 * self.tokens * model.groups * model.head_dim // self.config.layout.tp * self.parameter

    @cached_property
    def inner(self) -> int:
        """What comes out of the feed-forward's activation, [S, B, ffn / tp]."""
        return self.tokens * self.config.model.ffn // self.config.layout.tp * self.parameter

    @cached_property
    def gated(self) -> int:
        """What goes into it: under SwiGLU the gates too."""
        return self.tokens * self.config.model.inner // self.config.layout.tp * self.parameter

    @cached_property
    def scores(self) -> int:
        """Elements of the attention's probabilities, [B, heads / tp, S, S]."""
        return self.tokens * self.config.train.sequence * self.config.model.heads // self.config.layout.tp

    @cached_property
    def softmax(self) -> int:
        """Of an element of the softmax."""
        return self.wide if self.config.model.fp32_softmax else self.parameter

    @cached_property
    def random(self) -> int:
        """Random words of a layer's largest dropout."""
        model = self.config.model
        hidden = self.slice_tokens * model.hidden if model.dropout and self.device == "cpu" else 0
        most = max(hidden, self.scores if model.attention_dropout else 0)
        return PHILOX_BYTES * (min(most, PHILOX_WORDS) if self.device == "cpu" else most)

    @cached_property
    def norm(self) -> int:
        """A norm keeps its input and statistics; its output is the input of what follows, which keeps it."""
        return self.residual + self.statistics + self.hidden

    @cached_property
    def statistics(self) -> int:
        """Of a norm: mean and deviation, or the root mean square alone."""
        return self.slice_tokens * self.wide * (1 if self.config.model.norm == "rms" else 2)

    @cached_property
    def rotary(self) -> int:
        """Sines and cosines of the positions, [2, S, B, head dimension / 2], in fp32."""
        return 4 * self.tokens * self.config.model.head_dim if self.config.model.position == "rope" else 0

    @cached_property
    def biases(self) -> int:
        """Of ALiBi: [heads / tp, S, S], of every sample where documents are separated."""
        if self.config.model.position != "alibi" or self.fused_attention:
            return 0
        samples = self.config.layout.micro_batch if self.config.data.separate_documents else 1
        length = self.config.train.sequence
        return samples * self.config.model.heads // self.config.layout.tp * length * length * self.parameter

    @cached_property
    def embedded(self) -> int:
        """What is kept of the embedding: row numbers, which are inside, the input of its norm, and what was dropped."""
        model = self.config.model
        rows = self.tokens + (self.slice_tokens if model.position == "learned" else 0)
        return 9 * rows + (self.residual + self.statistics if model.embedding_norm else 0) + self.dropped

    @cached_property
    def dropped(self) -> int:
        """A dropout of the residual stream keeps a byte an element on a CPU; a GPU makes the mask again."""
        keeps = self.config.model.dropout and self.device == "cpu"
        return self.slice_tokens * self.config.model.hidden if keeps else 0

    @cached_property
    def chunked(self) -> bool:
        """Whether the loss is computed in chunks of tokens."""
        return in_chunks(self.tokens, self.local_vocabulary, self.parameter)

    @cached_property
    def logits(self) -> int:
        """[S, B, vocabulary / tp] in the parameters' dtype."""
        return 0 if self.chunked else self.tokens * self.local_vocabulary * self.parameter

    @cached_property
    def probabilities(self) -> int:
        """The same in the dtype of the loss."""
        return 0 if self.chunked else self.tokens * self.local_vocabulary * self.wide

    @cached_property
    def chunk(self) -> int:
        """Of a loss in chunks: the logits of one, and the part of a product that is added to a wider sum."""
        width = self.wide if self.device == "cuda" else self.parameter
        most = min(CHUNK_BYTES[self.device], self.tokens * self.local_vocabulary * width)
        return most + (PRODUCT_BYTES if self.parameter < self.wide else 0)

    @cached_property
    def labels(self) -> int:
        """Of the loss: which logit, whether it is on this rank, and whether it is counted."""
        return self.tokens * (8 + 1 + 1)

    @cached_property
    def mask(self) -> int:
        """Where documents are separated, who sees whom: [B, S, S], a byte each."""
        needed = self.config.data.separate_documents and not self.fused_attention
        return self.tokens * self.config.train.sequence if needed else 0

    @cached_property
    def kept_mask(self) -> int:
        """Of it what is kept: ALiBi's biases take its place."""
        return 0 if self.config.model.position == "alibi" else self.mask

    @cached_property
    def fused_attention(self) -> bool:
        """Whether a kernel of ours finds documents and biases itself, and reads the heads where they are."""
        narrow = self.config.train.precision != "fp64"
        ours = narrow and self.config.kernels.attention != "sdpa"
        return self.device == "cuda" and ours and not self.explicit_attention

    @cached_property
    def explicit_attention(self) -> bool:
        """Whether all probabilities are in memory."""
        model = self.config.model
        return model.attention_dropout > 0 or not (model.fp32_softmax or self.parameter == self.wide)


def layer_sites(sizes: Sizes, recompute: str) -> dict[str, int]:
    """What one layer keeps from its forward to its backward pass, by site, under a kind of recomputation.

    The output of a site is counted where it is the input of the next that keeps it.
    """
    if recompute == "full":
        return {"layer's input": sizes.residual}
    sites = {
        "attention norm": sizes.norm,
        "qkv": 0 if sizes.explicit_attention and recompute == "none" else sizes.heads + sizes.key_value,
        "attention": attention_core(sizes),
        "output": sizes.heads,
        "attention dropout": sizes.dropped,
        "feed-forward norm": sizes.norm,
        "up": sizes.gated,
        "activation": sizes.inner,
        "feed-forward dropout": sizes.dropped,
    }
    if recompute == "selective":
        sites["attention"] = sites["activation"] = 0
    return sites


def attention_core(sizes: Sizes) -> int:
    """What attention keeps between qkv and the output layer."""
    model, batch = sizes.config.model, sizes.config.layout.micro_batch
    if sizes.explicit_attention:
        narrow = sizes.parameter if sizes.softmax > sizes.parameter else 0  # of what multiplies the values
        if model.attention_dropout:
            narrow = sizes.parameter + 1  # the values' factor after dropout, and what was kept
        visible = 0 if model.position == "alibi" else sizes.mask or sizes.config.train.sequence**2
        return 3 * sizes.heads + sizes.scores * (sizes.softmax + narrow) + visible
    sums = sizes.tokens * model.heads // sizes.config.layout.tp * sizes.wide
    if sizes.fused_attention:
        return sums
    grouped = sizes.heads if model.groups < model.heads else 0  # the queries of all groups side by side are a copy
    # CUDA's kernel for fp32 and for masks gives [B, S, ...], the others what they were given, here [S, B, ...].
    reordered = sizes.device == "cuda" and batch > 1 and (sizes.parameter > 2 or sizes.mask or sizes.biases)
    return grouped + sums + sizes.kept_mask * sizes.parameter + (sizes.heads if reordered else 0)


def put_off_sites(sizes: Sizes) -> dict[str, tuple[int, int]]:
    """What the weight part of a layer's split backward pass needs: inputs and gradients of outputs of the linears."""
    return {
        "qkv": (sizes.hidden, sizes.heads + sizes.key_value),
        "output": (sizes.heads, sizes.hidden + sizes.gathered),
        "up": (sizes.hidden, sizes.gated),
        "down": (sizes.inner, sizes.hidden + sizes.gathered),
    }


@dataclass(frozen=True)
class StageMemory:
    """What one micro-batch takes on a stage, without the stage's input and output.

    Attributes:
        kept: from the forward to the backward pass.
        put_off: from the input part to the weight part of a split backward pass.
        moments: by kind of action, what there is at its heights beside what there was when it began.
    """

    kept: Live
    put_off: Live
    moments: dict[Kind, list[Live]]


def stage_memory(sizes: Sizes, layers: tuple[int, int], first: bool, last: bool) -> StageMemory:
    """Of a stage with the layers [begin, end)."""
    layout = sizes.config.layout
    modes: list[str] = [
        "none" if layout.recompute == "full" and i % layout.recompute_every else layout.recompute
        for i in range(*layers)
    ]
    activations = sum(sum(layer_sites(sizes, mode).values()) for mode in modes)
    put_off = len(modes) * sum(map(sum, put_off_sites(sizes).values()))
    if not first and (modes or last):
        activations -= sizes.residual  # the stage's input
    if set(modes) - {"none"}:
        activations += sizes.kept_mask  # for what is computed again; else its copies in the attention are what is kept
    if modes:
        activations += sizes.rotary + (sizes.biases if sizes.config.data.separate_documents else 0)
    if first:
        activations += sizes.embedded
        put_off += (sizes.hidden if sizes.config.model.position == "learned" else 0) + (sizes.gathered or sizes.hidden)
    if last:
        activations += sizes.norm + sizes.labels
        put_off += sizes.hidden
    kept = Live(activations, sizes.probabilities if last else 0)
    later = Live(put_off, sizes.logits if last else 0)
    moments = {
        Kind.FORWARD: list(_forward(sizes, kept, bool(modes), last)),
        Kind.BACKWARD: list(_backward(sizes, modes, last, split=False)),
        Kind.BACKWARD_INPUT: list(_backward(sizes, modes, last, split=True)),
        Kind.BACKWARD_WEIGHT: list(_weights(sizes, bool(modes), last)),
    }
    return StageMemory(kept, later, moments)


def _forward(sizes: Sizes, kept: Live, layers: bool, last: bool) -> Iterator[Live]:
    if layers:
        height = max(sizes.residual + sizes.hidden + sizes.gathered, sizes.random)
        yield Live(kept.activations, 0, height + sizes.mask)
    if last:
        narrow = sizes.logits if sizes.parameter < sizes.wide else 0
        yield Live(kept.activations, sizes.probabilities + narrow, sizes.chunk if sizes.chunked else 0)


def _backward(sizes: Sizes, modes: list[str], last: bool, *, split: bool) -> Iterator[Live]:
    """From the last layer to the first; what a layer kept is gone when the one before it begins."""
    live = Live()
    sites = put_off_sites(sizes).values() if split else ()
    inputs, gradients = sum(x for x, _ in sites), sum(dy for _, dy in sites)
    if last and sizes.chunked:
        live = live.minus(Live(sizes.labels + sizes.norm)).plus(Live(sizes.hidden if split else 0))
        yield live.plus(Live(0, 0, 2 * sizes.hidden + (sizes.chunk if split else 0)))
    elif last:
        yield Live(0, sizes.logits if sizes.parameter < sizes.wide else 0)  # the gradient that leaves the loss
        live = live.minus(Live(sizes.labels, sizes.probabilities)).plus(Live(0, sizes.logits))
        d_input = Live(0, 0, 2 * (sizes.hidden + sizes.gathered))
        yield live.plus(d_input).plus(Live() if split else _output_product(sizes))
        live = live.minus(Live(sizes.norm, 0 if split else sizes.logits))
        live = live.plus(Live(sizes.hidden if split else 0))
    for mode in reversed(modes):
        yield live.plus(Live(_computed_again(sizes, mode), 0, _layer_workspace(sizes, mode, split)))
        live = live.plus(Live(inputs - sum(layer_sites(sizes, mode).values()), 0, gradients))


def _weights(sizes: Sizes, layers: bool, last: bool) -> Iterator[Live]:
    if last:
        yield _output_product(sizes)
    if layers:
        model = sizes.config.model
        inner = _product(sizes, model.hidden, model.inner // sizes.config.layout.tp)
        yield Live(0, 0, sizes.gathered + inner)


def _computed_again(sizes: Sizes, mode: str) -> int:
    """Activations of one layer that the backward pass makes anew."""
    if mode == "full":
        return sum(layer_sites(sizes, "none").values()) - sizes.residual
    return attention_core(sizes) if mode == "selective" else 0


def _product(sizes: Sizes, inputs: int, outputs: int) -> int:
    """Workspace of the gradient of a weight, which is added to its sum after it is made.

    On a CPU one factor is transposed for fp32, where it is not narrower.
    """
    if sizes.device == "cuda":
        return 0 if sizes.parameter == sizes.wide else inputs * outputs * sizes.wide
    if sizes.wide > 4:
        return 0
    widened = inputs + outputs if sizes.parameter < sizes.wide else 0
    return (inputs * outputs + sizes.tokens * (widened + min(inputs, outputs))) * sizes.wide


def _output_product(sizes: Sizes) -> Live:
    """The same of the output layer: on a CPU one factor is a copy of the logits' gradient."""
    if sizes.chunked:
        return Live(0, 0, sizes.chunk + sizes.gathered)
    product = _product(sizes, sizes.config.model.hidden, sizes.local_vocabulary)
    copy = sizes.probabilities if product and sizes.device == "cpu" and sizes.parameter < sizes.wide else 0
    return Live(0, copy, product - copy + sizes.gathered)


def _layer_workspace(sizes: Sizes, mode: str, split: bool) -> int:
    """The gradient of the residual stream, and the largest of what stands beside it on the way through a layer."""
    model, tp = sizes.config.model, sizes.config.layout.tp
    narrow = sizes.hidden if sizes.hidden != sizes.residual else 0
    product = 0 if split else _product(sizes, model.hidden, model.inner // tp)
    again = 0 if mode == "none" else sizes.inner
    factors = 2 * sizes.inner if model.activation == "swiglu" else 0  # of the gradient of the gates
    inside = max(sizes.inner + sizes.gated + factors, sizes.gated + sizes.hidden + product)
    feedforward = again + sizes.gathered + inside
    attention = 2 * (sizes.heads + sizes.key_value)
    if sizes.explicit_attention:
        attention += 2 * sizes.scores * sizes.softmax
    return sizes.residual + narrow + max(feedforward, attention, sizes.random if mode != "none" else 0)
