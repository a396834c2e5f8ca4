"""Make a teacher draw, whatever kind of pipeline it is.

A model that changes pictures is given its own: drawn from grey with nothing left of it, then, for
inpainting, with half of each to be drawn anew. (SDXL's refiner never learnt the first steps, so its
own pictures are poor ones.)
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import LatentConsistencyModelPipeline
from torch import Tensor

from laptop.models import component_classes
from laptop.models.description import of_pipeline
from laptop.pruning.sampling_choice import picture_size
from laptop.pruning.sampling_config import Sampling

STRENGTH = 0.3  # share of the steps that an image-to-image model goes back; SDXL's default


def draw(
    pipe: Any,
    prompts: Sequence[str],
    sampling: Sampling,
    generator: torch.Generator | list[torch.Generator],
    given: Mapping[str, Any],
    output_type: str = "latent",
) -> Tensor:
    """Latents or, with `output_type="pt"`, pictures in [0, 1] (N, C, H, W), one for each prompt.

    One generator for all of them, or one for each.
    `given` is what `starts` gave. Unconditional models draw pixels, whose "latents" are in [-1, 1].
    """
    arguments = {**sampling.arguments, "generator": generator, **given}
    if _task(pipe) == "unconditional":
        images = pipe(batch_size=len(prompts), output_type="np", **arguments).images
        pictures = torch.as_tensor(images).permute(0, 3, 1, 2)
        return pictures * 2 - 1 if output_type == "latent" else pictures
    drawn: Tensor = pipe(list(prompts), output_type=output_type, **arguments).images
    return drawn


def guidance_embedding(unet: Mapping[str, Any], scale: float | None) -> Tensor | None:
    """What a U-Net that learnt guidance gets instead of two passes, (1, time_cond_proj_dim).

    None for a U-Net of another kind. `scale` is that of classifier-free guidance, as the pipelines
    take it.
    """
    if scale is None or not unet.get("time_cond_proj_dim"):
        return None
    embedding: Tensor = LatentConsistencyModelPipeline.get_guidance_scale_embedding(
        None, torch.tensor([scale - 1]), embedding_dim=unet["time_cond_proj_dim"]
    )
    return embedding


def starts(
    pipe: Any,
    batches: Sequence[Sequence[str]],
    sampling: Sampling,
    generator: torch.Generator,
) -> list[dict[str, Any]]:
    """For each batch of prompts what else `draw` needs: the size, and pictures to change."""
    task = _task(pipe)
    height, width = picture_size(of_pipeline(pipe), sampling.height, sampling.width)
    if task == "unconditional":
        return [{}] * len(batches)
    size = {"height": height, "width": width}
    if task == "text-to-image":
        return [size] * len(batches)
    found = []
    for batch in batches:
        given: dict[str, Any] = {"image": torch.full((len(batch), 3, height, width), 0.5)}
        if task == "inpainting":
            given |= size | {"mask_image": torch.ones(len(batch), 1, height, width)}
        own = draw(pipe, batch, sampling, generator, {**given, "strength": 1.0}, "pt")
        given["image"] = own.float().cpu()
        if task == "image-to-image":
            given["strength"] = max(STRENGTH, 1 / sampling.steps)
        if task == "inpainting":
            given["mask_image"] = _half_masks(len(batch), height, width, generator)
        found.append(given)
    return found


def _task(pipe: Any) -> str:
    return component_classes.TASKS[type(pipe).__name__]


def _half_masks(count: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    """Masks (N, 1, H, W) of the left, right, upper or lower half, by chance; 1 is drawn anew."""
    masks = torch.zeros(count, 1, height, width)
    for mask, side in zip(masks, torch.randint(4, (count,), generator=generator), strict=True):
        halves = (
            mask[..., : width // 2], mask[..., width // 2 :],
            mask[:, : height // 2], mask[:, height // 2 :],
        )  # fmt: skip
        halves[int(side)].fill_(1)
    return masks
