"""Latency on an iPhone or iPad, from the Mac that it is connected to: `ios://UDID`.

coremltools builds an app of Apple's, signs it with the user's team, starts it on the device, and
asks it to load packages and to predict; the app tells how long each took, transfer left out. See
https://apple.github.io/coremltools/docs-guides/source/mlmodel-benchmarking.html (experimental).

No Mac was at hand: tests run coremltools' own classes against a stand-in of the app.
"""

import asyncio
import atexit
import functools
import math
import shutil
import sys
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from laptop.benchmarks.metering import Facts, Heat, Ready, Round, Workload
from laptop.errors import BadInput, LaptopError, MissingExtra, Unsupported

UNITS = {  # of a runtime, by the name after its colon: coremltools' ComputeUnit
    "": "ALL",
    "cpu": "CPU_ONLY",
    "gpu": "CPU_AND_GPU",
    "ane": "CPU_AND_NE",
}
KINDS = {"MLNeuralEngineComputeDevice": "neural_engine", "MLGPUComputeDevice": "gpu"}
TOKENS = 10  # ids of text are below, as coremltools draws them
Call = Coroutine[Any, Any, Any]
CHUNK = 20  # predictions between looks at the clock, at most


@dataclass(frozen=True)
class Apple:
    """A `Device`."""

    refused: ClassVar[tuple[str, ...]] = ()
    udid: str
    team: str = ""  # Apple's development team that signs the app, such as A1B2C3D4E5

    @property
    def address(self) -> str:
        return f"ios://{self.udid}"

    def probe(self) -> Facts:
        found = self._found()
        version = f"Core ML of iOS {found.os_version}"
        return Facts(
            found.name,
            f"iOS {found.os_version} ({found.os_build_number})",
            {f"coreml:{unit}".rstrip(":"): version for unit in UNITS},
            state=f"{found.state.value}; developer mode {found.developer_mode_state or 'unknown'}",
            how_to="--to coreml exports what runs there",
        )

    def heat(self) -> Heat:
        return Heat()  # devicectl does not tell

    @contextmanager
    def meter(
        self, workload: Workload, warmup_iterations: int, warmup_s: float
    ) -> Iterator["Meter"]:
        from coremltools import ComputeUnit
        from coremltools.models import MLModel
        from coremltools.models.ml_program.experimental.perf_utils import MLModelBenchmarker

        units = ComputeUnit[UNITS[workload.runtime.partition(":")[2]]]
        model = MLModel(workload.source, compute_units=units, skip_model_load=True)
        inputs = make_inputs(model.get_spec().description, workload)
        self._found()
        if not self.team:
            raise BadInput(
                f"{self.address}: the app that measures there must be signed. Set "
                '[bench] team = "A1B2C3D4E5", your Apple development team, in a recipe.'
            )
        device = _doing(self.address, "starting the app there", lambda: prepared(self))
        with asyncio.Runner() as runner:
            benchmarker = MLModelBenchmarker(model, device)
            meter = Meter(self.address, benchmarker, inputs, runner.run)
            try:
                meter.warm_up(warmup_iterations, warmup_s)
                yield meter
            finally:
                with suppress(LaptopError):  # an error on the way here says more
                    meter.stop()

    def _found(self) -> Any:
        """The device as devicectl knows it, connected; `LaptopError` where it is not."""
        known = {device.udid: device for device in connected()}
        if self.udid not in known:
            there = ", ".join(f"ios://{udid} ({d.name})" for udid, d in known.items())
            raise LaptopError(
                f"{self.address} is not connected; there is {there or 'no device'}. Connect it by "
                "cable, unlock it, trust this Mac, and turn on developer mode in its settings."
            )
        return known[self.udid]


class Meter:
    """One package on the device; a `metering.Meter`."""

    ready: Ready

    def __init__(
        self,
        address: str,
        benchmarker: Any,
        inputs: Mapping[str, Any],
        wait: Callable[[Call], Any],
    ):
        self.address, self.benchmarker, self.inputs, self.wait = address, benchmarker, inputs, wait

    def warm_up(self, iterations: int, seconds: float) -> None:
        """Load twice, run once, look where operations run, and run as often and as long."""
        loads = self._ask("loading", lambda: self.benchmarker.benchmark_load(2)).samples
        (first,) = self._predict(1)
        infos = self._ask(
            "asking where operations run",
            lambda: self.benchmarker.benchmark_operation_execution(self.inputs, 1),
        )
        cold_s, warm_s = (ms / 1000 for ms in loads)
        self.ready = Ready(cold_s, warm_s, first, placement=placement(infos))
        self.run_round(iterations, seconds)

    def run_round(self, iterations: int, seconds: float) -> Round:
        samples: list[float] = []
        while len(samples) < iterations or sum(samples) < 1000 * seconds:
            left_ms = 1000 * seconds - sum(samples)
            by_time = math.ceil(left_ms * len(samples) / sum(samples)) if samples else 1
            samples += self._predict(min(CHUNK, max(1, iterations - len(samples), by_time)))
        return Round(tuple(samples))

    def stop(self) -> int | None:
        """Unload it there; the app does not tell its memory."""
        if (loaded := self.benchmarker._loaded_model) is not None:
            self.benchmarker._loaded_model = None
            self._ask("unloading", loaded.unload)
        return None

    def _predict(self, times: int) -> list[float]:
        found: list[float] = self._ask(
            "predicting", lambda: self.benchmarker.benchmark_predict(self.inputs, times)
        ).samples
        return found

    def _ask(self, doing: str, call: Callable[[], Call]) -> Any:
        return _doing(self.address, doing, lambda: self.wait(call()))


def _doing(address: str, doing: str, call: Callable[[], Any]) -> Any:
    """What a call of coremltools gives; its errors, of many classes, become ours."""
    try:
        return call()
    except Exception as e:
        raise LaptopError(
            f"{address}: {doing} failed: {type(e).__name__}: {e}. Is the device connected and "
            "unlocked, and did Xcode sign the app?"
        ) from e


@functools.cache
def prepared(device: Apple) -> Any:
    """The device with Apple's app running on it until this process ends; built once (minutes)."""
    from coremltools.models.ml_program.experimental.remote_device import AppSigningCredentials

    folder = Path.home() / ".cache/laptop/ios"
    folder.mkdir(parents=True, exist_ok=True)
    credentials = AppSigningCredentials(development_team=device.team)
    found = asyncio.run(device._found().prepare_for_model_debugging(credentials, folder))
    atexit.register(found.session.stop)
    return found


def connected() -> list[Any]:
    """Connected iPhones and iPads; `Unsupported` or `MissingExtra` where nothing can be asked."""
    if missing := missing_programs():
        raise Unsupported(
            "an iPhone is measured from a Mac with Xcode, to which it is connected, by "
            f"coremltools' remote device; missing here: {', '.join(missing)}."
        )
    try:
        from coremltools.models.ml_program.experimental import remote_device as remote
    except ImportError as e:
        raise MissingExtra(
            "an iPhone is measured by coremltools: pip install 'laptop-diff[coreml]'"
        ) from e
    found = _doing("ios://", "listing devices", remote.Device.get_devices)
    kinds = (remote.DeviceType.IPHONE, remote.DeviceType.IPAD)
    return [d for d in found if d.type in kinds and d.state == remote.DeviceState.CONNECTED]


def missing_programs() -> list[str]:
    """What measuring on an iPhone needs of this computer, and is not here."""
    needed = {
        "xcrun": "Xcode",
        "devicectl": "devicectl on PATH",
        "xcodebuild": "xcodebuild",
    }
    missing = [what for program, what in needed.items() if shutil.which(program) is None]
    return [*([] if sys.platform == "darwin" else ["a Mac (this is not one)"]), *missing]


def make_inputs(description: Any, workload: Workload) -> dict[str, np.ndarray[Any, Any]]:
    """Seeded inputs as the package wants them; `BadInput` for other shapes than the workload's."""
    rng = np.random.default_rng(workload.seed)
    made: dict[str, np.ndarray[Any, Any]] = {}
    for wanted in description.input:
        array = wanted.type.multiArrayType
        shape, asked = tuple(array.shape), workload.shapes.get(wanted.name)
        if asked is not None and math.prod(shape) != math.prod(asked):
            raise BadInput(
                f"{workload.source}: {wanted.name} is of shape {shape}; asked for is {asked}. "
                "Shapes are fixed when a package is made."
            )
        is_whole = array.ArrayDataType.Name(array.dataType) == "INT32"
        made[wanted.name] = (
            rng.integers(0, TOKENS, shape, dtype=np.int32)
            if is_whole
            else rng.standard_normal(shape, dtype=np.float32)
        )
    return made


def placement(infos: list[Any]) -> dict[str, dict[str, float]]:
    """Shares of operations, and of their estimated cost, by where the compute plan puts them.

    `infos` is what coremltools' `benchmark_operation_execution` gives; constants have no place.
    """
    counts: dict[str, int] = {}
    costs: dict[str, float] = {}
    for info in infos:
        if info.compute_device_usage is not None:
            kind = type(info.compute_device_usage.preferred_compute_device).__name__
            where = KINDS.get(kind, "cpu")
            counts[where] = counts.get(where, 0) + 1
            costs[where] = costs.get(where, 0.0) + sum(info.measurement.samples)
    total, cost = sum(counts.values()), sum(costs.values())
    return {
        where: {"operations": count / total, "cost": costs[where] / cost if cost else 0.0}
        for where, count in counts.items()
    }
