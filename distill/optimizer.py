"""The optimizer, and the learning rate of each step."""

import math
from collections.abc import Callable, Iterable

import torch
from torch import nn

from laptop.errors import MissingExtra

BETAS = (0.9, 0.99)


def _adamw(parameters: Iterable[nn.Parameter], learning_rate: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=learning_rate, betas=BETAS, fused=True)


def _adamw_8bit(parameters: Iterable[nn.Parameter], learning_rate: float) -> torch.optim.Optimizer:
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise MissingExtra(
            "optimizer 'adamw-8bit' needs bitsandbytes: pip install 'laptop-diff[adam8bit]'."
        ) from None
    optimizer: torch.optim.Optimizer = AdamW8bit(parameters, lr=learning_rate, betas=BETAS)
    return optimizer


OPTIMIZERS: dict[str, Callable[[Iterable[nn.Parameter], float], torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "adamw-8bit": _adamw_8bit,  # blockwise states (2110.02861), a quarter of the memory
}
STATE_BYTES = {"adamw": 8, "adamw-8bit": 2}  # of one parameter's states


def _cosine(share: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * share))


# The factor of the peak, from the share of the steps after the warm-up that are done.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": _cosine,  # to zero at the last step
    "constant": lambda _share: 1.0,
}


def learning_rate(step: int, *, peak: float, schedule: str, warmup: int, steps: int) -> float:
    """The learning rate of `step`: a linear warm-up to `peak`, then as the schedule says."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * SCHEDULES[schedule]((step - warmup) / max(1, steps - warmup))
