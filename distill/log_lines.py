"""What a step says of itself: a line of metrics.jsonl."""

from typing import Any

import torch
from torch import Tensor, nn

from laptop.distill.losses import Terms

TERMS = ("loss", "task", "output", "feature")
BY_PLACE = ("features", "alphas", "norms")


def flat(terms: Terms) -> dict[str, Tensor]:
    """What is logged of a batch, by "loss", "task", ... and "features/down_blocks.0", ..."""
    found = {name: getattr(terms, name) for name in TERMS}
    for group in BY_PLACE:
        found |= {f"{group}/{place}": v for place, v in getattr(terms, group).items()}
    return found


def nested(values: dict[str, float]) -> dict[str, Any]:
    """The same as the line has it: {"loss": ..., "features": {place: value}, ...}"""
    found: dict[str, Any] = {}
    for name, value in values.items():
        group, _, place = name.partition("/")
        if place:
            found.setdefault(group, {})[place] = value
        else:
            found[name] = value
    return found


def gradient_norms(terms: Terms, student: nn.Module, scaler: Any = None) -> dict[str, float]:
    """L2 norm of the gradient that each weighed term alone would give, by term.

    Of this process's batch. With a `scaler`, gradients are computed at its scale.
    """
    factor = scaler.get_scale() if scaler else 1.0
    parameters, norms = list(student.parameters()), {}
    for name, term in terms.weighed().items():
        found = torch.autograd.grad(term * factor, parameters, retain_graph=True, allow_unused=True)
        squares = [g.float().square().sum() for g in found if g is not None]
        norms[name] = float(torch.stack(squares).sum().sqrt()) / factor
    return norms
