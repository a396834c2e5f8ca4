"""A diffusers U-Net from which whole layers are gone; needs torch and diffusers only.

This file is shipped with the weights of a pruned model and is the same for all of them: the removed
layers are in `config.json`, under "removed", as module paths. Load such a model with

    DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)

A removed ResnetBlock2D leaves its residual path (the identity, or its `conv_shortcut`), a removed
transformer or transformer block the identity, a removed attention or feed-forward inside of a block
nothing to add. Every module that stays keeps its name.

The stand-ins of the layers under "healed" replace a part of their effect, by scaling and shifting
each channel: x + scale x + shift, where `scale` and `shift` (C,) are parameters like all
others.
"""

import inspect
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.models.attention import BasicTransformerBlock, FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import nn

NAME = "laptop_unet_v1"
SUBLAYERS = {"attn1": "norm1", "attn2": "norm2", "ff": "norm3"}  # with the norms before them
SOURCE = Path(__file__)


class StandIn(nn.Module):
    """A stand-in for a removed layer; its output has `width` channels if healed, else None."""

    def __init__(self, width: int | None = None):
        super().__init__()
        self.scale = None if width is None else nn.Parameter(torch.zeros(width))
        self.shift = None if width is None else nn.Parameter(torch.zeros(width))

    def heal(self, x: torch.Tensor) -> torch.Tensor:
        """Add the correction of healing to `x` (B, C, H, W) or (B, T, C)."""
        return x if self.scale is None else x + self.added(x)

    def added(self, x: torch.Tensor) -> torch.Tensor:
        """The correction of healing for `x`; a single zero if there is none."""
        if self.scale is None or self.shift is None:
            return x.new_zeros(1)  # Core ML's converter takes no tensor without dimensions here
        shape = (-1, 1, 1) if x.ndim == 4 else (-1,)
        return x * self.scale.view(shape) + self.shift.view(shape)


class RemovedResnet(StandIn):
    """A removed ResnetBlock2D: its residual path."""

    def __init__(self, resnet: ResnetBlock2D, width: int | None = None):
        super().__init__(width)
        if resnet.conv_shortcut is not None:
            self.conv_shortcut = resnet.conv_shortcut

    def forward(self, x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        return self.heal(self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x)


class Identity(StandIn):
    """A removed BasicTransformerBlock, residual attention, or norm of a removed sublayer."""

    def forward(self, x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        return self.heal(x)


class RemovedTransformer(StandIn):
    """A removed Transformer2DModel: the identity."""

    def forward(
        self, x: torch.Tensor, *args: object, return_dict: bool = True, **kwargs: object
    ) -> tuple[torch.Tensor] | Transformer2DModelOutput:
        x = self.heal(x)
        return Transformer2DModelOutput(sample=x) if return_dict else (x,)


class RemovedSublayer(StandIn):
    """A removed attention or feed-forward, whose output its block adds: the correction of healing.

    `x` is the block's stream itself, for the norm before the sublayer is gone too.
    """

    def forward(self, x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        return self.added(x)


def stand_in(module: nn.Module, healed: bool = False) -> StandIn:
    """The stand-in of `module` once it is removed; TypeError for a layer that cannot be removed."""
    if isinstance(module, ResnetBlock2D):
        return RemovedResnet(module, module.out_channels if healed else None)
    if isinstance(module, Transformer2DModel):
        return RemovedTransformer(module.in_channels if healed else None)
    if isinstance(module, BasicTransformerBlock):
        return Identity(module.dim if healed else None)
    if isinstance(module, Attention):
        kind = Identity if module.residual_connection else RemovedSublayer
        return kind(module.query_dim if healed else None)
    if isinstance(module, FeedForward):
        return RemovedSublayer(module.net[2].out_features if healed else None)
    raise TypeError(f"{type(module).__name__} is not a removable layer")


def remove_(unet: nn.Module, name: str, healed: bool = False) -> list[tuple[str, nn.Module]]:
    """Put the layer's stand-in into `unet`; returns the replaced modules with their names.

    The norm before a sublayer goes with it.
    """
    replaced = [(name, unet.get_submodule(name))]
    unet.set_submodule(name, stand_in(replaced[0][1], healed))
    block, _, part = name.rpartition(".")
    if part in SUBLAYERS:
        norm = f"{block}.{SUBLAYERS[part]}"
        replaced.append((norm, unet.get_submodule(norm)))
        unet.set_submodule(norm, Identity())
    return replaced


def _constructor(stock: type[nn.Module]) -> Callable[..., None]:
    """The constructor of `stock` with two more config keys, lists of module paths.

    `removed` are gone; `healed` are those of them whose stand-ins have parameters. diffusers reads
    the config keys that a class takes off the signature of its `__init__`.
    """

    def __init__(
        self: Any,
        *args: Any,
        removed: Sequence[str] = (),
        healed: Sequence[str] = (),
        **kwargs: Any,
    ) -> None:
        stock.__init__(self, *args, **kwargs)
        self.register_to_config(removed=list(removed), healed=list(healed))
        for name in sorted(removed, key=len, reverse=True):  # what is inside first
            remove_(self, name, name in healed)

    ours = inspect.signature(__init__).parameters
    theirs = inspect.signature(stock.__init__)
    keys = [*theirs.parameters.values(), ours["removed"], ours["healed"]]
    vars(__init__)["__signature__"] = theirs.replace(parameters=keys)
    return __init__


class _Shipped:
    """Saving that puts this file into the model's folder."""

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """Save by the stock method, and put this file next to the weights."""
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        target = Path(save_directory) / f"{NAME}.py"
        if target.resolve() != SOURCE.resolve():
            shutil.copyfile(SOURCE, target)


class LaptopUNet2DConditionModel(_Shipped, UNet2DConditionModel):  # type: ignore[misc]
    """A text-conditional U-Net, built from its teacher's config, `removed` and `healed`."""

    __init__ = _constructor(UNet2DConditionModel)


class LaptopUNet2DModel(_Shipped, UNet2DModel):  # type: ignore[misc]
    """An unconditional U-Net, built from its teacher's config, `removed` and `healed`."""

    __init__ = _constructor(UNet2DModel)


for _class in (LaptopUNet2DConditionModel, LaptopUNet2DModel):
    _class.__module__ = NAME  # which diffusers writes into model_index.json
