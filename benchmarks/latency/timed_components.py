"""The components of a model or of a folder of artifacts, and the shapes of their inputs."""

import math
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, NotRequired, TypedDict, cast

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
# runtimes by the targets that can be timed
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
    """A component of a subject, to be timed in one runtime."""

    component: str
    runtime: str
    target: str
    source: str
    precision: str = "fp32"
    shapes: Shapes | None = None  # of the inputs, as recorded when it was exported
    picture: Size | None = None  # pixels, if they were asked for; None: the model's own
    pixels_per_latent: int | None = None  # None: not known
    params: int | None = None  # None: not known


def is_timed(folder: Path, refused: Collection[str]) -> bool:
    """Whether a folder holds artifacts that a device can time, which refuses some targets."""
    return (folder / LIST).is_file() and any(
        artifact.target in RUNS and artifact.target not in refused
        for artifact in read_list(folder).artifacts
    )


def timed_components(source: str | Path, wanted: Sequence[str]) -> list[TimedComponent]:
    """The wanted components of artifacts, of another tool's ONNX export, or of a PyTorch model."""
    folder = Path(source)
    if (folder / LIST).is_file():
        return list(_of_artifacts(folder, wanted))
    return list(_of_graphs(folder, wanted)) or list(_of_model(str(source), wanted))


def _of_artifacts(folder: Path, wanted: Sequence[str]) -> Iterator[TimedComponent]:
    """Components in a folder of our artifacts."""
    listed = read_list(folder)
    for artifact in listed.artifacts:
        if artifact.target in RUNS and artifact.component in wanted:
            check_file(folder / artifact.file)
            yield TimedComponent(
                component=artifact.component,
                runtime=RUNS[artifact.target],
                target=artifact.folder,
                source=str(folder / artifact.file),
                precision=artifact.precision,
                shapes=dict(artifact.shapes) if artifact.shapes else None,
                picture=listed.picture_size,
                pixels_per_latent=listed.pixels_per_latent,
                params=artifact.params,
            )


def _of_graphs(folder: Path, wanted: Sequence[str]) -> Iterator[TimedComponent]:
    """Components in the folder of another tool's ONNX export."""
    for name in wanted:
        for part in (folder / "onnx" / name, folder / name):
            if (part / GRAPH).is_file():
                yield TimedComponent(
                    component=name,
                    runtime="onnxruntime",
                    target="onnx",
                    source=str(part / GRAPH),
                    precision=graph_precision(part / GRAPH),
                    pixels_per_latent=pixels_per_latent(part.with_name("vae_decoder")),
                )
                break


def _of_model(model: str, wanted: Sequence[str]) -> Iterator[TimedComponent]:
    """Components of a PyTorch model."""
    source = locating.locate(model)
    index = read_json(locating.folder(model) / "model_index.json") if len(wanted) > 1 else {}
    root = locating.folder(model) if len(wanted) > 1 else Path(source)
    scale = pixels_per_latent(root / "vae")
    for name in wanted:
        part = "vae" if name.startswith("vae_") else name
        if name == "unet" or (index.get(part) or [None])[0] is not None:
            yield TimedComponent(name, "pytorch", "pytorch", source, pixels_per_latent=scale)


@cache
def graph_precision(path: Path) -> str:
    """The precision of most weights of an ONNX graph that no list describes, such as `fp16`.

    Raises `BadInput` for a file that is no ONNX graph, or a hostile one.
    """
    import onnx

    graph = read_graph(path).graph
    for node in graph.node:
        if node.op_type in QUANTIZED:
            return QUANTIZED[node.op_type]
    sizes: Counter[str] = Counter()
    for weights in graph.initializer:
        if kind := FLOATS.get(onnx.TensorProto.DataType.Name(weights.data_type)):
            sizes[kind] += math.prod(weights.dims)
    return sizes.most_common(1)[0][0] if sizes else "unknown"


def shapes_of(
    part: TimedComponent, guidance: bool, tokens: int, pixels: Size | None = None
) -> Shapes:
    """Shapes of a component's inputs, from its config and that of the same model's U-Net."""
    if part.component.startswith("text_"):
        return {"input_ids": (1, read_tokens(part) or tokens)}
    unet = unet_config(part)
    height, width = native_size(unet)
    if part.component != "unet":
        vae = vae_config(part, part.component)
        scale = latent_pixels(vae)
        height, width = (side // scale for side in pixels) if pixels else (height, width)
        if part.component == "vae_decoder":
            return {"latent_sample": (1, vae["latent_channels"], height, width)}
        return {"sample": (1, vae["in_channels"], scale * height, scale * width)}
    if pixels:
        scale = latent_pixels(vae_config(part, "vae_decoder"))
        height, width = (side // scale for side in pixels)
    is_guided = guidance and "cross_attention_dim" in unet  # by text only
    halves = 2 if is_guided and not unet.get("time_cond_proj_dim") else 1
    return input_shapes({**unet, "sample_size": (height, width)}, tokens, halves)


def unet_config(part: TimedComponent) -> UnetConfig:
    """The config.json of the U-Net of a component's model."""
    if part.target == "pytorch":
        return cast(UnetConfig, locating.unet_config(part.source))
    return read_record(Path(part.source).parent.with_name("unet") / "config.json", UnetConfig)


def vae_config(part: TimedComponent, component: str) -> VaeConfig:
    """The config.json of the VAE of a component's model, or of the half that was exported."""
    if part.target == "pytorch":
        return read_record(locating.folder(part.source) / "vae" / "config.json", VaeConfig)
    return read_record(Path(part.source).parent.with_name(component) / "config.json", VaeConfig)


def read_tokens(part: TimedComponent) -> int | None:
    """How many tokens of a prompt the component's model reads; None if its files do not say."""
    root = Path(part.source)
    if part.target != "pytorch":
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
