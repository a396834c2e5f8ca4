"""Training data: a folder of captioned images, encoded once and kept.

The folder is Hugging Face's image-folder layout: pictures and `metadata.jsonl` with `file_name` and
`text` in each line.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from safetensors.torch import load_file, save_file
from torch import Tensor

from laptop.errors import BadInput
from laptop.run import track


@dataclass(frozen=True)
class Encoded:
    """Latents and conditionings of N captioned images, M different captions.

    Caption 0 is the empty one, for samples that are trained without a caption.
    """

    latents: Tensor  # (N, C, h, w), scaled as the U-Net sees them
    caption: Tensor  # (N,) index of each image's caption
    states: Tensor  # (M, tokens, width)
    pooled: Tensor | None  # (M, width), SDXL only
    time_ids: Tensor | None  # (1, 6), SDXL only

    def rows(self, index: Tensor, keep: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Latents (B, C, h, w) and conditionings of the images `index` (B,); captions if `keep`."""
        caption = self.caption[index] * keep
        rows = {"encoder_hidden_states": self.states[caption]}
        if self.pooled is not None and self.time_ids is not None:
            rows["text_embeds"] = self.pooled[caption]
            rows["time_ids"] = self.time_ids.expand(len(index), -1)
        return self.latents[index], rows


def read_captions(folder: Path) -> list[tuple[Path, str]]:
    """Paths and captions from `metadata.jsonl`; `BadInput` names the first bad line."""
    metadata = folder / "metadata.jsonl"
    if not metadata.is_file():
        raise BadInput(
            f"{folder} has no metadata.jsonl. Needed is a folder of images with one JSON line for "
            'each: {"file_name": "0.png", "text": "a caption"}.'
        )
    pairs = []
    for number, line in enumerate(metadata.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            pairs.append((folder / row["file_name"], str(row["text"])))
        except (ValueError, KeyError, TypeError) as e:
            raise BadInput(
                f"{metadata}, line {number}: needs file_name and text ({e!r})."
            ) from None
        if not pairs[-1][0].is_file():
            raise BadInput(f"{metadata}, line {number}: {pairs[-1][0].name} does not exist.")
    if not pairs:
        raise BadInput(f"{metadata} is empty.")
    return pairs


def _read_image(path: Path, size: int) -> Tensor:
    """A picture scaled and cropped to (3, size, size), -1..1."""
    try:
        with Image.open(path) as image:
            fitted = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.LANCZOS)
    except (UnidentifiedImageError, OSError) as e:
        raise BadInput(
            f"{path} is not a readable picture ({e}). Remove its line or mend it."
        ) from None
    return torch.from_numpy(np.array(fitted)).permute(2, 0, 1).float() / 127.5 - 1


def condition(pipe: Any, captions: Sequence[str]) -> tuple[Tensor, Tensor | None]:
    """Text conditioning: states (B, tokens, width) and, for SDXL, pooled (B, width)."""
    result = pipe.encode_prompt(
        prompt=list(captions),
        device=pipe.device,
        num_images_per_prompt=1,
        do_classifier_free_guidance=False,
    )
    return result[0], result[2] if len(result) == 4 else None


@torch.inference_mode()
def encode(pipe: Any, folder: Path, cache: Path, *, seed: int, batch_size: int = 64) -> Encoded:
    """Latents and text states of all images in `folder`; read back from `cache` if it is there."""
    if not cache.exists():
        tensors = _encode_images(pipe, folder, seed, batch_size)
        beside = cache.with_suffix(".tmp")
        save_file({k: v.contiguous() for k, v in tensors.items()}, beside)
        beside.replace(cache)
    tensors = load_file(cache)
    return Encoded(
        tensors["latents"],
        tensors["caption"],
        tensors["states"],
        tensors.get("pooled"),
        tensors.get("time_ids"),
    )


def _encode_images(pipe: Any, folder: Path, seed: int, batch_size: int) -> dict[str, Tensor]:
    pairs = read_captions(folder)
    captions = list(dict.fromkeys(["", *(caption for _, caption in pairs)]))
    side = pipe.unet.config.sample_size
    size = (side if isinstance(side, int) else min(side)) * pipe.vae_scale_factor
    batch_size = max(1, batch_size * 64**2 // size**2)  # as many pixels at once at any size
    scale = pipe.vae.config.scaling_factor
    generator = torch.Generator().manual_seed(seed)
    latents, states, pooled = [], [], []
    starts = range(0, len(pairs), batch_size)
    for i in track(starts, "encode images", len(starts)):
        images = torch.stack([_read_image(path, size) for path, _ in pairs[i : i + batch_size]])
        latents.append(scale * pipe.vae.encode(images).latent_dist.sample(generator))
    for i in range(0, len(captions), batch_size):
        some_states, some_pooled = condition(pipe, captions[i : i + batch_size])
        states.append(some_states)
        if some_pooled is not None:
            pooled.append(some_pooled)
    number = {caption: i for i, caption in enumerate(captions)}
    tensors = {
        "latents": torch.cat(latents),
        "caption": torch.tensor([number[caption] for _, caption in pairs]),
        "states": torch.cat(states),
    }
    if pooled:
        tensors["pooled"] = torch.cat(pooled)
        if pipe.config.force_zeros_for_empty_prompt:
            tensors["states"][0], tensors["pooled"][0] = 0, 0
        tensors["time_ids"] = torch.tensor([[size, size, 0, 0, size, size]], dtype=torch.float32)
    return tensors
