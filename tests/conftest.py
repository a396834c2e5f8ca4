"""Small real models that the tests share."""

from pathlib import Path

import pytest
from diffusers import StableDiffusionXLPipeline

from laptop import models
from laptop.tiny import architecture

REMOVED = [
    "down_blocks.0.resnets.1",
    "up_blocks.0.resnets.1",
    "up_blocks.1.attentions.0.transformer_blocks.0",
]


@pytest.fixture(scope="session")
def tiny_pipe() -> StableDiffusionXLPipeline:
    """An untrained `tiny-sdxl`; do not change it."""
    return architecture.pipeline(0)


@pytest.fixture(scope="session")
def tiny_folder(
    tiny_pipe: StableDiffusionXLPipeline, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The untrained `tiny-sdxl` as a diffusers folder; do not change it."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def pruned_folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with three layers removed, in the shipped class; do not change it."""
    pipe = models.load_pipeline(str(tiny_folder))
    unet = models.shipped_class(pipe.unet).from_config(pipe.unet.config, removed=REMOVED)
    weights = pipe.unet.state_dict()
    unet.load_state_dict({name: weights[name] for name in unet.state_dict()})
    pipe.register_modules(unet=unet)
    folder = tmp_path_factory.mktemp("models") / "pruned"
    pipe.save_pretrained(folder)
    return folder
