"""Which tensor of a Megatron file is which part of which logical tensor. No torch.

A model is split over ``tp`` ranks, and its layers over stages; each stage of each rank is one set of named tensors, and
layers are numbered within it. Two ways to name them: megatron-core's GPTModel, and the language model of Megatron-LM
before it, of PolyLM's release. The columns of weights are the inputs, as ours are.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from megapoly.checkpoint.families import Slot
from megapoly.config import Model
from megapoly.spec import Box, Index

DIVISOR = 128  # Megatron pads the vocabulary to a multiple of this x tp


@dataclass(frozen=True)
class Naming:
    """Names of the parts of a stage.

    Attributes:
        embedding, positions, layer, final_norm, output: in the stage; a layer's number comes after ``layer``.
        copy: of the embedding on the last stage, for a tied output layer.
        norms: attention_norm and feedforward_norm in a layer, up to "weight" and "bias".
        linears: qkv, output, up and down in a layer.
    """

    embedding: str
    positions: str
    layer: str
    final_norm: str
    output: str
    copy: str
    norms: tuple[str, str]
    linears: tuple[str, str, str, str]


_CORE_LINEARS = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
_CORE = Naming(
    "embedding.word_embeddings", "embedding.position_embeddings", "decoder.layers", "decoder.final_layernorm",
    "output_layer", "output_layer", ("input_layernorm.", "pre_mlp_layernorm."), _CORE_LINEARS,
)  # fmt: skip
NAMINGS: dict[str, Naming] = {
    "core": _CORE,
    "core-te": Naming(
        _CORE.embedding, _CORE.positions, _CORE.layer, _CORE.final_norm, _CORE.output, _CORE.copy,
        ("self_attention.linear_qkv.layer_norm_", "mlp.linear_fc1.layer_norm_"), _CORE_LINEARS,
    ),
    "legacy": Naming(
        "language_model.embedding.word_embeddings", "language_model.embedding.position_embeddings",
        "language_model.encoder.layers", "language_model.encoder.final_layernorm", "language_model.output_layer",
        "word_embeddings_for_head", ("input_layernorm.", "post_attention_layernorm."),
        ("self_attention.query_key_value", "self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    ),
}  # fmt: skip
# What older and newer releases of Megatron-LM call the same things, one after another.
_LEGACY_ALIASES = (
    (re.compile(r"^language_model\.transformer\."), "language_model.encoder."),
    (re.compile(r"^language_model\.(word|position)_embeddings\."), r"language_model.embedding.\1_embeddings."),
    (re.compile(r"(\.layers\.\d+)\.attention\."), r"\1.self_attention."),
    (re.compile(r"\.(input|post_attention|final)_norm\."), r".\1_layernorm."),
)
# State that is no weight of the model: of TransformerEngine's scaling, and the angles of rotary embedding.
_STATE = re.compile(r"(.*\.)?(_extra_state|inv_freq)")


@dataclass(frozen=True)
class Part:
    """What one tensor-parallel rank holds of one pipeline stage: layers ``[begin, end)`` of the model.

    Attributes:
        padded: rows of the vocabulary with its padding, of all ranks.
        order: of the rows of queries, keys and values: ``"groups"``, each group's queries, key and value together,
            since version 2 of Megatron's checkpoints; ``"kinds"``, all queries, all keys, all values, in version 0;
            ``"channels"``, the three of a channel of a head together, in version 1.
    """

    tp: int
    rank: int
    begin: int
    end: int
    first: bool
    last: bool
    padded: int
    order: str = "groups"


def padded_vocabulary(vocabulary: int, tp: int, divisor: int = DIVISOR) -> int:
    """Rows of Megatron's table for a vocabulary."""
    multiple = divisor * tp
    return -(-vocabulary // multiple) * multiple


def naming_of(names: list[str]) -> str:
    """The key of :data:`NAMINGS` that tensors of a stage are named by."""
    if any(name.startswith(("language_model.", "word_embeddings_for_head")) for name in names):
        return "legacy"
    return "core-te" if any(".layer_norm_weight" in name for name in names) else "core"


def canonical(name: str, naming: str) -> str | None:
    """The name as :class:`Naming` has it; None where it is of no weight of the model."""
    if _STATE.fullmatch(name):
        return None
    for pattern, replacement in _LEGACY_ALIASES if naming == "legacy" else ():
        name = pattern.sub(replacement, name)
    return name


def layer_count(names: list[str], naming: str) -> int:
    """Layers of a stage, by the highest number among its canonical names."""
    pattern = re.compile(re.escape(NAMINGS[naming].layer) + r"\.(\d+)\.")
    numbers = [int(match[1]) for match in map(pattern.match, names) if match]
    return 1 + max(numbers, default=-1)


def is_copy(slot: Slot, naming: str) -> bool:
    """Whether a slot is a copy of the embedding for the output layer."""
    return slot.name == "embedding.weight" and slot.source == f"{NAMINGS[naming].copy}.weight"


def slots(model: Model, part: Part, naming: str) -> Iterator[Slot]:
    """Every tensor of a part, in Megatron's order. Slots of other ranks with the same box are copies of it.

    A table of the vocabulary has more rows than its box by padding, at the end.
    """
    names = NAMINGS[naming]
    if part.first:
        yield _table(f"{names.embedding}.weight", "embedding.weight", model, part)
        if model.position == "learned":
            yield _whole(f"{names.positions}.weight", "positions.weight", (model.positions, model.hidden))
    for number in range(part.begin, part.end):
        yield from _layer(f"{names.layer}.{number - part.begin}.", f"layers.{number}.", model, part, names)
    if part.last:
        yield from _norm(f"{names.final_norm}.", "final_norm", model)
        if not model.tied:
            yield _table(f"{names.output}.weight", "output.weight", model, part)
        elif not part.first:
            yield _table(f"{names.copy}.weight", "embedding.weight", model, part)


def _layer(prefix: str, name: str, model: Model, part: Part, names: Naming) -> Iterator[Slot]:
    qkv, output, up, down = (prefix + linear for linear in names.linears)
    hidden, heads, ffn = model.hidden, model.heads * model.head_dim, model.ffn
    yield from _norm(prefix + names.norms[0], f"{name}attention_norm", model)
    yield _columns(f"{output}.weight", f"{name}attention.output.weight", hidden, heads, part)
    if model.biases:
        yield _whole(f"{output}.bias", f"{name}attention.output.bias", (hidden,))
    yield _qkv(f"{qkv}.weight", f"{name}attention.qkv.weight", (hidden,), model, part)
    if model.has_qkv_biases:
        yield _qkv(f"{qkv}.bias", f"{name}attention.qkv.bias", (), model, part)
    yield from _norm(prefix + names.norms[1], f"{name}feedforward_norm", model)
    gated = model.activation == "swiglu"
    inner = f"{name}feedforward.{'gate_up' if gated else 'up'}"
    yield _inner(f"{up}.weight", f"{inner}.weight", (hidden,), model, part)
    if model.biases:
        yield _inner(f"{up}.bias", f"{inner}.bias", (), model, part)
    yield _columns(f"{down}.weight", f"{name}feedforward.down.weight", hidden, ffn, part)
    if model.biases:
        yield _whole(f"{down}.bias", f"{name}feedforward.down.bias", (hidden,))


def _slot(source: str, name: str, box: Box, rows: int) -> Slot:
    """The elements of a box in their order; its first ``rows`` dimensions are one in the file."""
    shape = (Box(box.start[:rows], box.stop[:rows]).size, *box.shape[rows:])
    return Slot(source, shape, name, box, box.shape, tuple(range(len(box.shape))))


def _whole(source: str, name: str, shape: Index) -> Slot:
    return _slot(source, name, Box.whole(shape), 1)


def _norm(source: str, name: str, model: Model) -> Iterator[Slot]:
    """``source`` ends in what "weight" is put to."""
    for kind in ("weight",) if model.norm == "rms" else ("weight", "bias"):
        yield _whole(source + kind, f"{name}.{kind}", (model.hidden,))


def _table(source: str, name: str, model: Model, part: Part) -> Slot:
    rows, hidden = part.padded // part.tp, model.hidden
    start, stop = (min(model.vocabulary, rows * rank) for rank in (part.rank, part.rank + 1))
    return Slot(source, (rows, hidden), name, Box((start, 0), (stop, hidden)), (rows, hidden), (0, 1))


def _columns(source: str, name: str, outputs: int, inputs: int, part: Part) -> Slot:
    start, stop = (inputs // part.tp * rank for rank in (part.rank, part.rank + 1))
    return _slot(source, name, Box((0, start), (outputs, stop)), 1)


def _qkv(source: str, name: str, rest: Index, model: Model, part: Part) -> Slot:
    groups, per_group, dim = model.groups // part.tp, model.heads // model.groups + 2, model.head_dim
    zeros = (0,) * (2 + len(rest))
    box = Box((groups * part.rank, *zeros), (groups * (part.rank + 1), per_group, dim, *rest))
    shape, tail = (groups * per_group * dim, *rest), tuple(range(3, 3 + len(rest)))
    if part.order == "kinds":
        return Slot(source, shape, name, box, (per_group, groups, dim, *rest), (1, 0, 2, *tail))
    if part.order == "channels":
        return Slot(source, shape, name, box, (groups, dim, per_group, *rest), (0, 2, 1, *tail))
    return _slot(source, name, box, 3)


def _inner(source: str, name: str, rest: Index, model: Model, part: Part) -> Slot:
    """Rows of the first layer of the feed-forward; a rank's gates stand before its values."""
    start, stop = (model.ffn // part.tp * rank for rank in (part.rank, part.rank + 1))
    zeros = (0,) * len(rest)
    if model.activation == "swiglu":
        return _slot(source, name, Box((0, start, *zeros), (2, stop, *rest)), 2)
    return _slot(source, name, Box((start, *zeros), (stop, *rest)), 1)
