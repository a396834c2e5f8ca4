"""plan.json and the menu of plans: the layers to remove, and what is left of the U-Net."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Self

from laptop.errors import BadInput
from laptop.fields import Name, Range
from laptop.models import mistakes
from laptop.pruning.scores import Cost, Loss, Names, WholeCost
from laptop.records import Record

Milliseconds = Annotated[float, Range(0, below=86_400_000)]  # a day


@dataclass(frozen=True, kw_only=True)
class CostChange(Record):
    """A cost of a U-Net before and after pruning."""

    before: WholeCost
    after: Cost


@dataclass(frozen=True, kw_only=True)
class LatencyChange(Record):
    """The latency of a U-Net before and after pruning, in ms."""

    before: Milliseconds
    after: Milliseconds


@dataclass(frozen=True, kw_only=True)
class Plan(Record):
    """A plan.json; `config` and `rename` are those of a preset."""

    SCHEMA = "laptop.plan/1"
    REMEDY = "Make the plan again."
    LEFT_OUT = frozenset(
        {"preset", "latency_ms", "one_shot_loss", "unrestricted_predicted_loss", "config", "rename"}
    )

    model: Name | None = None
    preset: Name | None = None
    budget: Mapping[str, object] = field(default_factory=dict)  # a PlanConfig, as it was set
    remove: Names  # module paths, in the order in which they run
    params: CostChange
    macs: CostChange | None = None
    stock_config: bool | None = None  # whether a plain diffusers config can say the student
    latency_ms: LatencyChange | None = None
    sampling: Mapping[str, object] = field(default_factory=dict)  # for the student's folder
    solver: Name | None = None
    measured_loss: Loss | None = None  # of removing all these layers together
    one_shot_loss: Loss | None = None  # measured, before refinement
    predicted_loss: Loss | None = None  # the sum of the layers' own
    unrestricted_predicted_loss: Loss | None = None  # of the plan without `expressible`
    config: Mapping[str, object] | None = None  # what the stock config changes in the teacher's
    rename: Mapping[str, Name] | None = None  # paths of modules in the student: in the teacher

    @classmethod
    def read(cls, path: Path) -> Self:
        """The plan in a file that `laptop plan` made; no folder."""
        if path.is_dir():
            raise BadInput(mistakes.refusal(path, "plan"))
        return super().read(path)


@dataclass(frozen=True, kw_only=True)
class MenuPoint(Record):
    """The best plan at a pruning ratio."""

    ratio: float  # removed share of the U-Net's parameters
    params: Cost  # that are left
    macs: Cost  # that are left, of a forward
    predicted_loss: Loss
    remove: Names


@dataclass(frozen=True, kw_only=True)
class Menu(Record):
    """The best plan at every hundredth of pruning ratio, which `laptop plan --menu` writes."""

    SCHEMA = "laptop.menu/1"

    model: Name
    points: tuple[MenuPoint, ...]
