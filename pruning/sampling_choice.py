"""Choose how a model draws: flags and recipe > its folder > its configs > defaults.

Configs decide where the scheduler is of a consistency model (LCM, TCD) and where the U-Net embeds
the guidance scale. Trailing timesteps or a name such as "turbo" are signs only: they are reported,
and decide nothing.
"""

import functools
import inspect
import re
from pathlib import Path
from typing import TYPE_CHECKING

from laptop.console import say
from laptop.errors import BadInput
from laptop.files import reason, shown
from laptop.models import component_classes, locating
from laptop.models.component_classes import Config
from laptop.models.config_values import SchedulerValues
from laptop.models.description import Description, describe
from laptop.models.shapes import Size
from laptop.pruning.sampling_config import (
    FILE,
    TRAINED,
    Sampling,
    SamplingConfig,
    read_file,
)
from laptop.records import checked

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, SchedulerMixin

STEPS = 25  # unless something else sets them
CONSISTENCY = {"LCMScheduler": 4, "TCDScheduler": 4}  # steps that their documentation uses
GUIDANCE = {  # defaults of diffusers' pipelines; the others have none
    "StableDiffusionPipeline": 7.5,
    "StableDiffusionXLPipeline": 5.0,
    "LatentConsistencyModelPipeline": 8.5,
    "StableDiffusionImg2ImgPipeline": 7.5,
    "StableDiffusionXLImg2ImgPipeline": 5.0,
    "StableDiffusionInpaintPipeline": 7.5,
    "StableDiffusionXLInpaintPipeline": 7.5,
}
EMBEDS = "LatentConsistencyModelPipeline"  # never guides by a second row
NAMES = re.compile(r"(?<![a-z])(turbo|lightning|hyper|lcm|tcd|dmd2?|flash|\d-?steps?)(?![a-z])")


def choose_sampling(
    model: str,
    config: SamplingConfig | None = None,
    *others: str,
    steps: int | None = None,
    default: int = STEPS,
    most: int | None = None,
    resolution: int | None = None,
) -> Sampling:
    """The sampling of `model`, with everything filled in and checked; reads configs only.

    `others` are models that draw with it, such as its student: their folders count, too. `steps`
    and `resolution` (pixels a side) are a stage's own keys, which go first; without such a key a
    stage takes at most `most` steps, and `default` if nothing else sets them. Raises `BadInput`
    for what the model cannot draw with. Says on stderr, once, what is only guessed.
    """
    described = describe(model)
    stated = of_folders(config or SamplingConfig(), model, *others)
    settled = stated.over(_of_configs(described, stated))
    if steps is None:
        steps = settled.steps or default
        steps = min(steps, most or steps)
    guidance = settled.guidance
    height, width = (resolution or side for side in (settled.height, settled.width))
    sampling = Sampling(
        steps,
        guidance,
        rows_each(described, guidance),
        *picture_size(described, height, width),
        settled.scheduler,
        settled.scheduler_options,
    )
    if described.scheduler:
        _try(make_scheduler(described.scheduler, sampling), steps)
    if stated.steps is None and stated.guidance is None:
        _warn(model, described, settled)
    return sampling


def settle(model: str, config: SamplingConfig | None = None, *others: str) -> SamplingConfig:
    """The settings of flags, recipe, folders and configs; None for what is left to defaults."""
    stated = of_folders(config or SamplingConfig(), model, *others)
    return stated.over(_of_configs(describe(model), stated))


def of_folders(config: SamplingConfig, *names: str) -> SamplingConfig:
    """`config`, completed by what the folders of these models state.

    Raises `BadInput` where two folders state different things that `config` does not decide.
    """
    first: SamplingConfig = SamplingConfig()
    for name in names:
        other = _of_folder(name)
        for key, value in other.stated.items():
            before = first.stated.get(key, value)
            if before != value and key not in config.stated:
                raise BadInput(
                    f"{', '.join(names)} state different [sampling] {key}: {shown(before)} and "
                    f"{shown(value)}. Choose one in the recipe"
                    f"{FLAGS.get(key, '')}, for they draw together."
                )
        first = first.over(other)
    return config.over(first)


FLAGS = {"steps": " or by --sampling-steps", "guidance": " or by --guidance"}


def _of_folder(model: str) -> SamplingConfig:
    if locating.random_name(model):
        return SamplingConfig()
    path = locating.find_file(locating.locate(model), FILE)
    return read_file(path) if path else SamplingConfig()


def _of_configs(described: Description, stated: SamplingConfig) -> SamplingConfig:
    """The settings of the configs: steps of consistency models, and the pipeline's guidance."""
    scheduler = stated.scheduler or described.scheduler.get("_class_name", "")
    steps = CONSISTENCY.get(scheduler)
    guidance = GUIDANCE.get(described.pipeline)
    if steps and guidance is not None and not _embeds_guidance(described):
        guidance = 1.0  # they were distilled with it
    if described.pipeline == EMBEDS:
        steps = steps or CONSISTENCY["LCMScheduler"]
    return SamplingConfig(steps=steps, guidance=guidance)


def _embeds_guidance(described: Description) -> bool:
    return bool(described.unet.get("time_cond_proj_dim"))


def rows_each(described: Description, guidance: float | None) -> int:
    """Rows of the U-Net's batch for one picture: 2 with classifier-free guidance, else 1."""
    is_embedded = described.pipeline == EMBEDS or _embeds_guidance(described)
    return 1 if guidance is None or guidance <= 1 or is_embedded else 2


def picture_size(described: Description, height: int | None, width: int | None) -> Size:
    """Height and width in pixels, the model's own where None.

    Raises `BadInput` for pictures that do not come down to whole latents on every level.
    """
    native = described.latents.picture_size
    size = height or native[0], width or native[1]
    if size == native:
        return native
    if component_classes.TASKS[described.pipeline] == "unconditional":
        raise BadInput(
            f"an unconditional model draws one size only, {native[0]} x {native[1]} pixels: leave "
            "--resolution, height and width out."
        )
    if min(size) < 1 or any(side % described.multiple for side in size):
        asked = f"{size[0]}" if size[0] == size[1] else f"{size[0]} x {size[1]}"
        raise BadInput(
            f"resolution {asked} does not fit this model: it must be a multiple of "
            f"{described.multiple} pixels."
        )
    return size


def make_scheduler(own: Config, sampling: Sampling) -> "SchedulerMixin":
    """The scheduler of `sampling`, on the noise schedule of the model's own config.

    Raises `BadInput` for an option that its class lacks, and for a class that cannot have the
    model's schedule.
    """
    import diffusers

    name = sampling.scheduler or own["_class_name"]
    cls = getattr(diffusers, name)
    parameters = inspect.signature(cls.__init__).parameters
    options = [k for k in parameters if k not in ("self", *TRAINED)]
    for key, value in sampling.scheduler_options.items():
        if key not in options:
            raise BadInput(
                f"[sampling] scheduler_options has {shown(key)}, which {name} lacks; known are "
                f"{', '.join(options)}."
            )
        _check_option(key, value, parameters[key].default)
    checked(
        sampling.scheduler_options, SchedulerValues, "[sampling] scheduler_options", "Change it."
    )
    learns, own_learns = (_learns(c) for c in (sampling.scheduler_options, own))
    if learns and not own_learns:
        raise BadInput(
            "[sampling] scheduler_options: variance_type is for a U-Net that learned a variance, "
            "which this one did not. Leave it out."
        )
    trained = [key for key in TRAINED if own.get(key) not in (None, False, "discrete")]
    if lost := [key for key in trained if key not in parameters]:
        raise BadInput(
            f"[sampling] scheduler {name} cannot have the model's {', '.join(lost)}, which it was "
            f"trained with. Choose another one, or leave it out for {own['_class_name']}."
        )
    # diffusers takes the other class's defaults for what a file leaves out; not for the training's
    left_out = [key for key in own.get("_use_default_values", ()) if key not in TRAINED]
    config = {**own, "_use_default_values": left_out}
    try:
        return cls.from_config(config, **sampling.scheduler_options)
    except ImportError as e:
        raise BadInput(f"{name} needs a library that is not installed: {reason(e)}") from None
    except (ArithmeticError, RuntimeError, TypeError, ValueError) as e:
        raise BadInput(f"[sampling] {name} does not take its options: {reason(e)}") from None


def _check_option(key: str, value: object, default: object) -> None:
    """Raise `BadInput` unless an option is of the type of its default."""
    if default is None or default is inspect.Parameter.empty:
        return
    kind = (int, float) if isinstance(default, float) else type(default)
    if not isinstance(value, kind) or (isinstance(value, bool) and not isinstance(default, bool)):
        raise BadInput(
            f"[sampling] scheduler_options: {key} is {shown(value)}; needed is a "
            f"{type(default).__name__}, such as {default!r}."
        )


def _learns(scheduler: Config) -> bool:
    """Whether a scheduler's config states that the U-Net predicts a variance, too."""
    return str(scheduler.get("variance_type")).startswith("learned")


def _try(scheduler: "SchedulerMixin", steps: int) -> None:
    """Raise `BadInput` unless the scheduler can draw in `steps` steps."""
    import torch

    sample = torch.ones(1, 1, 8, 8)
    output = torch.zeros(1, 1 + _learns(scheduler.config), 8, 8)
    try:
        with torch.random.fork_rng(devices=[]):  # some draw noise in a step
            scheduler.set_timesteps(steps)
            sample *= float(scheduler.init_noise_sigma)
            for time in scheduler.timesteps:
                scheduler.scale_model_input(sample, time)
                sample = scheduler.step(output, time, sample).prev_sample
        if not sample.isfinite().all():
            raise ValueError("what it draws is not finite, by its noise schedule")
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as e:
        raise BadInput(
            f"{type(scheduler).__name__} does not draw in {steps} steps ({reason(e)}). Change "
            "[sampling] steps (--sampling-steps) or scheduler_options, or the model's own "
            "scheduler_config.json."
        ) from None


def set_scheduler_(pipe: "DiffusionPipeline", sampling: Sampling) -> None:
    """Give a pipeline the scheduler that `sampling` names, if any."""
    if sampling.scheduler or sampling.scheduler_options:
        own = {"_class_name": type(pipe.scheduler).__name__, **pipe.scheduler.config}
        pipe.scheduler = make_scheduler(own, sampling)


def _warn(model: str, described: Description, settled: SamplingConfig) -> None:
    """Warn of a model that looks as if it drew in few steps, if nothing is set."""
    if signs := _signs(model, described):
        steps = settled.steps or f"{STEPS} (each stage's default)"
        guidance = "none" if settled.guidance is None else f"{settled.guidance:g}"
        _say_once(
            f"warning: {model} looks like a few-step model ({', '.join(signs)}), and nothing sets "
            f"how it draws. Taken are steps {steps}, guidance {guidance}. Set [sampling] steps and "
            "guidance in the recipe, or --sampling-steps and --guidance."
        )


def _signs(model: str, described: Description) -> list[str]:
    """The signs that a model draws in few steps."""
    scheduler = described.scheduler
    name = scheduler.get("_class_name", "")
    signs = [f"its scheduler is {name}"] if name in CONSISTENCY else []
    # with a schedule that ends in pure noise, models of many steps have trailing timesteps, too
    is_trailing = scheduler.get("timestep_spacing") == "trailing"
    if is_trailing and not scheduler.get("rescale_betas_zero_snr"):
        signs.append("its timesteps are trailing")
    if _embeds_guidance(described):
        signs.append("its U-Net embeds the guidance scale")
    for text in (Path(model).name, Path(str(described.unet.get("_name_or_path") or "")).name):
        if match := NAMES.search(text.lower()):
            signs.append(f"its name has {match[0]!r}")
            break
    return signs


@functools.cache
def _say_once(message: str) -> None:
    say(message)
