"""Make a teacher draw, whatever kind of pipeline it is.

A model that changes pictures is given its own: drawn from grey with nothing left of it, then, for
inpainting, with half of each to be drawn anew. (SDXL's refiner never learnt the first steps, so its
own pictures are poor ones.)
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import diffusers
import torch
from diffusers import LatentConsistencyModelPipeline
from torch import Tensor

from laptop import models
from laptop.description import describe, of_pipeline
from laptop.errors import BadInput

STRENGTH = 0.3  # share of the steps that an image-to-image model goes back; SDXL's default


def draw(
    pipe: Any,
    prompts: Sequence[str],
    steps: int,
    generator: torch.Generator | list[torch.Generator],
    given: Mapping[str, Any],
    output_type: str = "latent",
) -> Tensor:
    """Latents or, with `output_type="pt"`, pictures in [0, 1] (N, C, H, W), one for each prompt.

    One generator for all of them, or one for each.
    `given` is what `starts` gave. Unconditional models draw pixels, whose "latents" are in [-1, 1].
    """
    arguments = {"num_inference_steps": steps, "generator": generator, **given}
    if _task(pipe) == "unconditional":
        images = pipe(batch_size=len(prompts), output_type="np", **arguments).images
        pictures = torch.as_tensor(images).permute(0, 3, 1, 2)
        return pictures * 2 - 1 if output_type == "latent" else pictures
    drawn: Tensor = pipe(list(prompts), output_type=output_type, **arguments).images
    return drawn


def guidance_embedding(unet: Mapping[str, Any], scale: float) -> Tensor | None:
    """What a U-Net that learnt guidance gets instead of two passes, (1, time_cond_proj_dim).

    None for a U-Net of another kind. `scale` is that of classifier-free guidance, as the pipelines
    take it.
    """
    if not unet.get("time_cond_proj_dim"):
        return None
    embedding: Tensor = LatentConsistencyModelPipeline.get_guidance_scale_embedding(
        None, torch.tensor([scale - 1]), embedding_dim=unet["time_cond_proj_dim"]
    )
    return embedding


def default_guidance(model: str) -> float:
    """The guidance scale that the pipeline of `model` draws with where none is asked for."""
    call = getattr(diffusers, models.pipeline_class(model)).__call__
    return float(inspect.signature(call).parameters["guidance_scale"].default)


def starts(
    pipe: Any,
    batches: Sequence[Sequence[str]],
    steps: int,
    generator: torch.Generator,
    resolution: int | None,
) -> list[dict[str, Any]]:
    """For each batch of prompts what `draw` needs beside it: the size, and pictures to change.

    `resolution` in pixels; None for the model's own.
    """
    task = _task(pipe)
    if task == "unconditional":
        if resolution is not None:
            raise BadInput("an unconditional model draws one size only: leave --resolution out.")
        return [{}] * len(batches)
    height, width = _size(pipe, resolution)
    size = {"height": height, "width": width}
    if task == "text-to-image":
        return [size] * len(batches)
    found = []
    for batch in batches:
        given: dict[str, Any] = {"image": torch.full((len(batch), 3, height, width), 0.5)}
        if task == "inpainting":
            given |= size | {"mask_image": torch.ones(len(batch), 1, height, width)}
        own = draw(pipe, batch, steps, generator, {**given, "strength": 1.0}, "pt")
        given["image"] = own.float().cpu()
        if task == "image-to-image":
            given["strength"] = max(STRENGTH, 1 / steps)
        if task == "inpainting":
            given["mask_image"] = _half_masks(len(batch), height, width, generator)
        found.append(given)
    return found


def _task(pipe: Any) -> str:
    return models.TASKS[type(pipe).__name__]


def _size(pipe: Any, resolution: int | None) -> tuple[int, int]:
    described = of_pipeline(pipe)
    if resolution is None:
        return described.latents.picture_size
    _check_resolution(resolution, described.multiple)
    return resolution, resolution


def latent_side(model: str, resolution: int) -> int:
    """Height and width of the latents of pictures with `resolution` pixels a side.

    Reads configs only; `BadInput` for what the model cannot draw.
    """
    if models.TASKS[models.pipeline_class(model)] == "unconditional":
        raise BadInput("an unconditional model draws one size only: leave --resolution out.")
    described = describe(model)
    _check_resolution(resolution, described.multiple)
    return resolution // described.latents.pixels


def _check_resolution(resolution: int, multiple: int) -> None:
    """Raise `BadInput` unless pictures of `resolution` pixels come down to whole numbers."""
    if resolution < 1 or resolution % multiple:
        raise BadInput(
            f"resolution {resolution} does not fit this model: it must be a multiple of {multiple} "
            "pixels."
        )


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
