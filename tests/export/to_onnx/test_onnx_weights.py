"""ONNX files of every precision and kind of shape, and what is done with their weights."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxslim
import pytest
import torch

from laptop.errors import BadInput
from laptop.export import components
from laptop.export.closeness import psnr
from laptop.export.job import Job
from laptop.export.settings import ExportConfig, OnnxConfig
from laptop.export.to_onnx import onnx_graph, onnx_session, onnx_weights
from laptop.export.to_onnx import target as to_onnx
from laptop.models import loading
from support.onnx_files import lowest_psnr, weights

FLOORS = {"fp32": 60, "fp16": 40, "int8": 30, "int8-qdq": 30}


@pytest.fixture(scope="module")
def exported(
    pruned_xl_folder: Path, recorded_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Job:
    """The job of `onnx_job`, done; do not change what it made."""
    inputs = recorded_folder / "unet.safetensors"
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    job = Job("onnx", "unet", "fp32", str(pruned_xl_folder), inputs, path, ExportConfig())
    to_onnx.export(job)
    return job


@pytest.mark.parametrize("precision", list(FLOORS))
@pytest.mark.parametrize("component", ["unet", "text_encoder_2"])
def test_every_precision_reaches_its_floor(
    precision: str, component: str, onnx_job: Job, recorded_folder: Path
) -> None:
    given = recorded_folder / f"{component}.safetensors"
    job = replace(onnx_job, component=component, precision=precision, inputs=given)
    to_onnx.export(job)
    assert lowest_psnr(job) >= FLOORS[precision]


def test_a_stock_unet_is_exported_too(onnx_job: Job, xl_folder: Path) -> None:
    job = replace(onnx_job, model=str(xl_folder))
    to_onnx.export(job)
    assert lowest_psnr(job) >= 60


@pytest.mark.parametrize("clean_up", [False, True])
@pytest.mark.parametrize("shapes", ["dynamic", "static"])
def test_text_that_nothing_reads_is_still_an_input(
    shapes: str, clean_up: bool, onnx_job: Job, textless_folder: Path
) -> None:
    config = ExportConfig(onnx=OnnxConfig(shapes=shapes, clean_up=clean_up))
    job = replace(onnx_job, model=str(textless_folder), config=config)
    to_onnx.export(job)
    names = [value.name for value in onnx.load(job.path).graph.input]
    assert names == ["sample", "timestep", "encoder_hidden_states", "text_embeds", "time_ids"]
    assert lowest_psnr(job) >= 60


@pytest.mark.parametrize(("height", "width"), [(8, 8), (9, 9), (13, 10)])
def test_every_size_that_pytorch_takes_fits(exported: Job, height: int, width: int) -> None:
    graph, run = components.load(exported.model, "unet"), onnx_session.load(exported.path)
    given = exported.examples()[0] | {"sample": torch.randn(2, 4, height, width)}
    (expected,) = components.run(graph, given).values()
    (got,) = run({name: given[name].numpy() for name in graph.inputs}).values()
    assert psnr(expected.numpy(), got) >= 60


def test_fp16_is_throughout_but_for_time_and_sizes(onnx_job: Job) -> None:
    job = replace(onnx_job, precision="fp16")
    to_onnx.export(job)
    graph = onnx.load(job.path).graph
    types = {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.output)}
    fine = {name for name, kind in types.items() if kind == onnx.TensorProto.FLOAT}
    assert fine == {"timestep", "time_ids"}
    assert {array.dtype.name for array in weights(job.path).values()} == {"float16"}


def test_large_weights_lie_in_one_file_beside_the_graph(
    exported: Job, onnx_job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside = weights(exported.path)
    assert {p.name for p in exported.path.parent.iterdir()} == {"model.onnx", "config.json"}
    monkeypatch.setattr(onnx_weights, "INLINE_BYTES", 0)
    to_onnx.export(onnx_job)
    assert onnx_job.path.stat().st_size < 1_500_000
    assert onnx_job.path.with_name("model.onnx_data").stat().st_size > 3_000_000
    beside = weights(onnx_job.path)
    assert set(beside) == set(inside)
    assert all(np.array_equal(beside[name], inside[name]) for name in inside)
    assert lowest_psnr(onnx_job) >= 60


def test_every_weight_of_the_model_is_in_the_file_once(exported: Job) -> None:
    unet = loading.load_unet(exported.model)
    saved = weights(exported.path)
    for name, value in unet.state_dict().items():
        array = saved.pop(f"unet.{name}")
        same = value if value.shape == array.shape and np.array_equal(value, array) else value.T
        assert np.array_equal(same, array), name
    assert not saved


def test_weights_in_eight_bits_are_the_nearest(onnx_job: Job) -> None:
    job = replace(onnx_job, precision="int8")
    to_onnx.export(job)
    saved, unet = weights(job.path), loading.load_unet(job.model).state_dict()
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


def test_static_shapes_are_those_that_were_sampled(onnx_job: Job) -> None:
    job = replace(onnx_job, config=ExportConfig(onnx=OnnxConfig(shapes="static")))
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
        onnx_session.load(job.path)(example | {"sample": np.zeros((2, 4, 16, 16), np.float32)})


@pytest.mark.parametrize("component", ["vae_decoder", "vae_encoder", "text_encoder_2"])
def test_static_graphs_declare_every_shape_and_compute_none(
    component: str, onnx_job: Job, recorded_folder: Path
) -> None:
    given = recorded_folder / f"{component}.safetensors"
    static = ExportConfig(onnx=OnnxConfig(shapes="static"))
    job = replace(onnx_job, component=component, inputs=given, config=static)
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


def cleaned(onnx_job: Job) -> Job:
    return replace(onnx_job, config=ExportConfig(onnx=OnnxConfig(clean_up=True)))


def test_a_graph_that_was_cleaned_up_is_smaller_and_computes_the_same(
    exported: Job, onnx_job: Job
) -> None:
    nodes = len(onnx.load(exported.path).graph.node)
    to_onnx.export(cleaned(onnx_job))
    assert len(onnx.load(onnx_job.path).graph.node) < 0.7 * nodes
    assert {p.name for p in onnx_job.path.parent.iterdir()} == {"model.onnx", "config.json"}
    assert lowest_psnr(onnx_job) >= 60


def test_a_clean_up_that_changes_outputs_is_not_kept(
    exported: Job,
    onnx_job: Job,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plain = exported.path.read_bytes()

    def damaged(model: onnx.ModelProto) -> onnx.ModelProto:
        sigmoid = next(node for node in model.graph.node if node.op_type == "Sigmoid")
        sigmoid.op_type = "Tanh"
        return model

    monkeypatch.setattr(onnxslim, "slim", damaged)
    to_onnx.export(cleaned(onnx_job))
    assert onnx_job.path.read_bytes() == plain
    assert "stays as it was" in capsys.readouterr().err
