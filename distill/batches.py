"""The samples of each step, with their noise.

All randomness of a sample comes from (seed, step, its place in the batch), and nothing from how
the batch is split: so a resumed run takes the steps that an unbroken one would have taken, and two
processes those of one.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from laptop.distill.cache import Cache
from laptop.processes import local_share
from laptop.pruning.units import example_inputs

PLACE_BITS = 24  # of a generator's key: a sample's place in its batch, below the step


@dataclass(frozen=True)
class Batch:
    """Training samples of one forward, on the CPU."""

    latents: Tensor  # (B, C, h, w), clean
    noise: Tensor  # (B, C, h, w)
    level: Tensor  # (B,) noise levels
    rows: dict[str, Tensor]  # the U-Net's conditions by name, (B, ...)
    ids: list[str]

    def not_finite(self) -> list[str]:
        """The samples whose own numbers are not finite."""
        finite = torch.ones(len(self.ids), dtype=torch.bool)
        for tensor in (self.latents, *self.rows.values()):
            finite &= tensor.flatten(1).isfinite().all(1)
        return [
            name for name, is_finite in zip(self.ids, finite.tolist(), strict=True) if not is_finite
        ]


Batches = Callable[[int], list[Batch]]  # this process's share of a step, in micro-batches


@dataclass(frozen=True)
class FromCache:
    """Batches from a cache: call it with a step."""

    data: Cache
    order: Callable[[int], Tensor]  # the samples of a step (of all processes), one bucket's
    levels: int  # of noise
    micro_batch: int
    drop_caption: float  # share of samples
    seed: int
    guidance: Tensor | None = None  # (1, width), see `guidance_embedding`

    def __call__(self, step: int) -> list[Batch]:
        """This process's share of the step, in micro-batches."""
        picked = self.order(step)
        places = local_share(len(picked))
        starts = range(places.start, places.stop, self.micro_batch)
        ends = [min(i + self.micro_batch, places.stop) for i in starts]
        return [self._batch(picked, range(i, j), step) for i, j in zip(starts, ends, strict=True)]

    def _batch(self, picked: Tensor, places: range, step: int) -> Batch:
        index = picked[places.start : places.stop]
        keys = [[self.seed, (step << PLACE_BITS) + place] for place in places]
        drawn = [np.random.Generator(np.random.Philox(key=key)) for key in keys]
        level = torch.tensor([int(g.integers(self.levels)) for g in drawn])
        keep = torch.tensor([g.random() >= self.drop_caption for g in drawn])
        latents, rows = self.data.rows(index, keep)
        if self.guidance is not None:
            rows["timestep_cond"] = self.guidance.expand(len(index), -1)
        shape = tuple(latents.shape[1:])
        noise = np.stack([g.standard_normal(shape, dtype=np.float32) for g in drawn])
        ids = [self.data.ids[i] for i in index.tolist()]
        return Batch(latents, torch.from_numpy(noise), level, rows, ids)


@dataclass(frozen=True)
class MadeUp:
    """Batches of zeros at the U-Net's native size, to measure with where there is no data."""

    config: Mapping[str, Any]  # of the U-Net
    tokens: int
    batch_size: int
    micro_batch: int

    def __call__(self, step: int) -> list[Batch]:
        """As `FromCache`."""
        own = len(local_share(self.batch_size))
        return [
            self._batch(min(self.micro_batch, own - i)) for i in range(0, own, self.micro_batch)
        ]

    def _batch(self, size: int) -> Batch:
        empty = example_inputs(self.config, self.tokens, size)
        empty |= empty.pop("added_cond_kwargs", {})
        rows = {k: torch.zeros(v.shape) for k, v in empty.items()}
        latents, level = rows.pop("sample"), rows.pop("timestep").long()
        return Batch(latents, torch.zeros_like(latents), level, rows, ["made up"] * size)
