"""What was made for the teacher still fits its student: LoRA, and ControlNet's residuals."""

from pathlib import Path

import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionXLPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from laptop.pruning.surgery import prune_unet
from laptop.tiny import architecture

PLANS = {
    "fine": ["up_blocks.1.attentions.0.transformer_blocks.0", "up_blocks.1.resnets.1"],
    "coarse": ["up_blocks.1.attentions.0", "mid_block.attentions.0", "down_blocks.0.resnets.1"],
    "sublayer": ["up_blocks.1.attentions.0.transformer_blocks.1.attn1"],
    "stock": ["up_blocks.1.attentions.0.transformer_blocks.1"],
}
INPUTS = {
    "sample": torch.ones(1, 4, 8, 8),
    "timestep": torch.tensor([5.0]),
    "encoder_hidden_states": torch.ones(1, 16, 128),
    "added_cond_kwargs": {"text_embeds": torch.ones(1, 64), "time_ids": torch.ones(1, 6)},
}


@pytest.fixture(scope="module")
def lora(tmp_path_factory) -> tuple[Path, set[str]]:
    """A LoRA of the teacher's attentions as diffusers saves it, and the modules that it changes."""
    teacher = architecture.pipeline(0).unet
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    teacher.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=targets))
    weights, folder = get_peft_model_state_dict(teacher), tmp_path_factory.mktemp("lora")
    StableDiffusionXLPipeline.save_lora_weights(folder, unet_lora_layers=weights)
    return folder, {name.partition(".lora_")[0] for name in weights}


@pytest.mark.parametrize("plan", PLANS)
def test_a_lora_of_the_teacher_changes_every_layer_that_remains(lora, plan) -> None:
    folder, targets = lora
    pipe = architecture.pipeline(0)
    pipe.register_modules(unet=prune_unet(pipe.unet, PLANS[plan]))
    with torch.no_grad():
        before = pipe.unet(**INPUTS).sample
        pipe.load_lora_weights(folder)
        after = pipe.unet(**INPUTS).sample
    changed = {n.partition(".lora_")[0] for n in pipe.unet.state_dict() if ".lora_A" in n}
    gone = tuple(f"{name}." for name in PLANS[plan])
    assert changed == {name for name in targets if not f"{name}.".startswith(gone)}
    assert (after - before).abs().max() > 0.01


@pytest.mark.parametrize("plan", PLANS)
def test_the_residuals_of_a_controlnet_fit(plan) -> None:
    teacher = architecture.unet().eval()
    control = ControlNetModel.from_unet(teacher).eval()
    with torch.no_grad():
        for parameter in control.controlnet_mid_block.parameters():
            parameter.fill_(0.1)  # they begin at zero
        down, mid = control(**INPUTS, controlnet_cond=torch.ones(1, 3, 64, 64), return_dict=False)
        student = prune_unet(teacher, PLANS[plan])
        steered = student(
            **INPUTS, down_block_additional_residuals=down, mid_block_additional_residual=mid
        ).sample
        assert not torch.allclose(steered, student(**INPUTS).sample, atol=1e-5)
