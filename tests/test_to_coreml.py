"""The Core ML package of a pruned U-Net, read back; it runs on macOS only."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from laptop import models
from laptop.export import parity
from laptop.export.artifacts import ExportConfig, export_model
from laptop.export.to_coreml import feeds_angles, library

PROMPTS = ["a large red circle on white"]
FLOAT16, FLOAT32 = 65552, 65568  # ArrayFeatureType.ArrayDataType


@pytest.fixture(scope="module")
def exported(pruned_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("coreml") / "artifacts"
    return export_model(str(pruned_folder), out, ExportConfig(targets=("coreml",)), PROMPTS)


@pytest.fixture(scope="module")
def spec(exported: Path) -> Any:
    return library().utils.load_spec(str(exported / "coreml" / "unet.mlpackage"))


def described(features: Any) -> dict[str, tuple[list[int], int]]:
    arrays = {f.name: f.type.multiArrayType for f in features}
    return {name: (list(array.shape), array.dataType) for name, array in arrays.items()}


def test_inputs_and_outputs_are_named_as_in_onnx_with_fixed_shapes(spec: Any) -> None:
    assert described(spec.description.input) == {
        "sample": ([2, 4, 8, 8], FLOAT16),
        "timestep": ([1], FLOAT32),
        "encoder_hidden_states": ([2, 16, 128], FLOAT16),
        "text_embeds": ([2, 64], FLOAT16),
        "time_ids": ([2, 6], FLOAT32),
    }
    assert described(spec.description.output) == {"out_sample": ([2, 4, 8, 8], FLOAT16)}


def test_the_network_computes_in_fp16_and_only_its_time_embeddings_in_fp32(spec: Any) -> None:
    (function,) = spec.mlProgram.functions.values()
    (block,) = function.block_specializations.values()
    types: dict[str, set[int]] = {}
    for op in block.operations:
        if op.type in ("conv", "linear", "matmul", "sin", "cos"):
            types.setdefault(op.type, set()).add(op.outputs[0].type.tensorType.dataType)
    fp16, fp32 = 10, 11  # MILSpec.DataType
    assert types.pop("sin") == {fp32}
    assert types.pop("cos") == {fp32}
    assert types
    assert all(found == {fp16} for found in types.values())


def test_the_package_holds_fp16_weights(exported: Path, pruned_folder: Path) -> None:
    (row,) = json.loads((exported / "artifacts.json").read_text())["artifacts"]
    assert (row["target"], row["component"], row["precision"]) == ("coreml", "unet", "fp16")
    assert row["file"] == "coreml/unet.mlpackage"
    files = [p for p in (exported / row["file"]).rglob("*") if p.is_file()]
    assert row["bytes"] == sum(p.stat().st_size for p in files)
    (weights,) = (p.stat().st_size for p in files if p.name == "weight.bin")
    params = models.load_unet(str(pruned_folder)).num_parameters()
    assert weights == pytest.approx(2 * params, rel=0.03)


def test_what_cannot_run_on_this_system_is_never_called_verified(
    exported: Path, pruned_folder: Path, tmp_path: Path
) -> None:
    out = parity.verify(
        exported, str(pruned_folder), tmp_path / "parity", parity.VerifyConfig(steps=2), PROMPTS
    )
    report = json.loads((out / "report.json").read_text())
    (row,) = report["results"]
    if sys.platform == "darwin":
        assert (row["state"], row["samples"]) == ("verified", 2), row
    else:
        assert row["state"] == "converted, not run here"
        assert (row["samples"], row["psnr_db"], row["max_abs_error"]) == (0, None, None)
    parity.check(report)


def test_only_what_leads_to_nothing_but_sines_stays_fp32() -> None:
    def op(kind: str, *users: Any) -> Any:
        return SimpleNamespace(op_type=kind, outputs=[SimpleNamespace(child_ops=list(users))])

    sine, cosine, conv = op("sin"), op("cos"), op("conv")
    assert feeds_angles(sine)
    assert feeds_angles(op("expand_dims", op("mul", sine, cosine)))
    assert not feeds_angles(op("mul", sine, conv))
    assert not feeds_angles(conv)
