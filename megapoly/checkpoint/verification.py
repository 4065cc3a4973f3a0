"""Whether two sets of weights are one model: logits of both for random tokens, and those of transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megapoly.checkpoint.huggingface import HuggingFace
from megapoly.checkpoint.weights import Weights, open_weights
from megapoly.data.huggingface_tokenizer import HuggingFaceTokenizer
from megapoly.errors import CheckpointError
from megapoly.layers.call import Call, Place, spec_of
from megapoly.models.decoder import DecoderStage
from megapoly.spec import Piece

_BATCH, _LENGTH = 4, 48
_TEXTS = ("Año 1984: los programas\n\nestán aquí.", "日本語の文。12", "ภาษาไทย  ok", " It's\ta line \n")
_PEER = 1e-3  # allowed difference to transformers in float32, which computes in another order


@dataclass(frozen=True)
class Comparison:
    """Logits of two models for the same tokens.

    Attributes:
        what: was compared.
        difference: the largest, relative to the largest logit.
        bound: that it has to stay within; 0 where they have to be equal.
        inputs: tokens in all.
    """

    what: str
    difference: float
    bound: float
    inputs: int


def verify(
    source: Path, written: Path, tell: Callable[[str], object], vocabulary: int | None = None
) -> Iterator[Comparison]:
    """Open both anew and compare their logits; where one is of Hugging Face, also with transformers' own.

    The source is rounded to the dtypes that were written, so that the two have to be equal. Models are loaded, one at a
    time, in float32 (float64 where they are stored in it). ``tell`` hears what cannot be compared, without
    transformers. ``vocabulary`` is what the source was opened with.

    Raises:
        CheckpointError: the logits differ.
    """
    if note := _tokenizer_note(written):
        tell(note)
    both = [open_weights(source, vocabulary), open_weights(written)]
    dtypes = [{name: dtype for name, (_, dtype) in each.tensors.items()} for each in both]
    wide = torch.float64 if any(torch.float64 in each.values() for each in dtypes) else torch.float32
    model = both[0].model
    draw = torch.Generator().manual_seed(0)
    tokens_BS = torch.randint(model.vocabulary, (_BATCH, min(_LENGTH, model.positions)), generator=draw)
    first, second = (_logits(each, tokens_BS, wide, dtypes[1]) for each in both)
    yield _compare(f"{source} and {written}", first, second, 0.0)
    for weights, own, logits in zip(both, dtypes, (first, second), strict=True):
        if isinstance(weights, HuggingFace):
            theirs = _peer(weights.path, tokens_BS, wide)
            if theirs is None:
                tell(f"{weights.path}: not compared with transformers: pip install 'megapoly[convert]'")
                continue
            ours = logits if own == dtypes[1] else _logits(weights, tokens_BS, wide, own)
            yield _compare(f"{weights.path} with transformers' own", ours, theirs, _PEER)


@torch.no_grad()
def _logits(weights: Weights, tokens_BS: Tensor, dtype: torch.dtype, rounded: Mapping[str, torch.dtype]) -> Tensor:
    """Of a model in ``dtype`` whose weights were ``rounded`` before."""
    stage = DecoderStage(weights.model, place=Place(dtype=dtype))
    for parameter in stage.parameters():
        spec = spec_of(parameter)
        stored = torch.empty(spec.box.size, dtype=rounded[spec.name])
        weights.read(spec.name, Piece.of(spec.box), stored)
        parameter.copy_(stored.view(parameter.shape))
        weights.release()
    positions_BS = torch.arange(tokens_BS.shape[1]).expand_as(tokens_BS)
    logits_SBV: Tensor = stage(None, Call(positions_BS.t(), tokens_SB=tokens_BS.t()))
    return logits_SBV.transpose(0, 1)


@torch.no_grad()
def _peer(path: Path, tokens_BS: Tensor, dtype: torch.dtype) -> Tensor | None:
    try:
        from transformers import AutoModelForCausalLM, logging
    except ImportError:
        return None
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, local_files_only=True).eval()
    logits: Tensor = model(tokens_BS).logits
    return logits


def _tokenizer_note(path: Path) -> str | None:
    """That transformers makes other ids of a text than the tokenizer.json in a folder."""
    file = path / "tokenizer.json"
    if not file.is_file():
        return None
    try:
        from transformers import AutoTokenizer, __version__
    except ImportError:
        return None
    theirs, ours = AutoTokenizer.from_pretrained(path, local_files_only=True), HuggingFaceTokenizer(file, ends=False)
    for text in _TEXTS:
        if theirs(text, add_special_tokens=False).input_ids != ours.encode_prompt(text, begins=False):
            return (
                f"{path}: AutoTokenizer of transformers {__version__} makes other ids of {text!r} than tokenizer.json,"
                f" since it takes {type(theirs).__name__}; load it with PreTrainedTokenizerFast.from_pretrained"
            )
    return None


def _compare(what: str, first: Tensor, second: Tensor, bound: float) -> Comparison:
    scale = float(first.abs().max())
    gap = float((first - second).abs().max())
    difference = gap / scale if scale else gap
    if not difference <= bound:  # not a number, too
        raise CheckpointError(
            f"{what}: are not the same model: for {first.shape[0]} x {first.shape[1]} random tokens the logits differ"
            f" by {difference:.3g} of the largest one, and {bound:.3g} is allowed; convert again, and report this if it"
            " stays"
        )
    return Comparison(what, difference, bound, first.shape[0] * first.shape[1])
