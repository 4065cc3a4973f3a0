"""Which tensor of a Hugging Face model is which part of which logical tensor. No torch.

A :class:`Slot` says it for one tensor of a file. Read in ``factors`` and permuted to ``order`` it is the ``box`` of the
logical tensor: rows of queries, keys and values become groups of heads, the ``[input, output]`` matrices of GPT-2 turn.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from megapoly.config import Model
from megapoly.spec import Box, Index

PREFIXES = {"gpt2": "transformer.", "bloom": "transformer.", "llama": "model.", "mistral": "model.", "qwen2": "model."}
HEAD = "lm_head.weight"
# Tensors of older files that transformers computes, and ignores.
BUFFERS = re.compile(r"(.*\.)?(rotary_emb\.inv_freq|attn\.(bias|masked_bias)|self_attention\.masked_bias)")


@dataclass(frozen=True)
class Slot:
    """One tensor of a Hugging Face file.

    Attributes:
        source: its name there.
        shape: its shape there.
        name: of the logical tensor that it is a part of.
        box: the part.
        factors: the shape that it is viewed in; its product is that of ``shape``.
        order: the permutation of ``factors`` that has the shape of ``box``.
    """

    source: str
    shape: Index
    name: str
    box: Box
    factors: Index
    order: Index

    @property
    def plain(self) -> bool:
        """Whether the elements stand in the order of the box."""
        return self.order == tuple(range(len(self.order)))


def slots(model_type: str, model: Model) -> list[Slot]:
    """Every tensor of a file of this ``model_type`` for ``model``, in the order of transformers."""
    prefix = PREFIXES[model_type]
    parts = {"gpt2": _gpt2, "bloom": _bloom}.get(model_type, _rotary)
    found = list(parts(model, prefix))
    if not model.tied:
        found.append(_rows(HEAD, "output.weight", (model.vocabulary, model.hidden)))
    return found


def _rows(source: str, name: str, shape: Index) -> Slot:
    """The same tensor."""
    return Slot(source, shape, name, Box.whole(shape), shape, tuple(range(len(shape))))


def _part(source: str, shape: Index, name: str, box: Box) -> Slot:
    return Slot(source, shape, name, box, box.shape, tuple(range(len(box.shape))))


def _turned(source: str, name: str, outputs: int, inputs: int) -> Slot:
    """A matrix ``[inputs, outputs]``, as GPT-2's are."""
    return Slot(source, (inputs, outputs), name, Box.whole((outputs, inputs)), (inputs, outputs), (1, 0))


def _rotary(model: Model, prefix: str) -> Iterator[Slot]:
    hidden, ffn, dim, groups = model.hidden, model.ffn, model.head_dim, model.groups
    queries = model.heads // groups
    yield _rows(f"{prefix}embed_tokens.weight", "embedding.weight", (model.vocabulary, hidden))
    for i in range(model.layers):
        old, new = f"{prefix}layers.{i}", f"layers.{i}"
        rests: list[tuple[str, Index]] = [("weight", (hidden,))]
        if model.has_qkv_biases:
            rests.append(("bias", ()))
        for kind, rest in rests:
            for letter, start, stop in (
                ("q", 0, queries),
                ("k", queries, queries + 1),
                ("v", queries + 1, queries + 2),
            ):
                box = Box((0, start, 0, *(0 for _ in rest)), (groups, stop, dim, *rest))
                shape = (groups * (stop - start) * dim, *rest)
                yield _part(f"{old}.self_attn.{letter}_proj.{kind}", shape, f"{new}.attention.qkv.{kind}", box)
        yield _rows(f"{old}.self_attn.o_proj.weight", f"{new}.attention.output.weight", (hidden, hidden))
        for number, which in enumerate(("gate", "up")):
            box = Box((number, 0, 0), (number + 1, ffn, hidden))
            yield _part(f"{old}.mlp.{which}_proj.weight", (ffn, hidden), f"{new}.feedforward.gate_up.weight", box)
        yield _rows(f"{old}.mlp.down_proj.weight", f"{new}.feedforward.down.weight", (hidden, ffn))
        yield _rows(f"{old}.input_layernorm.weight", f"{new}.attention_norm.weight", (hidden,))
        yield _rows(f"{old}.post_attention_layernorm.weight", f"{new}.feedforward_norm.weight", (hidden,))
    yield _rows(f"{prefix}norm.weight", "final_norm.weight", (hidden,))


def _norm(source: str, name: str, hidden: int) -> Iterator[Slot]:
    for kind in ("weight", "bias"):
        yield _rows(f"{source}.{kind}", f"{name}.{kind}", (hidden,))


def _linear(
    matrix: Callable[[str, str, int, int], Slot], source: str, name: str, outputs: int, inputs: int
) -> Iterator[Slot]:
    yield matrix(f"{source}.weight", f"{name}.weight", outputs, inputs)
    yield _rows(f"{source}.bias", f"{name}.bias", (outputs,))


def _gpt2(model: Model, prefix: str) -> Iterator[Slot]:
    hidden, heads, dim = model.hidden, model.heads, model.head_dim
    yield _rows(f"{prefix}wte.weight", "embedding.weight", (model.vocabulary, hidden))
    yield _rows(f"{prefix}wpe.weight", "positions.weight", (model.positions, hidden))
    for i in range(model.layers):
        old, new = f"{prefix}h.{i}", f"layers.{i}"
        yield from _norm(f"{old}.ln_1", f"{new}.attention_norm", hidden)
        whole = Box.whole((heads, 3, dim, hidden))
        qkv = f"{new}.attention.qkv"
        yield Slot(
            f"{old}.attn.c_attn.weight",
            (hidden, 3 * hidden),
            f"{qkv}.weight",
            whole,
            (hidden, 3, heads, dim),
            (2, 1, 3, 0),
        )
        yield Slot(
            f"{old}.attn.c_attn.bias",
            (3 * hidden,),
            f"{qkv}.bias",
            Box.whole((heads, 3, dim)),
            (3, heads, dim),
            (1, 0, 2),
        )
        yield from _linear(_turned, f"{old}.attn.c_proj", f"{new}.attention.output", hidden, hidden)
        yield from _norm(f"{old}.ln_2", f"{new}.feedforward_norm", hidden)
        yield from _linear(_turned, f"{old}.mlp.c_fc", f"{new}.feedforward.up", model.ffn, hidden)
        yield from _linear(_turned, f"{old}.mlp.c_proj", f"{new}.feedforward.down", hidden, model.ffn)
    yield from _norm(f"{prefix}ln_f", "final_norm", hidden)


def _bloom(model: Model, prefix: str) -> Iterator[Slot]:
    hidden, heads, dim = model.hidden, model.heads, model.head_dim

    def matrix(source: str, name: str, outputs: int, inputs: int) -> Slot:
        return _rows(source, name, (outputs, inputs))

    yield _rows(f"{prefix}word_embeddings.weight", "embedding.weight", (model.vocabulary, hidden))
    yield from _norm(f"{prefix}word_embeddings_layernorm", "embedding_norm", hidden)
    for i in range(model.layers):
        old, new = f"{prefix}h.{i}", f"layers.{i}"
        yield from _norm(f"{old}.input_layernorm", f"{new}.attention_norm", hidden)
        rests: tuple[tuple[str, Index], ...] = (("weight", (hidden,)), ("bias", ()))
        for kind, rest in rests:
            box, shape = Box.whole((heads, 3, dim, *rest)), (3 * hidden, *rest)
            source = f"{old}.self_attention.query_key_value.{kind}"
            yield _part(source, shape, f"{new}.attention.qkv.{kind}", box)
        yield from _linear(matrix, f"{old}.self_attention.dense", f"{new}.attention.output", hidden, hidden)
        yield from _norm(f"{old}.post_attention_layernorm", f"{new}.feedforward_norm", hidden)
        yield from _linear(matrix, f"{old}.mlp.dense_h_to_4h", f"{new}.feedforward.up", model.ffn, hidden)
        yield from _linear(matrix, f"{old}.mlp.dense_4h_to_h", f"{new}.feedforward.down", hidden, model.ffn)
    yield from _norm(f"{prefix}ln_f", "final_norm", hidden)
