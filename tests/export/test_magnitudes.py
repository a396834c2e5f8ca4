"""Half precision ends at 65504: who exceeds it is named, and what the config upcasts is kept."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn

from conftest import small_sd15
from laptop.errors import BadInput, CheckFailed
from laptop.export import components
from laptop.export.closeness import psnr
from laptop.export.components import Graph
from laptop.export.magnitudes import (
    SCORES,
    SQUARES,
    VALUES,
    Origin,
    is_upcast,
    keep_scores_wide_,
    magnitude,
    overflow,
    watched,
)
from laptop.export.parity import verify
from laptop.export.parity_report import ParityReport, check
from laptop.export.settings import VerifyConfig
from laptop.export.to_coreml import target as to_coreml
from laptop.export.to_coreml.split_einsum import SplitEinsum
from laptop.export.to_onnx import onnx_graph, onnx_weights
from laptop.export.to_onnx import target as to_onnx
from laptop.files import write_json

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
Change = Callable[[nn.Module], None]


def scaled(*names: str, factor: float) -> Change:
    """Multiply weights of a U-Net."""

    def change(unet: nn.Module) -> None:
        with torch.no_grad():
            for name in names:
                unet.get_parameter(f"{name}.weight").mul_(factor)

    return change


high_scores = scaled(f"{BLOCK}.attn1.to_q", f"{BLOCK}.attn1.to_k", factor=1000)
# what exceeds 65504, and where it does first
FAULTS: dict[str, tuple[Change, Origin]] = {
    "scores": (high_scores, Origin(f"unet.{BLOCK}.attn1", SCORES)),
    "feed-forward": (
        scaled(f"{BLOCK}.ff.net.0.proj", factor=1e3),
        Origin(f"unet.{BLOCK}.ff.net.0", VALUES),
    ),
    "residual stream": (scaled("conv_in", factor=1e5), Origin("unet.conv_in", VALUES)),
    "resnet": (
        scaled("down_blocks.0.resnets.0.conv2", factor=1e5),
        Origin("unet.down_blocks.0.resnets.0.conv2", VALUES),
    ),
    "text": (
        scaled(f"{BLOCK}.attn2.to_v", factor=1e5),
        Origin(f"unet.{BLOCK}.attn2.to_v", VALUES),
    ),
}


def unet(change: Change | None = None, *, upcast: bool = False) -> UNet2DConditionModel:
    """The small U-Net, changed, or one that upcasts attention."""
    network = small_sd15().unet
    state = network.state_dict()
    config = {k: v for k, v in network.config.items() if not k.startswith("_")}
    network = UNet2DConditionModel(**{**config, "upcast_attention": upcast}).eval()
    network.load_state_dict(state)
    if change is not None:
        change(network)
    return network


@pytest.fixture(scope="module")
def inputs() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        "sample": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor(999.0),
        "encoder_hidden_states": torch.randn(2, 16, 32),
    }


@pytest.fixture(scope="module")
def traced(inputs: dict[str, Tensor]) -> dict[bool, onnx.ModelProto]:
    """The half-precision graphs of the U-Nets without and with upcast attention."""
    graphs = {}
    for upcast in (False, True):
        graph = components._unet(unet(upcast=upcast))
        keep_scores_wide_(graph.module)
        graphs[upcast] = onnx_graph.trace(graph, "unet", inputs, torch.float16, onnx_graph.OPSET)
    return graphs


def written(trace: onnx.ModelProto, network: nn.Module, path: Path) -> Path:
    """A traced graph with the weights of `network`, and room for its inputs."""
    weights = {f"unet.{name}": value.detach() for name, value in network.named_parameters()}
    onnx_weights.write(copy.deepcopy(trace), 3, weights.__getitem__, path, int8=False)
    return path


def in_true_half(path: Path, inputs: dict[str, Tensor]) -> np.ndarray:
    """What a graph gives where every operator computes in the type that the graph declares."""
    types = {10: np.float16, 1: np.float32}
    feed = {
        value.name: inputs[value.name].numpy().astype(types[value.type.tensor_type.elem_type])
        for value in onnx.load(path).graph.input
    }
    with np.errstate(all="ignore"):
        (output,) = ReferenceEvaluator(str(path)).run(None, feed)
    return np.asarray(output, np.float32)


@pytest.mark.parametrize("fault", FAULTS)
def test_what_overflows_in_true_half_is_named_by_its_module(
    fault: str, traced: dict[bool, onnx.ModelProto], inputs: dict[str, Tensor], tmp_path: Path
) -> None:
    change, place = FAULTS[fault]
    graph = components._unet(unet(change))
    path = written(traced[False], graph.module.unet, tmp_path / "model.onnx")
    assert not np.isfinite(in_true_half(path, inputs)).all(), "the case is none"
    with watched(graph.module) as peaks:
        components.run(graph, inputs)
    message = overflow(peaks, to_onnx.wide_scores(path), squares=False)
    assert message is not None
    assert message.startswith(f"{place.module} overflows in half precision: {place.kind} reach")


def test_what_fits_half_is_not_called_an_overflow(
    traced: dict[bool, onnx.ModelProto], inputs: dict[str, Tensor], tmp_path: Path
) -> None:
    graph = components._unet(unet())
    path = written(traced[False], graph.module.unet, tmp_path / "model.onnx")
    with watched(graph.module) as peaks:
        reference = components.run(graph, inputs)["out_sample"]
    assert psnr(reference.numpy(), in_true_half(path, inputs)) > 40
    assert len({place.module for place in peaks}) > 50
    assert overflow(peaks, to_onnx.wide_scores(path), squares=True) is None


def test_what_the_config_upcasts_stays_in_fp32_in_the_graph(
    traced: dict[bool, onnx.ModelProto], inputs: dict[str, Tensor], tmp_path: Path
) -> None:
    graph = components._unet(unet(high_scores, upcast=True))
    path = written(traced[True], graph.module.unet, tmp_path / "model.onnx")
    keeps = to_onnx.wide_scores(path)
    with watched(graph.module) as peaks:
        reference = components.run(graph, inputs)["out_sample"]
    assert peaks[Origin(f"unet.{BLOCK}.attn1", SCORES)] > 65504
    assert overflow(peaks, keeps, squares=False) is None
    assert overflow(peaks, lambda _: False, squares=False) is not None, "where it is not kept"
    assert psnr(reference.numpy(), in_true_half(path, inputs)) > 40


class OneAttention(nn.Module):
    """Attention whose scores are far above 65504, with the flag of a U-Net or of a VAE."""

    def __init__(self, **flags: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attn = Attention(16, heads=2, dim_head=8, **flags)
        scaled("attn.to_q", "attn.to_k", factor=1000)(self)

    def forward(self, sample: Tensor) -> tuple[Tensor]:
        return (self.attn(sample),)


@pytest.mark.parametrize("form", ["original", "split-einsum"])
@pytest.mark.parametrize("flag", ["upcast_attention", "upcast_softmax", None])
def test_core_ml_keeps_what_the_config_upcasts(form: str, flag: str | None, tmp_path: Path) -> None:
    graph = Graph(OneAttention(**{flag: True} if flag else {}).eval(), ("sample",), ("out",))
    inputs = {"sample": torch.randn(2, 6, 16, generator=torch.manual_seed(0))}
    with watched(graph.module) as peaks:
        reference = components.run(graph, inputs)["out"].numpy()
    assert peaks[Origin("attn", SCORES)] > 65504
    is_wide = is_upcast(graph.module.attn)
    if form == "split-einsum":
        graph.module.attn.set_processor(SplitEinsum())
    keep_scores_wide_(graph.module)
    model = to_coreml._convert(graph, inputs, "fp16", "iOS17", is_wide=is_wide)
    model.save(str(tmp_path / "a.mlpackage"))
    value = to_coreml.load(tmp_path / "a.mlpackage")({"sample": inputs["sample"].numpy()})["out"]
    keeps = to_coreml.wide_scores(tmp_path / "a.mlpackage")
    if flag:
        assert psnr(reference, value) > 40
        assert overflow(peaks, keeps, squares=True) is None
    else:
        assert not np.isfinite(value).all()
        assert "attn overflows in half precision: attention" in str(
            overflow(peaks, keeps, squares=True)
        )


def test_a_weight_above_65504_is_refused_by_name(
    traced: dict[bool, onnx.ModelProto], tmp_path: Path
) -> None:
    network = unet(scaled("conv_in", factor=1e7))
    with pytest.raises(BadInput, match=r"values of the weight unet.conv_in.weight are not finite"):
        written(traced[False], network, tmp_path / "model.onnx")


def test_the_squares_of_a_norm_are_those_of_its_formula() -> None:
    torch.manual_seed(0)
    norm, sample = nn.GroupNorm(2, 8), 300 * torch.randn(2, 8, 4, 4) + 100
    with watched(norm) as peaks, torch.no_grad():
        norm(sample)
    groups = sample.reshape(2, 2, -1)
    formula = (groups - groups.mean(-1, keepdim=True)).square().max()
    assert peaks[Origin("", SQUARES)] == pytest.approx(float(formula))
    assert overflow(peaks, lambda _: False, squares=False) is None
    assert "squares in its norm" in str(overflow(peaks, lambda _: False, squares=True))


@pytest.mark.parametrize("masked", [-torch.inf, torch.finfo(torch.float32).min])
def test_what_is_masked_does_not_count(masked: float) -> None:
    values = torch.tensor([masked, -7.0, 3.0])
    assert magnitude(values) == 7
    assert magnitude(values + 1) == 6


def test_the_scores_of_fused_attention_are_those_of_its_formula() -> None:
    torch.manual_seed(0)
    query, key = torch.randn(2, 2, 3, 5, 8)
    with watched(nn.Identity()) as peaks:
        nn.functional.scaled_dot_product_attention(query, key, key, scale=2.0)
    formula = (2 * query @ key.transpose(-1, -2)).abs().max()
    assert peaks[Origin("", SCORES)] == pytest.approx(float(formula))


@pytest.fixture(scope="module")
def overflowing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose U-Net has scores above 65504, and does not say so."""
    pipe = small_sd15()
    high_scores(pipe.unet)
    folder = tmp_path_factory.mktemp("models") / "overflowing"
    pipe.save_pretrained(folder)
    return folder


def verified(folder: Path, model: Path, row: dict[str, str]) -> dict[str, Any]:
    """The only row of the report on an artifact that is already in the folder."""
    row = {"component": "unet", **row}
    listed = {"schema": "laptop.artifacts/1", "resolution": None, "artifacts": [row]}
    write_json(folder / "artifacts.json", listed)
    config = VerifyConfig(steps=1, floor_db=-100, pictures=False)
    out = verify(folder, str(model), folder.with_name("parity"), config, ["a red circle"])
    report = json.loads((out / "report.json").read_text())
    if report["results"][0]["reason"]:
        with pytest.raises(CheckFailed, match="the most is 65504"):
            check(ParityReport.read(out / "report.json"))
    result: dict[str, Any] = report["results"][0]
    return result


def test_verify_names_the_module_though_the_runtime_computes_in_float32(
    overflowing: Path, traced: dict[bool, onnx.ModelProto], tmp_path: Path
) -> None:
    path = tmp_path / "a" / "onnx-fp16" / "unet" / "model.onnx"
    path.parent.mkdir(parents=True)
    written(traced[False], unet(high_scores), path)
    row = {"target": "onnx", "precision": "fp16", "file": "onnx-fp16/unet/model.onnx"}
    result = verified(tmp_path / "a", overflowing, row)
    assert result["state"] == "failed"
    assert result["reason"].startswith(f"unet.{BLOCK}.attn1 overflows in half precision: attention")
    assert result["psnr_db"] > 20, "ONNX Runtime sees nothing of it"


def test_an_artifact_that_cannot_run_here_is_bounded_too(
    overflowing: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("laptop.export.to_executorch.target.checked", lambda _: None)
    (tmp_path / "a" / "executorch").mkdir(parents=True)
    (tmp_path / "a" / "executorch" / "unet.pte").write_bytes(b"of any content")
    row = {"target": "executorch", "precision": "coreml-fp16", "file": "executorch/unet.pte"}
    result = verified(tmp_path / "a", overflowing, row)
    assert (result["state"], result["samples"]) == ("failed", 0)
    assert "attn1 overflows in half precision" in result["reason"]
