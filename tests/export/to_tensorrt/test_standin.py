"""The stand-in trtexec itself: as strict as the real one, and in its forms."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from laptop.export.to_tensorrt import trtexec
from support.board import STANDIN


@pytest.fixture
def standin(tmp_path: Path) -> Callable[..., "subprocess.CompletedProcess[str]"]:
    def call(version: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, str(STANDIN), f"--standin={version},Orin,8.7", *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)

    return call


@pytest.mark.parametrize(
    ("version", "arguments", "said"),
    [
        ("11.0.0", ["--onnx=m.onnx", "--fp16"], "[E] Unknown option: --fp16"),
        ("11.0.0", ["--onnx=m.onnx", "--int8", "--best"], "[E] Unknown option: --best"),
        ("10.3.0", ["--onnx=m.onnx", "--workspace=9"], "[E] Unknown option: --workspace 9"),
        ("8.6.1", ["--onnx=m.onnx", "--stronglyTyped"], "[E] Unknown option: --stronglyTyped"),
        ("8.6.1", ["--fp16"], "[E] Model missing or format not recognized"),
        ("10.3.0", ["--loadEngine=a", "--saveEngine=b"], "[E] Incompatible load and save"),
        ("10.3.0", ["--loadEngine=none.plan"], "[E] Error opening engine file: none.plan"),
    ],
)
def test_the_standin_refuses_as_the_real_one(
    version: str, arguments: list[str], said: str, standin: Any
) -> None:
    done = standin(version, *arguments)
    assert done.returncode == 1
    assert said in done.stderr
    assert "&&&& FAILED TensorRT.trtexec [TensorRT v" in done.stdout


def test_the_standin_times_in_the_documented_form(standin: Any, tmp_path: Path) -> None:
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, (2, 3)) for n in "xy"]
    node = helper.make_node("Sqrt", ["x"], ["y"])
    graph = helper.make_graph([node], "g", values[:1], values[1:])
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=8), tmp_path / "m.onnx")
    done = standin(
        *("10.3.0", "--onnx=m.onnx", "--stronglyTyped"),
        *("--iterations=3", "--exportTimes=times.json"),
    )
    assert done.returncode == 0, done.stderr
    assert trtexec.read_version(done.stdout) == (10, 3, 0)
    assert trtexec.read_device(done.stdout) == ("Orin", "8.7")
    times = json.loads((tmp_path / "times.json").read_text())
    assert len(times) == 3
    assert all(row["latencyMs"] >= row["computeMs"] > 0 for row in times)
