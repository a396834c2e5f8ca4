"""What is recorded while a pipeline samples with guidance."""

from pathlib import Path

import pytest
import torch
from diffusers import (
    StableDiffusionXLPipeline,
)

from conftest import small_sd15
from laptop.errors import Unsupported
from laptop.export import components, inputs
from laptop.models import loading
from laptop.pruning.sampling_config import Sampling

PROMPTS = ["a large red circle on white", "a small blue cross on black"]


@pytest.fixture(scope="module")
def recorded(tiny_pipe: StableDiffusionXLPipeline) -> inputs.Recorded:
    tiny_pipe.set_progress_bar_config(disable=True)
    return inputs.record(tiny_pipe, PROMPTS, Sampling(3), seed=0)


def test_every_component_of_an_xl_pipeline_is_recorded_under_optimums_names(
    recorded: inputs.Recorded,
) -> None:
    shapes = {k: {n: tuple(t.shape) for n, t in v[0].items()} for k, v in recorded.items()}
    assert shapes == {
        "text_encoder": {"input_ids": (1, 16)},
        "text_encoder_2": {"input_ids": (1, 16)},
        "unet": {
            "sample": (2, 4, 8, 8),
            "timestep": (),
            "encoder_hidden_states": (2, 16, 128),
            "text_embeds": (2, 64),
            "time_ids": (2, 6),
        },
        "vae_encoder": {"sample": (1, 3, 64, 64)},
        "vae_decoder": {"latent_sample": (1, 4, 8, 8)},
    }


def test_the_unet_is_recorded_at_every_step_of_the_trajectory(recorded: inputs.Recorded) -> None:
    assert [float(r["timestep"]) for r in recorded["unet"]] == [999, 666, 332] * 2
    first, second = (r["sample"] for r in recorded["unet"][:2])
    assert not torch.equal(first, second)


def test_recorded_latents_decode_to_the_picture_that_the_encoder_gets(
    tiny_pipe: StableDiffusionXLPipeline, recorded: inputs.Recorded
) -> None:
    decoder = components.graph(tiny_pipe, "vae_decoder")
    for latents, image in zip(recorded["vae_decoder"], recorded["vae_encoder"], strict=True):
        decoded = components.run(decoder, latents)["sample"].clamp(-1, 1)
        torch.testing.assert_close(decoded, image["sample"])


def test_recording_leaves_the_pipeline_as_it_was(tiny_pipe: StableDiffusionXLPipeline) -> None:
    tiny_pipe.set_progress_bar_config(disable=True)
    with pytest.raises(ValueError, match="prompt"):
        inputs.record(tiny_pipe, [None], Sampling(1), seed=0)  # type: ignore[list-item]
    assert "decode" not in vars(tiny_pipe.vae)
    for part in (tiny_pipe.unet, tiny_pipe.text_encoder, tiny_pipe.text_encoder_2):
        assert not part._forward_pre_hooks


def test_the_same_seed_records_the_same_and_prompts_get_noise_of_their_own(
    tiny_pipe: StableDiffusionXLPipeline, recorded: inputs.Recorded
) -> None:
    again = inputs.record(tiny_pipe, PROMPTS[:1], Sampling(3), seed=0)
    torch.testing.assert_close(again["unet"][0], recorded["unet"][0], rtol=0, atol=0)
    assert not torch.equal(recorded["unet"][0]["sample"], recorded["unet"][3]["sample"])


def test_a_loaded_sd15_pipeline_is_recorded_without_the_parts_it_lacks(tmp_path: Path) -> None:
    small_sd15().save_pretrained(tmp_path)
    recorded = inputs.record(loading.load_pipeline(str(tmp_path)), PROMPTS[:1], Sampling(2), seed=0)
    assert set(recorded) == {"text_encoder", "unet", "vae_encoder", "vae_decoder"}
    assert set(recorded["unet"][0]) == {"sample", "timestep", "encoder_hidden_states"}
    assert len(recorded["text_encoder"]) == 2, "the prompt and the empty one"
    assert recorded["vae_encoder"][0]["sample"].shape == (1, 3, 16, 16)


def test_a_unet_with_other_conditions_is_refused_by_name() -> None:
    pipe = small_sd15()
    pipe.unet.register_to_config(class_embed_type="timestep")
    with pytest.raises(Unsupported, match="class_embed_type='timestep'"):
        components.graph(pipe, "unet")
