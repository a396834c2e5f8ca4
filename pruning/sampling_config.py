"""Settings of drawing: the table `[sampling]` of a recipe, and a file in a student's folder.

    [sampling]
    steps = 4
    guidance = 0.0
    scheduler = "LCMScheduler"
    scheduler_options = {original_inference_steps = 50}

Every stage that draws takes a `SamplingConfig`; `sampling_choice` fills in what it leaves out.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated

from laptop.errors import BadInput
from laptop.fields import OneOf, Pixels, Range, Steps, check_fields
from laptop.files import read_json, shown, write_json

SCHEMA = "laptop.sampling/1"
FILE = "laptop_sampling.json"  # in a model's folder
MOST_OPTION = 1e4  # of a scheduler's numbers; some make lists as long
SCHEDULERS = (  # of diffusers, that Stable Diffusion's pipelines take; nothing else is imported
    "DDIMScheduler", "DDPMScheduler", "DEISMultistepScheduler", "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler", "EDMDPMSolverMultistepScheduler", "EDMEulerScheduler",
    "EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler", "LCMScheduler",
    "LMSDiscreteScheduler", "PNDMScheduler", "TCDScheduler", "UniPCMultistepScheduler",
)  # fmt: skip
TRAINED = (  # keys of a scheduler's config that belong to the training: sampling cannot change them
    "beta_end", "beta_schedule", "beta_start", "num_train_timesteps", "prediction_type",
    "rescale_betas_zero_snr", "sigma_data", "timestep_type", "trained_betas", "use_flow_sigmas",
)  # fmt: skip


@dataclass(frozen=True)
class SamplingConfig:
    """Settings of drawing; None leaves one to the model's folder and configs.

    Raises `BadInput` for a value out of its range and for an unknown scheduler.
    """

    steps: Steps | None = None  # denoising steps of a picture
    # classifier-free guidance scale; 1 or less: no guidance
    guidance: Annotated[float, Range(0, 100)] | None = None
    scheduler: Annotated[str, OneOf(*SCHEDULERS)] | None = None  # instead of the model's own
    # changes of the scheduler's config, such as timestep_spacing = "trailing"
    scheduler_options: Mapping[str, object] = field(default_factory=dict)
    height: Pixels | None = None  # pixels of a picture; None: the model's own
    width: Pixels | None = None  # pixels of a picture; None: the model's own

    def __post_init__(self) -> None:
        check_fields(self, "sampling")
        for name, value in self.scheduler_options.items():
            _check_option(name, value)
            if name in TRAINED:
                raise BadInput(
                    f"[sampling] scheduler_options has {name}, which says what the model was "
                    "trained with, so sampling cannot change it. Leave it out."
                )

    def over(self, other: "SamplingConfig") -> "SamplingConfig":
        """These settings, completed by those of `other`.

        The options of a scheduler go with its name.
        """
        ours, theirs = vars(self), vars(other)
        merged = {k: theirs[k] if v is None else v for k, v in ours.items()}
        if self.scheduler is None and not self.scheduler_options:
            merged["scheduler_options"] = other.scheduler_options
        elif self.scheduler is None:
            merged["scheduler_options"] = {**other.scheduler_options, **self.scheduler_options}
        return SamplingConfig(**merged)

    @property
    def stated(self) -> dict[str, object]:
        """The settings that are not left to the model."""
        return {k: v for k, v in asdict(self).items() if v not in (None, {})}


@dataclass(frozen=True)
class Sampling:
    """A `SamplingConfig` with everything filled in."""

    steps: int  # denoising steps of a picture
    guidance: float | None = None  # None: the pipeline's default, or it has none
    rows: int = 2  # of the U-Net's batch for one picture: 2 with classifier-free guidance, else 1
    height: int | None = None  # pixels; None: the model's own
    width: int | None = None
    scheduler: str | None = None  # None: the model's own
    scheduler_options: Mapping[str, object] = field(default_factory=dict)

    def with_resolution(self, resolution: int | None) -> "Sampling":
        """This sampling with squares of `resolution` pixels a side; unchanged where None."""
        return self if resolution is None else replace(self, height=resolution, width=resolution)

    @property
    def arguments(self) -> dict[str, float]:
        """Steps and guidance as keyword arguments of a diffusers pipeline."""
        guided: dict[str, float] = (
            {} if self.guidance is None else {"guidance_scale": self.guidance}
        )
        return {"num_inference_steps": self.steps, **guided}


def _check_option(name: str, value: object) -> None:
    """Raise `BadInput` unless an option is a word, a number of usual size, or true or false."""
    is_number = isinstance(value, int | float) and abs(value) <= MOST_OPTION  # NaN is not
    if not is_number and not isinstance(value, str):
        raise BadInput(
            f"[sampling] scheduler_options: {shown(name)} is {shown(value)}; needed is a word, "
            f"true, false, or a number of at most {MOST_OPTION:g}."
        )


def write_file(folder: Path, config: SamplingConfig) -> None:
    """Write the stated settings into a model's folder; no file if there are none."""
    if config.stated:
        write_json(folder / FILE, {"schema": SCHEMA, **config.stated})


def read_file(path: Path) -> SamplingConfig:
    """The settings in a file of `write_file`; `BadInput` for another file."""
    values = read_json(path, SCHEMA)
    del values["schema"]
    return of_values(values, str(path))


def of_values(values: object, where: str) -> SamplingConfig:
    """The settings in a file's values; `BadInput`, which names `where`, for a wrong one."""
    keys = [f.name for f in fields(SamplingConfig)]
    if not isinstance(values, Mapping):
        raise BadInput(f"{where} is no object but {shown(values)}.")
    if unknown := [name for name in values if name not in keys]:
        raise BadInput(f"{where} has {shown(unknown[0])}; known are {', '.join(keys)}.")
    try:
        return SamplingConfig(**values)
    except BadInput as e:
        raise BadInput(f"{where}: {e}") from None
