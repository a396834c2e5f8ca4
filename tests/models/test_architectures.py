"""The published U-Nets have their published sizes (on the meta device)."""

import pytest

from laptop.models import loading
from laptop.models.architectures import UNETS

PARAMS = {
    "sd15": 859_520_964,
    "sd15-inpainting": 859_520_964 + 5 * 320 * 3 * 3,
    "lcm-sd15": 859_520_964 + 256 * 320,
    "sd21": 865_910_724,
    "sdxl": 2_567_463_684,
    "sdxl-refiner": 2_259_526_660,
    "ddpm-cifar10": 35_746_307,
}


@pytest.mark.parametrize("name", UNETS)
def test_a_published_unet_has_its_number_of_parameters(name: str) -> None:
    assert loading.empty_unet(f"random:{name}").num_parameters() == PARAMS[name]
