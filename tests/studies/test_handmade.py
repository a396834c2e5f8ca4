"""Hand-made plans meet a ratio with as few layers as their order needs, and keep what they must."""

import pytest

from laptop.models import loading
from laptop.models.description import context_length
from laptop.pruning.scores import Anatomy
from laptop.pruning.units import anatomy_of
from laptop.studies.handmade import FAMILIES, handmade


@pytest.fixture(scope="module")
def unet() -> Anatomy:
    return anatomy_of(loading.empty_unet("tiny-sdxl"), context_length("tiny-sdxl"))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.5, 0.7, 0.85])
def test_the_ratio_is_met_and_no_layer_is_superfluous(unet, family, ratio) -> None:
    names = handmade(family, unet.units, ratio, unet.params)
    gone = [u for u in unet.units if u.name in names]
    size, least = sum(u.params for u in gone), ratio * unet.params
    assert len(names) == len(set(names)) == len(gone)
    assert least <= size <= least + 0.01 * unet.params
    for unit in gone:
        assert set(unit.needs) <= set(names), "a shell goes after its blocks"
        assert size - unit.params < least or any(unit.name in u.needs for u in gone)


def test_a_family_names_every_layer(unet) -> None:
    for family in FAMILIES:
        assert len(handmade(family, unet.units, unet.largest_ratio, unet.params)) == 44


def test_families_are_their_authors_ideas(unet) -> None:
    bk, ssd, koala = (
        set(handmade(family, unet.units, 0.3, unet.params)) for family in ("bk", "ssd", "koala")
    )
    assert {"mid_block.resnets.0", "down_blocks.1.resnets.1", "up_blocks.1.resnets.1"} <= bk
    second = {u.name for u in unet.units if u.name.endswith("transformer_blocks.1")}
    assert len(second) == 5
    assert second <= ssd & koala
    assert not [n for n in ssd if n.endswith("transformer_blocks.0") and "mid" not in n]
