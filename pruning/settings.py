"""Settings of scoring, planning and pruning: the tables [score], [plan], [prune] of a recipe."""

from dataclasses import dataclass
from typing import Annotated

from laptop.errors import BadInput
from laptop.fields import (
    Length,
    Name,
    OneOf,
    Pixels,
    Range,
    Samples,
    Seed,
    Share,
    Steps,
    check_fields,
)

CRITERIA = (  # of `criteria`
    "output-loss", "task-loss", "block-influence", "magnitude", "taylor", "latent-statistics",
    "clip", "random",
)  # fmt: skip
WEIGHTINGS = ("none", "x0")  # of the timesteps
DTYPES = ("float32", "bfloat16", "float16")
OF_TASK = ("task-loss", "taylor")  # they need the targets of training
PER_ROW = ("output-loss", "task-loss", "block-influence")
GRANULARITIES = ("coarse", "fine", "sublayer")
HEALING = ("none", "affine")
EXPRESSIBLE = ("any", "stock", "comfyui")
DEFAULT_RATIO = 0.5  # if no budget is set
Budgeted = Annotated[int, Range(1, 10**18)]


@dataclass(frozen=True)
class ScoreConfig:
    """Settings of scoring; `BadInput` for values out of range and for ones that do not fit."""

    # what counts as a layer: whole transformers, their blocks, or attentions and feed-forwards
    granularity: Annotated[str, OneOf(*GRANULARITIES)] = "fine"
    criterion: Annotated[str, OneOf(*CRITERIA)] = "output-loss"  # how a layer is scored
    # weight of each calibration row; x0: by how much an output error changes the picture
    timestep_weighting: Annotated[str, OneOf(*WEIGHTINGS)] = "none"
    samples: Samples = 64  # calibration rows
    # denoising steps of the sampling that the rows come from; None: as [sampling] says, or 25
    steps: Steps | None = None
    batch_size: Samples = 4  # rows of one forward
    # precision of the U-Net while it is scored; losses are float32 in any case
    dtype: Annotated[str, OneOf(*DTYPES)] = "float32"
    # the one ratio to plan for: layers whose fate at it is certain get no more samples
    race: Annotated[float, Range(above=0, below=1)] | None = None
    # pixels a side of the pictures that are drawn for it; None: as [sampling] says
    resolution: Pixels | None = None
    clip_model: Name | None = None  # folder or Hub id of a CLIP model, for the criterion clip
    seed: Seed = 0  # seed of the noise and of the choice of the rows

    def __post_init__(self) -> None:
        check_fields(self, "score")
        if self.timestep_weighting != "none" and self.criterion not in PER_ROW:
            raise BadInput(
                f"criterion {self.criterion!r} has no value for each timestep, so there is nothing "
                f"to weigh; those that have are {', '.join(PER_ROW)}."
            )
        if self.race is not None and self.criterion not in PER_ROW:
            raise BadInput(
                f"a race by {self.criterion!r} is not possible: the criterion must be one of "
                f"{', '.join(PER_ROW)}."
            )
        if self.criterion == "clip" and self.clip_model is None:
            raise BadInput(
                "criterion 'clip' needs a CLIP model: set clip_model in the recipe's [score] to a "
                "folder or Hub id, such as openai/clip-vit-large-patch14."
            )


@dataclass(frozen=True)
class PlanConfig:
    """Budgets of the pruned U-Net; all of them must hold."""

    # share of the U-Net's parameters to remove, at least; 0.5 where no budget is set
    ratio: Share | None = None
    max_params: Budgeted | None = None  # parameters of the pruned U-Net, at most
    # bytes of the pruned U-Net's weights in the precision that the model is stored in, at most
    max_bytes: Budgeted | None = None
    # multiply-accumulates of one forward, batch 1, at the model's native size, at most
    max_macs: Budgeted | None = None
    # milliseconds of one forward, as the latency table counts it, at most
    max_latency_ms: Annotated[float, Range(above=0, most=10**9)] | None = None
    latency_table: Name | None = None  # the file that `laptop bench --layers` wrote
    # patterns of layers that stay, such as "mid_block.*"
    keep: Annotated[tuple[Name, ...], Length(10_000)] = ()
    # what must express the pruned U-Net; stock: a plain diffusers config; comfyui: one whose depths
    # ComfyUI detects, too
    expressible: Annotated[str, OneOf(*EXPRESSIBLE)] = "any"
    # sets of layers whose joint loss may be measured to improve the solver's plan
    refine: Annotated[int, Range(0, 1_000_000)] = 0

    def __post_init__(self) -> None:
        check_fields(self, "plan")


@dataclass(frozen=True)
class PruneConfig:
    """Settings of pruning."""

    # affine: fit a scale and a shift of each channel where layers are removed
    heal: Annotated[str, OneOf(*HEALING)] = "none"

    def __post_init__(self) -> None:
        check_fields(self, "prune")
