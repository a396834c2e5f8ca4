"""trtexec, TensorRT's own command that builds and runs engines: its flags and what it prints.

Pure functions: which flags each version takes, what its output means, when an engine may be used
again. Who runs the command is `engine`. The facts are from NVIDIA's sources

    samples/common/sampleOptions.cpp, sampleEngines.cpp, sampleReporting.cpp, samples/trtexec
        (github.com/NVIDIA/TensorRT at 8.4, 8.6 and 10.x)
    docs.nvidia.com/deeplearning/tensorrt/11.4.1/api/migration/tensorrt-{8x-to-10x,10x-to-11x}-
        trtexec.html
    github.com/onnx/onnx-tensorrt, docs/Changelog.md

and from published logs of 8.4 to 11.1. On the device, flags are checked against `trtexec --help`
before any work (`unlisted`), because no page lists all of every patch release.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, NamedTuple, TypedDict

import numpy as np

from laptop.errors import BadInput, LaptopError, Unsupported
from laptop.export.arrays import Array
from laptop.fields import Name, Range
from laptop.files import reason
from laptop.records import Record, checked

Shape = tuple[int, ...]
Sides = tuple[Annotated[int, Range(0, 2**31 - 1)], ...]  # a shape without dynamic sides
# LayerNormalization and INT32 ArgMax came with 8.6 (onnx-tensorrt's changelog), so did
# --skipInference and --builderOptimizationLevel.
OLDEST = (8, 6)


class Version(NamedTuple):
    """A version of TensorRT."""

    major: int
    minor: int
    patch: int

    def __str__(self) -> str:
        return ".".join(map(str, self))


@dataclass(frozen=True)
class Tensor(Record):
    """One input or output of a graph."""

    dtype: Name  # as ONNX names it: FLOAT, FLOAT16, INT64, INT32
    shape: tuple[Annotated[int, Range(-1, 2**31 - 1)], ...]  # -1 where it is dynamic


@dataclass(frozen=True)
class BuildPlan(Record):
    """The settings that an engine is built with, whatever the version of TensorRT."""

    precision: Name  # fp16 or fp32
    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]
    # min, opt and max of each dynamic input
    profile: Mapping[str, tuple[Sides, Sides, Sides]] = field(default_factory=dict)
    # a higher level builds longer and runs faster; None: TensorRT's 3
    optimization_level: Annotated[int, Range(0, 5)] | None = None
    # most scratch memory of a layer; None: what the device has
    workspace_mib: Annotated[int, Range(1, 1 << 30)] | None = None


class Gpu(NamedTuple):
    """The GPU that an engine is for."""

    name: str  # as nvidia-smi, trtexec or the device tree says it
    capability: str  # compute capability, such as "8.7"; "" where it is unknown


_VERSIONS = (
    r"\[?TensorRT v(\d{1,9}(?:\.\d{1,9})*)\]?",  # &&&& RUNNING TensorRT.trtexec [TensorRT v8602]
    r"TensorRT version: (\d{1,9}\.\d{1,9}\.\d{1,9})",
    r"(?:libnvinfer|tensorrt)\S*\s+(\d{1,9}\.\d{1,9}\.\d{1,9})",  # dpkg -l: libnvinfer-bin 10.3.0
    r"^\s*(\d{1,9}\.\d{1,9}\.\d{1,9})",  # tensorrt.__version__
)


def read_version(text: str) -> Version:
    """The TensorRT version in trtexec's banner or log, a line of `dpkg -l`, or a bare version.

    The banner's number is major·1000 + minor·100 + patch up to 9 (`v8602`), and
    major·10000 + minor·100 + patch from 10 on (`v100300`); some 11 print it with points.
    """
    for pattern in _VERSIONS:
        if match := re.search(pattern, text, re.MULTILINE):
            parts = match[1].split(".")
            return _decoded(int(parts[0])) if len(parts) == 1 else Version(*map(int, parts[:3]))
    raise BadInput(
        f"no TensorRT version in {text.strip()[:100]!r}; needed is a line such as "
        "'&&&& RUNNING TensorRT.trtexec [TensorRT v100300]'. Is this NVIDIA's trtexec?"
    )


def _decoded(number: int) -> Version:
    unit = 1000 if number < 100_000 else 10_000
    return Version(number // unit, number % unit // 100, number % 100)


def need_supported(version: Version) -> None:
    """Raise `Unsupported` for a TensorRT that cannot build our graphs."""
    if version[:2] < OLDEST:
        raise Unsupported(
            f"TensorRT {version} is too old: 8.6 or later is needed (JetPack 6, or JetPack 5.1.2 "
            "with TensorRT upgraded), because earlier ones have no LayerNormalization."
        )


def precision_flags(version: Version, precision: str) -> list[str]:
    """The flags that make the engine compute in the types of the graph.

    8 has no strong typing: `--fp16` allows fp16 kernels. From 9 on `--stronglyTyped` takes types
    from the graph. 11 always does; it refuses `--fp16` and the like as unknown. In fp32, TF32
    (ten bits of mantissa) would miss the floor of 60 dB, so it is off.
    """
    exact = ["--noTF32"] if precision == "fp32" else []
    if version.major >= 11:
        return exact
    if version.major >= 9:
        return ["--stronglyTyped", *exact]
    return exact or ["--fp16"]


def build_flags(version: Version, plan: BuildPlan) -> list[str]:
    """The flags that decide what engine comes out; they are part of its key."""
    flags = precision_flags(version, plan.precision)
    if plan.profile:  # a static graph with shapes given is refused by every version
        for i, bound in enumerate(("min", "opt", "max")):
            flags.append(f"--{bound}Shapes={_spec({k: v[i] for k, v in plan.profile.items()})}")
    if plan.optimization_level is not None:
        flags.append(f"--builderOptimizationLevel={plan.optimization_level}")
    if plan.workspace_mib is not None:
        flags.append(f"--memPoolSize=workspace:{plan.workspace_mib}")
    return flags


def build_arguments(
    version: Version, plan: BuildPlan, onnx: str, engine: str, timing_cache: str
) -> list[str]:
    """The command line that builds `engine` and measures nothing."""
    return [
        f"--onnx={onnx}",
        f"--saveEngine={engine}",
        f"--timingCacheFile={timing_cache}",
        *build_flags(version, plan),
        "--skipInference",
    ]


def run_arguments(
    plan: BuildPlan,
    engine: str,
    inputs: Mapping[str, str],
    shapes: Mapping[str, Shape],
    *,
    output: str | None = None,
    times: str | None = None,
    extra: Sequence[str] = (),
) -> list[str]:
    """The command line that runs `engine` on files of raw values (name: file).

    `shapes` are those of the values; trtexec gets the dynamic ones only. `output` and `times`
    are files that it writes; `extra` such as `--warmUp=2000`.
    """
    dynamic = {name: shapes[name] for name in plan.profile}
    files = ",".join(f"{name}:{path}" for name, path in inputs.items())
    return [
        f"--loadEngine={engine}",
        *([f"--shapes={_spec(dynamic)}"] if dynamic else []),
        *([f"--loadInputs={files}"] if inputs else []),
        *([f"--exportOutput={output}"] if output else []),
        *([f"--exportTimes={times}"] if times else []),
        *extra,
    ]


def _spec(shapes: Mapping[str, Shape]) -> str:
    """`input0:1x3x256x256,input1:scalar`, as the help of 10.x has it."""
    return ",".join(f"{k}:{'x'.join(map(str, v)) or 'scalar'}" for k, v in shapes.items())


def unlisted(arguments: Iterable[str], help_text: str) -> list[str]:
    """The flags among `arguments` that `trtexec --help` does not list."""
    listed = set(re.findall(r"(?<![\w-])--\w+", help_text))
    return [flag for flag in (a.partition("=")[0] for a in arguments) if flag not in listed]


def raw_type(dtype: str, version: Version) -> np.dtype[np.generic]:
    """The type of an input's raw values; before 9 an INT64 input is an INT32 binding."""
    if dtype == "INT64":
        return np.dtype(np.int32 if version.major < 9 else np.int64)
    return np.dtype({"FLOAT": "float32", "FLOAT16": "float16", "INT32": "int32"}[dtype])


# What it prints ------------------------------------------------------------------------------


class _Output(TypedDict):
    name: str
    dimensions: str
    values: list[Any]  # numbers, of which there are too many to look at each in Python


def read_output(text: str) -> dict[str, Array]:
    """The content of `--exportOutput`: float64 arrays by name.

    NaN and Inf, which JSON has not, stand there as C++ prints them. Values have six digits.
    """
    legible = re.sub(r"(?<=[\[,\s])-?nan(?:\([^)]*\))?(?=[\],\s])", "NaN", text)
    legible = re.sub(r"(?<=[\[,\s])(-?)inf(?=[\],\s])", r"\1Infinity", legible)
    try:
        outputs = checked(json.loads(legible), list[_Output], "--exportOutput", "Please report it.")
    except (ValueError, RecursionError) as e:
        raise BadInput(f"--exportOutput wrote something else than JSON ({reason(e)}).") from None
    try:
        return {
            output["name"]: np.array(output["values"], np.float64).reshape(_dimensions(output))
            for output in outputs
        }
    except (ValueError, TypeError, OverflowError) as e:
        raise BadInput(f"--exportOutput wrote something else than numbers ({reason(e)}).") from None


def _dimensions(output: _Output) -> Shape:
    """A shape such as `2x4x64x64`; nothing or `scalar` for a scalar."""
    return tuple(int(d) for d in re.findall(r"\d+", output["dimensions"]))


def read_device(log: str) -> Gpu | None:
    """The GPU that a log of trtexec names; None where it does not get that far."""
    name = re.search(r"Selected Device: (.+)", log)
    capability = re.search(r"Compute Capability: ([\d.]+)", log)
    return Gpu(name[1].strip(), capability[1]) if name and capability else None


def failure(log: str, code: int, what: str) -> LaptopError:
    """The error for a failed trtexec, with what it printed."""
    errors = [line.strip() for line in re.findall(r"\[E\] (.+)", log)]
    unknown = [line.split()[2] for line in errors if line.startswith("Unknown option: ")]
    if unknown:
        return refused(what, read_version(log), unknown)
    tail = "; ".join(errors[:3]) or " ".join(log.split()[-30:]) or "it printed nothing"
    return LaptopError(f"{what}: trtexec failed (exit code {code}): {tail}")


def refused(what: str, version: Version, flags: Iterable[str]) -> Unsupported:
    """The error for flags that this trtexec does not take."""
    return Unsupported(
        f"{what}: this trtexec (TensorRT {version}) does not know {', '.join(flags)}. Please "
        "report it with the output of `trtexec --help` there."
    )


# When an engine may be used again --------------------------------------------------------------


@dataclass(frozen=True)
class EngineKey(Record):
    """Everything that an engine depends on: it runs only on the GPU and TensorRT that built it."""

    onnx_sha256: str
    tensorrt: str
    gpu: str
    capability: str
    flags: tuple[str, ...]

    @property
    def digest(self) -> str:
        """The name of the files of an engine; only equal keys have equal names."""
        return hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()[:24]
