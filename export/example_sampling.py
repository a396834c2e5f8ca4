"""The sampling that gives example inputs, and the one that the list of artifacts states."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from laptop.export.settings import ExportConfig
from laptop.export.targets import CALIBRATED, Request
from laptop.models.description import describe
from laptop.pruning.sampling_choice import choose_sampling, picture_size, settle
from laptop.pruning.sampling_config import Sampling, SamplingConfig

EXAMPLE_STEPS, RANGE_STEPS = 2, 8  # at most, of the inputs and of those for ranges


def settled_sampling(model: str, sampling: SamplingConfig | None) -> SamplingConfig:
    """The stated sampling of a model, with both height and width or with neither."""
    settled = settle(model, sampling)
    if not (settled.height or settled.width):
        return settled
    height, width = picture_size(describe(model), settled.height, settled.width)
    return replace(settled, height=height, width=width)


def example_sampling(
    model: str,
    config: ExportConfig,
    wanted: Sequence[Request],
    prompts: Sequence[str],
    sampling: SamplingConfig | None,
) -> tuple[Sequence[str], Sampling]:
    """The prompts to sample and their sampling, with more steps where ranges are calibrated."""
    onnx, size = config.onnx, config.resolution
    choose = partial(choose_sampling, model, sampling)
    first = choose(steps=config.steps, most=EXAMPLE_STEPS)
    precisions = {r.precision_of(name, config) for r in wanted for name in config.components}
    if CALIBRATED not in precisions:
        return prompts[:1], first.with_resolution(size)
    second = choose(steps=onnx.calibration_steps, most=RANGE_STEPS)
    more = max(first, second, key=lambda sampling: sampling.steps)
    return prompts[: onnx.calibration_prompts], more.with_resolution(size)
