"""Training that goes wrong: a loss that is not finite, or runs away from what it has been."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

from laptop.errors import LaptopError
from laptop.fields import Range
from laptop.records import MayBeInfinite, Record

MEMORY = 0.98  # of the running mean: some fifty steps
SHOWN = 8  # samples that a message names


class Diverged(LaptopError):
    """The loss is not finite, or has run away; the last good checkpoint is kept."""


@dataclass(frozen=True)
class RunningLoss(Record):
    """The running mean of the loss, and its least value so far."""

    mean: MayBeInfinite = 0.0
    least: MayBeInfinite = math.inf  # over the steps in which the mean has settled
    seen: Annotated[int, Range(0)] = 0  # steps

    def after(self, loss: float) -> "RunningLoss":
        """The running mean with one more step's loss."""
        seen = self.seen + 1
        weight = max(1 - MEMORY, 1 / seen)  # the plain mean at first
        mean = self.mean + weight * (loss - self.mean)
        has_settled = weight <= 1 - MEMORY
        return RunningLoss(mean, min(self.least, mean) if has_settled else self.least, seen)

    def has_run_away(self, factor: float) -> bool:
        """Whether the mean is more than `factor` times its least value."""
        return self.mean > factor * self.least


def explain(
    step: int, values: Mapping[str, float], ids: Sequence[str], has_bad_data: bool = False
) -> str:
    """The message of `Diverged`: the step, terms that are not finite, the samples, a remedy."""
    bad = [name for name, value in values.items() if not math.isfinite(value)]
    named = ", ".join(ids[:SHOWN]) + (f" and {len(ids) - SHOWN} more" if len(ids) > SHOWN else "")
    fault = f"{', '.join(bad)} not finite" if bad else "the loss has run away"
    parts = ", ".join(f"{name} {value:.3g}" for name, value in values.items())
    remedy = "Lower learning_rate"
    if has_bad_data:
        remedy = "Their own numbers are not finite: mend them and make the cache again"
    return f"step {step}: {fault} ({parts}), on samples {named}. {remedy}."
