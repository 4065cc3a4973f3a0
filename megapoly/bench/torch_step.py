"""A training step as a user of plain PyTorch writes it, around a peer's model."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from megapoly.bench.task import RATE
from megapoly.bench.worker import Work, random_rows
from megapoly.config import Config


def torch_work(
    model: nn.Module, mean_loss: Callable[[Tensor, Tensor], Tensor], config: Config, device: torch.device
) -> Work:
    """Forward, backward, clipping and torch's fused AdamW; under bf16 with fp32 weights and autocast.

    Args:
        mean_loss: of tokens and labels ``[batch, sequence]``, over the labels that are not -1.
    """
    model.to(device).train()
    tokens, labels = (rows.to(device) for rows in random_rows(config))
    parameters, settings = list(model.parameters()), config.optimizer
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.dim() > 1], "weight_decay": settings.weight_decay},
            {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
        ],
        lr=RATE,
        betas=(settings.beta1, settings.beta2),
        eps=settings.epsilon,
        fused=True,
    )
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=config.train.precision == "bf16")

    def step() -> float:
        optimizer.zero_grad()
        with autocast:
            loss = mean_loss(tokens, labels)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, settings.clip)
        optimizer.step()
        return loss.item()

    return Work(step, sum(p.numel() for p in parameters))
