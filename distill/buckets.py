"""Sizes of training pictures: one square, or a bucket for each aspect ratio; and their order.

Pictures of a batch have one size. A picture goes to the bucket with the nearest ratio of width to
height, is scaled to cover it and cropped at the middle. SDXL receives the original size and the
crop as conditions (arXiv 2307.01952, section 2.2), so that it does not learn from small or cropped
pictures to draw such ones.
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
    """The size whose ratio is nearest to a picture's."""
    ratio = math.log(width / height)
    return min(sizes, key=lambda size: abs(math.log(size[1] / size[0]) - ratio))


def fit(image: Image.Image, size: Size) -> tuple[Tensor, Tensor]:
    """Scale and crop a picture to `size`: (3, H, W) in [-1, 1], and its micro-conditioning (6,).

    SDXL's micro-conditioning is, in pixels: original height and width, top and left of the crop in
    the scaled picture, target height and width.
    """
    height, width = size
    scale = max(height / image.height, width / image.width)
    top, left = (image.height - height / scale) / 2, (image.width - width / scale) / 2
    box = (left, top, left + width / scale, top + height / scale)  # what is kept, before scaling
    cropped = image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS, box)
    top, left = round(top * scale), round(left * scale)
    pixels = torch.from_numpy(np.array(cropped)).permute(2, 0, 1).float() / 127.5 - 1
    return pixels, torch.tensor([image.height, image.width, top, left, height, width]).float()


class SampleOrder:
    """Which samples each optimizer step takes: a new permutation every epoch.

    A batch is of one bucket, and a bucket has batches in proportion to its size: what an epoch
    leaves of it begins the next one, so a bucket smaller than a batch has one in some epochs only.
    Any step can be asked for at any time, so training resumes where it was.
    """

    def __init__(self, buckets: Mapping[Size, Tensor], batch_size: int, seed: int):
        self.buckets, self.batch_size, self.seed = list(buckets.values()), batch_size, seed
        self._epoch = -1
        self._batches: list[tuple[int, int]] = []  # of the epoch
        self._shuffled: dict[tuple[int, int], Tensor] = {}

    def __call__(self, step: int) -> Tensor:
        """Indices (batch_size,) of the samples of optimizer step `step`."""
        total = sum(len(samples) for samples in self.buckets)
        epoch = step * self.batch_size // total
        while self._steps_before(epoch + 1) <= step:  # rounding holds some batches back
            epoch += 1
        if epoch != self._epoch:
            self._epoch, self._batches = epoch, self._of_epoch(epoch)
        bucket, batch = self._batches[step - self._steps_before(epoch)]
        positions = range(batch * self.batch_size, (batch + 1) * self.batch_size)
        return torch.stack([self._sample(bucket, position) for position in positions])

    def _steps_before(self, epoch: int) -> int:
        return sum(epoch * len(samples) // self.batch_size for samples in self.buckets)

    def _of_epoch(self, epoch: int) -> list[tuple[int, int]]:
        """An epoch's batches in their order: bucket, and number of its batch from the first on."""
        batches = [
            (bucket, batch)
            for bucket, samples in enumerate(self.buckets)
            for batch in range(
                epoch * len(samples) // self.batch_size,
                (epoch + 1) * len(samples) // self.batch_size,
            )
        ]
        order = np.random.default_rng([self.seed, epoch]).permutation(len(batches))
        return [batches[i] for i in order.tolist()]

    def _sample(self, bucket: int, position: int) -> Tensor:
        """The sample at `position` of a bucket's permutations, one after the other."""
        samples = self.buckets[bucket]
        turn, position = divmod(position, len(samples))
        if (bucket, turn) not in self._shuffled:
            self._shuffled = {k: v for k, v in self._shuffled.items() if k[0] != bucket}
            rng = np.random.default_rng([self.seed, bucket, turn])
            self._shuffled[bucket, turn] = samples[torch.from_numpy(rng.permutation(len(samples)))]
        return self._shuffled[bucket, turn][position]
