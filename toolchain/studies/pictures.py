"""Pictures of many prompts, as `laptop eval` draws them, for the studies."""

from collections.abc import Sequence

import numpy as np
from diffusers import DiffusionPipeline
from numpy.typing import NDArray

from laptop.benchmarks.quality import draw
from laptop.benchmarks.settings import EvalConfig
from laptop.pruning.sampling_config import Sampling


def draw_prompts(
    pipe: DiffusionPipeline, prompts: Sequence[str], sampling: Sampling
) -> list[NDArray[np.uint8]]:
    """Draw one picture (H, W, 3) for each prompt, in the batches and with the seed of [eval]."""
    config, pictures = EvalConfig(), []
    for first in range(0, len(prompts), config.batch):
        numbers = range(first, min(first + config.batch, len(prompts)))
        pictures += list(draw(pipe, prompts, numbers, sampling, config.seed)[0])
    return pictures
