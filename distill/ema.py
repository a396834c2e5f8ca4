"""The moving average of a student's weights, which becomes the distilled model."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

POWER = 0.75  # of the warm-up, as in k-diffusion: early averages forget faster


class Average:
    """Exponential moving average, updated in place; starts as a copy of the student itself."""

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float):
        self.weights = [p.detach().clone() for p in parameters]
        self.decay = decay

    @torch.no_grad()
    def update(self, parameters: Iterable[nn.Parameter], step: int) -> None:
        """Take in the weights after `step`, the first of which is 1."""
        decay = min(self.decay, 1 - (1 + step) ** -POWER)
        torch._foreach_lerp_(self.weights, [p.detach() for p in parameters], 1 - decay)

    @torch.no_grad()
    def copy_to(self, parameters: Iterable[nn.Parameter]) -> None:
        """Put the averages in the parameters' place."""
        for parameter, average in zip(parameters, self.weights, strict=True):
            parameter.copy_(average)

    def named(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The averages by their parameters' names, for a checkpoint; shared, not copied."""
        return dict(zip(names, self.weights, strict=True))
