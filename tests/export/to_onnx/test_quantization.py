"""ONNX graphs with activations in 8 bits."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from laptop.export.example_sampling import example_sampling
from laptop.export.job import Job
from laptop.export.settings import ExportConfig, OnnxConfig
from laptop.export.targets import requests
from laptop.export.to_onnx import quantization
from laptop.export.to_onnx import target as to_onnx
from support.onnx_files import weights

RNG = np.random.default_rng(0)
FLOAT = onnx.TensorProto.FLOAT


def product(weight: np.ndarray, path: Path) -> None:
    """A graph of one matrix product."""
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], "product")],
        "graph",
        [helper.make_tensor_value_info("x", FLOAT, ["rows", len(weight)])],
        [helper.make_tensor_value_info("y", FLOAT, ["rows", weight.shape[1]])],
        [numpy_helper.from_array(weight, "w")],
    )
    opset = [helper.make_opsetid("", 18)]
    onnx.save_model(helper.make_model(graph, opset_imports=opset, ir_version=10), str(path))


def test_ranges_are_those_of_all_examples_and_scales_their_255th_part(tmp_path: Path) -> None:
    weight = RNG.normal(size=(8, 4)).astype(np.float32)
    given = [RNG.normal(size=(3, 8)).astype(np.float32) * size for size in (1, 4, 2)]
    product(weight, tmp_path / "plain.onnx")
    quantization.quantize(
        tmp_path / "plain.onnx", tmp_path / "int8.onnx", [{"x": value} for value in given]
    )
    saved = weights(tmp_path / "int8.onnx")
    for name, values in (("x", given), ("y", [value @ weight for value in given])):
        low, high = min(v.min() for v in values), max(v.max() for v in values)
        assert saved[f"{name}_scale"] == pytest.approx((high - low) / 255, rel=1e-5)
        assert saved[f"{name}_zero_point"].dtype == np.uint8
    assert saved["w_scale"] == pytest.approx(np.abs(weight).max(0) / 127, rel=0.01)
    assert {p.name for p in tmp_path.iterdir()} == {"plain.onnx", "int8.onnx"}


def test_embeddings_and_outermost_layers_stay_in_float(onnx_job: Job) -> None:
    to_onnx.export(replace(onnx_job, precision="int8-qdq"))
    saved = weights(onnx_job.path)
    kept = {name for name, value in saved.items() if value.ndim > 1 and value.dtype == np.float32}
    assert {name.split(".")[1] for name in kept if "time_emb_proj" not in name} == {
        "conv_in",
        "conv_out",
        "time_embedding",
        "add_embedding",
    }
    bits = sum(value.size for value in saved.values() if value.dtype == np.int8)
    assert bits > 0.7 * sum(value.size for value in saved.values())
    assert not list(onnx_job.path.parent.glob("tmp*"))


def test_large_weights_in_eight_bits_lie_beside_the_graph(
    onnx_job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("laptop.export.to_onnx.onnx_weights.INLINE_BYTES", 0)
    to_onnx.export(replace(onnx_job, precision="int8-qdq"))
    names = {p.name for p in onnx_job.path.parent.iterdir()}
    assert names == {"model.onnx", "model.onnx_data", "config.json"}


@pytest.mark.parametrize(
    ("targets", "vae", "expected"),
    [
        (("onnx", "onnx:int8-qdq"), "fp32", (3, 5)),
        (("onnx",), "int8-qdq", (3, 5)),
        (("onnx:int8",), "fp32", (1, 2)),
    ],
)
def test_more_is_sampled_where_ranges_are_needed(
    targets: tuple[str, ...], vae: str, expected: tuple[int, int]
) -> None:
    onnx = OnnxConfig(calibration_prompts=3, calibration_steps=5)
    config = ExportConfig(targets=targets, vae_precision=vae, onnx=onnx)
    prompts, how = example_sampling(
        "tiny-sdxl", config, requests(config), ["a", "b", "c", "d"], None
    )
    assert (len(prompts), how.steps) == expected
