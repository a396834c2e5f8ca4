"""Sizes of training pictures, what SDXL is told of them, and the order of training."""

import pytest
import torch
from PIL import Image

from laptop.distill.buckets import MAX_RATIO, SampleOrder, bucket_sizes, fit, nearest


@pytest.mark.parametrize(
    ("resolution", "multiple", "step"), [(1024, 32, 64), (512, 64, 64), (128, 32, 32)]
)
def test_buckets_hold_about_the_same_pixels_in_sides_that_the_unet_takes(
    resolution: int, multiple: int, step: int
) -> None:
    sizes = bucket_sizes(resolution, multiple)
    assert (resolution, resolution) in sizes
    assert {(w, h) for h, w in sizes} == set(sizes)
    for height, width in sizes:
        assert height % step == width % step == 0
        assert max(height / width, width / height) <= MAX_RATIO
        assert abs(height * width / resolution**2 - 1) < step / min(height, width)


def test_a_picture_goes_to_the_nearest_ratio() -> None:
    sizes = bucket_sizes(1024, 32)
    assert nearest(sizes, 3000, 3000) == (1024, 1024)
    assert nearest(sizes, 1080, 1920) == (768, 1344)
    assert nearest(sizes, 5000, 100) == max(sizes, key=lambda size: size[0] / size[1])


def test_a_picture_is_scaled_cropped_at_the_middle_and_described() -> None:
    image = Image.new("RGB", (400, 100), "red")
    image.paste("blue", (150, 0, 250, 100))
    pixels, time_ids = fit(image, (50, 50))
    assert time_ids.tolist() == [100, 400, 0, 75, 50, 50]
    blue = torch.tensor([-1.0, -1.0, 1.0])[:, None, None].expand(3, 50, 50)
    assert (pixels - blue)[..., 3:-3].abs().max() < 0.05, "the middle was taken"
    tall, time_ids = fit(image.rotate(90, expand=True), (50, 40))
    assert tall.shape == (3, 50, 40)
    assert time_ids.tolist() == [400, 100, 55, 0, 50, 40]
    whole, time_ids = fit(image, (100, 400))
    assert time_ids.tolist() == [100, 400, 0, 0, 100, 400]
    assert whole[:, 0, 0].tolist() == [1, -1, -1]


def two_buckets() -> dict[tuple[int, int], torch.Tensor]:
    return {(8, 8): torch.arange(0, 40, 2), (8, 12): torch.arange(1, 13, 2)}  # 20 and 6 samples


def test_every_sample_comes_once_an_epoch_in_batches_of_one_bucket() -> None:
    buckets = {size: samples[: len(samples) // 2 * 2] for size, samples in two_buckets().items()}
    order = SampleOrder(buckets, 2, seed=0)
    epochs = []
    for epoch in range(3):
        batches = [order(epoch * 13 + step) for step in range(13)]
        for batch in batches:
            assert sum(set(batch.tolist()) <= set(s.tolist()) for s in buckets.values()) == 1
        epochs.append(torch.cat(batches))
        assert sorted(epochs[-1].tolist()) == sorted(torch.cat([*buckets.values()]).tolist())
    assert not epochs[0].equal(epochs[1])
    assert not epochs[0].equal(
        torch.cat([SampleOrder(buckets, 2, seed=1)(step) for step in range(13)])
    )


def test_any_step_can_be_asked_for_first() -> None:
    steps = list(range(40))
    unbroken = SampleOrder(two_buckets(), 4, seed=3)
    batches = [unbroken(step) for step in steps]
    for step in (39, 0, 17, 8):
        assert SampleOrder(two_buckets(), 4, seed=3)(step).equal(batches[step])


@pytest.mark.parametrize("batch_size", [4, 8, 50])
def test_all_samples_come_equally_often_whatever_their_bucket(batch_size: int) -> None:
    """20 and 6 samples; also in batches that are larger than a bucket, or than all of them."""
    order = SampleOrder(two_buckets(), batch_size, seed=0)
    steps = 40 * 26 // batch_size
    seen = torch.cat([order(step) for step in range(steps)]).bincount()
    seen = seen[torch.cat([*two_buckets().values()])].float()
    assert seen.mean() == pytest.approx(steps * batch_size / 26)
    assert float((seen - seen.mean()).abs().max()) <= 2 + batch_size / 6
