"""The embedded text-to-image model `tiny-sdxl`, the scenes it draws, and how it was trained."""

from pathlib import Path

MODEL_DIR = Path(__file__).parent / "model"  # a diffusers StableDiffusionXLPipeline folder, fp16
