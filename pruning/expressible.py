"""Pruned U-Nets as stock diffusers configs, and as the shipped class where no config fits.

A plain `UNet2DConditionModel` has a depth for each of its transformers, and can do without its mid
block or all but this one's first resnet. So a plan that removes only last blocks of transformers
needs no class of this package, as long as the model built from such a config has exactly the
surviving weights under their own names.
"""

from collections.abc import Sequence

import torch
from diffusers import ModelMixin, UNet2DConditionModel
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import nn

from laptop.models import unet_classes
from laptop.models.component_classes import Config


def stock_config(unet: UNet2DConditionModel, names: Sequence[str]) -> Config | None:
    """The stock config of `unet` without the layers `names`; None if there is none."""
    is_stock = type(unet) is UNet2DConditionModel
    if not is_stock or not all(_is_block(n) or n.startswith("mid_block.") for n in names):
        return None
    if not names:
        return dict(unet.config)
    down = _depths(unet, "down_blocks", names)
    mid = _left(unet.mid_block, "mid_block", names)
    if mid and not getattr(unet.down_blocks[-1], "attentions", None):
        down[-1] = mid[0]  # diffusers reads the mid block's depth there
    config = {
        **unet.config,
        "mid_block_type": _mid_type(unet, names),
        "transformer_layers_per_block": down,
        "reverse_transformer_layers_per_block": _depths(unet, "up_blocks", names),
    }
    survivors = set(without(unet, names).state_dict())
    return config if set(build(UNet2DConditionModel, config).state_dict()) == survivors else None


def _is_block(name: str) -> bool:
    return name.split(".")[-2] == "transformer_blocks"


def _mid_type(unet: UNet2DConditionModel, names: Sequence[str]) -> str | None:
    """The kind of mid block that is left: none, its first resnet, or the same."""
    if "mid_block.resnets.0" in names:
        return None
    if "mid_block.attentions.0" in names:
        return "UNetMidBlock2D"
    same: str | None = unet.config.mid_block_type
    return same


def _depths(unet: UNet2DConditionModel, path: str, names: Sequence[str]) -> list[list[int] | int]:
    """The depths of the transformers of each block at `path` once `names` are gone."""
    return [_left(block, f"{path}.{i}", names) or 1 for i, block in enumerate(getattr(unet, path))]


def _left(block: nn.Module, path: str, names: Sequence[str]) -> list[int]:
    """The number of blocks that each transformer of a U-Net's block keeps."""
    gone = set(names)
    return [
        sum(
            f"{path}.attentions.{j}.transformer_blocks.{k}" not in gone
            for k in range(len(transformer.transformer_blocks))
        )
        for j, transformer in enumerate(getattr(block, "attentions", None) or [])
        if isinstance(transformer, Transformer2DModel)  # not the bare attention of other blocks
    ]


def without(
    unet: UNet2DConditionModel, names: Sequence[str], healed: Sequence[str] = ()
) -> ModelMixin:
    """`unet` without `names` in the shipped class, without memory for its weights.

    The stand-ins of `healed` have parameters, like those that `unet` already has.
    """
    gone = [*unet.config.get("removed", []), *names]
    stay = [h for h in unet.config.get("healed", []) if not h.startswith(_inside(names))]
    config = {**unet.config, "removed": gone, "healed": [*stay, *healed]}
    return build(unet_classes.shipped_class(unet), config)


def _inside(names: Sequence[str]) -> tuple[str, ...]:
    """The prefixes of all module paths inside of `names`."""
    return tuple(f"{name}." for name in names)


def build(cls: type[ModelMixin], config: Config) -> ModelMixin:
    """A U-Net without memory for its weights, from every value in `config`."""
    # diffusers would ignore the values of the keys that this one lists
    values = {k: v for k, v in config.items() if k != "_use_default_values"}
    with torch.device("meta"):
        return cls.from_config(values)
