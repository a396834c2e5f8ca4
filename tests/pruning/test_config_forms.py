"""Config keys in all forms that diffusers takes: one value, one for each level, nested lists."""

from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from laptop.distill.checks import check_pair, check_smaller
from laptop.errors import BadInput
from laptop.models.shapes import input_shapes
from laptop.pruning.settings import GRANULARITIES
from laptop.pruning.surgery import prune_unet
from laptop.pruning.units import anatomy_of, removed

BASE: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 24,
    "norm_num_groups": 8,
    "attention_head_dim": 4,
}
FORMS: dict[str, dict[str, Any]] = {
    "heads by level": {"attention_head_dim": [2, 4]},
    "text by level": {"cross_attention_dim": [24, 24]},
    "text at one level": {
        "cross_attention_dim": [48, 24],
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    },
    "layers by level": {"layers_per_block": [1, 2]},
    "depths": {"transformer_layers_per_block": 2},
    "depths by level": {"transformer_layers_per_block": [1, 2]},
    "depths by layer": {
        "transformer_layers_per_block": [[2], [1]],
        "reverse_transformer_layers_per_block": [[1, 2], [2, 1]],
    },
    "only cross": {"only_cross_attention": True},
    "only cross by level": {"only_cross_attention": [True, False]},
    "only cross in the middle": {"mid_block_only_cross_attention": True},
    "fourier": {"time_embedding_type": "fourier"},
    "scale and shift": {"resnet_time_scale_shift": "scale_shift"},
    "kernels": {"conv_in_kernel": 1, "conv_out_kernel": 1},
    "times": {
        "timestep_post_act": "silu",
        "time_embedding_act_fn": "silu",
        "time_embedding_dim": 64,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
    },
    "skips": {"resnet_skip_time_act": True, "resnet_out_scale_factor": 1.4},
    "projected text": {"encoder_hid_dim": 40},
    "guidance": {"time_cond_proj_dim": 8},
    "oblong and centered": {"sample_size": [8, 12], "center_input_sample": True},
    "no middle": {"mid_block_type": None},
    "linear and upcast": {"use_linear_projection": True, "upcast_attention": True},
}


@pytest.mark.parametrize("form", FORMS)
def test_a_unet_of_every_form_is_taken_apart_and_pruned(form: str) -> None:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**BASE | FORMS[form]).eval()
    shapes = input_shapes(unet.config, tokens=5, batch=2)
    rows: dict[str, Any] = {k: torch.randn(s) for k, s in shapes.items() if k != "timestep"}
    rows["timestep"] = torch.tensor(401.0)
    for granularity in GRANULARITIES:
        units = [u for u in anatomy_of(unet, 5, granularity).units if not u.needs]
        assert units
        last = [u.name for u in units if u.name.endswith("transformer_blocks.1")]
        for names in filter(None, ([u.name for u in units][::2], last)):
            with torch.no_grad():
                with removed(unet, names):
                    expected = unet(**rows).sample
                student = prune_unet(unet, names)
                assert torch.allclose(student(**rows).sample, expected, atol=1e-5), names


@pytest.mark.parametrize(
    ("of_teacher", "of_student", "fits"),
    [
        ({"sample_size": 8}, {"sample_size": [8, 8]}, True),
        ({"sample_size": 8}, {"sample_size": [8, 12]}, False),
        ({"cross_attention_dim": 24}, {"cross_attention_dim": [24, 24]}, True),
        ({"cross_attention_dim": [24, 24]}, {"cross_attention_dim": 24}, True),
        ({"cross_attention_dim": 24}, {"cross_attention_dim": [32, 32]}, False),
    ],
)
def test_teacher_and_student_pair_by_what_their_configs_mean(
    monkeypatch: pytest.MonkeyPatch, of_teacher: Any, of_student: Any, fits: bool
) -> None:
    configs = {"teacher": BASE | of_teacher, "student": BASE | of_student}
    monkeypatch.setattr("laptop.models.locating.unet_config", lambda name: dict(configs[name]))
    if fits:
        check_pair("teacher", "student")
        return
    with pytest.raises(BadInput, match="is no pruned teacher"):
        check_pair("teacher", "student")


def test_a_teacher_is_not_its_own_student(pair: tuple[str, str]) -> None:
    teacher, student = pair
    check_smaller(teacher, student)
    with pytest.raises(BadInput, match="is student and teacher"):
        check_smaller(teacher, teacher)
    with pytest.raises(BadInput, match="Are they the wrong way round"):
        check_smaller(student, teacher)
