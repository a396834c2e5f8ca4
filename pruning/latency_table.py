"""The latency table: the time that removing each layer saves, measured on one machine.

Parameters and multiply-accumulates are poor guides to speed; `laptop bench MODEL --layers` measures
it (`laptop.benchmarks.latency.layers`), and the planner takes the times as one more cost. They are
whole nanoseconds, so that the solver adds integers as it does for every other cost.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Self

from laptop.console import say
from laptop.errors import BadInput
from laptop.fields import Name, Range
from laptop.files import shown
from laptop.pruning.plan_file import Milliseconds
from laptop.pruning.scores import Anatomy, WholeCost
from laptop.pruning.settings import PlanConfig
from laptop.records import Record

NS = 1e6  # in a millisecond


@dataclass(frozen=True, kw_only=True)
class TimedUnit(Record):
    """A layer, and the time that removing it saves in a forward."""

    name: Name
    latency_ms: Milliseconds


@dataclass(frozen=True, kw_only=True)
class ForwardTime(Record):
    """The latency of the whole U-Net: percentiles and spread, in ms but for `cv`."""

    LEFT_OUT = frozenset({"p90", "p95", "p99", "mean", "stdev", "cv"})

    p50: Annotated[float, Range(above=0, below=86_400_000)]
    p90: float | None = None
    p95: float | None = None
    p99: float | None = None
    mean: float | None = None
    stdev: float | None = None
    cv: float | None = None  # stdev / mean


@dataclass(frozen=True, kw_only=True)
class LatencyTable(Record):
    """The times of all layers, which `laptop bench MODEL --layers` writes."""

    SCHEMA = "laptop.latency-table/1"
    REMEDY = "Measure again."

    model: Name | None = None
    granularity: Name | None = None
    params: WholeCost | None = None  # of the whole U-Net
    runtime: Name | None = None
    precision: Name | None = None
    device: Name | None = None
    address: Name = "local"
    probe: Mapping[str, object] = field(default_factory=dict)  # facts of the device
    conditions: Mapping[str, object] = field(default_factory=dict)
    n: int | None = None  # samples
    unet_ms: ForwardTime
    without_layers: float | None = None  # a forward without all layers, as a share of a whole one
    units: tuple[TimedUnit, ...]
    valid: bool | None = None
    invalid_reasons: tuple[str, ...] = ()
    samples_ms: tuple[Milliseconds, ...] = ()

    @classmethod
    def read(cls, path: Path) -> Self:
        """The table in `path`, in which every layer has one time and all fit into a forward."""
        table = super().read(path)
        whole = table.unet_ms.p50
        if len(table.times_ms) != len(table.units):
            raise BadInput(f"{path} names a layer twice. Measure again.")
        if (total := math.fsum(table.times_ms.values())) > whole:
            raise BadInput(
                f"{path}: the layers take {total:.3f} ms together, the whole U-Net only "
                f"{whole:.3f} ms. What removing each layer saves must not add up to more. "
                "Measure again."
            )
        return table

    @property
    def times_ms(self) -> dict[str, float]:
        """The time that removing each layer saves, by name."""
        return {unit.name: unit.latency_ms for unit in self.units}

    def check_layers(self, anatomy: Anatomy, where: str) -> None:
        """Raise `BadInput` unless the table, read from `where`, is of the layers of `anatomy`."""
        names, times = {u.name for u in anatomy.units}, self.times_ms
        what = f"{where} is of {shown(self.model)} with granularity {shown(self.granularity)}"
        advice = "Make it from the scored model: laptop bench MODEL --layers --granularity G."
        if strange := sorted(names ^ times.keys()):
            raise BadInput(
                f"{what}, {len(times)} layers; here are {len(names)}, and {len(strange)} are only "
                f"in one of both, such as {shown(strange[0])}. {advice}"
            )
        if self.params not in (None, anatomy.params):
            raise BadInput(
                f"{what}, a U-Net of {self.params} parameters; this one has {anatomy.params}. "
                f"{advice}"
            )


def with_latencies(anatomy: Anatomy, config: PlanConfig) -> Anatomy:
    """`anatomy` with the times of the config's latency table, if it names one.

    Raises `BadInput` for a limit without a table or the reverse, and for a table that is broken or
    was made for other layers.
    """
    limit, table = config.max_latency_ms, config.latency_table
    if table is None:
        if limit is None:
            return anatomy
        raise BadInput(
            f"--max-latency-ms {limit:g} needs the time of each layer: pass --latency-table T, "
            "which `laptop bench MODEL --layers -o T` makes."
        )
    if limit is None:
        raise BadInput(
            f"--latency-table {table} is there without a limit: pass --max-latency-ms X too, or "
            "leave the table out."
        )
    return with_table(anatomy, Path(table))


def with_table(anatomy: Anatomy, path: Path) -> Anatomy:
    """`anatomy` with the times of the latency table in `path`."""
    table = LatencyTable.read(path)
    table.check_layers(anatomy, str(path))
    if table.invalid_reasons:
        reasons = shown(list(table.invalid_reasons))
        say(f"the times in {path} cannot be trusted: {reasons}. Measure again.")
    # rounded down: what layers save must not add up to more than there is
    ns = {name: math.floor(ms * NS) for name, ms in table.times_ms.items()}
    return replace(anatomy, latency_ns=round(table.unet_ms.p50 * NS), latencies_ns=ns)
