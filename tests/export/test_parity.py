"""The stage that compares artifacts with PyTorch, on artifacts that are right, wrong and broken."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor

from laptop import files
from laptop.errors import BadInput, CheckFailed, Unsupported
from laptop.export import components, parity
from laptop.export.artifact_list import Artifact
from laptop.export.artifacts import ExportConfig, export_model
from laptop.export.closeness import compare, cosine, psnr, worst
from laptop.export.parity import verify
from laptop.export.parity_report import ParityReport, check
from laptop.export.settings import VerifyConfig
from laptop.models import loading

PROMPTS = ["a large red circle on white"]


@pytest.fixture(scope="module")
def exported(xl_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("parity") / "artifacts"
    return export_model(str(xl_folder), out, ExportConfig(), PROMPTS)


@pytest.fixture
def copied(exported: Path, tmp_path: Path) -> Path:
    """The text encoders and the VAE decoder alone, to be spoiled."""
    target = tmp_path / "artifacts"
    shutil.copytree(exported, target)
    keep = ("text_encoder", "text_encoder_2", "vae_decoder")
    content = json.loads((target / "artifacts.json").read_text())
    content["artifacts"] = [r for r in content["artifacts"] if r["component"] in keep]
    files.write_json(target / "artifacts.json", content)
    return target


def strictly(path: Path) -> dict[str, Any]:
    """The report, read as other languages read JSON: NaN and Infinity are errors."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


def spoil(path: Path, change: Any) -> None:
    """Apply `change` to the largest weight of an ONNX file."""
    model = onnx.load(path)
    weight = max(model.graph.initializer, key=lambda t: math.prod(t.dims))
    array = onnx.numpy_helper.to_array(weight).copy()
    weight.CopyFrom(onnx.numpy_helper.from_array(change(array), weight.name))
    onnx.save(model, path)


def flatten(path: Path) -> None:
    """Let an ONNX file give nothing but zeros."""
    model = onnx.load(path)
    last = next(n for n in model.graph.node if model.graph.output[0].name in n.output)
    last.output[0] = "before"
    output = model.graph.output[0].name
    model.graph.node.append(onnx.helper.make_node("Sub", ["before", "before"], [output]))
    onnx.save(model, path)


def blank_half(weight: np.ndarray) -> np.ndarray:
    weight[: len(weight) // 2] = 0  # scaling it all would vanish in the group norm behind it
    return weight


def test_psnr_is_its_formula_in_float64() -> None:
    rng = np.random.default_rng(0)
    reference = rng.standard_normal((3, 5)).astype(np.float32)
    value = (reference + 1e-3 * rng.standard_normal((3, 5))).astype(np.float16)
    a, b = reference.astype(np.float64), value.astype(np.float64)
    formula = 10 * np.log10(np.abs(a).max() ** 2 / np.mean((a - b) ** 2))
    assert psnr(reference, value) == pytest.approx(formula, abs=1e-12)


def test_psnr_of_a_known_error_is_known() -> None:
    assert psnr(np.array([-10.0, 0, 5]), np.array([-9.9, 0.1, 5.1])) == pytest.approx(40)


def test_psnr_has_a_value_for_every_edge() -> None:
    ones, zeros = np.ones(4, np.float32), np.zeros(4, np.float32)
    assert psnr(ones, ones) == math.inf
    assert psnr(zeros, zeros) == math.inf
    assert psnr(zeros, ones) == -math.inf
    assert math.isnan(psnr(ones, np.array([1, np.nan, 1, 1])))
    assert math.isnan(psnr(np.array([1, np.inf, 1, 1]), ones))
    assert psnr(np.full(4, 6e4, np.float16), np.zeros(4, np.float16)) == 0, "no overflow in fp16"
    with pytest.raises(ValueError, match="shapes differ"):
        psnr(np.ones((1, 4)), np.ones(4))


def test_the_worst_of_several_outputs_counts() -> None:
    good, bad = np.array([1.0, 2.0]), np.array([1.0, 2.5])
    found = worst([compare(good, good), compare(good, bad)])
    assert (found.psnr_db, found.max_abs_error) == (psnr(good, bad), 0.5)
    found = worst([compare(good, bad), compare(good, np.array([np.nan, np.inf]))])
    assert math.isnan(found.psnr_db)
    assert found.nonfinite == 2


def test_every_onnx_component_equals_pytorch(
    exported: Path, xl_folder: Path, tmp_path: Path
) -> None:
    out = verify(exported, str(xl_folder), tmp_path / "parity", VerifyConfig(steps=3), PROMPTS)
    report = strictly(out / "report.json")
    assert report["schema"] == "laptop.parity/1"
    rows = {r["component"]: r for r in report["results"]}
    assert list(rows) == [*components.ALL, "picture"]
    for name, row in rows.items():
        assert row["state"] == "verified", row
        assert row["psnr_db"] >= row["floor_db"] == (40 if name == "picture" else 60)
        assert row["cosine"] == pytest.approx(1, abs=1e-6)
        assert 0 < row["max_abs_error"] < 1e-3
        assert row["sha256"] == files.sha256(exported / row["artifact"])
    assert rows["unet"]["samples"] == 3
    drawn, reference = (out / "onnx" / "picture" / f"000{end}.png" for end in ("", ".reference"))
    assert np.array(Image.open(drawn)).shape == (64, 64, 3)
    assert abs(np.array(Image.open(drawn), int) - np.array(Image.open(reference))).max() <= 1
    check(ParityReport.read(out / "report.json"))
    noted = strictly(exported / "manifest.json")["verified"]
    assert {r["component"]: r["psnr_db"] for r in noted["results"]}["unet"] >= 60
    assert noted["versions"]["onnxruntime"]
    saved = {p.name: np.load(p) for p in (out / "onnx" / "unet").iterdir()}
    reference = [f"{i:03d}.out_sample.reference.npy" for i in range(3)]
    ratios = [psnr(saved[n], saved[n.replace(".reference", "")]) for n in reference]
    assert min(ratios) == pytest.approx(rows["unet"]["psnr_db"])
    assert float(saved["000.timestep.npy"]) == 999


def test_a_planted_fault_is_found_and_named(copied: Path, xl_folder: Path, tmp_path: Path) -> None:
    spoil(copied / "onnx/vae_decoder/model.onnx", blank_half)
    out = verify(copied, str(xl_folder), tmp_path / "parity", VerifyConfig(steps=1), PROMPTS)
    report = strictly(out / "report.json")
    states = {r["component"]: r["state"] for r in report["results"]}
    assert states == {
        "text_encoder": "verified",
        "text_encoder_2": "verified",
        "vae_decoder": "failed",
    }
    with pytest.raises(CheckFailed, match=r"onnx vae_decoder: PSNR .* dB, at least 60 needed"):
        check(ParityReport.read(out / "report.json"))


def test_nan_fails_and_the_report_stays_valid_json(
    copied: Path, xl_folder: Path, tmp_path: Path
) -> None:
    spoil(copied / "onnx/vae_decoder/model.onnx", lambda w: np.full_like(w, np.nan))
    out = verify(copied, str(xl_folder), tmp_path / "parity", VerifyConfig(steps=1), PROMPTS)
    report = strictly(out / "report.json")
    row = report["results"][-1]
    assert (row["state"], row["psnr_db"], row["max_abs_error"]) == ("failed", None, None)
    assert row["nonfinite"] > 0
    with pytest.raises(CheckFailed, match="values are NaN or Inf"):
        check(ParityReport.read(out / "report.json"))


def test_identical_outputs_are_verified_without_a_number() -> None:
    artifact = Artifact(target="onnx", component="unet", file="f", precision="fp32")
    same = compare(np.ones(3), np.ones(3))
    row = parity.parity_row(artifact, "0" * 64, same, 60.0, 1)
    assert (row.state, row.psnr_db, row.identical) == ("verified", None, True)
    json.dumps(row.as_json(), allow_nan=False)


def test_a_fault_of_the_unet_is_seen_in_its_picture_too(
    exported: Path, xl_folder: Path, tmp_path: Path
) -> None:
    spoilt = shutil.copytree(exported, tmp_path / "artifacts")
    spoil(spoilt / "onnx/unet/model.onnx", blank_half)
    out = verify(spoilt, str(xl_folder), tmp_path / "parity", VerifyConfig(steps=2), PROMPTS)
    failed = [r["component"] for r in strictly(out / "report.json")["results"] if r["reason"]]
    assert failed == ["unet", "picture"]


def test_a_black_picture_is_named_even_above_the_floor(
    copied: Path, xl_folder: Path, tmp_path: Path
) -> None:
    flatten(copied / "onnx/vae_decoder/model.onnx")
    config = VerifyConfig(steps=1, floor_db=-100)
    out = verify(copied, str(xl_folder), tmp_path / "parity", config, PROMPTS)
    with pytest.raises(CheckFailed, match="vae_decoder: 1 of 1 pictures are of one colour"):
        check(ParityReport.read(out / "report.json"))


def test_the_unet_is_compared_early_in_the_middle_and_late() -> None:
    assert parity.early_middle_late(list(range(16)), 2) == [0, 4, 7, 8, 12, 15]
    assert parity.early_middle_late([5], 1) == [5]


def test_the_cosine_is_of_the_angle() -> None:
    assert cosine(np.array([1.0, 0]), np.array([1.0, 1])) == pytest.approx(0.5**0.5)
    assert cosine(np.zeros(2), np.zeros(2)) == 1
    assert cosine(np.zeros(2), np.ones(2)) == 0


def test_the_floor_can_be_raised(copied: Path, xl_folder: Path, tmp_path: Path) -> None:
    config = VerifyConfig(steps=1, floor_db=200.0)
    out = verify(copied, str(xl_folder), tmp_path / "parity", config, PROMPTS)
    with pytest.raises(CheckFailed, match="3 of 3 artifacts differ"):
        check(ParityReport.read(out / "report.json"))


def test_a_file_that_is_cut_off_is_named_before_the_model_is_loaded(
    copied: Path, tmp_path: Path
) -> None:
    path = copied / "onnx/vae_decoder/model.onnx"
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"no model"):
        path.write_bytes(content)
        with pytest.raises(BadInput, match=r"vae_decoder/model.onnx .*cut off.*Export it again"):
            verify(copied, "no/such-model", tmp_path / "parity", VerifyConfig(), PROMPTS)
    assert not (tmp_path / "parity").exists()


def test_a_missing_artifact_and_a_folder_without_a_list_are_named(
    copied: Path, tmp_path: Path
) -> None:
    (copied / "onnx/text_encoder/model.onnx").unlink()
    with pytest.raises(BadInput, match=r"text_encoder/model.onnx \(onnx of text_encoder\) is miss"):
        verify(copied, "no/such-model", tmp_path / "parity", VerifyConfig(), PROMPTS)
    with pytest.raises(BadInput, match="needed is the folder that `laptop export"):
        verify(tmp_path, "no/such-model", tmp_path / "parity", VerifyConfig(), PROMPTS)


def test_an_artifact_of_another_model_is_refused(
    copied: Path, xl_folder: Path, tmp_path: Path
) -> None:
    shutil.copy(copied / "onnx/vae_encoder/model.onnx", copied / "onnx/vae_decoder/model.onnx")
    with pytest.raises(BadInput, match="Pass the model that it was exported from"):
        verify(copied, str(xl_folder), tmp_path / "p", VerifyConfig(steps=1), PROMPTS)


def test_an_unknown_precision_is_refused(copied: Path, tmp_path: Path) -> None:
    content = json.loads((copied / "artifacts.json").read_text())
    content["artifacts"][0]["precision"] = "int3"
    files.write_json(copied / "artifacts.json", content)
    with pytest.raises(Unsupported, match="int3"):
        verify(copied, "no/such-model", tmp_path / "parity", VerifyConfig(), PROMPTS)


def test_to_have_verified_nothing_is_no_success() -> None:
    with pytest.raises(CheckFailed, match="nothing was verified"):
        check(ParityReport(results=()))


def test_what_a_safety_checker_blackens_is_compared_before_it(
    small_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flagging = with_checker(small_folder, tmp_path / "model")
    pictures = [
        loading.load_pipeline(str(flagging), checked=checked)(
            PROMPTS[0], num_inference_steps=1, output_type="np"
        ).images
        for checked in (True, False)
    ]
    assert pictures[0].max() == 0, "the case is none"
    assert pictures[1].max() > 0
    config = ExportConfig(components=("unet",), steps=1)
    exported = export_model(str(flagging), tmp_path / "artifacts", config, PROMPTS)
    assert "the safety checker is left out" in capsys.readouterr().err
    for name in ("artifacts.json", "manifest.json"):
        assert strictly(exported / name)["left_out"] == ["safety_checker"]
    out = verify(exported, str(flagging), tmp_path / "p", VerifyConfig(steps=1), PROMPTS)
    report = strictly(out / "report.json")
    assert [r["state"] for r in report["results"]] == ["verified"] * 2
    assert np.array(Image.open(out / "onnx/picture/000.png")).max() > 0


def with_checker(model: Path, folder: Path) -> Path:
    """The model with a safety checker that calls every picture unsafe."""
    pipe = loading.load_pipeline(str(model))
    tower = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    vision = {**tower, "image_size": 16, "patch_size": 8}
    config = CLIPConfig(text_config=tower, vision_config=vision, projection_dim=16)
    checker = StableDiffusionSafetyChecker(config)
    checker.concept_embeds_weights.data.fill_(-5)
    extractor = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16)
    pipe.register_modules(safety_checker=checker, feature_extractor=extractor)
    pipe.register_to_config(requires_safety_checker=True)
    pipe.save_pretrained(folder)
    return folder
