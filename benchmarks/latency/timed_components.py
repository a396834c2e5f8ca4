"""The components of a model or of a folder of artifacts, and the shapes of their inputs."""

import math
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict

from laptop.benchmarks.bench_report import Text
from laptop.benchmarks.devices.device import Shapes
from laptop.export.artifact_list import LIST, pixels_per_latent, read_list
from laptop.export.targets import TARGETS
from laptop.export.to_onnx.onnx_checks import check_file, read_graph
from laptop.fields import Length, Name, Range
from laptop.files import read_json
from laptop.models import locating
from laptop.models.shapes import Size, input_shapes, latent_pixels, native_size
from laptop.records import read_record

GRAPH = "model.onnx"
QUANTIZED = {  # operators of graphs with whole numbers for weights
    **dict.fromkeys(("DequantizeLinear", "MatMulInteger", "ConvInteger"), "int8"),
    "MatMulNBits": "int4",
}
FLOATS = {"FLOAT": "fp32", "FLOAT16": "fp16", "BFLOAT16": "bf16"}
RUNS = {name: target.runtime for name, target in TARGETS.items() if target.runtime}
Pixels = Annotated[int, Range(1, 1 << 20)]  # or channels
Channels = Annotated[list[Pixels], Length(10)]


class UnetConfig(TypedDict):
    """config.json of a U-Net, as far as the shapes of its inputs follow from it."""

    in_channels: Pixels
    sample_size: Pixels | tuple[Pixels, Pixels]
    cross_attention_dim: NotRequired[Pixels | list[Pixels] | None]
    encoder_hid_dim: NotRequired[Pixels | None]
    down_block_types: NotRequired[list[Name]]
    mid_block_type: NotRequired[Text | None]
    time_cond_proj_dim: NotRequired[Pixels | None]
    addition_embed_type: NotRequired[Text | None]
    addition_time_embed_dim: NotRequired[Pixels | None]
    projection_class_embeddings_input_dim: NotRequired[Pixels | None]


class VaeConfig(TypedDict):
    """config.json of a VAE, as far as the shapes of its inputs follow from it."""

    in_channels: Pixels
    latent_channels: Pixels
    block_out_channels: NotRequired[Channels | None]
    decoder_block_out_channels: NotRequired[Channels | None]


class TextConfig(TypedDict):
    """config.json of a text encoder."""

    max_position_embeddings: NotRequired[Annotated[int, Range(1, 100_000)] | None]


class TokenizerConfig(TypedDict):
    """tokenizer_config.json."""

    model_max_length: NotRequired[Annotated[int, Range(1, 100_000)] | None]


@dataclass(frozen=True)
class TimedComponent:
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


def is_timed(folder: Path, refused: Collection[str]) -> bool:
    """Whether a folder of artifacts holds some that a device can time, which refuses these."""
    return (folder / LIST).is_file() and any(
        artifact.target in RUNS and artifact.target not in refused
        for artifact in read_list(folder).artifacts
    )


def timed_components(place: str | Path, wanted: Sequence[str]) -> Iterator[TimedComponent]:
    """Components in an artifacts folder, ours or another ONNX export, or of a PyTorch model."""
    folder = Path(place)
    if (folder / LIST).is_file():
        listed = read_list(folder)
        for artifact in listed.artifacts:
            if artifact.target in RUNS and artifact.component in wanted:
                check_file(folder / artifact.file)
                yield TimedComponent(
                    artifact.component,
                    RUNS[artifact.target],
                    artifact.folder,
                    str(folder / artifact.file),
                    artifact.precision,
                    dict(artifact.shapes) if artifact.shapes else None,
                    listed.picture_size,
                    listed.pixels_per_latent,
                    artifact.params,
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
                yield TimedComponent(
                    name, "onnxruntime", "onnx", path, precision, pixels_per_latent=scale
                )
        return
    source = locating.locate(str(place))
    index = read_json(locating.folder(str(place)) / "model_index.json") if len(wanted) > 1 else {}
    root = locating.folder(str(place)) if len(wanted) > 1 else Path(source)
    scale = pixels_per_latent(root / "vae")
    for name in wanted:
        part = "vae" if name.startswith("vae_") else name
        if name == "unet" or (index.get(part) or [None])[0] is not None:
            yield TimedComponent(name, "pytorch", "pytorch", source, pixels_per_latent=scale)


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


def shapes_of(
    one: TimedComponent, guidance: bool, tokens: int, pixels: Size | None = None
) -> Shapes:
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


def config_of(one: TimedComponent, component: str) -> dict[str, Any]:
    """The config.json of a component of the same model."""
    if one.target == "pytorch":
        if component == "unet":
            return locating.unet_config(one.source)
        part = "vae" if component.startswith("vae_") else component
        path = locating.folder(one.source) / part / "config.json"
    else:
        path = Path(one.source).parent.with_name(component) / "config.json"
    kind: Any = UnetConfig if component == "unet" else VaeConfig
    config: dict[str, Any] = read_record(path, kind)
    return config


def read_tokens(one: TimedComponent) -> int | None:
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
