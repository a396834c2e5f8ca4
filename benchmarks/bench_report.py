"""The report of `laptop bench`: rows of components, whole images, and ratios of two models."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

from laptop.benchmarks.devices.device import DeviceState, Facts, Placed
from laptop.fields import Plain, Range
from laptop.records import UNFINISHED, Record

Amount = Annotated[float, Range(0, 1e18)]  # of parameters, bytes, operations
Ms = Annotated[float, Range(0, 1e9)]  # eleven days
Positive = Annotated[float, Range(above=0, most=1e9)]
Text = Annotated[str, Plain(empty=True)]
Side = Annotated[int, Range(0, 1 << 31)]  # of an input


@dataclass(frozen=True, kw_only=True)
class Spread(Record):
    """Percentiles of latencies in ms, their mean, standard deviation (n - 1) and variation."""

    p50: Ms
    p90: Ms
    p95: Ms | None = None
    p99: Ms
    mean: Ms
    stdev: Ms
    cv: Annotated[float, Range(0)]  # coefficient of variation: stdev / mean


@dataclass(frozen=True, kw_only=True)
class RowLatency(Spread):
    """The latencies of a component in ms."""

    first: Ms | None  # the first inference, which is not among the others


@dataclass(frozen=True, kw_only=True)
class LoadSeconds(Record):
    """The time in seconds that loading a component takes."""

    cold: Amount | None  # the first load of a process, its files out of the page cache
    warm: Amount | None  # the second


@dataclass(frozen=True, kw_only=True)
class BenchConditions(Record):
    """Everything that must be equal for two rows to be compared, but for device and precision."""

    batch: Side | None = None
    guidance: bool | None = None
    steps: int | None = None
    resolution: tuple[Side, ...] | None = None  # height and width in pixels; None: not known
    shapes: Mapping[str, tuple[Side, ...]] = field(default_factory=dict)  # of the inputs
    threads: int | None = None
    runtime_version: str | None = None
    os: str | None = None
    power_mode: str | None = None
    accelerator: str | None = None
    sustained_s: Amount | None = None
    cv_bound: Amount | None = None


@dataclass(frozen=True, kw_only=True)
class RoundRow(DeviceState):
    """A round of a row: how many inferences, and the state of the device at its end."""

    n: int


@dataclass(frozen=True, kw_only=True)
class Sustained(Record):
    """A sustained load by parts of about a minute."""

    p50_ms: tuple[Ms, ...]
    seconds: tuple[Amount, ...]
    temperature_c: tuple[float | None, ...]
    throttled: tuple[str | None, ...]
    last_over_first: Amount  # the median of the last part over that of the first


@dataclass(frozen=True, kw_only=True)
class BenchRow(Record):
    """The measurement of one component of a model in one runtime."""

    LEFT_OUT = frozenset({"placement", "sustained"})

    label: Text
    component: Text
    target: Text = ""  # the folder of the artifact; reports before 0.1.0 lack it
    artifact: Text = ""
    sha256: Text | None = None
    size_bytes: Amount | None = None
    params: int | None = None
    runtime: Text
    precision: Text
    device: Text
    conditions: BenchConditions
    n: Annotated[int, Range(0)]
    latency_ms: RowLatency
    load_s: LoadSeconds
    peak_memory_bytes: Amount | None
    power_w: Amount | None = None
    energy_j: Amount | None = None  # of an inference
    valid: bool
    invalid_reasons: tuple[Text, ...]
    samples_ms: tuple[Ms, ...] = ()
    rounds: tuple[RoundRow, ...] = ()
    placement: Mapping[str, Placed] | None = None
    sustained: Sustained | None = None


@dataclass(frozen=True, kw_only=True)
class ImageLatency(Record):
    """The time of a whole image in ms."""

    p50: Ms


@dataclass(frozen=True, kw_only=True)
class ImageRow(Record):
    """The time of a whole image, put together from the medians of its components."""

    label: Text
    runtime: Text
    target: Text = ""
    precision: Text = ""
    device: Text = ""
    steps: Annotated[int, Range(1)]
    guidance: bool | None = None
    latency_ms: ImageLatency
    parts_ms: Mapping[str, Ms] = field(default_factory=dict)  # by component
    parts: Mapping[str, Text] = field(default_factory=dict)  # the label that each was timed for
    energy_j: Amount | None = None
    valid: bool


@dataclass(frozen=True, kw_only=True)
class Ratio(Record):
    """A latency over another: the median over rounds, and its 95 % interval."""

    median: Positive
    low: Positive
    high: Positive


@dataclass(frozen=True, kw_only=True)
class RatioRow(Ratio):
    """The latency of model `b` over that of model `a`, in the same runtime."""

    component: Text
    runtime: Text
    target: Text = ""
    a: Text
    b: Text
    valid: bool = True


@dataclass(frozen=True, kw_only=True)
class BenchGroup(Record):
    """Rows that were timed in turns, and their ratios: what an interrupted bench keeps."""

    REMEDY = UNFINISHED

    results: tuple[BenchRow, ...]
    ratios: tuple[RatioRow, ...]


@dataclass(frozen=True, kw_only=True)
class ProbedDevice(Facts):
    """A device with its address, as it was before the measurement."""

    address: Text


@dataclass(frozen=True, kw_only=True)
class BenchReport(Record):
    """A report of `laptop bench`."""

    SCHEMA = "laptop.bench/1"
    REMEDY = "Measure again."

    device: ProbedDevice | None = None  # reports before 0.1.0 lack it
    results: tuple[BenchRow, ...]
    images: tuple[ImageRow, ...] = ()
    ratios: tuple[RatioRow, ...]

    @property
    def address(self) -> str:
        """The address of the device."""
        return self.device.address if self.device else "local"
