"""Healing without training: each removed layer leaves a closed-form map of its channels.

Our own addition to the method (closed-form stand-ins are known from depth pruning of language
models, arXiv 2407.16286). Place by place, in running order, with everything before already removed
and healed in the student: x is the residual stream there, y what the teacher has at the same place,
on the same calibration rows. Least squares give y = scale x + shift for each channel. A local fit
need not help the output, so a correction stays only if the joint output loss falls, and all of them
only if it falls on rows that none of them has seen.

Where a linear layer comes right before or after, the correction is folded into it: the
`conv_shortcut` of a removed resnet, or the `proj_out` of a transformer whose last blocks are gone.
The student shares the teacher's weights all along.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from laptop import models
from laptop.errors import BadInput
from laptop.pruning.expressible import without
from laptop.pruning.units import SUBLAYERS, example_inputs, forward_rows, listed
from laptop.run import track

KINDS = ("none", "affine")
RIDGE = 1e-6  # of the mean variance of all channels; holds a channel without variance at scale 1
HELD_OUT = 4  # every fourth row judges; rows are sorted by time step, so no last quarter
SAME = 1e-3  # most squared error, relative to the output's, of a model on its own recorded rows


@dataclass(frozen=True)
class Rows:
    """Calibration: U-Net inputs, the U-Net's output (N, C, H, W) on them, rows a forward."""

    inputs: Mapping[str, Tensor]
    output: Tensor
    batch_size: int

    def part(self, which: Tensor | slice) -> "Rows":
        return Rows({k: v[which] for k, v in self.inputs.items()}, self.output[which], self.size)

    @property
    def size(self) -> int:
        return self.batch_size

    def batches(self) -> Iterator["Rows"]:
        for start in range(0, len(self.output), self.size):
            yield self.part(slice(start, start + self.size))

    def split(self) -> tuple["Rows", "Rows"]:
        """Those to fit on, and those to judge by."""
        judging = torch.arange(len(self.output)) % HELD_OUT == HELD_OUT - 1
        return self.part(~judging), self.part(judging)

    def loss(self, unet: nn.Module) -> float:
        """Mean squared error of `unet`'s output, in float32."""
        found = forward_rows(unet, dict(self.inputs), self.batch_size)
        return float((found - self.output).square().mean())


@dataclass(frozen=True)
class Correction:
    """y = scale x + shift, by channel (C,), in float64."""

    scale: Tensor
    shift: Tensor


