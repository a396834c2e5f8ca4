"""The interface of every device: it is probed, says how hot it is, and times workloads.

A `Device` makes a `Meter` of each `Workload`; `latency/bench.py` decides which meter runs when, and
knows no more of devices than this.
"""

import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Protocol

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
    """One component in one runtime, to be timed."""

    label: str  # of the model
    component: str
    runtime: str  # onnxruntime, executorch, tensorrt, pytorch; with a provider: onnxruntime:cuda
    target: str  # the folder of the artifact, with its precision: onnx, onnx-fp16; pytorch
    source: str  # what is opened: a model's name or folder, an artifact's file
    shapes: Shapes  # of the inputs
    precision: str = "fp32"  # of the artifact
    threads: int = 1
    seed: int = 0  # of the inputs' values
    pixels_per_latent: int | None = None  # of a side; None: not known
    params: int | None = None  # as the artifact's list says
    loader: str | None = None  # `module:function` that loads the source; None: the runtime's own

    @property
    def artifact(self) -> Path | None:
        """The component's file or folder; None for one in the Hub's cache."""
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
        """Height and width in pixels of the pictures behind the inputs; None: not known."""
        sides = (self.shapes.get("latent_sample") or self.shapes.get("sample") or ())[2:]
        scale = 1 if self.component == "vae_encoder" else self.pixels_per_latent
        return tuple(side * scale for side in sides) if sides and scale else None


@dataclass(frozen=True, kw_only=True)
class Placed(Record):
    """The part of a program that runs on one kind of processor."""

    operations: Portion
    cost: Portion  # of the estimated cost of all operations


@dataclass(frozen=True)
class Ready(Record):
    """The times of loading a workload and of its first run; None: the runtime does not say."""

    cold_s: AtLeast0 | None  # the first load, if possible without the files in the page cache
    warm_s: AtLeast0 | None  # the second one
    first_ms: AtLeast0 | None  # the first inference
    params: int | None = None
    precision: str | None = None  # of the computation, if not the workload's
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
    """One loaded, warmed-up workload."""

    ready: Ready

    def run_round(self, iterations: int, seconds: float) -> Round:
        """Run at least `iterations` inferences, which take at least `seconds` together."""

    def stop(self) -> int | None:
        """End the workload; returns its peak memory in bytes, None where it is not known."""


@dataclass(frozen=True)
class Heat(Record):
    """The temperature of a device, and `why` a measurement should wait; None if it is ready."""

    why: str | None = None
    temperature_c: Celsius | None = None


@dataclass(frozen=True)
class Facts(Record):
    """Facts about a device: its name, its system, what it can run; None: it does not say."""

    name: str  # the board's or processor's
    os: str
    runtimes: Mapping[str, str]  # versions of what can run artifacts there, by runtime
    power_mode: str | None = None
    free_memory_bytes: int | None = None
    free_disk_bytes: int | None = None
    state: str | None = None  # further words, such as a battery's
    cores: int | None = None
    how_to: str | None = None  # how to install a runtime there; None: by pip
    accelerator: str | None = None  # the GPU's name


class Device(Protocol):
    """A place where latency is measured."""

    refused: ClassVar[tuple[str, ...]] = ()  # targets that cannot be timed there

    @property
    def address(self) -> str:
        """The address, such as `local`, `ssh://orin`, `adb://0123`, `ios://UDID`."""

    def check_settings(self) -> None:
        """Raise `BadInput` if a setting that measuring there needs is missing."""
        return

    def probe(self) -> Facts:
        """The facts about the device; `LaptopError` if it cannot be reached."""

    def heat(self) -> Heat:
        """The heat now; a device that does not say counts as cool."""
        return Heat()

    def has(self, workload: Workload) -> bool:
        """Whether the device holds the workload's files, whole."""
        return False

    def meter(
        self, workload: Workload, warmup_iterations: int, warmup_s: float
    ) -> AbstractContextManager[Meter]:
        """Send what is needed, load twice, run once, warm up. `LaptopError` where it fails."""


def wait_until_cool(device: Device, most_s: float, pause_s: float = 5) -> str | None:
    """Wait for a hot device, at most `most_s`; returns why it is not ready even then, else None."""
    end = time.monotonic() + most_s
    last = None
    while (why := device.heat().why) and time.monotonic() < end:
        if why != last:
            say(f"bench: {device.address} is not ready ({why}); waiting, at most {most_s:g} s")
        last = why
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
        if sizes := [p.stat().st_size for p in files if p.suffix in kinds]:
            return sum(sizes)
    return 0
