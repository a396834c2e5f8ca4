"""Core ML packages timed on an iPhone, by the app and the benchmarker of coremltools.

Its module `remote_device` is experimental. Private parts of it are called, because otherwise a
model cannot be unloaded, an app that has ended is polled forever, and a load that takes longer than
about 20 s, as the first one for a neural engine does, is given up.
"""

import asyncio
import contextlib
import functools
import importlib
import shutil
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Coroutine, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from laptop.benchmarks.devices.device import Placed, Ready, Round, Workload
from laptop.benchmarks.devices.worker import value
from laptop.console import quiet, say
from laptop.errors import BadInput, DeviceError, LaptopError
from laptop.export.to_coreml.target import library

EXPERIMENTAL = "coremltools.models.ml_program.experimental"
KINDS = {  # coremltools' classes of what an operation runs on
    "MLCPUComputeDevice": "cpu",
    "MLGPUComputeDevice": "gpu",
    "MLNeuralEngineComputeDevice": "neural_engine",
}
CALL_S = 1800  # an answer may take; the first load on a neural engine compiles for minutes
POLL_S = 0.5  # between looks for an answer, each a call of devicectl
LOOKS = 10 * CALL_S  # for an answer, which CALL_S ends long before
ROUND_S = 60
ENDS_S = 5  # that a launched app may take to end
T = TypeVar("T")
Work = Coroutine[Any, Any, T]
RemotePhone = Any  # coremltools' record of a device, with the app's session
Inputs = Mapping[str, NDArray[np.generic]]  # of a package, by name
Placement = Mapping[str, Placed]


class App:
    """The app of coremltools on one device: launched for its first user, ended after the last."""

    address: str
    device: RemotePhone
    _runner: asyncio.Runner  # one loop for all calls: coremltools keeps the one it finds

    def __init__(self) -> None:
        self._users = 0
        self._stack = contextlib.ExitStack()

    @contextlib.contextmanager
    def running(self, address: str, phone: RemotePhone, team: str) -> Iterator["App"]:
        """The launched app on `phone`, a device of coremltools."""
        if not self._users:
            self._launch(address, phone, team)
        self._users += 1
        try:
            yield self
        finally:
            self._users -= 1
            if not self._users:
                self._stack.close()

    def call(self, work: Work[T], doing: str) -> T:
        """The result of a coroutine of coremltools; `LaptopError` if it fails."""
        try:
            with quiet():
                return self._runner.run(self._watched(work))
        except failures() as e:
            ended = not self.device.session.is_alive()
            why = (
                "the app there has ended. iOS ends one whose models take too much memory (bench "
                "fewer models at once: no --against, one --component), that came off the screen "
                "or was locked (keep it unlocked), or that it does not trust (Settings, General, "
                "VPN & Device Management)"
                if ended
                else f"{str(e) or type(e).__name__}. Keep it connected, unlocked and the app on "
                "its screen, and measure again"
            )
            raise DeviceError(f"{self.address}, {doing}: {why}. Nothing was written.") from None

    async def _watched(self, work: Work[T]) -> T:
        """The result of `work`, which is cancelled when the app ends, or after CALL_S."""
        task = asyncio.ensure_future(work)
        end = time.monotonic() + CALL_S
        while self.device.session.is_alive() and time.monotonic() < end:
            if (await asyncio.wait({task}, timeout=0.5))[0]:
                return task.result()
        task.cancel()
        await asyncio.wait({task})
        raise TimeoutError(f"no answer in {CALL_S} s")

    def _launch(self, address: str, phone: RemotePhone, team: str) -> None:
        """Build the app, unless an earlier run has, install and launch it."""
        self.address = address
        remote, folder = remote_device(), app_folder(team)
        folder.mkdir(parents=True, exist_ok=True)
        # coremltools' own identifier is one team's; an app's is to be the only one in the world
        identifier = f"com.{team.lower()}.laptop.modelrunner"
        signing = remote.AppSigningCredentials(development_team=team, bundle_identifier=identifier)
        say(f"bench: starting coremltools' app on {address}; building it once takes minutes")
        with contextlib.ExitStack() as stack:
            stack.enter_context(_own_temporary_files())
            stack.enter_context(_patience(remote))
            self._runner = stack.enter_context(asyncio.Runner())
            try:
                with quiet():
                    prepared = phone.prepare_for_model_debugging(signing, folder)
                    self.device = self._runner.run(prepared)
            except failures() as e:
                shutil.rmtree(folder / phone.udid, ignore_errors=True)  # the app may be half built
                raise DeviceError(
                    f"{address}: the app that runs models there could not be built, installed or "
                    f"launched: {e}. Open {workspace()} in Xcode and run it on the device once, "
                    f"signed by {team}: Xcode shows what is wrong."
                ) from None
            stack.callback(_end, self.device.session)
            self._stack = stack.pop_all()


class PackageMeter:
    """A `Meter` of one package in the app; each inference sends and fetches files."""

    ready: Ready

    def __init__(self, app: App, model: object, inputs: Inputs, workload: Workload):
        self._app, self._workload, self.inputs = app, workload, inputs
        tools = importlib.import_module(f"{EXPERIMENTAL}.perf_utils")
        self._bench = tools.MLModelBenchmarker(model, app.device)

    def warm_up(self, iterations: int, seconds: float) -> None:
        """Load twice, one after the other, run at least `iterations` times and `seconds` long.

        Also asks on which processors the operations run.
        """
        cold_ms = self._load()
        self._call(self._unload(), "unloading")
        warm_ms = self._load()
        start = time.monotonic()
        first_ms = self._predict()
        took_s = time.monotonic() - start
        say(f"bench: {first_ms:.1f} ms of inference take {took_s:.1f} s with their transfers")
        self.run_round(iterations, seconds)
        self.ready = Ready(cold_ms / 1000, warm_ms / 1000, first_ms, placement=self._placement())

    def run_round(self, iterations: int, seconds: float) -> Round:
        """Run at least `iterations` inferences that take `seconds` without their transfers.

        The transfers of a small model could take hours: after ROUND_S the round ends.
        """
        samples: list[float] = []
        end = time.monotonic() + ROUND_S
        while len(samples) < iterations or (
            sum(samples) < 1000 * seconds and time.monotonic() < end
        ):
            samples.append(self._predict())
        return Round(tuple(samples))

    def stop(self) -> None:
        """Unload the package; the app does not report its memory."""
        self.close()

    def close(self) -> None:
        """Unload what is loaded."""
        if self._bench._loaded_model is None:
            return
        service = self._bench._loaded_model._remote_service
        try:
            self._call(self._unload(), "unloading")
        except LaptopError as e:
            say(f"bench: {e} The app is ended, and its models with it.")
            self._bench._loaded_model = None
            service._state = service.State.Unloaded  # else its finalizer asks the app once more

    def _load(self) -> float:
        (ms,) = self._call(self._bench.benchmark_load(1), "loading").samples
        return float(ms)

    def _predict(self) -> float:
        work = self._bench.benchmark_predict(self.inputs, iterations=1)
        (ms,) = self._call(work, "running").samples
        return float(ms)

    async def _unload(self) -> None:
        await self._bench._loaded_model.unload()
        self._bench._loaded_model = None

    def _placement(self) -> Placement | None:
        work = self._bench.benchmark_operation_execution(self.inputs, iterations=1)
        try:
            return placement(self._call(work, "asking for the compute plan"))
        except LaptopError as e:
            say(f"bench: {e} Where operations run is left out.")
            return None

    def _call(self, work: Work[T], doing: str) -> T:
        w = self._workload
        return self._app.call(work, f"{doing} {w.label!r} ({w.component}, {w.source})")


def inputs_of(description: Any, workload: Workload) -> Inputs:
    """Seeded inputs as a package describes them; `BadInput` if the workload has other shapes."""
    types = library().proto.FeatureTypes_pb2.ArrayFeatureType
    dtypes = {getattr(types, name.upper()): name for name in ("float16", "float32", "int32")}
    inputs = {}
    for feature in description.input:
        array = feature.type.multiArrayType
        shape, name = list(array.shape), feature.name
        if (wanted := workload.shapes.get(name)) is not None and list(wanted or (1,)) != shape:
            raise BadInput(
                f"{workload.source} takes {name} of {shape}; {list(wanted)} is to be timed. Export "
                "it again for those shapes."
            )
        if not shape or array.dataType not in dtypes:
            raise BadInput(
                f"{workload.source}: input {name} is no array of {', '.join(dtypes.values())}."
            )
        inputs[name] = value(name, shape, dtypes[array.dataType], workload.seed)
    return inputs


def placement(infos: list[Any]) -> Placement | None:
    """How much of a program runs on each processor, by coremltools' `OperationExecutionInfo`.

    Constants, which nothing runs, do not count.
    """
    count: Counter[str] = Counter()
    cost: Counter[str] = Counter()
    for info in infos:
        if info.compute_device_usage is not None:
            kind = type(info.compute_device_usage.preferred_compute_device).__name__
            name = KINDS.get(kind, kind)
            count[name] += 1
            cost[name] += sum(info.measurement.samples)
    total = cost.total() or 1
    return {
        name: Placed(operations=n / count.total(), cost=cost[name] / total)
        for name, n in count.items()
    } or None


def remote_device() -> ModuleType:
    """The module `remote_device` of coremltools."""
    library()
    return importlib.import_module(f"{EXPERIMENTAL}.remote_device")


def failures() -> tuple[type[Exception], ...]:
    """The exceptions of coremltools when Xcode, the device or the app fails."""
    remote = remote_device()
    own = (remote._DeviceCtlError, remote._AppBuilder.Error)
    return (*own, OSError, RuntimeError, ValueError, TypeError, subprocess.SubprocessError)


def app_folder(team: str) -> Path:
    """The folder that keeps the built app, by team and version of coremltools."""
    return Path.home() / ".cache/laptop/ios" / f"{team}-{library().__version__}"


def workspace() -> Path:
    """The sources of the app, which are part of coremltools for macOS."""
    return Path(str(library().__file__)).parent / "modelrunner" / "ModelRunner.xcworkspace"


def _end(session: Any) -> None:
    """End the app and remove the copies of all files that were sent and fetched."""
    process = session._process
    session.stop()
    try:
        process.communicate(timeout=ENDS_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
    shutil.rmtree(session.working_directory, ignore_errors=True)


@contextlib.contextmanager
def _own_temporary_files() -> Iterator[None]:
    """Let coremltools write to a folder that is removed: it leaves a file for each inference."""
    before = tempfile.tempdir
    with tempfile.TemporaryDirectory() as folder:
        tempfile.tempdir = folder
        try:
            yield
        finally:
            tempfile.tempdir = before


@contextlib.contextmanager
def _patience(remote: Any) -> Iterator[None]:
    """Let coremltools wait long enough for a load; by itself it looks 20 times for an answer."""
    service = remote._DeviceCtlRemoteService
    remote._DeviceCtlRemoteService = functools.partial(
        service, poll_time=POLL_S, max_attempts=LOOKS
    )
    try:
        yield
    finally:
        remote._DeviceCtlRemoteService = service
