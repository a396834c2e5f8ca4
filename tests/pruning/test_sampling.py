"""Every kind of pipeline is scored, planned, pruned and loaded again, by its own way of drawing."""

import json
from pathlib import Path

import diffusers
import pytest
import torch

from laptop.errors import BadInput, Unsupported
from laptop.models import architectures, loading, locating, random_weights
from laptop.pruning import calibration
from laptop.pruning.calibration import Calibration
from laptop.pruning.plan import make_plan
from laptop.pruning.sampling import draw, guidance_embedding, starts
from laptop.pruning.sampling_choice import choose_sampling
from laptop.pruning.sampling_config import Sampling
from laptop.pruning.score import score
from laptop.pruning.settings import PlanConfig, ScoreConfig
from laptop.pruning.surgery import prune
from laptop.pruning.units import forward_rows

SMALL = {"sample_size": 8, "norm_num_groups": 8}
CONDITIONED = SMALL | {"cross_attention_dim": 32, "attention_head_dim": 4}
TEXT = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "projection_dim": 32,
}  # fmt: skip
PROMPTS = ["a lighthouse", "a boat"]
ARCHITECTURES = sorted(architectures.PIPELINES)
ROWS = {  # of each prompt at two steps: guidance doubles them, and a picture to change costs some
    "ddpm-cifar10": 2, "lcm-sd15": 2, "sd15": 4, "sd15-inpainting": 4, "sd21": 4, "sdxl": 4,
    "sdxl-refiner": 2,
}  # fmt: skip


@pytest.fixture
def folders(monkeypatch, tmp_path) -> Path:
    """The published architectures in small, in a cache of their own."""
    for name, config in architectures.UNETS.items():
        levels = len(config.get("block_out_channels", range(4)))
        small = config | (SMALL if name.startswith("ddpm") else CONDITIONED)
        small["block_out_channels"] = tuple(range(8, 8 * levels + 1, 8))
        if "addition_time_embed_dim" in config:
            ids = 5 if name == "sdxl-refiner" else 6
            small |= {
                "addition_time_embed_dim": 8,
                "projection_class_embeddings_input_dim": 8 * ids + 32,
                "cross_attention_dim": 32 if name == "sdxl-refiner" else 64,
                "transformer_layers_per_block": 2,
            }
        monkeypatch.setitem(architectures.UNETS, name, small)
    big = dict(TEXT)
    for name, texts in random_weights.TEXT.items():
        given = [big if t is random_weights.VIT_BIG_G else TEXT for t in texts]
        monkeypatch.setitem(random_weights.TEXT, name, given)
    monkeypatch.setattr(random_weights, "VIT_BIG_G", big)
    monkeypatch.setattr(random_weights, "VAE_CHANNELS", (32,) * 4)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_kind_of_pipeline_is_scored_planned_pruned_and_loaded_again(folders, name) -> None:
    model = f"random:{name}"
    config = ScoreConfig(granularity="coarse", samples=2 * ROWS[name], steps=2, batch_size=4)
    scores = score(model, folders / "scores", config, PROMPTS)
    plan = make_plan(scores, folders / "plan.json", PlanConfig(ratio=0.3))
    pruned = prune(model, plan, folders / "pruned")

    samples = Calibration.read(scores / "calibration.safetensors")
    rows, output = samples.rows, samples.output
    teacher, student = loading.load_unet(model), loading.load_unet(str(pruned))
    assert torch.allclose(forward_rows(teacher, rows, 4), output, atol=1e-5)
    loss = float((forward_rows(student, rows, 4) - output).square().mean())
    assert loss == pytest.approx(json.loads(plan.read_text())["measured_loss"], rel=1e-3)
    pipe = loading.load_pipeline(str(pruned))
    assert type(pipe).__name__ == architectures.PIPELINES[name]
    generator = torch.Generator().manual_seed(0)
    given = starts(pipe, [PROMPTS], Sampling(2), generator)[0]
    assert draw(pipe, PROMPTS, Sampling(2), generator, given, "pt").isfinite().all()
    assert len(rows["sample"]) == 2 * ROWS[name], "every row of the trajectories, and no more"
    with pytest.raises(BadInput, match="calibration samples asked"):
        calibration.record(pipe, PROMPTS, Sampling(2), samples=99, seed=0, batch_size=1)


def test_an_inpainting_model_is_given_its_own_pictures_with_half_of_each_to_draw(folders) -> None:
    pipe = loading.load_pipeline("random:sd15-inpainting")
    rows = calibration.record(pipe, PROMPTS, Sampling(2), samples=8, seed=0, batch_size=2)
    masks, pictures = rows["sample"][:, 4:5], rows["sample"][:, 5:]
    assert masks.mean((1, 2, 3)).tolist() == [0.5] * 8
    assert pictures.std() > 0.01, "something is left of the picture"
    noised = calibration.denoising(pipe, PROMPTS, Sampling(2), samples=3, seed=0, batch_size=2)
    assert noised.rows["sample"].shape[1] == 9
    assert noised.output.shape[1] == 4
    assert noised.rows["sample"][:, 4].mean((1, 2)).tolist() == [0.5] * 3


def test_calibration_is_drawn_at_the_resolution_that_is_asked(folders) -> None:
    pipe = loading.load_pipeline("random:sdxl")
    rows = calibration.record(
        pipe, PROMPTS, Sampling(2, height=128, width=128), samples=2, seed=0, batch_size=2
    )
    assert rows["sample"].shape == (2, 4, 16, 16)
    assert rows["time_ids"][0].tolist() == [128, 128, 0, 0, 128, 128]
    with pytest.raises(BadInput, match=r"resolution 100 does not fit.*multiple of 32 pixels"):
        calibration.record(
            pipe, PROMPTS, Sampling(2, height=100, width=100), samples=2, seed=0, batch_size=2
        )
    unconditional = loading.load_pipeline("random:ddpm-cifar10")
    with pytest.raises(BadInput, match="one size only"):
        calibration.record(
            unconditional,
            PROMPTS,
            Sampling(2, height=64, width=64),
            samples=2,
            seed=0,
            batch_size=2,
        )


def test_guidance_is_embedded_as_the_pipeline_does(folders) -> None:
    """A U-Net that learnt guidance gets the scale; training shows it what drawing does."""
    pipe = loading.load_pipeline("random:lcm-sd15")
    rows = calibration.record(pipe, PROMPTS, Sampling(1), samples=2, seed=0, batch_size=2)
    embedding = guidance_embedding(pipe.unet.config, choose_sampling("random:lcm-sd15").guidance)
    assert torch.allclose(embedding.expand(2, -1), rows["timestep_cond"])
    assert guidance_embedding(locating.unet_config("random:sd15"), 7.5) is None


def test_criteria_that_draw_take_models_without_a_prompt(folders) -> None:
    config = ScoreConfig(granularity="coarse", samples=2, steps=2, criterion="latent-statistics")
    scores = score("random:ddpm-cifar10", folders / "s", config, PROMPTS)
    units = json.loads((scores / "scores.json").read_text())["units"]
    assert all(unit["score"] > 0 for unit in units)


def test_later_stages_name_the_pipeline_that_they_do_not_take_yet(folders) -> None:
    with pytest.raises(Unsupported, match=r"StableDiffusionInpaintPipeline; export takes"):
        locating.need_whole_chain("random:sd15-inpainting", "export")
    locating.need_whole_chain("random:sd15", "export")


def test_a_pruned_unconditional_model_loads_in_stock_diffusers_with_its_own_class(folders) -> None:
    config = ScoreConfig(granularity="coarse", samples=2, steps=2)
    scores = score("random:ddpm-cifar10", folders / "s", config, PROMPTS)
    plan = make_plan(scores, folders / "plan.json", PlanConfig(ratio=0.3))
    pruned = prune("random:ddpm-cifar10", plan, folders / "pruned")
    pipe = diffusers.DiffusionPipeline.from_pretrained(pruned, trust_remote_code=True)
    assert type(pipe.unet).__name__ == "LaptopUNet2DModel"
    pipe.save_pretrained(folders / "again")
    again = loading.load_unet(str(folders / "again"))
    for name, value in loading.load_unet(str(pruned)).state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
