"""Units and costs, against the numbers of method.md (architecture only, on the meta device)."""

import pytest
import torch
from diffusers import UNet2DConditionModel

from laptop.errors import BadInput
from laptop.pruning.units import anatomy, check_names, removed

SDXL = {
    "sample_size": 128,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SD15 = {"sample_size": 64, "cross_attention_dim": 768}


@pytest.mark.parametrize(
    ("config", "units", "params", "removable", "gmacs"),
    [
        (SD15, 38, 859_520_964, 756_821_760, 401.6),
        (SDXL, 87, 2_567_463_684, 2_499_877_440, 3380.6),
    ],
)
def test_counts_of_the_published_models(config, units, params, removable, gmacs) -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
    known = anatomy(unet)
    assert len(known.units) == units
    assert known.params == params
    assert sum(u.params for u in known.units) == removable
    assert known.macs / 1e9 == pytest.approx(gmacs, abs=0.06)


def test_units_come_in_the_order_in_which_they_run(tiny_pipe) -> None:
    names = [u.name for u in anatomy(tiny_pipe.unet).units]
    assert names[0] == "down_blocks.0.resnets.0"
    assert names[-1] == "up_blocks.2.resnets.2"
    first = names.index("down_blocks.1.attentions.0.transformer_blocks.0")
    assert first == names.index("down_blocks.1.resnets.0") + 1
    assert len(names) == len(set(names)) >= 30


def test_a_removal_is_undone_and_leaves_the_output_as_it_was(tiny_pipe) -> None:
    unet, names = tiny_pipe.unet, [u.name for u in anatomy(tiny_pipe.unet).units]
    before = dict(unet.named_modules())
    with removed(unet, names):
        assert len(dict(unet.named_modules())) < len(before)
    assert dict(unet.named_modules()) == before


def test_names_of_another_model_are_refused(tiny_pipe) -> None:
    with pytest.raises(BadInput, match="made for another model"):
        check_names(["down_blocks.7.resnets.0"], anatomy(tiny_pipe.unet), "plan.json")
