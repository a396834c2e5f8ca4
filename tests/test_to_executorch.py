"""ExecuTorch programs, run here; and our quick lowering against the plain one."""

import contextlib
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from laptop.errors import BadInput, Unsupported
from laptop.export import parity, to_executorch
from laptop.export.artifacts import ExportConfig, export_model
from laptop.export.components import Graph
from laptop.export.components import run as run_graph
from laptop.export.lowering import fewer_repeats
from laptop.export.targets import TARGETS

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


def lowered(block: Graph, given: dict[str, torch.Tensor], precision: str, path: Path) -> Path:
    with to_executorch._quiet():
        partitioner = to_executorch._partitioner("xnnpack", precision)
        program = to_executorch.lower(block, tuple(given.values()), partitioner, precision)
        path.write_bytes(program.buffer)
    return path


@pytest.fixture(scope="module")
def program(
    block: Graph, given: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    return lowered(block, given, "fp32", tmp_path_factory.mktemp("pte") / "block.pte")


def outputs(path: Path, given: dict[str, torch.Tensor]) -> np.ndarray:
    return to_executorch.load(path)({k: v.numpy() for k, v in given.items()})["out_sample"]


def test_a_program_computes_what_the_graph_does_with_a_scalar_timestep(
    block: Graph, given: dict[str, torch.Tensor], program: Path
) -> None:
    reference = run_graph(block, given)["out_sample"].numpy()
    assert parity.psnr(reference, outputs(program, given)) > 100


def test_quick_lowering_gives_the_outputs_of_the_plain_one(
    block: Graph,
    given: dict[str, torch.Tensor],
    program: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(to_executorch, "fewer_repeats", contextlib.nullcontext)
    plain = lowered(block, given, "fp32", tmp_path / "plain.pte")
    np.testing.assert_array_equal(outputs(plain, given), outputs(program, given))
    assert plain.stat().st_size == pytest.approx(program.stat().st_size, rel=0.01)


def test_what_quick_lowering_replaces_is_put_back() -> None:
    plain = torch.fx.GraphModule.recompile
    with to_executorch._quiet(), fewer_repeats():
        assert torch.fx.GraphModule.recompile is not plain
        traced = torch.fx.symbolic_trace(nn.ReLU())
        assert traced(torch.tensor(-1.0)) == 0
    assert torch.fx.GraphModule.recompile is plain


def test_int8_quantizes_and_stays_above_its_floor(
    block: Graph, given: dict[str, torch.Tensor], program: Path, tmp_path: Path
) -> None:
    path = lowered(block, given, "int8", tmp_path / "int8.pte")
    reference = run_graph(block, given)["out_sample"].numpy()
    ratio = parity.psnr(reference, outputs(path, given))
    assert parity.FLOORS["int8"] <= ratio < 80, "as exact as float32: nothing was quantized"


def test_inputs_of_other_shapes_and_a_cut_off_file_are_refused(
    given: dict[str, torch.Tensor], program: Path, tmp_path: Path
) -> None:
    with pytest.raises(BadInput, match="Shapes are fixed"):
        outputs(program, given | {"sample": torch.zeros(1, 8, 4, 4)})
    cut = tmp_path / "cut.pte"
    cut.write_bytes(program.read_bytes()[:100])
    with pytest.raises(BadInput, match="cut off"):
        to_executorch.load(cut)


def test_an_unknown_backend_and_a_precision_that_one_lacks_are_refused() -> None:
    with pytest.raises(Unsupported, match="no backend 'vulkan'; known: xnnpack, coreml"):
        to_executorch._partitioner("vulkan", "fp32")
    with pytest.raises(Unsupported, match="Core ML backend of ExecuTorch has no 'int8'"):
        to_executorch._partitioner("coreml", "int8")


def test_a_text_encoder_goes_through_export_and_verify(tiny_folder: Path, tmp_path: Path) -> None:
    config = ExportConfig(targets=("executorch:int8",), components=("text_encoder",), steps=1)
    out = export_model(str(tiny_folder), tmp_path / "artifacts", config, PROMPTS)
    listed = json.loads((out / "artifacts.json").read_text())
    assert not listed["failed"]
    (row,) = listed["artifacts"]
    assert row["file"] == "executorch-int8/text_encoder.pte"
    found = parity.verify(
        out, str(tiny_folder), tmp_path / "parity", parity.VerifyConfig(steps=1), PROMPTS
    )
    (result,) = json.loads((found / "report.json").read_text())["results"]
    assert result["state"] == "verified", result


def test_every_component_is_covered() -> None:
    assert set(TARGETS["executorch"].components) == set(TARGETS["onnx"].components)
    assert dataclasses.asdict(ExportConfig())["executorch"] == {"backend": "xnnpack"}
