"""A UNet2DConditionModel from which whole layers are gone; needs torch and diffusers only.

This file is shipped beside the weights of a pruned model and is the same for all of them: what is
removed stands in `config.json`, under "removed", as module paths. Load such a model with

    DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)

A removed ResnetBlock2D leaves its residual path (the identity, or its `conv_shortcut`), a removed
transformer block the identity. Every module that stays keeps its name.
"""

import inspect
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

NAME = "laptop_unet_v1"
SOURCE = Path(__file__)


class RemovedResnet(nn.Module):
    """What stays of a ResnetBlock2D: its residual path."""

    def __init__(self, resnet: ResnetBlock2D):
        super().__init__()
        if resnet.conv_shortcut is not None:
            self.conv_shortcut = resnet.conv_shortcut

    def forward(self, x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        return self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x


class RemovedBlock(nn.Module):
    """What stays of a BasicTransformerBlock: the identity, without parameters."""

    def forward(self, x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        return x


def stand_in(module: nn.Module) -> nn.Module:
    """What takes the place of `module` once it is removed; TypeError for what cannot be."""
    if isinstance(module, ResnetBlock2D):
        return RemovedResnet(module)
    if isinstance(module, BasicTransformerBlock):
        return RemovedBlock()
    raise TypeError(f"{type(module).__name__} is not a removable layer")


class LaptopUNet2DConditionModel(UNet2DConditionModel):  # type: ignore[misc]
    """Built from the teacher's config and `removed`, the module paths that are gone."""

    def __init__(self, *args: Any, removed: Sequence[str] = (), **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.register_to_config(removed=list(removed))
        for name in removed:
            self.set_submodule(name, stand_in(self.get_submodule(name)))

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """As the stock method, and put this file beside the weights."""
        super().save_pretrained(save_directory, *args, **kwargs)
        target = Path(save_directory) / f"{NAME}.py"
        if target.resolve() != SOURCE.resolve():
            shutil.copyfile(SOURCE, target)


# diffusers reads the config keys that a class takes off the signature of its __init__,
# and writes the name of a class's module into model_index.json.
_stock = inspect.signature(UNet2DConditionModel.__init__)
_removed = inspect.signature(LaptopUNet2DConditionModel.__init__).parameters["removed"]
setattr(  # noqa: B010 (an attribute that type checkers do not know)
    LaptopUNet2DConditionModel.__init__,
    "__signature__",
    _stock.replace(parameters=[*_stock.parameters.values(), _removed]),
)
LaptopUNet2DConditionModel.__module__ = NAME
