"""ONNX files of every precision and kind of shape, and what is done with their weights."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from laptop import models
from laptop.errors import BadInput
from laptop.export import components, inputs, onnx_graph, onnx_weights, runtimes, to_onnx
from laptop.export.job import Job, save_examples
from laptop.export.metrics import psnr
from laptop.export.settings import ExportConfig, OnnxConfig

PROMPTS = ["a large red circle on white"]
FLOORS = {"fp32": 60, "fp16": 40, "int8": 30}


@pytest.fixture(scope="module")
def recorded(pruned_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What every component of the pruned model gets while it samples, in files."""
    folder = tmp_path_factory.mktemp("recorded")
    pipe = models.load_pipeline(str(pruned_folder))
    for name, rows in inputs.record(pipe, PROMPTS, seed=0, steps=3).items():
        save_examples(rows, folder / f"{name}.safetensors")
    return folder


@pytest.fixture
def job(pruned_folder: Path, recorded: Path, tmp_path: Path) -> Job:
    """The pruned U-Net, of the shipped class, in fp32."""
    path, given = tmp_path / "model.onnx", recorded / "unet.safetensors"
    return Job("onnx", "unet", "fp32", str(pruned_folder), given, path, ExportConfig())


def lowest_psnr(job: Job) -> float:
    """Of all outputs of all examples against PyTorch in fp32."""
    graph, run = components.load(job.model, job.component), runtimes.onnx_runner(job.path)
    found = []
    for example in job.examples():
        got = run({name: example[name].numpy() for name in graph.inputs})
        for name, value in components.run(graph, example).items():
            found.append(psnr(value.numpy(), got[name]))
    return min(found)


def weights(path: Path) -> dict[str, np.ndarray]:
    return {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}


@pytest.mark.parametrize("precision", list(FLOORS))
@pytest.mark.parametrize("component", ["unet", "text_encoder_2"])
def test_every_precision_reaches_its_floor(
    precision: str, component: str, job: Job, recorded: Path
) -> None:
    given = recorded / f"{component}.safetensors"
    job = replace(job, component=component, precision=precision, inputs=given)
    to_onnx.export(job)
    assert lowest_psnr(job) >= FLOORS[precision]


def test_a_stock_unet_is_exported_too(job: Job, tiny_folder: Path) -> None:
    job = replace(job, model=str(tiny_folder))
    to_onnx.export(job)
    assert lowest_psnr(job) >= 60


def test_fp16_is_throughout_but_for_time_and_sizes(job: Job) -> None:
    job = replace(job, precision="fp16")
    to_onnx.export(job)
    graph = onnx.load(job.path).graph
    types = {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.output)}
    fine = {name for name, kind in types.items() if kind == onnx.TensorProto.FLOAT}
    assert fine == {"timestep", "time_ids"}
    assert {array.dtype.name for array in weights(job.path).values()} == {"float16"}


def test_large_weights_lie_in_one_file_beside_the_graph(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    to_onnx.export(job)
    inside = weights(job.path)
    assert {p.name for p in job.path.parent.iterdir()} == {"model.onnx", "config.json"}
    monkeypatch.setattr(onnx_weights, "INLINE_BYTES", 0)
    to_onnx.export(job)
    assert job.path.stat().st_size < 1_500_000
    assert job.path.with_name("model.onnx_data").stat().st_size > 5_000_000
    beside = weights(job.path)
    assert set(beside) == set(inside)
    assert all(np.array_equal(beside[name], inside[name]) for name in inside)
    assert lowest_psnr(job) >= 60


def test_every_weight_of_the_model_is_in_the_file_once(job: Job) -> None:
    to_onnx.export(job)
    unet = models.load_unet(job.model)
    saved = weights(job.path)
    for name, value in unet.state_dict().items():
        array = saved.pop(f"unet.{name}")
        same = value if value.shape == array.shape and np.array_equal(value, array) else value.T
        assert np.array_equal(same, array), name
    assert not saved


def test_weights_in_eight_bits_are_the_nearest(job: Job) -> None:
    job = replace(job, precision="int8")
    to_onnx.export(job)
    saved, unet = weights(job.path), models.load_unet(job.model).state_dict()
    checked = 0
    for name, codes in saved.items():
        if not name.endswith(".int8"):
            continue
        name = name.removesuffix(".int8")
        weight = unet[name.removeprefix("unet.")].numpy()
        is_transposed = codes.shape != weight.shape or not close(weight, codes, saved, name)
        weight = weight.T if is_transposed else weight
        axis = 1 if is_transposed else 0
        scale = np.expand_dims(saved[f"{name}.scale"], [i for i in range(weight.ndim) if i != axis])
        assert np.abs(codes * scale - weight).max() <= 0.5001 * scale.max(), name
        checked += weight.size
    assert checked > 0.9 * sum(v.numel() for v in unet.values())


def close(weight: np.ndarray, codes: np.ndarray, saved: dict[str, Any], name: str) -> bool:
    """Whether the codes are of the weight as it is, with a scale for each of its rows."""
    scale = saved[f"{name}.scale"].reshape(-1, *[1] * (weight.ndim - 1))
    return len(scale) == len(weight) and bool(np.abs(codes * scale - weight).max() < scale.max())


def test_static_shapes_are_those_that_were_sampled(job: Job) -> None:
    job = replace(job, config=ExportConfig(onnx=OnnxConfig(shapes="static")))
    to_onnx.export(job)
    graph = onnx.load(job.path).graph
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in graph.input}
    assert shapes == {
        "sample": [2, 4, 8, 8],
        "timestep": [],
        "encoder_hidden_states": [2, 16, 128],
        "text_embeds": [2, 64],
        "time_ids": [2, 6],
    }
    assert [d.dim_value for d in graph.output[0].type.tensor_type.shape.dim] == [2, 4, 8, 8]
    assert lowest_psnr(job) >= 60
    example = {name: value.numpy() for name, value in job.examples()[0].items()}
    with pytest.raises(BadInput, match="does not fit"):
        runtimes.onnx_runner(job.path)(example | {"sample": np.zeros((2, 4, 16, 16), np.float32)})


@pytest.mark.parametrize("component", ["vae_decoder", "vae_encoder", "text_encoder_2"])
def test_static_graphs_declare_every_shape_and_compute_none(
    component: str, job: Job, recorded: Path
) -> None:
    given = recorded / f"{component}.safetensors"
    static = ExportConfig(onnx=OnnxConfig(shapes="static"))
    job = replace(job, component=component, inputs=given, config=static)
    to_onnx.export(job)
    graph = onnx.load(job.path).graph
    expected = components.run(components.load(job.model, component), job.examples()[0])
    shapes = {o.name: [d.dim_value for d in o.type.tensor_type.shape.dim] for o in graph.output}
    assert shapes == {name: list(value.shape) for name, value in expected.items()}
    assert not [node for node in graph.node if node.op_type == "Shape"]
    assert lowest_psnr(job) >= 60


def test_a_large_unet_is_traced_without_its_weights() -> None:
    graph = components.empty("random:sd15")
    example = {
        "sample": torch.zeros(2, 4, 64, 64),
        "timestep": torch.tensor(500.0),
        "encoder_hidden_states": torch.zeros(2, 77, 768),
    }
    traced = onnx_graph.trace(graph, "unet", example, torch.float16, onnx_graph.OPSET)
    params = sum(np.prod(list(s.shape)) for s in graph.module.state_dict().values())
    assert params == 859_520_964
    assert traced.ByteSize() < 2_000_000
