"""What is to be timed: the components of models and of artifacts' folders, as workloads.

Inputs have the shapes that were recorded when an artifact was made, where it says so, and else
those that the components' own `config.json` gives.
"""

import json
import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from laptop import models
from laptop.benchmarks.devices.device import Facts, Shapes, Workload
from laptop.benchmarks.documents import TextConfig, TokenizerConfig, UnetConfig, VaeConfig
from laptop.console import say
from laptop.errors import BadInput, MissingExtra
from laptop.export.artifacts import (
    LIST,
    listed_pixels_per_latent,
    picture_size,
    pixels_per_latent,
    read_list,
)
from laptop.export.onnx_runner import check_file
from laptop.export.settings import COMPONENTS
from laptop.export.to_onnx.onnx_checks import read_graph
from laptop.files import read_json, shown
from laptop.models.shapes import Size, input_shapes, latent_pixels, native_size
from laptop.records import read_record

GRAPH = "model.onnx"
QUANTIZED = {  # operators of graphs with whole numbers for weights
    **dict.fromkeys(("DequantizeLinear", "MatMulInteger", "ConvInteger"), "int8"),
    "MatMulNBits": "int4",
}
FLOATS = {"FLOAT": "fp32", "FLOAT16": "fp16", "BFLOAT16": "bf16"}
IMAGE = ("text_encoder", "text_encoder_2", "unet", "vae_decoder")  # what an image needs
CLIP_TOKENS = 77  # what SD and SDXL take; used where no text encoder lies beside the U-Net
RUNS = {  # targets that can be timed, and where
    "onnx": "onnxruntime",
    "ort": "onnxruntime",
    "executorch": "executorch",
    "tensorrt": "tensorrt",
    "coreml": "coreml",
}
IMPORTS = {  # before the clock of the first load starts
    "pytorch": ("torch", "diffusers.models.unets.unet_2d_condition"),
    "onnxruntime": ("onnxruntime",),
    "executorch": ("executorch.runtime",),
}
FIXED = ("executorch", "tensorrt", "coreml")  # runtimes of artifacts that may take one shape only
EXTRAS = {"onnxruntime": "onnx", "executorch": "executorch"}  # of ours, which install a runtime
Places = str | Path | Sequence[str | Path]


@dataclass(frozen=True)
class Found:
    """A component of a subject."""

    component: str
    runtime: str
    target: str
    source: str
    precision: str = "fp32"
    shapes: Shapes | None = None  # recorded ones
    picture: Size | None = None  # pixels, where they were asked for; None: the model's own
    pixels_per_latent: int | None = None  # None: not known
    params: int | None = None  # likewise


def workloads(
    subjects: Mapping[str, Places],
    components: Sequence[str],
    facts: Facts,
    *,
    unet_only: Collection[str] = (),
    refused: Collection[str] = (),
    runtimes: Sequence[str] = (),
    guidance: bool = True,
    size: Size | None = None,
    threads: int | None = None,
    seed: int = 0,
) -> list[Workload]:
    """One workload for each component of each subject and runtime, checked before anything runs.

    Of the labels in `unet_only` no other component is timed, of targets in `refused` none.
    `runtimes` are those asked for; none: all that the device has, on its processor. Raises
    `BadInput` for subjects that cannot be compared, `MissingExtra` where no runtime is there,
    `UnknownModel` for what is no model.
    """
    if not components or (unknown := set(components) - set(COMPONENTS)):
        named = ", ".join(sorted(unknown)) if components else "nothing"
        raise BadInput(f"cannot bench {shown(named)}; components are {', '.join(COMPONENTS)}.")
    found: dict[tuple[str, str, str, str], Found] = {}
    for label, places in subjects.items():
        wanted = [c for c in components if c == "unet" or label not in unet_only]
        if not wanted:
            say(f"bench: {label} is left out: of it, only the U-Net is timed.")
            continue
        for place in [places] if isinstance(places, str | Path) else places:
            there = [c for c in _components(place, wanted) if _kind(c.target) not in refused]
            for one in _on_device(place, there, facts, runtimes):
                key = (label, one.component, one.runtime, one.target)
                if (other := found.setdefault(key, one)) != one:
                    raise BadInput(
                        f"{label!r} names two models for {one.runtime}: {other.source} and "
                        f"{one.source}."
                    )
    _check_asked(subjects, components, runtimes, list(found.values()), {k[0] for k in found})
    tokens = next((t for one in found.values() if (t := read_tokens(one))), CLIP_TOKENS)
    pixels = size or next((one.picture for one in found.values() if one.picture), None)
    made = [
        Workload(
            label,
            one.component,
            one.runtime,
            one.target,
            one.source,
            _guided(one, guidance) if one.shapes else shapes_of(one, guidance, tokens, pixels),
            one.precision,
            threads or facts.cores or 1,
            seed,
            _settings(one.runtime.partition(":")[0]),
            one.pixels_per_latent,
            one.params,
        )
        for (label, *_), one in found.items()
    ]
    check_same_shapes(made)
    return made


def _check_asked(
    subjects: Collection[str],
    components: Sequence[str],
    runtimes: Sequence[str],
    found: Sequence[Found],
    labels: Collection[str],
) -> None:
    """Raise `BadInput` for what was asked for by name and is not there."""
    if runtimes and (without := [label for label in subjects if label not in labels]):
        raise BadInput(
            f"{', '.join(without)} has nothing that runs in {', '.join(runtimes)}: export it for "
            "that runtime first, or leave --runtime out."
        )
    there = {one.component for one in found}
    if tuple(components) != IMAGE and (missing := [c for c in components if c not in there]):
        raise BadInput(f"there is no {', '.join(missing)} to bench; there are {sorted(there)}.")


def is_timed(folder: Path, refused: Collection[str]) -> bool:
    """Whether a folder of artifacts holds some that a device can time, which refuses these."""
    return (folder / LIST).is_file() and any(
        row["target"] in RUNS and row["target"] not in refused for row in read_list(folder)
    )


def _kind(folder: str) -> str:
    """The target of its folder, which has the precision: onnx of onnx-fp16."""
    return folder.partition("-")[0]


def _settings(runtime: str) -> dict[str, Any]:
    own = {"loader": "laptop.benchmarks.devices.eager:load"} if runtime == "pytorch" else {}
    return {"imports": IMPORTS.get(runtime, ()), **own}


def _components(place: str | Path, wanted: Sequence[str]) -> Iterator[Found]:
    """Components in an artifacts folder, ours or another ONNX export, or of a PyTorch model."""
    folder = Path(place)
    if (folder / LIST).is_file():
        rows, size = read_list(folder), picture_size(folder)
        scale = listed_pixels_per_latent(folder)
        for row in rows:
            if row["target"] in RUNS and row["component"] in wanted:
                check_file(folder / row["file"], row["target"])
                shapes = row.get("shapes")
                yield Found(
                    row["component"],
                    RUNS[row["target"]],
                    Path(row["file"]).parts[0],
                    str(folder / row["file"]),
                    row["precision"],
                    {k: tuple(v) for k, v in shapes.items()} if shapes else None,
                    size,
                    scale,
                    row.get("params"),
                )
        return
    graphs = {
        name: next(
            (p for p in (folder / "onnx" / name, folder / name) if (p / GRAPH).is_file()),
            None,
        )
        for name in wanted
    }
    if any(graphs.values()):
        for name, graph in graphs.items():
            if graph:
                scale = pixels_per_latent(graph.with_name("vae_decoder"))
                path, precision = str(graph / GRAPH), graph_precision(graph / GRAPH)
                yield Found(name, "onnxruntime", "onnx", path, precision, pixels_per_latent=scale)
        return
    source = models.locate(str(place))
    index = read_json(models.folder(str(place)) / "model_index.json") if len(wanted) > 1 else {}
    root = models.folder(str(place)) if len(wanted) > 1 else Path(source)
    scale = pixels_per_latent(root / "vae")
    for name in wanted:
        part = "vae" if name.startswith("vae_") else name
        if name == "unet" or (index.get(part) or [None])[0] is not None:
            yield Found(name, "pytorch", "pytorch", source, pixels_per_latent=scale)


@cache
def graph_precision(path: Path) -> str:
    """The precision of most weights of an ONNX graph that no list describes, such as `fp16`.

    Raises `BadInput` for what is no ONNX graph, or a hostile one.
    """
    import onnx

    graph = read_graph(path).graph
    if found := [QUANTIZED[node.op_type] for node in graph.node if node.op_type in QUANTIZED]:
        return found[0]
    sizes: Counter[str] = Counter()
    for weights in graph.initializer:
        if kind := FLOATS.get(onnx.TensorProto.DataType.Name(weights.data_type)):
            sizes[kind] += math.prod(weights.dims)
    return sizes.most_common(1)[0][0] if sizes else "unknown"


def _on_device(
    place: str | Path, found: Sequence[Found], facts: Facts, runtimes: Sequence[str]
) -> Iterator[Found]:
    """Those that can run on the device, by the runtimes that are asked for."""
    there = facts.runtimes
    if missing := [r for r in runtimes if r not in there]:
        raise BadInput(f"{', '.join(missing)} is not on {facts.name}; there are {_listed(there)}.")
    made = []
    lost = set()
    for one in found:
        asked = [r for r in runtimes if r.partition(":")[0] == one.runtime]
        for runtime in asked if runtimes else [one.runtime]:
            if runtime in there:
                made.append(Found(**{**vars(one), "runtime": runtime}))
            else:
                lost.add(runtime)
    for runtime in sorted(lost):
        needed = f"{place} needs {runtime}, which is not installed on {facts.name}"
        if facts.how_to:
            needed += f": {facts.how_to}"
        elif runtime in EXTRAS:
            needed += f": pip install 'laptop-diff[{EXTRAS[runtime]}]'"
        if not made:
            raise MissingExtra(f"{needed}. There are {_listed(there)}.")
        say(f"bench: {needed}. It is left out.")
    if not made and not runtimes:
        raise BadInput(
            f"{place} holds nothing that can be timed: no component for {', '.join(RUNS)}."
        )
    yield from made


def _listed(runtimes: Mapping[str, str]) -> str:
    return ", ".join(f"{k} {v}" for k, v in runtimes.items()) or "none"


def _guided(one: Found, guidance: bool) -> Shapes:
    """Recorded shapes: of two rows with guidance, of one without it or where it is embedded."""
    assert one.shapes
    batch, rows = (one.shapes.get("sample") or (0,))[0], 2 if guidance else 1
    is_embedded = "timestep_cond" in one.shapes
    if one.component != "unet" or batch == rows or one.runtime in FIXED or is_embedded:
        return one.shapes
    return {
        k: (rows, *shape[1:]) if shape[:1] == (batch,) else shape for k, shape in one.shapes.items()
    }


def shapes_of(one: Found, guidance: bool, tokens: int, pixels: Size | None = None) -> Shapes:
    """Shapes of a component's inputs, from its config and that of the U-Net beside it."""
    if one.component.startswith("text_"):
        return {"input_ids": (1, read_tokens(one) or tokens)}
    config = config_of(one, "unet")
    height, width = native_size(config)
    if pixels or one.component != "unet":
        vae = config_of(one, "vae_decoder" if one.component == "unet" else one.component)
        scale = latent_pixels(vae)
        height, width = (side // scale for side in pixels) if pixels else (height, width)
    match one.component:
        case "vae_decoder":
            return {"latent_sample": (1, vae["latent_channels"], height, width)}
        case "vae_encoder":
            return {"sample": (1, vae["in_channels"], scale * height, scale * width)}
    is_guided = guidance and "cross_attention_dim" in config  # by text only
    halves = 2 if is_guided and not config.get("time_cond_proj_dim") else 1
    return input_shapes({**config, "sample_size": (height, width)}, tokens, halves)


def config_of(one: Found, component: str) -> dict[str, Any]:
    """The config.json of a component of the same model."""
    if one.target == "pytorch":
        if component == "unet":
            return models.unet_config(one.source)
        part = "vae" if component.startswith("vae_") else component
        path = models.folder(one.source) / part / "config.json"
    else:
        path = Path(one.source).parent.with_name(component) / "config.json"
    kind: Any = UnetConfig if component == "unet" else VaeConfig
    config: dict[str, Any] = read_record(path, kind)
    return config


def read_tokens(one: Found) -> int | None:
    """How many tokens the model of the component reads of a prompt; None when it is not told."""
    root = Path(one.source)
    if one.target != "pytorch":
        root = root.parent.parent
    for name in ("tokenizer", "tokenizer_2"):  # SDXL's refiner has the second one only
        config = root / name / "tokenizer_config.json"
        settings = read_record(config, TokenizerConfig) if config.is_file() else TokenizerConfig()
        if length := settings.get("model_max_length"):
            return length
    for name in ("text_encoder", "text_encoder_2"):
        if (config := root / name / "config.json").is_file():
            return read_record(config, TextConfig).get("max_position_embeddings")
    return None


def check_same_shapes(made: Sequence[Workload]) -> None:
    """Raise `BadInput` unless all subjects take the same inputs, but for programs of fixed ones."""
    first: dict[tuple[str, str | None], Workload] = {}
    for one in made:
        fixed = one.target if one.runtime in FIXED else None
        other = first.setdefault((one.component, fixed), one)
        if one.shapes != other.shapes:
            raise BadInput(
                f"{other.label} ({other.runtime}) takes {json.dumps(other.shapes)}, {one.label} "
                f"({one.runtime}) takes {json.dumps(one.shapes)}: their latencies cannot be "
                "compared. Bench models of one resolution and kind."
            )
