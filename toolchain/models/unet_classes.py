"""The class of a U-Net, and networks without weights, from their configs."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from laptop.files import read_json
from laptop.models.component_classes import SHIPPED_UNETS, Config

if TYPE_CHECKING:
    from diffusers import ModelMixin
    from torch import nn

SHIPPED_CLASS = Path(__file__).parent / "laptop_unet_v1.py"


def empty_network(folder: Path, part: str, class_name: str) -> "nn.Module":
    """A component of a checked folder from its config alone, on the meta device."""
    import torch

    config = read_json(folder / part / "config.json")
    network: nn.Module
    with torch.device("meta"):
        if part in ("unet", "vae"):
            network = unet_class(config).from_config(config)
        elif part == "safety_checker":
            from diffusers.pipelines.stable_diffusion import safety_checker
            from transformers import CLIPConfig

            network = safety_checker.StableDiffusionSafetyChecker(CLIPConfig.from_dict(config))
        else:
            import transformers

            parsed = transformers.CLIPTextConfig.from_dict(config)
            network = getattr(transformers, class_name)(parsed)
    return network


def shipped_module() -> ModuleType:
    """`laptop_unet_v1.py`, imported under the name that diffusers records for its class."""
    name = SHIPPED_CLASS.stem
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, SHIPPED_CLASS)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def shipped_class(unet: "ModelMixin") -> "type[ModelMixin]":
    """The class of a U-Net of `unet`'s kind without some of its layers."""
    name = type(unet).__name__
    name = name if name in SHIPPED_UNETS else f"Laptop{name}"
    shipped: type[ModelMixin] = getattr(shipped_module(), name)
    return shipped


def unet_class(config: Config) -> "type[ModelMixin]":
    """The class that a U-Net's config names: of diffusers, or of the shipped file."""
    import diffusers

    name = config["_class_name"]
    named: type[ModelMixin] = getattr(
        shipped_module() if name in SHIPPED_UNETS else diffusers, name
    )
    return named
