"""What scores.json, plan.json and latency tables hold: types, checked when one is read."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, NotRequired, TypedDict

from laptop.fields import Length, Name, Range, Samples

SCHEMA = "laptop.plan/1"
Costs = Annotated[int, Range(0, 10**18)]  # parameters, multiply-accumulates
Size = Annotated[int, Range(1, 10**18)]
Milliseconds = Annotated[float, Range(0, below=86_400_000)]  # a day
Loss = Annotated[float, Range(-1e30, 1e30)]
Names = Annotated[list[Name], Length(1_000_000)]


class ScoredUnit(TypedDict):
    """A layer of a scores.json."""

    name: Name
    kind: Name
    params: Costs
    macs: Costs
    score: Loss
    needs: NotRequired[Names]


class Base(TypedDict):
    """The costs of a whole U-Net."""

    params: Size
    macs: Size


class Scores(TypedDict):
    """A scores.json."""

    model: Name
    units: Annotated[list[ScoredUnit], Length(1_000_000, least=1)]
    base: Base
    granularity: NotRequired[Name]
    criterion: NotRequired[Name]
    timestep_weighting: NotRequired[Name]
    dtype: NotRequired[Literal["float32", "bfloat16", "float16"]]
    batch_size: NotRequired[Samples]
    samples: NotRequired[Samples]
    race: NotRequired[Annotated[float, Range(above=0, below=1)] | None]
    seed: NotRequired[int]
    sampling: NotRequired[Mapping[str, Any]]


class Change(TypedDict):
    """A cost of a U-Net before and after pruning."""

    before: Size
    after: NotRequired[Costs]


class Times(TypedDict):
    """The latency of a U-Net before and after pruning."""

    before: Milliseconds
    after: Milliseconds


class Plan(TypedDict):
    """A plan.json; config and rename are those of a preset."""

    remove: Names
    params: Change
    model: NotRequired[Name]
    macs: NotRequired[Change]
    latency_ms: NotRequired[Times]
    budget: NotRequired[Mapping[str, Any]]
    preset: NotRequired[Name]
    config: NotRequired[Mapping[str, Any]]
    rename: NotRequired[dict[str, Name]]
    stock_config: NotRequired[bool]
    solver: NotRequired[Name | None]
    predicted_loss: NotRequired[Loss | None]
    measured_loss: NotRequired[Loss | None]
    one_shot_loss: NotRequired[Loss | None]
    unrestricted_predicted_loss: NotRequired[Loss | None]
    sampling: NotRequired[Mapping[str, Any]]


class TimedUnit(TypedDict):
    """What removing a layer saves of a forward."""

    name: Name
    latency_ms: Milliseconds
    kind: NotRequired[Name]
    params: NotRequired[Costs]


class Median(TypedDict):
    """The latency of a whole U-Net."""

    p50: Annotated[float, Range(above=0, below=86_400_000)]


class LatencyTable(TypedDict):
    """A latency table of `laptop bench MODEL --layers`."""

    units: list[TimedUnit]
    unet_ms: Median
    model: NotRequired[Name]
    granularity: NotRequired[Name]
    params: NotRequired[Size]
    valid: NotRequired[bool]
    invalid_reasons: NotRequired[list[str]]
