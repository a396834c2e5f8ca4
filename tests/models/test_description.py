"""What a model states is read from its configs, and the same for every stage."""

import pytest
import torch
from diffusers import LCMScheduler

from laptop.errors import Unsupported
from laptop.models import description, locating, shapes

UNET = {"sample_size": (12, 8), "in_channels": 4, "block_out_channels": (8, 8)}
VAE = {"latent_channels": 4, "block_out_channels": (8, 8, 8), "scaling_factor": 0.5}
STATISTICS = {"latents_mean": [-1.6, 1.1, -1.8, 0.4], "latents_std": [8.4, 5.9, 6.4, 5.3]}


def of(pipeline: str = "StableDiffusionXLPipeline", **vae: object) -> description.Description:
    return description.of_configs(pipeline, UNET, vae=VAE | vae, scheduler={})


def test_latents_and_pictures_need_not_be_square() -> None:
    described = of()
    assert described.latents.size == (12, 8)
    assert described.latents.picture_size == (48, 32)
    assert described.multiple == 8


def test_latents_are_scaled_as_the_xl_pipelines_undo_it() -> None:
    """Their decoding: latents * std / scaling_factor + mean."""
    raw = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    scaled = of(**STATISTICS).latents.scaled(raw)
    mean, std = (torch.tensor(STATISTICS[k]).view(1, 4, 1, 1) for k in STATISTICS)
    assert torch.allclose(scaled * std / VAE["scaling_factor"] + mean, raw, atol=1e-5)
    assert torch.equal(of().latents.scaled(raw), raw * 0.5)


@pytest.mark.parametrize(
    ("pipeline", "vae", "message"),
    [
        ("StableDiffusionPipeline", STATISTICS, "latents_mean and latents_std, which Stable"),
        ("StableDiffusionXLPipeline", {"latents_std": [1.0] * 4}, "sets latents_std, which"),
        ("StableDiffusionXLPipeline", STATISTICS | {"latents_mean": [0.0]}, "needed are 4 numbers"),
        ("StableDiffusionPipeline", {"shift_factor": 0.1}, "sets shift_factor 0.1"),
    ],
)
def test_what_a_pipeline_does_not_apply_is_refused_by_its_key(pipeline, vae, message) -> None:
    with pytest.raises(Unsupported, match=message):
        of(pipeline, **vae)


def test_keys_that_a_config_leaves_out_have_the_defaults_of_its_class() -> None:
    """Not those of DDPM: the defaults of schedulers differ."""
    stated = locating.with_defaults({"_class_name": "LCMScheduler", "steps_offset": 1})
    whole = dict(LCMScheduler(steps_offset=1).config)
    assert all(stated[key] == value for key, value in whole.items() if not key.startswith("_"))
    assert locating.with_defaults({"_class_name": "AutoencoderKL"})["scaling_factor"] == 0.18215


@pytest.mark.parametrize(
    ("config", "width"),
    [
        ({"cross_attention_dim": 32}, 32),
        ({"cross_attention_dim": (32, 32)}, 32),
        ({"cross_attention_dim": 32, "encoder_hid_dim": 48}, 48),
        ({}, None),
    ],
)
def test_the_width_of_the_text_is_what_the_unet_projects(config, width) -> None:
    assert shapes.text_width(config) == width
    found = shapes.input_shapes(UNET | config, 7, 2)
    assert found.get("encoder_hidden_states") == (width and (2, 7, width))
    assert found["sample"] == (2, 4, 12, 8)
