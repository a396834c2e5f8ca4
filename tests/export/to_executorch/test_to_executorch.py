"""ExecuTorch programs, run here."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from laptop.benchmarks.devices.computer import Computer
from laptop.benchmarks.latency.bench import bench
from laptop.benchmarks.settings import BenchConfig
from laptop.errors import BadInput
from laptop.export import parity
from laptop.export.artifacts import ExportConfig, export_model
from laptop.export.closeness import psnr
from laptop.export.components import Graph
from laptop.export.components import run as run_graph
from laptop.export.settings import CoremlConfig, VerifyConfig
from laptop.export.to_executorch import target as to_executorch
from laptop.files import write_json
from laptop.hosts.host import Local

PROMPTS = ["a large red circle on white"]


class Block(nn.Module):
    """A residual block and a transformer, as a U-Net joins them: several partitions."""

    def __init__(self) -> None:
        super().__init__()
        self.resnet = ResnetBlock2D(in_channels=8, out_channels=8, temb_channels=16, groups=4)
        self.transformer = BasicTransformerBlock(8, 2, 4, cross_attention_dim=12)

    def forward(
        self, sample: torch.Tensor, time: torch.Tensor, text: torch.Tensor
    ) -> tuple[torch.Tensor]:
        found = self.resnet(sample, torch.sin(time * torch.arange(16)).expand(len(sample), 16))
        rows = found.flatten(2).transpose(1, 2)
        rows = self.transformer(rows, encoder_hidden_states=text)
        return (rows.transpose(1, 2).reshape(sample.shape),)


@pytest.fixture(scope="module")
def block() -> Graph:
    torch.manual_seed(0)
    return Graph(Block().eval(), ("sample", "timestep", "text"), ("out_sample",))


@pytest.fixture(scope="module")
def given() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {
        "sample": torch.randn(2, 8, 4, 4),
        "timestep": torch.tensor(0.3),
        "text": torch.randn(2, 5, 12),
    }


def lowered(
    block: Graph, given: dict[str, torch.Tensor], path: Path, precision: str = "fp32"
) -> Path:
    with to_executorch._quiet():
        program = to_executorch.lower(block, tuple(given.values()), precision, CoremlConfig())
        path.write_bytes(program.buffer)
    return path


@pytest.fixture(scope="module")
def program(
    block: Graph, given: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    return lowered(block, given, tmp_path_factory.mktemp("pte") / "block.pte")


def outputs(path: Path, given: dict[str, torch.Tensor]) -> np.ndarray:
    return to_executorch.load(path)({k: v.numpy() for k, v in given.items()})["out_sample"]


def test_a_program_computes_what_the_graph_does_with_a_scalar_timestep(
    block: Graph, given: dict[str, torch.Tensor], program: Path
) -> None:
    reference = run_graph(block, given)["out_sample"].numpy()
    assert psnr(reference, outputs(program, given)) > 100


def test_linear_layers_in_eight_bits_are_near_and_smaller(
    block: Graph, given: dict[str, torch.Tensor], program: Path, tmp_path: Path
) -> None:
    coarse = lowered(block, given, tmp_path / "int8.pte", "int8")
    reference = run_graph(block, given)["out_sample"].numpy()
    assert 35 < psnr(reference, outputs(coarse, given)) < 100
    assert psnr(reference, outputs(program, given)) > 100


def test_a_program_for_core_ml_hands_all_to_it_and_is_not_run_here(
    block: Graph, given: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    path = lowered(block, given, tmp_path / "coreml.pte", "coreml-fp16")
    assert b"CoreMLBackend" in path.read_bytes()
    assert b"XnnpackBackend" not in path.read_bytes()
    if sys.platform != "darwin":
        assert to_executorch.checked("coreml-fp16") is None
        with pytest.raises(BadInput, match="a backend that is not among"):
            to_executorch.load(path)


def test_a_program_is_timed_with_the_inputs_that_it_takes(
    given: dict[str, torch.Tensor], program: Path, tmp_path: Path
) -> None:
    row = {
        "target": "executorch",
        "component": "unet",
        "precision": "fp32",
        "file": "executorch/unet.pte",
        "shapes": {k: v.shape for k, v in given.items()},
    }
    listed = {"schema": "laptop.artifacts/1", "artifacts": [row]}
    for name in ("a", "b"):
        (tmp_path / name / "executorch").mkdir(parents=True)
        shutil.copy(program, tmp_path / name / "executorch" / "unet.pte")
        write_json(tmp_path / name / "artifacts.json", listed)
    config = BenchConfig(threads=1, rounds=2, iterations=4, seconds=0, warmup_s=0)
    subjects = {name: tmp_path / name for name in ("a", "b")}
    out = bench(subjects, tmp_path / "bench.json", config, Computer(Local()))
    found = json.loads(out.read_text())
    assert [row["runtime"] for row in found["results"]] == ["executorch"] * 2
    assert found["results"][0]["size_bytes"] == program.stat().st_size
    assert found["results"][0]["latency_ms"]["p50"] > 0
    assert found["results"][0]["conditions"]["threads"] == 1
    assert [pair["runtime"] for pair in found["ratios"]] == ["executorch"]


def test_inputs_of_other_shapes_and_a_cut_off_file_are_refused(
    given: dict[str, torch.Tensor], program: Path, tmp_path: Path
) -> None:
    with pytest.raises(BadInput, match="Shapes are fixed"):
        outputs(program, given | {"sample": torch.zeros(1, 8, 4, 4)})
    cut = tmp_path / "cut.pte"
    cut.write_bytes(program.read_bytes()[:100])
    with pytest.raises(BadInput, match="cut off"):
        to_executorch.load(cut)


def test_a_text_encoder_goes_through_export_and_verify(xl_folder: Path, tmp_path: Path) -> None:
    config = ExportConfig(targets=("executorch",), components=("text_encoder",), steps=1)
    out = export_model(str(xl_folder), tmp_path / "artifacts", config, PROMPTS)
    listed = json.loads((out / "artifacts.json").read_text())
    assert not listed["failed"]
    (row,) = listed["artifacts"]
    assert row["file"] == "executorch/text_encoder.pte"
    found = parity.verify(out, str(xl_folder), tmp_path / "parity", VerifyConfig(steps=1), PROMPTS)
    (result,) = json.loads((found / "report.json").read_text())["results"]
    assert result["state"] == "verified", result
