"""Published architectures with seeded random weights, as whole diffusers folders: no download.

For smoke runs and for measurements at full size. Such a model is named `random:sdxl`; its folder is
made once, in the user's cache. Its pictures are noise, so nothing about quality can be learnt from
it. Its tokenizer knows no words, only letters: CLIP's vocabulary is a download too.
"""

import functools
import inspect
import os
from pathlib import Path

import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    LCMScheduler,
    SchedulerMixin,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from laptop.console import say
from laptop.models.architectures import PIPELINES, UNETS, unet_class_name
from laptop.models.word_tokenizer import word_tokenizer
from laptop.run import run_stage

SEED = 0
MAX_TOKENS = 77
DTYPE = torch.float16  # in which they are stored, as the published ones
TextValues = dict[str, int | str]
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
VIT_L: TextValues = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}
VIT_L |= {"num_attention_heads": 12, "projection_dim": 768}
VIT_H: TextValues = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23}
VIT_H |= {"num_attention_heads": 16, "projection_dim": 512, "hidden_act": "gelu"}
VIT_BIG_G: TextValues = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32}
VIT_BIG_G |= {"num_attention_heads": 20, "projection_dim": 1280, "hidden_act": "gelu"}
TEXT: dict[str, list[TextValues]] = {
    "sd15": [VIT_L],
    "sd15-inpainting": [VIT_L],
    "lcm-sd15": [VIT_L],
    "sd21": [VIT_H],
    "sdxl": [VIT_L, VIT_BIG_G],
    "sdxl-refiner": [VIT_BIG_G],
}  # text encoders; others draw without a prompt
VAE_CHANNELS = (128, 256, 512, 512)


def cached_folder(name: str) -> Path:
    """The diffusers folder of the architecture `name`; it is made at the first call."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return _cached(name, cache / "laptop" / "random-weights" / name)


@functools.cache  # a command asks for it many times
def _cached(name: str, out: Path) -> Path:
    settings = {"unet": UNETS[name], "text": TEXT.get(name, []), "seed": SEED}
    return run_stage(
        "random-weights", out, settings, {}, lambda folder: _write(name, folder), overwrite="stale"
    )


def _write(name: str, folder: Path) -> None:
    say(f"random weights for {name} go to the cache")
    before = torch.get_default_dtype()
    torch.set_default_dtype(DTYPE)  # never a copy in float32, which for SDXL would be 10 GB
    try:
        torch.manual_seed(SEED)
        pipe = _pipeline(name)
    finally:
        torch.set_default_dtype(before)
    pipe.save_pretrained(folder)


def _pipeline(name: str) -> DiffusionPipeline:
    is_xl, is_conditional = name.startswith("sdxl"), name in TEXT
    cls = getattr(diffusers, PIPELINES[name])
    unet = getattr(diffusers, unet_class_name(name))(**UNETS[name])
    scheduler = _scheduler(name)
    if not is_conditional:
        return cls(unet=unet, scheduler=scheduler)
    tokens = word_tokenizer(words=(), length=MAX_TOKENS)
    parts: dict[str, object] = {
        "unet": unet,
        "scheduler": scheduler,
        "vae": AutoencoderKL(
            block_out_channels=VAE_CHANNELS,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            latent_channels=4,
            sample_size=8 * unet.config.sample_size,
            scaling_factor=0.13025 if is_xl else 0.18215,
        ),
        "text_encoder": None,
        "tokenizer": None,
    }
    for values in TEXT[name]:
        is_second = values is VIT_BIG_G
        suffix = "_2" if is_second else ""
        encoder = CLIPTextModelWithProjection if is_second else CLIPTextModel
        parts[f"text_encoder{suffix}"] = encoder(_text_config(tokens, values))
        parts[f"tokenizer{suffix}"] = tokens
    if is_xl:
        is_refiner = "requires_aesthetics_score" in inspect.signature(cls).parameters
        aesthetics = {"requires_aesthetics_score": True} if is_refiner else {}
        return cls(**parts, add_watermarker=False, **aesthetics)
    return cls(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)


def _text_config(tokens: CLIPTokenizer, values: TextValues) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=49408,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokens.bos_token_id,
        eos_token_id=tokens.eos_token_id,
        pad_token_id=tokens.pad_token_id,
        **values,
    )


def _scheduler(name: str) -> SchedulerMixin:
    if name not in TEXT:
        return DDPMScheduler()
    if name.startswith("sdxl"):
        return EulerDiscreteScheduler(**BETAS, timestep_spacing="leading", steps_offset=1)
    if name.startswith("lcm"):
        return LCMScheduler(**BETAS)
    predicts = "v_prediction" if name == "sd21" else "epsilon"
    return DDIMScheduler(
        **BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1, prediction_type=predicts
    )
