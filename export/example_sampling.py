"""How the model is sampled for an export, and what the artifacts' list says of how it draws."""

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
    """How the model draws, as far as it is stated; height and width are both there, or none is."""
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
    """Which prompts are sampled, and how: in more steps where ranges are to be seen."""
    onnx, size = config.onnx, config.resolution
    choose = partial(choose_sampling, model, sampling)
    first = choose(steps=config.steps, most=EXAMPLE_STEPS)
    precisions = {r.precision_of(name, config) for r in wanted for name in config.components}
    if CALIBRATED not in precisions:
        return prompts[:1], first.with_resolution(size)
    second = choose(steps=onnx.calibration_steps, most=RANGE_STEPS)
    more = max(first, second, key=lambda how: how.steps)
    return prompts[: onnx.calibration_prompts], more.with_resolution(size)
