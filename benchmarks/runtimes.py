"""What can be timed: a loader for each runtime, and inputs of the shapes that a component takes.

Latency does not depend on the values of the inputs, so they are seeded noise; their shapes come
from the model's own `config.json`.
"""

import json
import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from laptop import models
from laptop.errors import BadInput, MissingExtra
from laptop.run import read_json, say

CLIP_TOKENS = 77  # what SD and SDXL take; used where no text encoder lies beside the U-Net
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Loaded:
    """A component that is ready to run."""

    run: Callable[[], object]  # one inference, finished when it returns
    precision: str  # of the computation: fp32, fp16
    params: int | None  # None where the runtime does not tell


@dataclass(frozen=True)
class Workload:
    """One thing to time. It crosses to another process, so `load` is a function of a module."""

    label: str
    component: str
    runtime: str
    source: str  # what `load` opens: a model's name or folder, an .onnx or a .pte file
    load: Callable[["Workload"], Loaded]
    shapes: Shapes
    threads: int = 1
    seed: int = 0
    imports: tuple[str, ...] = ()  # imported before the clock of the first load starts

    @property
    def artifact(self) -> Path | None:
        """The component's file or folder; None when it lies in the Hub's cache."""
        source = Path(self.source)
        if source.suffix == ".onnx":
            return source.parent
        if source.suffix == ".pte":
            return source
        return source / self.component if source.is_dir() else None


def load_pytorch(workload: Workload) -> Loaded:
    """The U-Net in float32 on the CPU, as `models.load_unet` gives it."""
    unet, run = pytorch_unet(workload)
    return Loaded(run, "fp32", sum(p.numel() for p in unet.parameters()))


def pytorch_unet(workload: Workload) -> tuple[Any, Callable[[], object]]:
    """The U-Net and one inference of it; sets the number of torch's threads."""
    import torch

    torch.set_num_threads(workload.threads)
    unet = models.load_unet(workload.source)
    tensors = {k: torch.from_numpy(v) for k, v in noise(workload.shapes, workload.seed).items()}
    added = {k: tensors.pop(k) for k in ("text_embeds", "time_ids") if k in tensors}
    given = {**tensors, **({"added_cond_kwargs": added} if added else {})}
    timestep = torch.tensor(500)

    @torch.inference_mode()
    def run() -> object:
        return unet(**given, timestep=timestep, return_dict=False)

    return unet, run


def load_onnxruntime(workload: Workload) -> Loaded:
    """An ONNX file in a session of the CPU provider."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = workload.threads
    session = ort.InferenceSession(workload.source, options, providers=["CPUExecutionProvider"])
    values: dict[str, NDArray[Any]] = dict(noise(workload.shapes, workload.seed))
    values["timestep"] = np.array(500)
    batch = next(iter(workload.shapes.values()))[0]
    feed = {}
    for wanted in session.get_inputs():
        dtype = _numpy_type(wanted.type)
        value = values[wanted.name].astype(dtype)
        if wanted.name == "timestep" and len(wanted.shape) == 1:  # one for all, or one each
            value = np.full(batch if "batch" in str(wanted.shape[0]) else 1, value, dtype)
        feed[wanted.name] = value
    is_half = feed["sample"].dtype == np.float16
    return Loaded(lambda: session.run(None, feed), "fp16" if is_half else "fp32", None)


def load_executorch(workload: Workload) -> Loaded:
    """An ExecuTorch program on the CPU; sets the number of its threads."""
    from executorch.extension.pybindings import portable_lib

    from laptop.export import to_executorch

    portable_lib._unsafe_reset_threadpool(workload.threads)
    run = to_executorch.load(Path(workload.source))
    feed = {**noise(workload.shapes, workload.seed), "timestep": np.array(500, np.float32)}
    return Loaded(lambda: run(feed), "fp32", None)


def _numpy_type(onnx_type: str) -> str:
    name = onnx_type.removeprefix("tensor(").removesuffix(")")
    return {"float": "float32", "double": "float64"}.get(name, name)


@dataclass(frozen=True)
class Runtime:
    """Where components run, and what it needs."""

    load: Callable[[Workload], Loaded]
    package: str  # whose version a result records
    imports: tuple[str, ...]
    extra: str | None  # the extra of ours that installs it; None: always there


RUNTIMES = {
    "pytorch": Runtime(
        load_pytorch, "torch", ("torch", "diffusers.models.unets.unet_2d_condition"), None
    ),
    "onnxruntime": Runtime(load_onnxruntime, "onnxruntime", ("onnxruntime",), "onnx"),
    "executorch": Runtime(load_executorch, "executorch", ("executorch.runtime",), "executorch"),
}
FIXED = ("executorch",)  # runtimes whose programs have the shapes that they were exported with
ARTIFACTS = {  # of a U-Net, by the target that makes it: the runtime, and files, first come first
    "onnx": ("onnxruntime", ("onnx/unet/model.onnx", "unet/model.onnx")),
    "executorch": ("executorch", ("executorch/unet.pte",)),
}


def runtime_version(runtime: str) -> str | None:
    """The installed version; None for a runtime that is not in the table (a stand-in)."""
    return metadata.version(RUNTIMES[runtime].package) if runtime in RUNTIMES else None


def noise(shapes: Shapes, seed: int) -> dict[str, NDArray[np.float32]]:
    """Seeded normal arrays of `shapes`, by input name."""
    rng = np.random.default_rng(seed)
    return {k: rng.standard_normal(shape, np.float32) for k, shape in shapes.items()}


def unet_shapes(config: Mapping[str, Any], batch: int, tokens: int) -> Shapes:
    """Shapes of a U-Net's inputs but the timestep, from its config.

    Text only for a U-Net that takes some, text_embeds and time_ids only for SDXL's.
    """
    size = config["sample_size"]
    height, width = (size, size) if isinstance(size, int) else size
    shapes: dict[str, tuple[int, ...]] = {"sample": (batch, config["in_channels"], height, width)}
    if "cross_attention_dim" in config:
        shapes["encoder_hidden_states"] = (batch, tokens, config["cross_attention_dim"])
    if config.get("time_cond_proj_dim"):
        shapes["timestep_cond"] = (batch, config["time_cond_proj_dim"])
    if config.get("addition_embed_type") == "text_time":
        # six micro-conditions are embedded and joined with the pooled text
        times = 6 * config["addition_time_embed_dim"]
        shapes["text_embeds"] = (batch, config["projection_class_embeddings_input_dim"] - times)
        shapes["time_ids"] = (batch, 6)
    return shapes


def locate(place: str | Path) -> dict[str, str]:
    """Sources of a subject by runtime: the U-Nets of an artifacts folder, or a PyTorch model.

    Raises `UnknownModel` or `Unsupported` for anything else, `MissingExtra` without a runtime.
    """
    found = artifacts_in(Path(place)) or {"pytorch": models.locate(str(place))}
    missing = [name for name in found if util.find_spec(RUNTIMES[name].package) is None]
    for name in missing:
        needed = (
            f"{place} needs {RUNTIMES[name].package}, which is not installed: "
            f"pip install 'laptop-diff[{RUNTIMES[name].extra}]'"
        )
        if len(missing) == len(found):
            raise MissingExtra(needed)
        say(f"bench: {needed}. It is left out.")
    return {name: source for name, source in found.items() if name not in missing}


def artifacts_in(folder: Path) -> dict[str, str]:
    """The U-Nets in an artifacts folder that can be timed, by runtime."""
    found = {}
    for runtime, names in ARTIFACTS.values():
        if files := [folder / name for name in names if (folder / name).is_file()]:
            found[runtime] = str(files[0])
    return found


def shapes_of(source: str, batch: int, tokens: int) -> Shapes:
    """Shapes of a U-Net's inputs but the timestep; those of a program are fixed."""
    path = Path(source)
    if path.suffix != ".pte":
        return unet_shapes(read_config(source), batch, tokens)
    rows = read_json(path.parent.parent / "artifacts.json")["artifacts"]
    row = next(row for row in rows if row["file"] == f"{path.parent.name}/{path.name}")
    return {name: tuple(shape) for name, shape in row["shapes"].items() if name != "timestep"}


def read_config(source: str) -> dict[str, Any]:
    """The U-Net's config beside an .onnx file, in a model's folder, or from the Hub's cache."""
    path = Path(source)
    if path.suffix == ".onnx":
        return read_json(path.with_name("config.json"))
    if path.is_dir():
        return read_json(path / "unet" / "config.json")
    from diffusers import UNet2DConditionModel

    return dict(UNet2DConditionModel.load_config(source, subfolder="unet"))


def read_tokens(source: str) -> int | None:
    """How many tokens the text encoder beside the U-Net gives; None when there is none."""
    path = Path(source)
    root = path.parent.parent if path.suffix == ".onnx" else path
    config = root / "text_encoder" / "config.json"
    if not config.is_file():
        return None
    tokens = read_json(config).get("max_position_embeddings")
    return tokens if isinstance(tokens, int) else None


def check_same_shapes(by_subject: Mapping[str, Shapes]) -> None:
    """Raise `BadInput` unless all subjects take the same inputs, or no ratio would mean a thing."""
    first, *others = by_subject.items()
    for name, shapes in others:
        if shapes != first[1]:
            raise BadInput(
                f"{first[0]} takes {json.dumps(first[1])}, {name} takes {json.dumps(shapes)}: "
                "their latencies cannot be compared. Bench models of one resolution and kind."
            )


def usable_threads() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def device_name() -> str:
    """This machine's processor, as people name it."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = (line.partition(":") for line in cpuinfo.read_text().splitlines())
        name = next((value.strip() for key, _, value in lines if "model name" in key), name)
    return f"{name}, {os.cpu_count()} cores"
