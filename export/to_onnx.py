"""ONNX of every component in optimum's folder layout, and the way back: an ONNX Runtime pipeline.

    unet/model.onnx  text_encoder*/  vae_encoder/  vae_decoder/   each with its config.json
    tokenizer*/  scheduler/  model_index.json

Traced with TorchScript (`dynamo=False`): of torch 2.13's two exporters the other takes tens of
seconds for a U-Net of a few million weights, this one two, with the same outputs. Batch and picture
size are dynamic, so that guidance, several pictures and other resolutions work.
"""

import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

import onnx
import torch

from laptop import models
from laptop.errors import BadInput, MissingExtra
from laptop.export import runtimes
from laptop.export.components import Graph, folder_of
from laptop.export.components import load as load_graph
from laptop.export.job import Job
from laptop.export.runtimes import Runner
from laptop.export.targets import VERIFIED

OPSET = 18
MODEL, DATA = "model.onnx", "model.onnx_data"
BATCH = {0: "batch_size"}
NEEDED = ("unet", "text_encoder", "vae_decoder")  # to generate a picture


def export(job: Job) -> None:
    """Write the component of `job`, and its config beside it.

    Weights lie beside the graph, in `model.onnx_data`, only where one file would pass protobuf's
    limit of 2 GB.
    """
    traced = load_graph(job.model, job.component)
    _write_graph(traced, job.component, job.examples()[0], job.path.parent)
    source = models.folder(job.model) / folder_of(job.component) / "config.json"
    shutil.copy(source, job.path.parent)


def complete(model: str, folder: Path) -> None:
    """What a pipeline needs beside its networks."""
    source = models.folder(model)
    for name in ("tokenizer", "tokenizer_2", "scheduler", "feature_extractor"):
        if (source / name).is_dir():
            shutil.copytree(source / name, folder / name)
    shutil.copy(source / "model_index.json", folder)


def load(path: Path) -> Runner:
    """An ONNX file on the CPU, as `runtimes.onnx_runner` gives it."""
    return runtimes.onnx_runner(path)


def checked() -> str | None:
    """ONNX Runtime runs everywhere."""
    return VERIFIED


def _write_graph(
    traced: Graph, component: str, example: dict[str, torch.Tensor], folder: Path
) -> None:
    # the tracer's warnings are about the values of shapes: the dynamic-shape test is the proof
    with tempfile.TemporaryDirectory(dir=folder) as raw, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            traced.module,
            tuple(example[name] for name in traced.inputs),
            str(Path(raw) / MODEL),
            dynamo=False,
            opset_version=OPSET,
            input_names=list(traced.inputs),
            output_names=list(traced.outputs),
            dynamic_axes=dynamic_axes(component, traced),
        )
        _gather(Path(raw), folder)


def dynamic_axes(component: str, traced: Graph) -> dict[str, dict[int, str]]:
    """Axis names as optimum writes them; it computes output shapes from such as "height * 8"."""
    factor = 1
    if component.startswith("vae_"):
        factor = 2 ** (len(traced.module.vae.config.block_out_channels) - 1)

    def picture(name: str, scale: str = "") -> dict[int, str]:
        return BATCH | {2: f"{name}height{scale}", 3: f"{name}width{scale}"}

    special: dict[str, dict[str, dict[int, str]]] = {
        "unet": {
            "sample": picture(""),
            "timestep": {},
            "encoder_hidden_states": BATCH | {1: "sequence_length"},
            "out_sample": picture(""),
        },
        "vae_encoder": {
            "sample": picture("sample_"),
            "latent_parameters": picture("sample_", f" / {factor}"),
        },
        "vae_decoder": {
            "latent_sample": picture("latent_"),
            "sample": picture("latent_", f" * {factor}"),
        },
    }
    known = special.get(component, {})
    return {name: known.get(name, BATCH) for name in (*traced.inputs, *traced.outputs)}


def _gather(raw: Path, folder: Path) -> None:
    """Move the export from `raw`; the many weight files of one above 2 GB become a single one."""
    if len(list(raw.iterdir())) == 1:
        (raw / MODEL).replace(folder / MODEL)
        return
    model = onnx.load(str(raw / MODEL))
    onnx.save_model(model, str(folder / MODEL), save_as_external_data=True, location=DATA)


def load_pipeline(artifacts: Path) -> Any:
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
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # it uses torch.jit.script
            from optimum.onnxruntime import ORTDiffusionPipeline
    except ImportError as e:
        raise MissingExtra(
            f"running ONNX artifacts as a pipeline needs optimum ({e}): "
            "pip install 'laptop-diff[onnx,optimum]'"
        ) from e
    pipe = ORTDiffusionPipeline.from_pretrained(folder, export=False)
    for encoder in (pipe.text_encoder, getattr(pipe, "text_encoder_2", None)):
        if encoder is not None:  # optimum 2.1 looks here, which diffusers has deprecated
            encoder.num_hidden_layers = encoder.config.num_hidden_layers
    pipe.set_progress_bar_config(disable=True)
    return pipe
