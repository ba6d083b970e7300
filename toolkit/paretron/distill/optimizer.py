"""How weights move: AdamW."""

from __future__ import annotations

import torch
from torch import nn

from paretron.recipe import Training


def adamw(trained: nn.Module, settings: Training) -> torch.optim.AdamW:
    """AdamW whose weight decay spares norms and biases: only matrices shrink."""
    parameters = [p for p in trained.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, settings.beta2), fused=True)
