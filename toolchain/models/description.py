"""The description of a model by its configs: native size, latents, conditions, noise schedule.

Calibration, caching, training, drawing, export and benchmarks all use it, so that none of them
assumes what another one reads. Nothing but JSON is read, and no network is built.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from laptop.errors import Unsupported
from laptop.files import read_json, shown
from laptop.models import component_classes, locating
from laptop.models.component_classes import Config
from laptop.models.shapes import VAE_LEVELS, Size, latent_pixels, native_size

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import Tensor

SCHEDULER = "scheduler/scheduler_config.json"
CLIP_TOKENS = 77


@dataclass(frozen=True)
class Latents:
    """The arrays that the U-Net denoises: latents of the VAE, or pixels if it has none."""

    channels: int
    size: Size  # that the U-Net was trained for
    pixels: int  # of a picture, on the side of one latent
    scaling_factor: float = 1.0
    mean: tuple[float, ...] | None = None  # of the VAE's own latents, by channel
    std: tuple[float, ...] | None = None

    @property
    def picture_size(self) -> Size:
        """Height and width in pixels of the pictures that the U-Net was trained for."""
        return self.size[0] * self.pixels, self.size[1] * self.pixels

    def scaled(self, encoded: "Tensor") -> "Tensor":
        """Scale the output of the VAE's encoder to latents (B, C, h, w) as the U-Net sees them.

        By the formula of diffusers' pipelines for SDXL: (x - mean) * scaling_factor / std.
        """
        if self.mean is None or self.std is None:
            return encoded * self.scaling_factor
        mean, std = (encoded.new_tensor(v).reshape(-1, 1, 1) for v in (self.mean, self.std))
        return (encoded - mean) * self.scaling_factor / std


@dataclass(frozen=True)
class Description:
    """The configs of a model, and what follows from them."""

    pipeline: str  # name of the diffusers class
    unet: Config  # configs
    scheduler: Config  # with its `_class_name`
    latents: Latents

    @property
    def multiple(self) -> int:
        """Pixels of which the sides of a picture must be multiples."""
        channels = self.unet.get("block_out_channels")
        levels = len(channels) if channels else VAE_LEVELS
        return int(self.latents.pixels * 2 ** (levels - 1))


def describe(model: str) -> Description:
    """The description of a model by name, folder or Hub id; reads its configs only."""
    pipeline = locating.pipeline_class(model)
    if locating.random_name(model) and component_classes.TASKS[pipeline] != "unconditional":
        source = ""  # its folder is made when weights are needed, and has Stable Diffusion's VAE
    else:
        source = locating.locate(model)
    vae, scheduler = (_config(source, n) for n in ("vae/config.json", SCHEDULER))
    return of_configs(pipeline, locating.unet_config(model), vae=vae, scheduler=scheduler)


def _config(source: str, name: str) -> Config:
    path = locating.find_file(source, name) if source else None
    return locating.with_defaults(read_json(path)) if path else {}


def of_pipeline(pipe: "DiffusionPipeline") -> Description:
    """The description of a pipeline that is loaded."""
    vae = getattr(pipe, "vae", None)
    return of_configs(
        type(pipe).__name__,
        pipe.unet.config,
        vae=vae.config if vae is not None else {},
        scheduler={"_class_name": type(pipe.scheduler).__name__, **pipe.scheduler.config},
    )


def of_configs(pipeline: str, unet: Config, *, vae: Config, scheduler: Config) -> Description:
    """The description that these configs make; `Unsupported` if they contradict each other."""
    latents = Latents(unet["in_channels"], native_size(unet), 1)
    if component_classes.TASKS.get(pipeline) != "unconditional":
        latents = _of_vae(pipeline, unet, vae)
    return Description(pipeline, unet, scheduler, latents)


def _of_vae(pipeline: str, unet: Config, vae: Config) -> Latents:
    """Latents as `pipeline` scales them; `Unsupported` for settings that its class ignores."""
    channels = int(vae.get("latent_channels", 4))
    mean, std = vae.get("latents_mean"), vae.get("latents_std")
    stated = [k for k in ("latents_mean", "latents_std") if vae.get(k) is not None]
    if stated and ("XL" not in pipeline or len(stated) == 1):
        raise Unsupported(
            f"vae/config.json sets {' and '.join(stated)}, which {pipeline} does not apply (only "
            "the XL pipelines do, and only both together): pictures drawn and pictures encoded "
            "would not agree. Remove them there, or use the pipeline that the VAE was trained for."
        )
    for key in stated:
        if not isinstance(vae[key], list | tuple) or len(vae[key]) != channels:
            raise Unsupported(
                f"vae/config.json: {key} is {shown(vae[key])}; needed are {channels} numbers, one "
                "for each of its latent_channels."
            )
    if vae.get("shift_factor"):
        raise Unsupported(
            f"vae/config.json sets shift_factor {shown(vae['shift_factor'])}, which {pipeline} "
            "does not apply. Set it to null or 0."
        )
    return Latents(
        channels=channels,
        size=native_size(unet),
        pixels=latent_pixels(vae),
        scaling_factor=float(vae.get("scaling_factor", 0.18215)),
        mean=tuple(mean) if mean else None,
        std=tuple(std) if std else None,
    )


def context_length(model: str) -> int:
    """Tokens of a prompt that the text encoders read; CLIP's 77 if the model states no number."""
    if locating.random_name(model):
        return CLIP_TOKENS
    source = locating.locate(model)
    for tokenizer in ("tokenizer", "tokenizer_2"):  # SDXL's refiner has the second one only
        path = locating.find_file(source, f"{tokenizer}/tokenizer_config.json")
        if path is not None and (length := read_json(path).get("model_max_length")):
            return int(length)
    return CLIP_TOKENS
