"""scores.json and the additivity report: the removable layers, their costs, what each is worth."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Self

from laptop.errors import BadInput
from laptop.fields import Length, Name, OneOf, Range, Samples
from laptop.models import mistakes
from laptop.pruning.settings import DTYPES
from laptop.records import Record

Cost = Annotated[int, Range(0, 10**18)]  # parameters, multiply-accumulates
WholeCost = Annotated[int, Range(1, 10**18)]
Loss = Annotated[float, Range(-1e30, 1e30)]
Names = Annotated[tuple[Name, ...], Length(1_000_000)]


@dataclass(frozen=True)
class Unit(Record):
    """One removable layer; `params` and `macs` are what removing it saves."""

    name: Name  # module path in the U-Net
    kind: Name  # such as resnet or transformer_block
    params: Cost
    macs: Cost  # multiply-accumulates of one forward, batch 1, at the model's native size
    needs: Names = ()  # removable only together with these


@dataclass(frozen=True)
class Anatomy:
    """The removable layers in the order in which they run, and the whole U-Net's cost."""

    units: Sequence[Unit]
    params: int
    macs: int
    macs_before: Mapping[str, int] = field(default_factory=dict)  # of all that runs before a unit
    latency_ns: int | None = None  # of a forward; from a latency table, where there is one
    latencies_ns: Mapping[str, int] = field(default_factory=dict)  # what removing a unit saves

    @property
    def largest_ratio(self) -> float:
        """The pruning ratio at which every removable layer is gone."""
        return sum(u.params for u in self.units) / self.params


@dataclass(frozen=True, kw_only=True)
class ScoredUnit(Unit):
    """A removable layer with what it is worth: the lowest go first."""

    score: Loss  # what removing it costs, by the criterion


@dataclass(frozen=True, kw_only=True)
class Costs(Record):
    """The costs of a whole U-Net."""

    params: WholeCost
    macs: WholeCost  # multiply-accumulates of one forward, batch 1, at the native size


@dataclass(frozen=True, kw_only=True)
class Forwards(Record):
    """The cost of scoring, in forwards of the U-Net."""

    naive: int  # a forward for each unit and one without any removed
    spent: float  # with prefix reuse, and without the forwards that a race spares


@dataclass(frozen=True, kw_only=True)
class Scores(Record):
    """A scores.json."""

    SCHEMA = "laptop.scores/1"
    REMEDY = "Score the model again."

    model: Name  # a known name, a folder or a Hub id
    granularity: Name = "fine"
    criterion: Name = "output-loss"
    timestep_weighting: Name = "none"
    race: Annotated[float, Range(above=0, below=1)] | None = None  # the one ratio to plan for
    samples: Samples | None = None  # calibration rows
    batch_size: Samples = 1  # rows of a forward
    dtype: Annotated[str, OneOf(*DTYPES)] = "float32"  # of the U-Net while it was scored
    seed: int = 0
    units: Annotated[tuple[ScoredUnit, ...], Length(1_000_000, least=1)]
    base: Costs
    forwards: Forwards | None = None
    sampling: Mapping[str, object] = field(default_factory=dict)  # for the student's folder

    @classmethod
    def read(cls, path: Path) -> Self:
        """The scores in a scores.json, or in the folder that `laptop score` made."""
        path = scores_file(path)
        scores = super().read(path)
        names = {unit.name for unit in scores.units}
        if len(names) < len(scores.units):
            raise BadInput(f"{path} names a layer twice. Score the model again.")
        for unit in scores.units:
            if not names.issuperset(unit.needs):
                raise BadInput(f"{path}: {unit.name} needs a layer that is not scored.")
        return scores

    @property
    def anatomy(self) -> Anatomy:
        """The scored layers with their costs."""
        return Anatomy(self.units, self.base.params, self.base.macs)

    def predicted_loss(self, names: Sequence[str]) -> float:
        """The sum of the own losses of the layers `names`."""
        gone = set(names)
        return float(sum(unit.score for unit in self.units if unit.name in gone))


def scores_file(path: Path) -> Path:
    """The scores.json that a path means: a file, or the folder that `laptop score` made."""
    if path.is_dir() and not (path / "scores.json").exists():
        raise BadInput(mistakes.refusal(path, "scores"))
    return path / "scores.json" if path.is_dir() else path


@dataclass(frozen=True, kw_only=True)
class LayerSet(Record):
    """A set of layers: the sum of their scores, and the output loss of removing them together."""

    ratio: float  # of the U-Net's parameters, which the set reaches
    remove: Names
    sum: float
    joint: float


@dataclass(frozen=True, kw_only=True)
class Agreement(Record):
    """Agreement of sums and joint losses; None for too few sets, or if all sums are equal."""

    pearson_log: float | None = None  # of logarithms
    spearman: float | None = None
    slope_log: float | None = None  # of logarithms; 1 where sums and joint losses are the same


@dataclass(frozen=True, kw_only=True)
class Additivity(Record):
    """The report on whether losses add up, which `laptop plan --additivity` writes."""

    SCHEMA = "laptop.additivity/1"

    model: Name
    criterion: Name
    all: Agreement  # of all sets
    by_ratio: Mapping[str, Agreement]  # of the sets of each ratio
    sets: tuple[LayerSet, ...]
