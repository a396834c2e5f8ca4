"""Encode training examples with a model's VAE and text encoders, or draw them from captions."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from diffusers import DiffusionPipeline
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTinyOutput
from torch import Tensor

from laptop import processes
from laptop.distill.buckets import Size, bucket_sizes, fit, nearest
from laptop.distill.sources import Broken, Example
from laptop.distill.viewer import BadPicture, view
from laptop.errors import LaptopError
from laptop.models import loading
from laptop.models.description import describe
from laptop.models.precision import stored_dtype
from laptop.pruning.sampling import draw
from laptop.pruning.sampling_choice import picture_size, set_scheduler_
from laptop.pruning.sampling_config import Sampling

STORED = torch.float16  # exact to 5e-4 of a value, far below the noise that training adds
PIXELS = 64 * 64**2  # encoded or drawn at once, on a CPU
PIXELS_ON_GPU = 4 * 1024**2
CAPTIONS = 64  # encoded at once


class NotFinite(LaptopError):
    """A network computed NaN or infinity."""


@dataclass(frozen=True)
class Sample:
    """An encoded example; captions are encoded apart, since many may be alike."""

    id: str
    caption: str
    latents: Tensor  # (C, h, w), scaled as the U-Net sees them
    time_ids: Tensor  # (6,), see `buckets.fit`


@dataclass(frozen=True)
class _Fitted:
    """An example scaled and cropped, which waits for others of its size."""

    example: Example
    seed: int
    pixels: Tensor | None  # (3, H, W); None: to be drawn
    time_ids: Tensor


class Encoder:
    """Encodes in float32; draws (on a GPU) in the precision that the weights are stored in.

    Each example's noise has a seed of its own, so that batches do not matter beyond rounding.
    """

    def __init__(self, model: str, sampling: Sampling, *, has_buckets: bool, is_drawn: bool):
        self.device, self.sampling = processes.device(), sampling
        self.is_cpu = self.device.type == "cpu"
        dtype = torch.float32 if self.is_cpu or not is_drawn else stored_dtype(model)
        load = loading.load_pipeline if is_drawn else loading.load_encoders
        self.pipe: DiffusionPipeline = load(model, dtype)
        self.pipe.to(self.device)
        set_scheduler_(self.pipe, sampling)
        self.precision = str(dtype).removeprefix("torch.")
        description = describe(model)
        self.latents = description.latents
        self.sizes: list[Size] = [picture_size(description, sampling.height, sampling.width)]
        if has_buckets:
            self.sizes = bucket_sizes(min(self.sizes[0]), description.multiple)

    def latent_size(self, size: Size) -> Size:
        """The height and width of the latents of a picture of `size`."""
        return size[0] // self.latents.pixels, size[1] // self.latents.pixels

    @torch.inference_mode()
    def encode(
        self, records: Sequence[Example | Broken], seeds: Sequence[int]
    ) -> tuple[dict[Size, list[Sample]], list[Broken]]:
        """Encode records: samples by the size of their latents, and the records that give none."""
        samples: dict[Size, list[Sample]] = {}
        broken: list[Broken] = []
        for size, batch in self._batches(records, seeds, broken):
            latents = self._draw(size, batch) if batch[0].pixels is None else self._encode(batch)
            kept = _stored(latents, f"latents of {batch[0].example.id} to {batch[-1].example.id}")
            samples.setdefault(self.latent_size(size), []).extend(
                Sample(item.example.id, item.example.caption, latent, item.time_ids)
                for item, latent in zip(batch, kept, strict=True)
            )
        return samples, broken

    def _batches(
        self, records: Sequence[Example | Broken], seeds: Sequence[int], broken: list[Broken]
    ) -> Iterator[tuple[Size, list[_Fitted]]]:
        """Give batches of one size; append to `broken` the records that cannot be used."""
        limit = PIXELS if self.is_cpu else PIXELS_ON_GPU
        waiting: dict[Size, list[_Fitted]] = {size: [] for size in self.sizes}
        for record, seed in zip(records, seeds, strict=True):
            if isinstance(record, Broken):
                broken.append(record)
                continue
            try:
                size, item = self._fit(record, seed)
            except BadPicture as e:
                broken.append(Broken(record.id, f"not a readable picture ({e})"))
                continue
            waiting[size].append(item)
            if len(waiting[size]) == max(1, limit // (size[0] * size[1])):
                yield size, waiting[size]
                waiting[size] = []
        yield from ((size, batch) for size, batch in waiting.items() if batch)

    def _fit(self, example: Example, seed: int) -> tuple[Size, _Fitted]:
        if example.picture is None:
            size = self.sizes[0]
            return size, _Fitted(example, seed, None, torch.tensor([*size, 0, 0, *size]).float())
        image = view(example.picture)
        size = nearest(self.sizes, image.height, image.width)
        return size, _Fitted(example, seed, *fit(image, size))

    def _encode(self, batch: Sequence[_Fitted]) -> Tensor:
        """Latents (B, C, h, w), sampled from the VAE's posterior."""
        pixels = torch.stack([item.pixels for item in batch if item.pixels is not None])
        encoded = self.pipe.vae.encode(pixels.to(self.device, self.pipe.vae.dtype))
        if isinstance(encoded, AutoencoderTinyOutput):  # one value, no distribution
            return self.latents.scaled(encoded.latents)
        posterior = encoded.latent_dist
        noise = [torch.randn(posterior.mean.shape[1:], generator=g) for g in _generators(batch)]
        sampled = posterior.mean + posterior.std * torch.stack(noise).to(posterior.mean)
        return self.latents.scaled(sampled)

    def _draw(self, size: Size, batch: Sequence[_Fitted]) -> Tensor:
        """Draw the captions: latents (B, C, h, w)."""
        captions = [item.example.caption for item in batch]
        arguments = {"height": size[0], "width": size[1]}
        return draw(self.pipe, captions, self.sampling, _generators(batch), arguments)

    @torch.inference_mode()
    def embed(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Encode captions: `states` (B, tokens, width) and, for SDXL, `pooled` (B, width)."""
        embeddings: dict[str, list[Tensor]] = {"states": [], "pooled": []}
        for i in range(0, len(captions), CAPTIONS):
            result = self.pipe.encode_prompt(
                prompt=list(captions[i : i + CAPTIONS]),
                device=self.device,
                num_images_per_prompt=1,
                do_classifier_free_guidance=False,
            )
            embeddings["states"].append(_stored(result[0], "text embeddings"))
            if len(result) == 4:
                embeddings["pooled"].append(_stored(result[2], "pooled text embeddings"))
        return {name: torch.cat(parts) for name, parts in embeddings.items() if parts}

    def embed_nothing(self) -> dict[str, Tensor]:
        """Encode the empty caption as the pipeline does: zeros, or its embeddings."""
        embeddings = self.embed([""])
        if self.pipe.config.get("force_zeros_for_empty_prompt"):
            return {name: torch.zeros_like(value) for name, value in embeddings.items()}
        return embeddings


def _generators(batch: Sequence[_Fitted]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(item.seed) for item in batch]


def _stored(value: Tensor, name: str) -> Tensor:
    """A tensor as it is stored, on the CPU; `NotFinite` where it overflows or is not finite."""
    stored = value.to("cpu", STORED)
    if not stored.isfinite().all():
        raise NotFinite(
            f"{name}: the model computed values that are not finite in {STORED}. Its weights may "
            "be damaged."
        )
    return stored
