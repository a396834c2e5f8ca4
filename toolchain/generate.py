"""Draw one picture with a model, or with the ONNX artifacts of one."""

from pathlib import Path
from typing import Any

import torch

from laptop import models
from laptop.errors import BadInput


def load(model: str) -> Any:
    """A pipeline from a model, or on ONNX Runtime from a folder that `laptop export` wrote."""
    for folder in (Path(model), Path(model) / "onnx"):
        if (folder / "unet" / "model.onnx").is_file():
            from laptop.export import to_onnx  # needs the extra [onnx]

            return to_onnx.load_pipeline(folder)
    models.need_whole_chain(model, "generate")
    return models.load_pipeline(model, checked=True)


def generate(
    model: str, prompt: str, out: Path, *, steps: int, guidance: float, seed: int
) -> tuple[int, int]:
    """Write the picture as a PNG file; returns its width and height in pixels."""
    if out.suffix.lower() != ".png":
        raise BadInput(f"{out}: the picture is written as PNG; let the name end in .png.")
    if steps < 1:
        raise BadInput(f"--steps {steps}: at least 1 is needed.")
    pipe = load(model)
    image = pipe(
        prompt,
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=torch.Generator().manual_seed(seed),
    ).images[0]
    out.parent.mkdir(parents=True, exist_ok=True)
    image.save(out)
    width, height = image.size
    return width, height
