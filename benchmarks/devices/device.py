"""What times a component, wherever it runs: the interface that every device offers.

A `Device` is probed, tells how hot it is, and makes a `Meter` of each thing to be timed; the
protocol (`latency/bench.py`) says which meter runs when, and knows no more of devices than this.
"""

import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Protocol

from laptop.console import say
from laptop.fields import Range
from laptop.records import Record

Shapes = Mapping[str, tuple[int, ...]]
PACKAGE = ".mlpackage"  # Core ML's, a folder
AtLeast0 = Annotated[float, Range(0, 1e18)]
Portion = Annotated[float, Range(0, 1)]
Celsius = Annotated[float, Range(-300, 10_000)]


@dataclass(frozen=True)
class Workload:
    """One thing to time."""

    label: str
    component: str
    runtime: str  # onnxruntime, executorch, tensorrt, pytorch; with a provider: onnxruntime:cuda
    target: str  # the folder of the artifact, with its precision: onnx, onnx-fp16; pytorch
    source: str  # what is opened: a model's name or folder, an artifact's file
    shapes: Shapes  # of its inputs
    precision: str = "fp32"  # of the artifact
    threads: int = 1
    seed: int = 0  # of the inputs' values
    settings: Mapping[str, Any] = field(default_factory=dict)  # what else the loader needs
    pixels_per_latent: int | None = None  # of a side; None: not known
    params: int | None = None  # as the artifact's list says

    @property
    def artifact(self) -> Path | None:
        """The component's file or folder; None when it lies in the Hub's cache."""
        source = Path(self.source)
        if source.suffix == PACKAGE:
            return source
        if source.is_dir():
            return source / ("vae" if self.component.startswith("vae_") else self.component)
        if not source.is_file():
            return None
        return source.parent if source.name == "model.onnx" else source

    @property
    def resolution(self) -> tuple[int, ...] | None:
        """Height and width in pixels of the pictures that the inputs are of; None: not known."""
        sides = (self.shapes.get("latent_sample") or self.shapes.get("sample") or ())[2:]
        scale = 1 if self.component == "vae_encoder" else self.pixels_per_latent
        return tuple(side * scale for side in sides) if sides and scale else None


@dataclass(frozen=True, kw_only=True)
class Placed(Record):
    """How much of a program runs on one kind of processor."""

    operations: Portion
    cost: Portion  # of the estimated cost of all operations


@dataclass(frozen=True)
class Ready(Record):
    """What a meter found before its first round; None: the runtime does not tell."""

    cold_s: AtLeast0 | None  # the first load, the files not in the page cache where that can be had
    warm_s: AtLeast0 | None  # the second one
    first_ms: AtLeast0 | None  # the first inference
    params: int | None = None
    precision: str | None = None  # of the computation, where it is not what the workload says
    placement: Mapping[str, Placed] | None = None  # by cpu, gpu, neural_engine


@dataclass(frozen=True, kw_only=True)
class DeviceState(Record):
    """The state of a device during a round; None: it does not say."""

    temperature_c: Celsius | None = None  # the hottest sensor, at the end
    throttled: str | None = None  # how the system says that it has slowed itself down
    others: AtLeast0 | None = None  # share of the processors' time that went to other processes
    power_w: AtLeast0 | None = None  # mean


@dataclass(frozen=True)
class Round(DeviceState):
    """One turn of a meter."""

    samples_ms: tuple[AtLeast0, ...]


class Meter(Protocol):
    """One loaded, warmed-up workload; a context manager that leaves nothing running."""

    ready: Ready

    def run_round(self, iterations: int, seconds: float) -> Round:
        """At least so many inferences, which take at least so long together."""

    def stop(self) -> int | None:
        """End it; its peak memory in bytes."""


@dataclass(frozen=True)
class Heat(Record):
    """How hot a device is: `why` it is too hot to begin, None when it is cool."""

    why: str | None = None
    temperature_c: Celsius | None = None


@dataclass(frozen=True)
class Facts(Record):
    """What a device is and can run; None: it does not say."""

    name: str  # the board's or processor's
    os: str
    runtimes: Mapping[str, str]  # versions of what can run artifacts there, by runtime
    power_mode: str | None = None
    free_memory_bytes: int | None = None
    free_disk_bytes: int | None = None
    state: str | None = None  # further words, such as a battery's
    cores: int | None = None
    how_to: str | None = None  # how a runtime comes there; None: by pip
    accelerator: str | None = None  # the GPU's name


class Device(Protocol):
    """Where latency is measured."""

    refused: ClassVar[tuple[str, ...]]  # targets that cannot be timed there

    @property
    def address(self) -> str:
        """`local`, `ssh://…`, `adb://…`, `ios://…`."""

    def probe(self) -> Facts:
        """What is there; `LaptopError` where it cannot be reached."""

    def heat(self) -> Heat:
        """How hot it is now."""

    def has(self, workload: Workload) -> bool:
        """Whether the workload's files lie there already, whole."""

    def meter(
        self, workload: Workload, warmup_iterations: int, warmup_s: float
    ) -> AbstractContextManager[Meter]:
        """Send what is needed, load twice, run once, warm up. `LaptopError` where it fails."""


def wait_until_cool(device: Device, most_s: float, pause_s: float = 5) -> str | None:
    """Wait for a device that is not ready, a bounded time; why it is not even then."""
    end = time.monotonic() + most_s
    said = None
    while (why := device.heat().why) and time.monotonic() < end:
        if why != said:
            say(f"bench: {device.address} is not ready ({why}); waiting, at most {most_s:g} s")
        said = why
        time.sleep(min(pause_s, max(0.0, end - time.monotonic())))
    return why


def size_bytes(artifact: Path) -> int:
    """The size of a component's float weights on disk (of an ONNX component with its graph)."""
    if artifact.is_file():
        return artifact.stat().st_size
    if artifact.suffix == PACKAGE:
        return sum(p.stat().st_size for p in artifact.rglob("*") if p.is_file())
    files = [p for p in artifact.iterdir() if p.is_file() and ".fp16." not in p.name]
    for kinds in ((".onnx", ".onnx_data", ".data"), (".safetensors",), (".bin",)):
        if found := [p.stat().st_size for p in files if p.suffix in kinds]:
            return sum(found)
    return 0
