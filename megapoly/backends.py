"""What computes the ops of a run: found out before anything is built, and said in its log."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from megapoly.config import Config
from megapoly.errors import ConfigError
from megapoly.models.cost import in_chunks
from megapoly_kernels.adamw import resolve as resolve_adamw
from megapoly_kernels.attention import resolve as resolve_attention
from megapoly_kernels.launch import runs_triton
from megapoly_kernels.norm import resolve as resolve_norm


def detect(config: Config, device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """Every op of the model with what computes it, such as ``triton``, for parameters of a dtype on a device.

    Raises:
        ConfigError: what ``[kernels]`` asks for is not installed, or not for this device or dtype.
    """
    model, chosen = config.model, config.kernels
    like = torch.empty(0, device=device, dtype=dtype)
    master = torch.empty(0, device=device, dtype=torch.promote_types(dtype, torch.float32))
    residual = (master if model.fp32_residual else like).element_size()
    plain = _resolve("attention", "auto", lambda: "triton" if runs_triton(like) else "torch")
    found = {}
    if model.attention_dropout > 0 or not (model.fp32_softmax or dtype == master.dtype):
        found["attention"] = "torch with all probabilities"
    else:
        found["attention"] = _resolve("attention", chosen.attention, lambda: resolve_attention(chosen.attention, like))
    of_norm = partial(resolve_norm, chosen.norm, like, model.hidden, residual)
    forward, backward = (_resolve("norm", chosen.norm, partial(of_norm, way)) for way in (False, True))
    found["norm"] = forward if forward == backward else f"{forward} forward, {backward} backward"
    found["activation"] = plain
    if model.position == "rope":
        found["rotary"] = plain
    if model.dropout > 0:
        found["dropout"] = plain
    tokens, vocabulary = config.layout.micro_batch * config.train.sequence, -(-model.vocabulary // config.layout.tp)
    found["loss"] = plain + (" in chunks" if in_chunks(tokens, vocabulary, like.element_size()) else "")
    found["AdamW"] = _resolve("optimizer", chosen.optimizer, lambda: resolve_adamw(chosen.optimizer, master))
    return found


def _resolve(key: str, value: str, resolve: Callable[[], str]) -> str:
    try:
        return resolve()
    except (ImportError, ValueError, RuntimeError) as error:  # of the last kind: a GPU, and no Triton
        raise ConfigError(f"kernels.{key} is {value!r}: {error}") from error
