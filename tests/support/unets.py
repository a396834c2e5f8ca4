"""U-Nets of every family, small or on the meta device."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from diffusers import UNet2DConditionModel, UNet2DModel

from laptop.models.architectures import UNETS
from laptop.pruning.calibration import Calibration
from laptop.pruning.units import example_inputs, removed
from laptop.tiny import architecture

SD15, SDXL = UNETS["sd15"], UNETS["sdxl"]


def on_meta(config: dict) -> UNet2DConditionModel:
    with torch.device("meta"):
        return UNet2DConditionModel(**config)


SMALL = {
    "sample_size": 16,
    "block_out_channels": (16, 32, 48),
    "norm_num_groups": 8,
    "cross_attention_dim": 24,
    "attention_head_dim": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
}


XL = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 64,
}


FAMILIES = {
    "sd1": {},
    "sd2": {"use_linear_projection": True, "attention_head_dim": (2, 4, 4)},
    "sdxl-refiner": XL | {"transformer_layers_per_block": 2},
    "inpainting": {"in_channels": 9},
    "lcm": {"time_cond_proj_dim": 32},
    "bk-tiny": {"layers_per_block": 1, "mid_block_type": None},
    "ssd-1b": XL
    | {
        "transformer_layers_per_block": [1, [2, 1], [2, 2]],
        "reverse_transformer_layers_per_block": [[2, 2, 3], [2, 1, 1], 1],
        "mid_block_type": "UNetMidBlock2D",
    },
    "koala-700m": XL
    | {"layers_per_block": 1, "transformer_layers_per_block": [0, 1, 3], "mid_block_type": None},
}


def model(family: str) -> torch.nn.Module:
    torch.manual_seed(0)
    if family == "tiny-sdxl":
        return architecture.unet().eval()
    if family == "unconditional":
        return UNet2DModel(
            sample_size=16,
            block_out_channels=(16, 32, 48),
            norm_num_groups=8,
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        ).eval()
    return UNet2DConditionModel(**SMALL | FAMILIES[family]).eval()


def rows_for(unet: torch.nn.Module, count: int = 2) -> dict[str, torch.Tensor]:
    inputs = example_inputs(unet.config, 5, count)
    rows = inputs | inputs.pop("added_cond_kwargs", {})
    drawn = {k: torch.randn(v.shape) for k, v in rows.items()}
    return drawn | {"timestep": torch.randint(1000, (count,))}


def output_loss(
    unet: torch.nn.Module, names: Sequence[str], samples: Calibration, batch_size: int = 64
) -> float:
    """The slow reference: mean of (output without `names` - output)^2 by plain removal."""
    with removed(unet, names):
        return replace(samples, batch_size=batch_size).loss(unet)


LAST_BLOCKS = [
    "up_blocks.1.attentions.1.transformer_blocks.1",
    "down_blocks.1.attentions.0.transformer_blocks.1",
]
