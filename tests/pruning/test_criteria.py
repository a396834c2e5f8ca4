"""Each criterion against its definition, computed plainly."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

from laptop.models import loading
from laptop.pruning.calibration import Calibration
from laptop.pruning.criteria import CRITERIA
from laptop.pruning.score import score
from laptop.pruning.settings import ScoreConfig
from laptop.pruning.surgery import prune_unet
from laptop.pruning.units import anatomy_of, forward_rows
from laptop.tiny import architecture

CONFIG = ScoreConfig(samples=4, steps=2, batch_size=4)
PROMPTS = ["a large red circle on white", "a small blue cross on black"]
BLOCK = "up_blocks.1.attentions.2.transformer_blocks.1"


def scored(model: Path, out: Path, **changes: object) -> tuple[dict[str, float], dict]:
    folder = score(str(model), out, replace(CONFIG, **changes), PROMPTS)
    document = json.loads((folder / "scores.json").read_text())
    return {u["name"]: u["score"] for u in document["units"]}, document


@pytest.mark.parametrize("criterion", sorted({*CRITERIA} - {"clip", "latent-statistics"}))
def test_every_criterion_gives_every_sublayer_a_finite_value(
    tiny_folder, tmp_path, criterion
) -> None:
    values, document = scored(
        tiny_folder, tmp_path / "s", criterion=criterion, granularity="sublayer", samples=2
    )
    assert document["criterion"] == criterion
    assert np.isfinite(list(values.values())).all()
    assert len(set(values.values())) > len(values) / 2, "units are told apart"


def test_task_loss_is_what_a_removal_adds_to_the_denoising_loss(tiny_folder, tmp_path) -> None:
    values, _ = scored(tiny_folder, tmp_path / "s", criterion="task-loss")
    samples = Calibration.read(tmp_path / "s" / "denoising.safetensors")
    rows, target = samples.rows, samples.output
    unet = loading.load_unet(str(tiny_folder))
    losses = [
        float((forward_rows(u, rows, 4) - target).square().mean())
        for u in (unet, prune_unet(unet, [BLOCK]))
    ]
    assert values[BLOCK] == pytest.approx(losses[1] - losses[0], rel=1e-3, abs=1e-7)


@pytest.mark.parametrize("criterion", ["task-loss", "taylor", "output-loss"])
def test_a_learned_variance_has_no_part_in_the_denoising_loss(tmp_path, criterion) -> None:
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        out_channels=6,
        block_out_channels=(16, 32),
        norm_num_groups=8,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    scheduler = DDPMScheduler(variance_type="learned_range")
    DDPMPipeline(unet, scheduler).save_pretrained(tmp_path / "model")
    values, _ = scored(tmp_path / "model", tmp_path / "s", criterion=criterion)
    assert np.isfinite(list(values.values())).all()
    if criterion == "task-loss":
        samples = Calibration.read(tmp_path / "s" / "denoising.safetensors")
        rows, target = samples.rows, samples.output
        assert target.shape[1] == 3
        name = min(values)
        losses = [
            float((forward_rows(u, rows, 4)[:, :3] - target).square().mean())
            for u in (unet.eval(), prune_unet(unet, [name]))
        ]
        assert values[name] == pytest.approx(losses[1] - losses[0], rel=1e-3, abs=1e-6)


def test_the_denoising_target_is_what_turns_the_row_back(tiny_folder, tmp_path) -> None:
    """x_t and v give back the same clean latents for the rows of one prompt."""
    scored(tiny_folder, tmp_path / "s", criterion="task-loss")
    samples = Calibration.read(tmp_path / "s" / "denoising.safetensors")
    rows, v = samples.rows, samples.output
    a = loading.load_pipeline(str(tiny_folder)).scheduler.alphas_cumprod[rows["timestep"].long()]
    a = a[:, None, None, None]
    clean = a.sqrt() * rows["sample"] - (1 - a).sqrt() * v
    assert torch.allclose(clean[0], clean[2], atol=1e-4)
    assert not torch.allclose(clean[0], clean[1], atol=1e-2)


def test_magnitude_and_taylor_follow_their_formulas(tiny_folder, tmp_path) -> None:
    magnitude, _ = scored(tiny_folder, tmp_path / "m", criterion="magnitude")
    taylor, _ = scored(tiny_folder, tmp_path / "t", criterion="taylor")
    samples = Calibration.read(tmp_path / "t" / "denoising.safetensors")
    rows, target = samples.rows, samples.output
    unet = loading.load_unet(str(tiny_folder))
    added = {k: rows.pop(k) for k in ("text_embeds", "time_ids")}
    F.mse_loss(unet(**rows, added_cond_kwargs=added).sample, target).backward()
    sums, products = [], []
    for weight in unet.get_submodule(BLOCK).parameters():
        if weight.ndim > 1:
            sums += weight.abs().flatten(1).sum(1).tolist()
            products += (weight * weight.grad).abs().flatten(1).sum(1).tolist()
    assert magnitude[BLOCK] == pytest.approx(np.mean(sums), rel=1e-5)
    assert taylor[BLOCK] == pytest.approx(np.mean(products), rel=1e-3)


def test_block_influence_is_nothing_for_a_layer_that_does_nothing(tiny_folder, tmp_path) -> None:
    pipe = loading.load_pipeline(str(tiny_folder))
    resnet, block = pipe.unet.down_blocks[0].resnets[1], pipe.unet.get_submodule(BLOCK)
    idle = [resnet.conv2, block.attn1.to_out[0], block.attn2.to_out[0], block.ff.net[2]]
    for layer in idle:
        layer.weight.data.zero_()
        layer.bias.data.zero_()
    pipe.save_pretrained(tmp_path / "idle")
    for granularity, names in {
        "fine": ["down_blocks.0.resnets.1", BLOCK],
        "sublayer": ["down_blocks.0.resnets.1", f"{BLOCK}.attn1", f"{BLOCK}.attn2", f"{BLOCK}.ff"],
    }.items():
        values, _ = scored(
            tmp_path / "idle",
            tmp_path / granularity,
            criterion="block-influence",
            granularity=granularity,
        )
        for name in names:
            assert values.pop(name) == pytest.approx(0, abs=1e-6)
        assert min(values.values()) > 1e-6


def test_latent_statistics_see_what_a_removal_does_to_the_latents(tiny_folder, tmp_path) -> None:
    values, _ = scored(tiny_folder, tmp_path / "s", criterion="latent-statistics", steps=1)
    pipe = loading.load_pipeline(str(tiny_folder))

    def statistics() -> tuple[torch.Tensor, torch.Tensor]:
        latents = pipe(
            PROMPTS,
            num_inference_steps=1,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
        ).images
        return latents.mean((0, 2, 3)), latents.std((0, 2, 3))

    before = statistics()
    pipe.register_modules(unet=prune_unet(pipe.unet, ["up_blocks.2.resnets.2"]))
    change = sum(float((a - b).norm()) for a, b in zip(statistics(), before, strict=True))
    assert values["up_blocks.2.resnets.2"] == pytest.approx(change, rel=1e-3)


def test_clip_scores_pictures_with_a_clip_model(tiny_folder, tmp_path) -> None:
    tokenizer = architecture.tokenizer()
    ids = {"vocab_size": len(tokenizer), "max_position_embeddings": 16, "hidden_size": 16}
    small = {"intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config=ids | small | {"eos_token_id": tokenizer.eos_token_id},
        vision_config=small | {"hidden_size": 16, "image_size": 32, "patch_size": 16},
        projection_dim=8,
    )
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(tmp_path / "clip")
    size = {"shortest_edge": 32}
    images = CLIPImageProcessor(size=size, crop_size={"height": 32, "width": 32})
    CLIPProcessor(images, tokenizer).save_pretrained(tmp_path / "clip")
    values, _ = scored(
        tiny_folder,
        tmp_path / "s",
        criterion="clip",
        granularity="coarse",
        steps=1,
        clip_model=str(tmp_path / "clip"),
    )
    assert len({*values.values()} - {0.0}) > len(values) / 2


def test_chance_depends_on_the_seed_alone(tiny_folder, tmp_path) -> None:
    one, _ = scored(tiny_folder, tmp_path / "a", criterion="random", seed=1)
    same, _ = scored(tiny_folder, tmp_path / "b", criterion="random", seed=1, samples=2)
    other, _ = scored(tiny_folder, tmp_path / "c", criterion="random", seed=2)
    assert one == same != other


def test_timestep_weights_are_shares_of_what_errors_do_to_the_picture(
    tiny_folder, tmp_path
) -> None:
    plain, _ = scored(tiny_folder, tmp_path / "plain")
    weighted, _ = scored(tiny_folder, tmp_path / "weighted", timestep_weighting="x0")
    samples = Calibration.read(tmp_path / "plain" / "calibration.safetensors")
    rows, output = samples.rows, samples.output
    pipe = loading.load_pipeline(str(tiny_folder))
    changed = forward_rows(prune_unet(pipe.unet, [BLOCK]), rows, 4)
    losses = (changed - output).square().flatten(1).mean(1)
    share = 1 - pipe.scheduler.alphas_cumprod[rows["timestep"].long()]  # v-prediction
    assert plain[BLOCK] == pytest.approx(float(losses.mean()), rel=1e-4)
    expected = float((losses * share).sum() / share.sum())
    assert weighted[BLOCK] == pytest.approx(expected, rel=1e-4)
    assert len(weighted) == len(anatomy_of(pipe.unet, 16).units)
