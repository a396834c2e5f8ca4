"""The process that loads one component and times it, by orders on stdin.

    {"loader": "onnxruntime", "source": "model.onnx", "shapes": {…}, …}   loads, warms up
    {"iterations": 2, "seconds": 1.0}                                     times one round
    {"profile": 2}                                                        times its operators
    (end of input)                                                        ends, even in a round

Each order is one line of JSON and so is each answer on stdout. Between orders it waits without
using the processor, so that several processes can take turns (`latency/bench.py`).

This file also runs on boards, where it is sent together with `sensors.py`: Python 3.9, numpy and
the runtime are enough there. Other loaders are named as `module:function` and run here only.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import math
import os
import resource
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from onnxruntime import InferenceSession
if TYPE_CHECKING or __package__:
    from laptop.benchmarks.devices import sensors
else:  # on a board
    import sensors

GRACE_S = 1  # after the end of the input, for the process to end by itself
LAST_GRACE_S = 3  # after the signal, for temporary files to be removed
EXECUTORCH_TYPES = {3: "int32", 4: "int64", 5: "float16", 6: "float32"}  # of its ScalarType


class Order(TypedDict):
    """The first order: what to load, and how."""

    loader: str
    source: str
    runtime: str
    component: str
    shapes: dict[str, list[int]]
    threads: int
    seed: int
    imports: list[str]  # modules, imported before the clock of the first load starts
    files: list[str]  # that the load reads
    path: list[str]  # of modules; only on this machine
    settings: TrtexecSettings  # only for TensorRT
    warmup_iterations: int
    warmup_s: float


class TrtexecSettings(TypedDict):
    """A call of trtexec without the engine and without what says how long it runs."""

    trtexec: str
    arguments: list[str]


class Event(TypedDict):
    """An event in ONNX Runtime's profile."""

    cat: str
    name: str
    dur: float  # microseconds


@dataclass(frozen=True)
class Loaded:
    """A component that is ready to run."""

    run: Callable[[], object]  # one inference, finished when it returns
    params: int | None = None  # None: the runtime does not say
    precision: str | None = None  # None: as the artifact's list says
    round: Callable[[int, float], list[float]] | None = None  # ms, of a runtime that times itself
    first: Callable[[], float] | None = None  # ms of the first inference, likewise
    profile: Callable[[int], list[tuple[str, float]]] | None = None  # operators: name, median ms


def load_onnxruntime(order: Order) -> Loaded:
    """An ONNX or ORT file in a session of one execution provider."""
    session = _session(order)
    inputs = {node.name: node for node in session.get_inputs()}
    dtypes = {name: _numpy_type(node.type) for name, node in inputs.items()}
    shapes = dict(order["shapes"])
    if "timestep" in inputs and len(inputs["timestep"].shape) == 1:  # one for all, or one each
        is_each = "batch" in str(inputs["timestep"].shape[0])
        shapes["timestep"] = [shapes["sample"][0] if is_each else 1]
    feed = {name: value(name, shapes[name], dtypes[name], order["seed"]) for name in inputs}

    def profile(iterations: int) -> list[tuple[str, float]]:
        with tempfile.TemporaryDirectory() as folder:
            profiled = _session(order, str(Path(folder) / "profile"))
            for _ in range(iterations + 1):  # the first one is a warm-up
                profiled.run(None, feed)
            with Path(profiled.end_profiling()).open(encoding="utf-8") as file:
                return operators(json.load(file))

    return Loaded(lambda: session.run(None, feed), profile=profile)


def _session(order: Order, profile: str | None = None) -> InferenceSession:
    """An inference session; with `profile`, it writes a profile whose name begins so."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = order["threads"]
    if profile:
        options.enable_profiling = True
        options.profile_file_prefix = profile
    _, _, processor = order["runtime"].partition(":")
    provider = sensors.PROVIDERS.get(processor, "CPUExecutionProvider")
    session = ort.InferenceSession(order["source"], options, providers=[provider])
    if session.get_providers()[0] != provider:  # it falls back to the processor silently
        raise RuntimeError(f"{provider} could not be started, see above; it is {ort.__version__}")
    return session


def operators(events: list[Event]) -> list[tuple[str, float]]:
    """Names and median ms of operators in the order in which they run, from ONNX Runtime's profile.

    The first call of each is left out.
    """
    from statistics import median

    ends = "_kernel_time"
    times: dict[str, list[float]] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith(ends):
            times.setdefault(event["name"][: -len(ends)], []).append(event["dur"] / 1000)
    return [(name, median(ms[1:] or ms)) for name, ms in times.items()]


def _numpy_type(onnx_type: str) -> str:
    name = onnx_type[len("tensor(") : -1]
    return {"float": "float32", "double": "float64"}.get(name, name)


def load_executorch(order: Order) -> Loaded:
    """An ExecuTorch program on the processor, with inputs as the program declares them."""
    import torch
    from executorch.extension.pybindings import portable_lib
    from executorch.runtime import Runtime

    portable_lib._unsafe_reset_threadpool(order["threads"])
    program = Runtime.get().load_program(order["source"])
    method = program.load_method("forward")
    inputs = []
    for i in range(method.metadata.num_inputs()):
        meta = method.metadata.input_tensor_meta(i)
        dtype = EXECUTORCH_TYPES[meta.dtype()]
        inputs.append(torch.from_numpy(value(str(i), meta.sizes(), dtype, order["seed"])))

    @torch.no_grad()
    def run() -> object:
        return method.execute(inputs)

    return Loaded(run)


def load_trtexec(order: Order) -> Loaded:
    """An engine in TensorRT's own program, which times each inference, copies included."""
    settings = order["settings"]
    command = [settings["trtexec"], f"--loadEngine={order['source']}", *settings["arguments"]]

    def turn(iterations: int, seconds: float, *more: str) -> list[float]:
        with tempfile.NamedTemporaryFile("r", suffix=".json") as times:
            length = [f"--iterations={iterations}", f"--duration={math.ceil(seconds)}"]
            done = subprocess.run(
                [*command, *length, *more, f"--exportTimes={times.name}"],
                capture_output=True,
                text=True,
            )
            if done.returncode:
                raise RuntimeError(f"trtexec failed: {done.stdout[-600:]} {done.stderr[-300:]}")
            return [row["latencyMs"] for row in json.load(times)]

    return Loaded(lambda: turn(1, 0), round=turn, first=lambda: turn(1, 0, "--warmUp=0")[0])


LOADERS = {
    "onnxruntime": load_onnxruntime,
    "executorch": load_executorch,
    "tensorrt": load_trtexec,
}


def loader(name: str) -> Callable[[Order], Loaded]:
    """The loader of a name in `LOADERS`, or of the form `module:function`."""
    if name in LOADERS:
        return LOADERS[name]
    module, _, function = name.partition(":")
    load: Callable[[Order], Loaded] = getattr(importlib.import_module(module), function)
    return load


def value(name: str, shape: list[int], dtype: str, seed: int) -> NDArray[np.generic]:
    """An input: seeded noise, or ones for integers; latency does not depend on values."""
    import numpy as np

    if name == "timestep":
        return np.full(shape, 500, dtype)
    if "int" in dtype:
        return np.ones(shape, dtype)
    return np.random.default_rng(seed).standard_normal(tuple(shape), np.float32).astype(dtype)


def serve() -> None:
    """Answer orders until the input ends."""
    sensors.no_telemetry()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    for number in (signal.SIGHUP, signal.SIGTERM):  # so that temporary files are removed
        signal.signal(number, lambda *_: sys.exit(1))
    threading.Thread(target=end_with_input, daemon=True).start()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    loaded = None
    for line in sys.stdin:
        order = json.loads(line)
        if loaded is None:
            answer, loaded = start(order)
        elif "profile" in order:
            answer = {"operators": loaded.profile(order["profile"]) if loaded.profile else None}
        else:
            answer = turn(loaded, order["iterations"], order["seconds"])
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def end_with_input() -> None:
    """End this process when the input has ended: whoever asked for a round may be gone."""
    poll = select.poll()
    poll.register(0, 0)  # a hang-up is reported in any case
    poll.poll()
    time.sleep(GRACE_S)
    os.kill(os.getpid(), signal.SIGHUP)
    time.sleep(LAST_GRACE_S)
    os._exit(1)  # it is in a call that Python cannot interrupt, such as a long load


def start(order: Order) -> tuple[dict[str, object], Loaded]:
    """Load twice, run once, warm up."""
    sys.path += [path for path in order.get("path", []) if path not in sys.path]
    load = loader(order["loader"])
    for module in order["imports"]:
        importlib.import_module(module)
    drop_page_cache(order["files"])
    cold_s, loaded = _load(load, order)
    del loaded
    gc.collect()
    warm_s, loaded = _load(load, order)
    first_ms = loaded.first() if loaded.first else run_round(loaded, 1, 0)[0]
    run_round(loaded, order["warmup_iterations"], order["warmup_s"])
    loads_once = loaded.round is None  # else it loads in each round
    return {
        "cold_s": cold_s if loads_once else None,
        "warm_s": warm_s if loads_once else None,
        "first_ms": first_ms,
        "params": loaded.params,
        "precision": loaded.precision,
        "pid": os.getpid(),
    }, loaded


def _load(load: Callable[[Order], Loaded], order: Order) -> tuple[float, Loaded]:
    begin = time.perf_counter()
    loaded = load(order)
    return time.perf_counter() - begin, loaded


def turn(loaded: Loaded, iterations: int, seconds: float) -> dict[str, object]:
    """A round, after an untimed run: other workloads had the caches meanwhile."""
    loaded.run()
    monitor = sensors.Monitor()
    samples = run_round(loaded, iterations, seconds)
    peak = children_peak_bytes() if loaded.round else peak_memory_bytes()
    return {"samples_ms": samples, **monitor.read(), "peak_memory_bytes": peak}


def run_round(loaded: Loaded, iterations: int, seconds: float) -> list[float]:
    """Latencies in ms of at least `iterations` runs that take at least `seconds` together."""
    if loaded.round:
        return loaded.round(iterations, seconds)
    return repeat(loaded.run, iterations, seconds)


def repeat(run: Callable[[], object], iterations: int, seconds: float) -> list[float]:
    """Times in ms of at least `iterations` calls that take at least `seconds` together."""
    samples: list[float] = []
    total_ms = 0.0
    while len(samples) < iterations or total_ms < 1000 * seconds:
        begin = time.perf_counter_ns()
        run()
        samples.append((time.perf_counter_ns() - begin) / 1e6)
        total_ms += samples[-1]
    return samples


def drop_page_cache(files: list[str]) -> None:
    """Ask the system to forget the files' cached pages, so that a cold load reads the disk."""
    for path in files if hasattr(os, "posix_fadvise") else ():
        # advice, which some file systems do not take
        with contextlib.suppress(OSError), Path(path).open("rb") as file:
            os.fsync(file.fileno())  # pages that are not written yet would stay
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def peak_memory_bytes() -> int:
    """Largest resident size of this process so far."""
    status = Path("/proc/self/status")
    if status.is_file():  # rusage would count the parent's, before the exec
        (line,) = (x for x in status.read_text().split("\n") if x.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def children_peak_bytes() -> int:
    """Largest resident size of a program that this process has run."""
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss


if __name__ == "__main__":
    try:
        serve()
    except BrokenPipeError:  # whoever asked is gone
        sys.exit(1)
