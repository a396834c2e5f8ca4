"""Draw pictures or latents with a teacher, whatever kind of pipeline it is.

A model that changes pictures gets its own: drawn from grey with nothing left of it, then, for
inpainting, with half of each to be drawn again. (SDXL's refiner never learnt the first steps, so
its own pictures are poor ones.)
"""

from collections.abc import Mapping, Sequence

import torch
from diffusers import DiffusionPipeline, LatentConsistencyModelPipeline
from torch import Tensor

from laptop.models import component_classes
from laptop.models.component_classes import Config
from laptop.models.description import of_pipeline
from laptop.pruning.sampling_choice import picture_size
from laptop.pruning.sampling_config import Sampling

Start = Mapping[str, Tensor | float]  # further arguments of a pipeline: sizes, pictures, strength
STRENGTH = 0.3  # share of the steps that an image-to-image model goes back; SDXL's default


def draw(
    pipe: DiffusionPipeline,
    prompts: Sequence[str],
    sampling: Sampling,
    generator: torch.Generator | list[torch.Generator],
    start: Start,
    output_type: str = "latent",
) -> Tensor:
    """Latents or, with `output_type="pt"`, pictures in [0, 1] (N, C, H, W), one for each prompt.

    One generator for all of them, or one for each. `start` comes from `starts`. Unconditional
    models draw pixels, whose "latents" are in [-1, 1].
    """
    arguments = {**sampling.arguments, "generator": generator, **start}
    if _task(pipe) == "unconditional":
        images = pipe(batch_size=len(prompts), output_type="np", **arguments).images
        pictures = torch.as_tensor(images).permute(0, 3, 1, 2)
        return pictures * 2 - 1 if output_type == "latent" else pictures
    drawn: Tensor = pipe(list(prompts), output_type=output_type, **arguments).images
    return drawn


def guidance_embedding(unet: Config, scale: float | None) -> Tensor | None:
    """The embedding that a U-Net with embedded guidance takes, (1, time_cond_proj_dim), or None.

    Such a U-Net needs no second pass. `scale` is the scale of classifier-free guidance, as the
    pipelines take it.
    """
    if scale is None or not unet.get("time_cond_proj_dim"):
        return None
    embedding: Tensor = LatentConsistencyModelPipeline.get_guidance_scale_embedding(
        None, torch.tensor([scale - 1]), embedding_dim=unet["time_cond_proj_dim"]
    )
    return embedding


def starts(
    pipe: DiffusionPipeline,
    batches: Sequence[Sequence[str]],
    sampling: Sampling,
    generator: torch.Generator,
) -> list[Start]:
    """Arguments of `draw` for each batch of prompts: a size, and pictures to change."""
    task = _task(pipe)
    height, width = picture_size(of_pipeline(pipe), sampling.height, sampling.width)
    if task == "unconditional":
        return [{}] * len(batches)
    size = {"height": height, "width": width}
    if task == "text-to-image":
        return [size] * len(batches)
    begun: list[Start] = []
    for batch in batches:
        start: dict[str, Tensor | float] = {
            "image": torch.full((len(batch), 3, height, width), 0.5)
        }
        if task == "inpainting":
            start |= size | {"mask_image": torch.ones(len(batch), 1, height, width)}
        own = draw(pipe, batch, sampling, generator, {**start, "strength": 1.0}, "pt")
        start["image"] = own.float().cpu()
        if task == "image-to-image":
            start["strength"] = max(STRENGTH, 1 / sampling.steps)
        if task == "inpainting":
            start["mask_image"] = _half_masks(len(batch), height, width, generator)
        begun.append(start)
    return begun


def _task(pipe: DiffusionPipeline) -> str:
    return component_classes.TASKS[type(pipe).__name__]


def _half_masks(count: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    """Masks (N, 1, H, W) of the left, right, upper or lower half, at random; 1 is drawn again."""
    masks = torch.zeros(count, 1, height, width)
    for mask, side in zip(masks, torch.randint(4, (count,), generator=generator), strict=True):
        halves = (
            mask[..., : width // 2], mask[..., width // 2 :],
            mask[:, : height // 2], mask[:, height // 2 :],
        )  # fmt: skip
        halves[int(side)].fill_(1)
    return masks
