"""What `bench` takes, and what it refuses before anything is timed."""

import json
import math
from dataclasses import replace
from pathlib import Path

import onnx
import pytest

from laptop.benchmarks.devices.computer import Computer
from laptop.benchmarks.latency.bench import bench
from laptop.benchmarks.latency.timed_components import TimedComponent, graph_precision, shapes_of
from laptop.benchmarks.settings import BenchConfig
from laptop.errors import BadInput, UnknownModel
from laptop.hosts.host import Local
from support.onnx_files import onnx_folder

QUICK = BenchConfig(rounds=3, iterations=6, seconds=0.3, warmup_s=0.1, cv_bound=10, threads=1)
HERE = Computer(Local())


def test_subjects_that_take_different_inputs_are_refused(tiny_folder: Path, tmp_path: Path) -> None:
    config = json.loads((tiny_folder / "unet" / "config.json").read_text())
    other = tmp_path / "other.json"
    other.write_text(json.dumps(config | {"sample_size": 16}))
    subjects = {"a": tiny_folder, "b": onnx_folder(tmp_path / "b", other)}
    with pytest.raises(BadInput, match="cannot be compared"):
        bench(subjects, tmp_path / "x.json", QUICK, HERE)


def test_a_subject_that_is_nothing_we_know_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(UnknownModel):
        bench({"a": tmp_path}, tmp_path / "x.json", QUICK, HERE)


def test_a_runtime_that_is_not_there_is_refused_with_those_that_are(
    tiny_folder: Path, tmp_path: Path
) -> None:
    config = replace(QUICK, runtimes=("onnxruntime:qnn",))
    with pytest.raises(BadInput, match=r"onnxruntime:qnn is not on .*there are pytorch 2"):
        bench({"a": tiny_folder}, tmp_path / "x.json", config, HERE)


def test_the_precision_of_a_graph_without_a_list_is_read_from_it(tmp_path: Path) -> None:
    def graph(kind: int, op: str) -> Path:
        weights = onnx.helper.make_tensor("w", kind, [4], [1, 2, 3, 4])
        node = onnx.helper.make_node(op, ["x", "w"], ["y"])
        made = onnx.helper.make_graph([node], "g", [], [], [weights])
        path = tmp_path / f"{kind}-{op}.onnx"
        onnx.save(onnx.helper.make_model(made), path)
        return path

    types = onnx.TensorProto
    assert graph_precision(graph(types.FLOAT, "Mul")) == "fp32"
    assert graph_precision(graph(types.FLOAT16, "Mul")) == "fp16"
    assert graph_precision(graph(types.BFLOAT16, "Mul")) == "bf16"
    assert graph_precision(graph(types.INT8, "DequantizeLinear")) == "int8"
    assert graph_precision(graph(types.UINT8, "MatMulNBits")) == "int4"
    assert graph_precision(graph(types.INT64, "Add")) == "unknown"
    (tmp_path / "pointer.onnx").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(BadInput, match="cannot be read as an ONNX model"):
        graph_precision(tmp_path / "pointer.onnx")


def test_an_unconditional_model_is_timed_without_guidance(tmp_path: Path) -> None:
    config = {"sample_size": 16, "in_channels": 3, "_class_name": "UNet2DModel"}
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text(json.dumps(config))
    component = TimedComponent("unet", "onnxruntime", "onnx", str(tmp_path / "unet" / "model.onnx"))
    assert shapes_of(component, True, 77)["sample"] == (1, 3, 16, 16)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"runtimes": ("pytorch",)}, "a has nothing that runs in pytorch"),
        ({"components": ("unet", "vae_decoder")}, "there is no vae_decoder to bench"),
        ({"rounds": 0}, "rounds is 0; it must be at least 1"),
        ({"seconds": math.inf}, "seconds is inf"),
        ({"cv_bound": math.nan}, "cv_bound is nan"),
        ({"threads": -1}, "threads is -1"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    tiny_folder: Path, tmp_path: Path, asked: dict[str, object], said: str
) -> None:
    graph = onnx_folder(tmp_path / "a", tiny_folder / "unet" / "config.json")
    with pytest.raises(BadInput, match=said):
        bench({"a": graph}, tmp_path / "x.json", replace(QUICK, **asked), HERE)


def test_subjects_without_a_ratio_are_said(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unet = tiny_folder / "unet" / "config.json"
    subjects = {"a": tiny_folder, "b": onnx_folder(tmp_path / "b", unet)}
    bench(subjects, tmp_path / "x.json", replace(QUICK, components=("unet",)), HERE)
    assert "no ratio for a, b" in capsys.readouterr().err
