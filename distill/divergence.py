"""Training that goes wrong: a loss that is not finite, or runs away from what it has been."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from laptop.errors import LaptopError

MEMORY = 0.98  # of the running mean: some fifty steps
SHOWN = 8  # samples that a message names


class Diverged(LaptopError):
    """The loss is not finite, or has run away; the last good checkpoint is kept."""


@dataclass
class Watch:
    """The running mean of the loss, and the least it has been; part of a checkpoint."""

    mean: float = 0.0
    least: float = math.inf
    seen: int = 0

    def runs_away(self, loss: float, factor: float) -> bool:
        """Note a step's loss; whether the mean is `factor` times the least it has been."""
        self.seen += 1
        weight = max(1 - MEMORY, 1 / self.seen)  # the plain mean at first
        self.mean += weight * (loss - self.mean)
        if weight > 1 - MEMORY:
            return False
        self.least = min(self.least, self.mean)
        return self.mean > factor * self.least


def explain(
    step: int, values: Mapping[str, float], ids: Sequence[str], has_bad_data: bool = False
) -> str:
    """A message: the step, the terms that are not finite, the samples; and what to do about it."""
    bad = [name for name, value in values.items() if not math.isfinite(value)]
    named = ", ".join(ids[:SHOWN]) + (f" and {len(ids) - SHOWN} more" if len(ids) > SHOWN else "")
    what = f"{', '.join(bad)} not finite" if bad else "the loss has run away"
    parts = ", ".join(f"{name} {value:.3g}" for name, value in values.items())
    remedy = "Lower learning_rate"
    if has_bad_data:
        remedy = "Their own numbers are not finite: mend them and make the cache anew"
    return f"step {step}: {what} ({parts}), on samples {named}. {remedy}."
