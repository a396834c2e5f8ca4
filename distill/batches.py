"""The samples of each step, with their noise.

All randomness of a sample comes from (seed, step, its position in the batch), not from how
the batch is split: so a resumed run takes the steps that an unbroken one would have taken, and two
processes those of one.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from laptop.distill.cache import Cache
from laptop.processes import own_range
from laptop.pruning.units import example_inputs

POSITION_BITS = 24  # of a generator's key: a sample's position in its batch, below the step


@dataclass(frozen=True)
class Batch:
    """Training samples of one forward, on the CPU."""

    latents: Tensor  # (B, C, h, w), clean
    noise: Tensor  # (B, C, h, w)
    level: Tensor  # (B,) noise levels
    conditions: dict[str, Tensor]  # of the U-Net by name, (B, ...)
    ids: list[str]

    def not_finite(self) -> list[str]:
        """The ids of samples that hold numbers that are not finite."""
        finite = torch.ones(len(self.ids), dtype=torch.bool)
        for tensor in (self.latents, *self.conditions.values()):
            finite &= tensor.flatten(1).isfinite().all(1)
        return [
            name for name, is_finite in zip(self.ids, finite.tolist(), strict=True) if not is_finite
        ]


Batches = Callable[[int], list[Batch]]  # this process's samples of a step, in micro-batches


@dataclass(frozen=True)
class CacheBatches:
    """Batches from a cache: call it with a step."""

    data: Cache
    order: Callable[[int], Tensor]  # the samples of a step (of all processes), one bucket's
    levels: int  # of noise
    micro_batch: int
    drop_caption: float  # share of samples
    seed: int
    guidance: Tensor | None = None  # (1, width), see `guidance_embedding`

    def __call__(self, step: int) -> list[Batch]:
        """The samples of this process in the step, in micro-batches."""
        picked = self.order(step)
        own = own_range(len(picked))
        starts = range(own.start, own.stop, self.micro_batch)
        ends = [min(i + self.micro_batch, own.stop) for i in starts]
        return [self._batch(picked, range(i, j), step) for i, j in zip(starts, ends, strict=True)]

    def _batch(self, picked: Tensor, positions: range, step: int) -> Batch:
        index = picked[positions.start : positions.stop]
        keys = [[self.seed, (step << POSITION_BITS) + position] for position in positions]
        generators = [np.random.Generator(np.random.Philox(key=key)) for key in keys]
        level = torch.tensor([int(g.integers(self.levels)) for g in generators])
        keep = torch.tensor([g.random() >= self.drop_caption for g in generators])
        latents, conditions = self.data.samples(index, keep)
        if self.guidance is not None:
            conditions["timestep_cond"] = self.guidance.expand(len(index), -1)
        shape = tuple(latents.shape[1:])
        noise = np.stack([g.standard_normal(shape, dtype=np.float32) for g in generators])
        ids = [self.data.ids[i] for i in index.tolist()]
        return Batch(latents, torch.from_numpy(noise), level, conditions, ids)


@dataclass(frozen=True)
class ZeroBatches:
    """Batches of zeros at the U-Net's native size, to measure speed without data."""

    config: Mapping[str, object]  # of the U-Net
    tokens: int
    batch_size: int
    micro_batch: int

    def __call__(self, step: int) -> list[Batch]:
        """The samples of this process in the step, in micro-batches."""
        own = len(own_range(self.batch_size))
        return [
            self._batch(min(self.micro_batch, own - i)) for i in range(0, own, self.micro_batch)
        ]

    def _batch(self, size: int) -> Batch:
        inputs = example_inputs(self.config, self.tokens, size)
        inputs |= inputs.pop("added_cond_kwargs", {})
        conditions = {k: torch.zeros(v.shape) for k, v in inputs.items()}
        latents, level = conditions.pop("sample"), conditions.pop("timestep").long()
        ids = ["made up"] * size
        return Batch(latents, torch.zeros_like(latents), level, conditions, ids)
