"""Units and costs, against the numbers of method.md (architecture only, on the meta device)."""

import pytest
import torch
from diffusers import UNet2DConditionModel

from laptop.errors import BadInput, Unsupported
from laptop.pruning.units import anatomy_of, check_names, removed
from support.unets import SD15, SDXL, on_meta


@pytest.mark.parametrize(
    ("config", "granularity", "units", "removable"),
    [
        (SD15, "coarse", 38, 781_652_480),
        (SD15, "fine", 38, 756_821_760),
        (SD15, "sublayer", 70, 756_821_760),
        (SDXL, "coarse", 28, 2_523_677_760),
        (SDXL, "fine", 87, 2_499_877_440),
        (SDXL, "sublayer", 227, 2_499_877_440),
    ],
)
def test_units_of_the_published_models(config, granularity, units, removable) -> None:
    known = anatomy_of(on_meta(config), granularity=granularity)
    layers = [u for u in known.units if u.kind != "transformer_shell"]
    assert len(layers) == units
    assert sum(u.params for u in layers) == removable
    if granularity != "coarse":  # with the shells, all is as in `coarse`
        whole = {str(SD15): 781_652_480, str(SDXL): 2_523_677_760}[str(config)]
        assert sum(u.params for u in known.units) == whole


@pytest.mark.parametrize(
    ("config", "params", "gmacs"),
    [(SD15, 859_520_964, 401.6), (SDXL, 2_567_463_684, 3380.6)],
)
def test_costs_of_the_published_models(config, params, gmacs) -> None:
    known = anatomy_of(on_meta(config), granularity="coarse")
    assert known.params == params
    assert known.macs / 1e9 == pytest.approx(gmacs, abs=0.06)


def test_a_layer_that_nobody_can_remove_is_refused_by_its_class() -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            block_out_channels=(32, 64),
            down_block_types=("KDownBlock2D", "KCrossAttnDownBlock2D"),
            up_block_types=("KCrossAttnUpBlock2D", "KUpBlock2D"),
            mid_block_type=None,
        )
    with pytest.raises(Unsupported, match="ResnetBlockCondNorm2D"):
        anatomy_of(unet)


def test_units_come_in_the_order_in_which_they_run(tiny_pipe) -> None:
    names = [u.name for u in anatomy_of(tiny_pipe.unet).units]
    assert names[0] == "down_blocks.0.resnets.0"
    assert names[-1] == "up_blocks.2.resnets.2"
    first = names.index("down_blocks.1.resnets.0")
    shell = "down_blocks.1.attentions.0"
    blocks = [f"{shell}.transformer_blocks.{i}" for i in (0, 1)]
    assert names[first + 1 : first + 4] == [shell, *blocks]
    assert len(names) == len(set(names)) >= 30


def test_a_removal_is_undone_and_leaves_the_output_as_it_was(tiny_pipe) -> None:
    unet, names = tiny_pipe.unet, [u.name for u in anatomy_of(tiny_pipe.unet).units]
    before = dict(unet.named_modules())
    with removed(unet, names):
        assert len(dict(unet.named_modules())) < len(before)
    assert dict(unet.named_modules()) == before


def test_names_of_another_model_are_refused(tiny_pipe) -> None:
    with pytest.raises(BadInput, match="made for another model"):
        check_names(tiny_pipe.unet, ["down_blocks.7.resnets.0"], "plan.json")
