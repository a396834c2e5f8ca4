"""The programs that run artifacts on an Android device, and what they print.

ONNX Runtime's `onnxruntime_perf_test` and ExecuTorch's `executor_runner` load a model, run it some
times and end. So every turn of a meter is a process of its own, and the first inference of each
is not among the samples: it fills caches that other processes used meanwhile.

`docs/guides/android.md` says which versions these are, and where to get them. What they print was
taken from their documentation and sources, not from a phone.
"""

import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from laptop.benchmarks.devices.device import Shapes, Workload
from laptop.errors import BadInput, DeviceError
from laptop.export.to_onnx.onnx_checks import read_graph
from laptop.files import lines

PAGE = "docs/guides/android.md"
PROVIDERS = ("cpu", "xnnpack", "nnapi", "qnn")
WEIGHTS = (".onnx_data", ".data")  # files of weights in the folder of model.onnx
NUMBER = r"([\d.]+(?:e[+-]?\d+)?)"
SESSION = re.compile(rf"Session creation time cost: {NUMBER} s")
FIRST = re.compile(rf"First inference time cost: {NUMBER} ms")
PEAK = re.compile(r"Peak working set size: (\d+) bytes")
LOADED = re.compile(rf"Model loaded in {NUMBER} ms")
ITERATION = re.compile(rf"Iteration \d+ of \d+: {NUMBER} ms")
EXECUTED = re.compile(rf"Model executed successfully (\d+) time\(s\) in {NUMBER} ms")


@dataclass(frozen=True)
class Call:
    """The report of one process of a runner."""

    samples_ms: tuple[float, ...]  # without the first inference
    load_s: float | None = None
    first_ms: float | None = None
    peak_bytes: int | None = None
    is_raw: bool = True  # a sample an inference; else their mean


class PhoneRunner(Protocol):
    """A program on the phone for one kind of artifact."""

    program: str

    def files(self, workload: Workload) -> list[Path]:
        """The files of the artifact; the program opens the first one."""

    def options(self, workload: Workload) -> list[str]:
        """The program's options for a workload; `BadInput` if it cannot run it."""

    def command(
        self, program: str, options: Sequence[str], model: str, times: int, result: str
    ) -> list[str]:
        """The command that runs `model` once, untimed, then `times` times; may write `result`."""

    def read(self, log: str, result: str) -> Call:
        """The report in what was printed and in the result; `LaptopError` if it holds no time."""


class PerfTest:
    """The runner of ONNX Runtime: raw times in a CSV file, the first one in whole milliseconds.

    It makes its inputs itself: seeded noise for float32, zeros for other types.
    """

    program = "onnxruntime_perf_test"

    def files(self, workload: Workload) -> list[Path]:
        folder = workload.artifact
        if folder is None or not (folder / "model.onnx").is_file():
            raise BadInput(f"{workload.label}: {workload.source} holds no model.onnx.")
        weights = sorted(p for p in folder.iterdir() if p.suffix in WEIGHTS)
        return [folder / "model.onnx", *weights]

    def options(self, workload: Workload) -> list[str]:
        dimensions = free_dimensions(self.files(workload)[0], workload.shapes)
        return [
            *("-I", "-S", str(workload.seed), "-x", str(workload.threads)),
            *("-e", provider(workload.runtime)),
            *(word for name, size in dimensions.items() for word in ("-f", f"{name}:{size}")),
        ]

    def command(
        self, program: str, options: Sequence[str], model: str, times: int, result: str
    ) -> list[str]:
        return [program, *options, "-m", "times", "-r", str(max(1, times)), model, result]

    def read(self, log: str, result: str) -> Call:
        return read_perf_test(log, result)


class ExecutorRunner:
    """The runner of ExecuTorch: a line for each inference or, as in 2025, only their sum.

    From a sum, each call gives one sample: the mean of all its inferences, the first one included.
    Inputs are ones, of the shapes that the program was exported with.
    """

    program = "executor_runner"

    def files(self, workload: Workload) -> list[Path]:
        file = workload.artifact
        if file is None or not file.is_file():
            raise BadInput(f"{workload.label}: {workload.source} is no ExecuTorch program.")
        return [file]

    def options(self, workload: Workload) -> list[str]:
        return [f"--cpu_threads={workload.threads}"]

    def command(
        self, program: str, options: Sequence[str], model: str, times: int, result: str
    ) -> list[str]:
        times += 1  # it also times the first one
        return with_peak([program, *options, f"--model_path={model}", f"--num_executions={times}"])

    def read(self, log: str, result: str) -> Call:
        return read_executor_runner(log)


RUNNERS: Mapping[str, PhoneRunner] = {"onnxruntime": PerfTest(), "executorch": ExecutorRunner()}


def runner_of(workload: Workload) -> PhoneRunner:
    """The program for a workload; `BadInput` if its runtime has none."""
    kind = workload.runtime.partition(":")[0]
    if kind not in RUNNERS:
        raise BadInput(
            f"{workload.label}: {workload.runtime} does not run on Android; known: "
            f"{', '.join(RUNNERS)}."
        )
    provider(workload.runtime)
    return RUNNERS[kind]


def runtimes_of(kind: str) -> list[str]:
    """`kind` with each of its providers, as --runtime names them."""
    providers = PROVIDERS[1:] if kind == "onnxruntime" else ()
    return [kind, *(f"{kind}:{name}" for name in providers)]


def provider(runtime: str) -> str:
    """ONNX Runtime's execution provider, as the perf test names it."""
    name = runtime.partition(":")[2] or "cpu"
    if runtime.startswith("onnxruntime") and name not in PROVIDERS:
        raise BadInput(f"{runtime}: known providers on Android: {', '.join(PROVIDERS)}.")
    return name


def free_dimensions(model: Path, shapes: Shapes) -> dict[str, int]:
    """Sizes of a graph's named dimensions; the runner takes unnamed and unknown ones for 1.

    Raises `BadInput` if the graph cannot take these shapes.
    """
    graph = read_graph(model).graph
    sizes: dict[str, int] = {}
    for value in graph.input:
        if value.name not in shapes:
            continue
        wanted, dims = shapes[value.name], value.type.tensor_type.shape.dim
        has = [
            sizes.setdefault(dim.dim_param, size) if dim.dim_param else dim.dim_value or 1
            for dim, size in zip(dims, wanted, strict=False)
        ]
        if len(dims) != len(wanted) or has != list(wanted):
            raise BadInput(
                f"{model}: input {value.name} is of shape {has}; asked for is {list(wanted)}. "
                "Bench it with the shapes that it was exported with."
            )
    return sizes


def read_perf_test(log: str, result: str) -> Call:
    """Parse a log of `onnxruntime_perf_test`, and its rows `model,seconds,peak bytes,CPU %,run`."""
    rows = [line.rsplit(",", 4) for line in lines(result) if line.count(",") >= 4]
    try:
        samples = tuple(1000 * float(row[1]) for row in rows)
    except ValueError:
        samples = ()
    if not samples or not all(map(math.isfinite, samples)):
        raise DeviceError(f"onnxruntime_perf_test gave no times: {complaint(log)}")
    peak = PEAK.search(log)
    return Call(samples, _number(SESSION, log), _number(FIRST, log), int(peak[1]) if peak else None)


def read_executor_runner(log: str) -> Call:
    """Parse a log of `executor_runner`, as its posix platform layer prints it."""
    peak = read_peak(log)
    load_ms = _number(LOADED, log)
    load_s = None if load_ms is None else load_ms / 1000
    each = [float(ms) for ms in ITERATION.findall(log)]
    if each:
        return Call(tuple(each[1:]), load_s, each[0], peak)
    total = EXECUTED.search(log)
    if total is None:
        raise DeviceError(
            f"executor_runner gave no times: {complaint(log)} It must be built with "
            f"EXECUTORCH_ENABLE_LOGGING=ON and EXECUTORCH_PAL_DEFAULT=posix; see {PAGE}."
        )
    times, mean_ms = int(total[1]), float(total[2]) / int(total[1])
    if times == 1:
        return Call((), load_s, mean_ms, peak)
    return Call((mean_ms,), load_s, None, peak, is_raw=False)


def _number(pattern: re.Pattern[str], text: str) -> float | None:
    match = pattern.search(text)
    return float(match[1]) if match else None


def complaint(log: str) -> str:
    """The line that says what is wrong: the last error, or the last line."""
    printed = [line.strip() for line in lines(log) if line.strip()]
    errors = [x for x in printed if re.search(r"error|fail|cannot|not found|^[EF] ", x, re.I)]
    return ([*printed[-1:], *errors[-1:]] or ["It printed nothing."])[-1][:300]


def with_peak(command: Sequence[str]) -> list[str]:
    """A command that runs another and also prints its peak memory: `VmHWM: … kB`.

    It looks once a second only, so that looking does not slow what is timed.
    """
    return [
        *("sh", "-c"),
        f"{shlex.join(command)} & p=$!; "
        "while now=$(grep VmHWM /proc/$p/status 2>/dev/null); do last=$now; sleep 1; done; "
        'wait $p; code=$?; echo "$last"; exit $code',
    ]


def read_peak(log: str) -> int | None:
    """The peak memory in bytes that a command of `with_peak` printed."""
    match = re.search(r"^VmHWM:\s+(\d+) kB", log, re.MULTILINE)
    return 1024 * int(match[1]) if match else None
