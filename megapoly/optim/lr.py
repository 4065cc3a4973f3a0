"""The learning rate as a function of the trained tokens."""

from __future__ import annotations

import math

from megapoly.config import Optimizer


def learning_rate(config: Optimizer, tokens: int, total: int) -> float:
    """Rate of a step that begins after ``tokens`` of a run of ``total`` tokens.

    Linear warm-up from ``warmup_start``; then ``cosine`` to ``minimum`` x peak at ``decay_tokens`` (where not given,
    the whole run), ``wsd``: constant, then linear to ``minimum`` x peak over the last ``decay_tokens`` (a tenth of the
    run), or ``constant``.
    """
    peak = config.learning_rate
    floor = peak * config.minimum
    if tokens < config.warmup_tokens:
        return config.warmup_start + (peak - config.warmup_start) * tokens / config.warmup_tokens
    if config.shape == "constant":
        return peak
    if config.shape == "wsd":
        length = config.decay_tokens or max(1, total // 10)
        left = min(1.0, max(0, total - tokens) / length)
        return floor + (peak - floor) * left
    end = config.decay_tokens or total
    progress = min(1.0, (tokens - config.warmup_tokens) / max(1, end - config.warmup_tokens))
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * progress))
