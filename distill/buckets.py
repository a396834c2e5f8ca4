"""Sizes of training pictures: one square, or a bucket for each aspect ratio; and their order.

Pictures of a batch have one size. A picture goes to the bucket with the nearest ratio of width to
height, is scaled to cover it and cropped at the middle. SDXL is told what was done to it
(arXiv 2307.01952, section 2.2), so that it need not learn from small or cropped pictures to draw
such ones.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

LARGE = 512  # pixels a side from which sides are multiples of 64, as SDXL's buckets are
MAX_RATIO = 2.0  # of a bucket's longer side to its shorter one
Size = tuple[int, int]  # height, width


def bucket_sizes(resolution: int, multiple: int) -> list[Size]:
    """Sizes of about `resolution`² pixels, their sides multiples of `multiple` pixels."""
    step = math.lcm(multiple, 64) if resolution >= LARGE else multiple
    sizes = {(resolution, resolution)}
    for height in range(step, math.ceil(resolution * MAX_RATIO), step):
        width = max(1, round(resolution**2 / height / step)) * step
        if max(height, width) <= MAX_RATIO * min(height, width):
            sizes |= {(height, width), (width, height)}
    return sorted(sizes)


def nearest(sizes: Sequence[Size], height: int, width: int) -> Size:
    """The size whose ratio is nearest to that of a picture."""
    wanted = math.log(width / height)
    return min(sizes, key=lambda size: abs(math.log(size[1] / size[0]) - wanted))


def fit(image: Image.Image, size: Size) -> tuple[Tensor, Tensor]:
    """A picture (3, H, W) of `size` in [-1, 1], and SDXL's micro-conditioning of it (6,).

    That is: original height and width, top and left of the crop in the scaled picture, target
    height and width, in pixels.
    """
    height, width = size
    scale = max(height / image.height, width / image.width)
    scaled = max(height, round(image.height * scale)), max(width, round(image.width * scale))
    top, left = (scaled[0] - height) // 2, (scaled[1] - width) // 2
    resized = image.convert("RGB").resize((scaled[1], scaled[0]), Image.Resampling.LANCZOS)
    cropped = resized.crop((left, top, left + width, top + height))
    pixels = torch.from_numpy(np.array(cropped)).permute(2, 0, 1).float() / 127.5 - 1
    return pixels, torch.tensor([image.height, image.width, top, left, height, width]).float()


class Order:
    """Which samples each optimizer step takes: a new permutation every epoch.

    A batch is of one bucket, and a bucket has batches in proportion to its size. What is left of it
    for its last batch in an epoch is filled from the beginning of its permutation. Any step can be
    asked for at any time, so training resumes where it was.
    """

    def __init__(self, buckets: Mapping[Size, Tensor], batch_size: int, seed: int):
        self.buckets, self.batch_size, self.seed = list(buckets.values()), batch_size, seed
        counts = [math.ceil(len(samples) / batch_size) for samples in self.buckets]
        self.batches = [(b, k) for b, count in enumerate(counts) for k in range(count)]
        self._epoch, self._shuffled = -1, ([], [])  # type: int, tuple[list[int], list[Tensor]]

    def __call__(self, step: int) -> Tensor:
        """Indices (batch_size,) of the samples of optimizer step `step`."""
        epoch, place = divmod(step, len(self.batches))
        if epoch != self._epoch:
            self._epoch, self._shuffled = epoch, self._shuffle(epoch)
        order, samples = self._shuffled
        bucket, batch = self.batches[order[place]]
        first = batch * self.batch_size
        wanted = torch.arange(first, first + self.batch_size) % len(samples[bucket])
        return samples[bucket][wanted]

    def _shuffle(self, epoch: int) -> tuple[list[int], list[Tensor]]:
        """The order of an epoch's batches, and of the samples in each bucket."""
        rng = np.random.default_rng([self.seed, epoch])
        order = rng.permutation(len(self.batches)).tolist()
        shuffled = [s[torch.from_numpy(rng.permutation(len(s)))] for s in self.buckets]
        return order, shuffled
