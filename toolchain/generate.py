"""Draw one picture with a model, or with the ONNX artifacts of one."""

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from laptop.errors import BadInput, OutputExists
from laptop.models import loading, locating
from laptop.pruning.sampling_choice import STEPS, choose_sampling, set_scheduler_
from laptop.pruning.sampling_config import Sampling, SamplingConfig

MARK = ("Software", "laptop")  # in the PNG files that `generate` writes


def load(model: str, config: SamplingConfig) -> tuple[DiffusionPipeline, Sampling]:
    """Load the pipeline of a model, or of ONNX artifacts on ONNX Runtime, and its sampling.

    What `config` leaves out is as the model states it.
    """
    for folder in (Path(model), Path(model) / "onnx"):
        if (folder / "unet" / "model.onnx").is_file():
            return _load_artifacts(folder, config)
    locating.need_whole_chain(model, "generate")
    sampling = choose_sampling(model, config)
    return loading.load_pipeline(model, checked=True), sampling


def _load_artifacts(folder: Path, config: SamplingConfig) -> tuple[DiffusionPipeline, Sampling]:
    """Load ONNX artifacts and the sampling that their list states (in the folder or above it)."""
    from laptop.export.artifact_list import LIST, Artifacts
    from laptop.export.to_onnx import target as to_onnx  # needs the extra [onnx]

    for root in (folder, folder.parent):
        if (root / LIST).is_file():
            listed = Artifacts.read(root / LIST)
            config = config.over(listed.sampling_config)
            if config.height is None and (size := listed.picture_size):
                config = replace(config, height=size[0], width=size[1])
            break
    pipe = to_onnx.load_pipeline(folder)
    return pipe, Sampling(
        config.steps or STEPS,
        config.guidance,
        height=config.height,
        width=config.width,
        scheduler=config.scheduler,
        scheduler_options=config.scheduler_options,
    )


def generate(
    model: str, prompt: str, out: Path, *, steps: int | None, guidance: float | None, seed: int
) -> tuple[int, int]:
    """Draw a picture into a PNG file; returns its width and height in pixels.

    `steps` and `guidance` are the model's where None.
    """
    if out.suffix.lower() != ".png":
        raise BadInput(f"{out}: the picture is written as PNG; let the name end in .png.")
    _need_own(out)
    _need_writable(out.parent)
    pipe, sampling = load(model, SamplingConfig(steps, guidance))
    set_scheduler_(pipe, sampling)
    sides = {"height": sampling.height, "width": sampling.width}
    pixels = pipe(
        prompt,
        **sampling.arguments,
        **{name: side for name, side in sides.items() if side is not None},
        generator=torch.Generator().manual_seed(seed),
        output_type="np",
    ).images[0]
    if not np.isfinite(pixels).all():
        raise BadInput(
            f"{model} draws values that are not numbers. Its weights or its noise schedule are "
            "damaged; if it is stored in half precision, its VAE may need float32."
        )
    (image,) = VaeImageProcessor.numpy_to_pil(pixels)
    mark = PngInfo()
    mark.add_text(*MARK)
    out.unlink(missing_ok=True)  # a link is replaced, not followed
    image.save(out, pnginfo=mark)
    width, height = image.size
    return width, height


def _need_writable(folder: Path) -> None:
    """Make the folder of the picture; `BadInput` where nothing can be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as e:
        raise BadInput(f"cannot write to {folder}: {e.strerror}. Choose another -o.") from None


def _need_own(out: Path) -> None:
    """Raise `OutputExists` for a file that `generate` did not write."""
    if not out.exists():
        return
    try:
        with Image.open(out) as image:
            is_own = image.info.get(MARK[0]) == MARK[1]
    except OSError:
        is_own = False
    if not is_own:
        raise OutputExists(
            f"{out} exists and is no picture of `laptop generate`, so it is left alone. Choose "
            "another -o."
        )
