"""The class of a U-Net, and networks without weights, from their configs."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

from laptop.files import read_json
from laptop.models.component_classes import SHIPPED_UNETS

SHIPPED_CLASS = Path(__file__).parent / "laptop_unet_v1.py"


def empty_network(folder: Path, part: str, class_name: str) -> Any:
    """A component of a checked folder from its config alone, on the meta device."""
    import torch

    config = read_json(folder / part / "config.json")
    with torch.device("meta"):
        if part in ("unet", "vae"):
            return unet_class(config).from_config(config)
        import transformers
        from diffusers.pipelines.stable_diffusion import safety_checker

        if part == "safety_checker":
            parsed = transformers.CLIPConfig.from_dict(config)
            return safety_checker.StableDiffusionSafetyChecker(parsed)
        return getattr(transformers, class_name)(transformers.CLIPTextConfig.from_dict(config))


def shipped_module() -> Any:
    """`laptop_unet_v1.py`, imported under the name that diffusers records for its class."""
    name = SHIPPED_CLASS.stem
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, SHIPPED_CLASS)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def shipped_class(unet: Any) -> Any:
    """The class of a U-Net of `unet`'s kind without some of its layers."""
    name = type(unet).__name__
    return getattr(shipped_module(), name if name in SHIPPED_UNETS else f"Laptop{name}")


def unet_class(config: dict[str, Any]) -> Any:
    """The class that a U-Net's config names: of diffusers, or of the shipped file."""
    import diffusers

    name = config["_class_name"]
    return getattr(shipped_module() if name in SHIPPED_UNETS else diffusers, name)
