"""ONNX of every component in optimum's folder layout, and the way back: an ONNX Runtime pipeline.

    unet/model.onnx  text_encoder*/  vae_encoder/  vae_decoder/   each with its config.json
    tokenizer*/  scheduler/  model_index.json

Batch and picture size are dynamic, for servers, so that guidance, several pictures and other
resolutions work; or static, for devices, as the pipeline sampled for the examples.
"""

import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import onnx
import torch

from laptop.console import say
from laptop.errors import BadInput, MissingExtra, Unsupported
from laptop.export import components
from laptop.export.arrays import ArrayFunction
from laptop.export.closeness import psnr
from laptop.export.components import folder_of
from laptop.export.components import load as load_graph
from laptop.export.job import Job
from laptop.export.magnitudes import keep_scores_wide_
from laptop.export.targets import CALIBRATED, VERIFIED
from laptop.export.to_onnx import (
    folding,
    onnx_checks,
    onnx_graph,
    onnx_session,
    onnx_weights,
    quantization,
)
from laptop.export.to_onnx.onnx_weights import MODEL
from laptop.files import copy_folder, files_in, read_json, reason, write_json
from laptop.models import locating
from laptop.models.component_classes import check_index
from laptop.models.component_classes import components as classes_of
from laptop.models.component_fit import TOKENIZERS
from laptop.models.foreign_code import check_component
from laptop.models.model_checks import check_configs, configs_in
from laptop.models.tokenizer_trial import check_tokenizer

if TYPE_CHECKING:
    from optimum.onnxruntime import ORTDiffusionPipeline

SAME_DB = 60.0  # PSNR of a graph that was cleaned up, against itself before
NEEDED = ("unet", "text_encoder", "vae_decoder")  # to generate a picture


def export(job: Job) -> None:
    """Write the component of `job` and its config.

    Large weights are in a second file, `model.onnx_data`. In fp16 everything is of that
    precision, inputs and outputs too, but the timestep and SDXL's sizes.
    """
    make(job)
    config = read_json(locating.folder(job.model) / folder_of(job.component) / "config.json")
    if "_class_name" in config:  # of diffusers; old files leave out what optimum reads, or guesses
        config = locating.with_defaults(config)
    write_json(job.path.parent / "config.json", config)


def make(job: Job) -> None:
    """Write the graph of `job` as `[export.onnx]` wants it, and its weights."""
    if job.precision == CALIBRATED:
        with in_temporary_folder(job, precision="fp32") as plain:
            make(plain)
            quantization.quantize(plain.path, job.path, job.feeds())
        return
    config = job.config.onnx
    write(job, is_static=config.shapes == "static")
    if config.clean_up:
        with in_temporary_folder(job) as cleaned:
            write(cleaned, is_static=config.shapes == "static", clean_up=True)
            if _agree(job, cleaned):
                for file in cleaned.path.parent.iterdir():
                    file.replace(job.path.with_name(file.name))
            else:
                say(f"{job.component}: onnxslim changed what it computes; it stays as it was.")


@contextmanager
def in_temporary_folder(job: Job, precision: str | None = None) -> Iterator[Job]:
    """The job with a path in a folder of its own, which is removed at the end."""
    with tempfile.TemporaryDirectory(dir=job.path.parent) as folder:
        yield replace(job, path=Path(folder) / MODEL, precision=precision or job.precision)


def _agree(job: Job, other: Job) -> bool:
    """Whether two artifacts give the same on the first example, as far as fp32 can tell."""
    feed = next(iter(job.feeds()))
    first, second = (load(j.path)(feed) for j in (job, other))
    return all(psnr(first[name], second[name]) >= SAME_DB for name in first)


def write(
    job: Job, *, is_static: bool, clean_up: bool = False, opset: int = onnx_graph.OPSET
) -> onnx.ModelProto:
    """Write the graph of `job` and its weights to its path; returns what was written.

    Static shapes are those of the examples, and nothing is left of the arithmetic on them. In half
    precision, attention that the model's config upcasts keeps its scores in float32.
    """
    dtype = torch.float16 if job.precision == "fp16" else torch.float32
    is_unet = job.component == "unet"  # its weights are read from its files, one by one
    graph = components.empty(job.model) if is_unet else load_graph(job.model, job.component)
    if dtype == torch.float16:
        keep_scores_wide_(graph.module)
    example = job.examples()[0]
    with onnx_weights.reader(job.model, job.component, graph) as read:
        model = onnx_graph.trace(graph, job.component, example, dtype, opset)
        if is_static:
            shapes = {name: tuple(example[name].shape) for name in graph.inputs}
            onnx_graph.fix_shapes_(model, shapes)
        if clean_up:  # while the weights are not in it
            model = _slimmed(model, graph.inputs)
        is_int8 = job.precision == "int8"
        onnx_weights.write(model, len(graph.inputs), read, job.path, int8=is_int8)
    return model


def _slimmed(model: onnx.ModelProto, names: Sequence[str]) -> onnx.ModelProto:
    """The graph cleaned up by onnxslim, which drops inputs that nothing reads; they come back."""
    import onnxslim  # not with TensorRT's extra, which needs the rest of this module

    first = [value for value in model.graph.input if value.name in names]
    slim: onnx.ModelProto = onnxslim.slim(model)
    weights = [value for value in slim.graph.input if value.name not in names]
    del slim.graph.input[:]
    slim.graph.input.extend([*first, *weights])
    return slim


def complete(model: str, folder: Path) -> None:
    """Copy what a pipeline needs in addition to its networks."""
    source = locating.folder(model)
    for name in ("tokenizer", "tokenizer_2", "scheduler", "feature_extractor"):
        if (source / name).is_dir():
            copy_folder(source / name, folder / name)
    shutil.copy(source / "model_index.json", folder)


def load(path: Path) -> ArrayFunction:
    """The graph as a function, computed by ONNX Runtime on the CPU."""
    return onnx_session.load(path)


def wide_scores(path: Path) -> Callable[[str], bool]:
    """Whether the graph's softmax of an attention module reads float32."""
    return wide_modules(path).__contains__


def wide_modules(path: Path) -> set[str]:
    """The attention modules whose softmax reads float32."""
    model = folding.weightless(onnx.load(str(path), load_external_data=False))
    values = onnx.shape_inference.infer_shapes(model).graph.value_info
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    return {
        node.name.strip("/").rpartition("/")[0].replace("/", ".")
        for node in model.graph.node
        if node.op_type == "Softmax" and types.get(node.input[0]) == onnx.TensorProto.FLOAT
    }


def checked(_precision: str) -> str | None:
    """The state of an artifact that ran here: ONNX Runtime runs everywhere."""
    return VERIFIED


READ = {  # keys that optimum needs, or guesses
    "unet": {"in_channels", "sample_size"},
    "vae_decoder": {"block_out_channels", "scaling_factor"},
    "text_encoder": {"num_hidden_layers"},
    "text_encoder_2": {"num_hidden_layers", "projection_dim"},
}


def load_pipeline(artifacts: Path) -> "ORTDiffusionPipeline":
    """An ONNX Runtime pipeline (optimum's) of an artifacts folder, or of the `onnx` folder in it.

    Raises `BadInput` where a network that a picture needs was not exported, and `MissingExtra`
    without optimum.
    """
    folder = artifacts / "onnx" if (artifacts / "onnx").is_dir() else artifacts
    missing = [name for name in NEEDED if not (folder / name / MODEL).is_file()]
    if missing or not (folder / "model_index.json").is_file():
        raise BadInput(
            f"{folder} holds no whole ONNX pipeline: {', '.join(missing) or 'model_index.json'} "
            "missing. Make one with `laptop export MODEL --to onnx -o DIR`."
        )
    _check_pipeline(folder)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # it uses torch.jit.script
            from optimum.onnxruntime import ORTDiffusionPipeline
    except ImportError as e:
        raise MissingExtra(
            f"running ONNX artifacts as a pipeline needs optimum ({e}): "
            "pip install 'laptop-diff[onnx,optimum]'"
        ) from e
    try:
        pipe = ORTDiffusionPipeline.from_pretrained(folder, export=False, trust_remote_code=False)
    except onnx_session.errors(OSError, ValueError, TypeError, KeyError, RuntimeError) as e:
        raise BadInput(f"{folder} cannot be loaded ({reason(e)}). Export it again.") from None
    for encoder in (pipe.text_encoder, getattr(pipe, "text_encoder_2", None)):
        if encoder is not None:  # optimum 2.1 looks here, which diffusers has deprecated
            encoder.num_hidden_layers = encoder.config.num_hidden_layers
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _check_pipeline(folder: Path) -> None:
    """Raise for what optimum would import or read though it is none of what laptop exports."""
    index = read_json(folder / "model_index.json")
    check_index(index, str(folder))
    if (pipeline := index["_class_name"]) not in locating.WHOLE_CHAIN:
        raise Unsupported(
            f"{folder} is a {pipeline}; supported are {', '.join(locating.WHOLE_CHAIN)}."
        )
    check_component(folder)
    check_configs(index, configs_in(folder, vae="vae_decoder"), str(folder))
    names = classes_of(index)
    for encoder, tokenizer in TOKENIZERS.items():
        if tokenizer in names:
            check_tokenizer(folder / tokenizer, names[tokenizer], folder / encoder)
    for name, keys in READ.items():
        path = folder / name / "config.json"
        if path.is_file() and (missing := keys - set(read_json(path))):
            raise BadInput(f"{path} lacks {', '.join(sorted(missing))}. Export it again.")
    for file in files_in(folder):
        if file.suffix == ".onnx":
            onnx_checks.read_graph(file)
