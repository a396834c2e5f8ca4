"""The optimizer, and the learning rate of each step."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch

from laptop.errors import MissingExtra

BETAS = (0.9, 0.99)


def _adamw(parameters: Iterable[Any], learning_rate: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=learning_rate, betas=BETAS, fused=True)


def _adamw_8bit(parameters: Iterable[Any], learning_rate: float) -> torch.optim.Optimizer:
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise MissingExtra(
            "optimizer 'adamw-8bit' needs bitsandbytes: pip install 'laptop-diff[adam8bit]'."
        ) from None
    made: torch.optim.Optimizer = AdamW8bit(parameters, lr=learning_rate, betas=BETAS)
    return made


OPTIMIZERS: dict[str, Callable[[Iterable[Any], float], torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "adamw-8bit": _adamw_8bit,  # blockwise states (2110.02861), a quarter of the memory
}
BYTES = {"adamw": 8, "adamw-8bit": 2}  # of the states of one parameter


def _cosine(share: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * share))


SCHEDULES: dict[str, Callable[[float], float]] = {  # of the share of steps since the warm-up
    "cosine": _cosine,  # to zero at the last step
    "constant": lambda _share: 1.0,
}


def learning_rate(step: int, *, peak: float, schedule: str, warmup: int, steps: int) -> float:
    """That of `step`: a linear warm-up to `peak`, then the schedule's."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * SCHEDULES[schedule]((step - warmup) / max(1, steps - warmup))
