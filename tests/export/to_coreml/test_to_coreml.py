"""Core ML packages, read back and computed by the reference interpreter (on macOS by Core ML)."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from laptop.errors import BadInput, LaptopError
from laptop.export import closeness, parity
from laptop.export.artifacts import ExportConfig, check_exported, export_model
from laptop.export.inputs import record
from laptop.export.job import Job
from laptop.export.settings import CoremlConfig, VerifyConfig
from laptop.export.to_coreml import mil_interpreter
from laptop.export.to_coreml import target as to_coreml
from laptop.export.to_coreml.mil_program import read, read_spec, spec_path
from laptop.export.to_coreml.target import feeds_angles, library
from laptop.models import loading
from laptop.pruning.sampling_config import Sampling
from support.packages import exact_output, output_of, weights_of

PROMPTS = ["a large red circle on white"]
FLOAT16, FLOAT32, INT32 = 65552, 65568, 131104  # ArrayFeatureType.ArrayDataType
CHUNKED = CoremlConfig(chunk="always", compute_units="cpu_and_ne")


@pytest.fixture(scope="module")
def exported(pruned_xl_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The U-Net, in chunks too, and a text encoder of the pruned `tiny-sdxl`."""
    out = tmp_path_factory.mktemp("coreml") / "artifacts"
    config = ExportConfig(
        targets=("coreml",), components=("unet", "text_encoder_2"), coreml=CHUNKED
    )
    return export_model(str(pruned_xl_folder), out, config, PROMPTS)


@pytest.fixture(scope="module")
def small(small_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All components of it, the VAE in fp16."""
    out = tmp_path_factory.mktemp("coreml") / "small"
    config = ExportConfig(targets=("coreml",), vae_precision="fp16")
    return export_model(str(small_folder), out, config, PROMPTS)


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


def reports(artifacts: Path, model: Path, out: Path) -> list[dict[str, Any]]:
    parity.verify(artifacts, str(model), out, VerifyConfig(steps=2), PROMPTS)
    return json.loads((out / "report.json").read_text())["results"]


def test_the_package_holds_fp16_weights(exported: Path, pruned_xl_folder: Path) -> None:
    rows = json.loads((exported / "artifacts.json").read_text())["artifacts"]
    (row,) = [row for row in rows if row["component"] == "unet"]
    assert (row["target"], row["precision"]) == ("coreml", "fp16")
    assert row["file"] == "coreml/unet.mlpackage"
    files = [p for p in (exported / row["file"]).rglob("*") if p.is_file()]
    assert row["bytes"] == sum(p.stat().st_size for p in files)
    (weights,) = (p.stat().st_size for p in files if p.name == "weight.bin")
    params = loading.load_unet(str(pruned_xl_folder)).num_parameters()
    assert weights == pytest.approx(2 * params, rel=0.03)


def test_the_weights_read_back_are_those_of_the_model(
    exported: Path, pruned_xl_folder: Path
) -> None:
    found = weights_of(read(exported / "coreml" / "unet.mlpackage"))
    unet = loading.load_unet(str(pruned_xl_folder))
    wanted = {k: v for k, v in unet.state_dict().items() if k.endswith("weight") and v.ndim > 1}
    for name, weight in wanted.items():
        value = found[name.replace(".", "_")].float()
        bound = weight.abs() * 2**-11 + 2**-25  # half a unit in the last place of fp16
        assert ((value - weight).abs() <= bound).all(), name
    assert len(wanted) > 60


def test_every_component_is_a_package_in_its_own_precision(small: Path) -> None:
    rows = json.loads((small / "artifacts.json").read_text())["artifacts"]
    assert [(r["component"], r["precision"]) for r in rows] == [
        ("text_encoder", "fp16"),
        ("unet", "fp16"),
        ("vae_encoder", "fp16"),
        ("vae_decoder", "fp16"),
    ]
    text = read_spec(small / "coreml" / "text_encoder.mlpackage").description
    assert described(text.input) == {"input_ids": ([1, 16], INT32)}
    assert described(text.output)["last_hidden_state"] == ([1, 16, 32], FLOAT16)
    picture = read_spec(small / "coreml" / "vae_decoder.mlpackage").description
    assert described(picture.input) == {"latent_sample": ([1, 4, 8, 8], FLOAT16)}


def test_every_component_is_computed_above_its_floor(
    small: Path, small_folder: Path, exported: Path, pruned_xl_folder: Path, tmp_path: Path
) -> None:
    rows = reports(small, small_folder, tmp_path / "small")
    rows += reports(exported, pruned_xl_folder, tmp_path / "pruned")
    assert len(rows) == 8, "six components and the pictures of two models"
    for row in rows:
        assert row["reason"] is None, row
        assert row["samples"] > 0
        assert row["state"] == to_coreml.checked("fp16")
        assert row["psnr_db"] >= 50 > row["floor_db"], row


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS predicts, there is nothing to add")
def test_a_unet_that_lost_sublayers_and_all_text_is_computed_above_its_floor(
    textless_folder: Path, tmp_path: Path
) -> None:
    config = ExportConfig(targets=("coreml",), components=("unet",), steps=1)
    out = export_model(str(textless_folder), tmp_path / "artifacts", config, PROMPTS)
    check_exported(out)
    (row,) = reports(out, textless_folder, tmp_path / "parity")[:1]
    assert row["component"] == "unet"
    assert row["psnr_db"] >= 40


def test_where_nothing_predicts_it_is_said_who_computes() -> None:
    words = "computed by the reference interpreter; not run on Apple hardware"
    assert to_coreml.checked("fp16") == words


def permute_weight(package: Path) -> None:
    """Turn the rows of one saved weight around."""
    program = read(package)
    kernels = [o for o in program.operations if o.kind == "const" and "conv1_weight" in o.name]
    value = kernels[0].inputs["val"].read().numpy()
    (weights,) = package.rglob("weight.bin")
    data = weights.read_bytes()
    assert data.count(value.tobytes()) == 1
    weights.write_bytes(data.replace(value.tobytes(), value[::-1].tobytes()))


def drop_operation(package: Path) -> None:
    """Let what uses one activation use its input instead."""
    spec = read_spec(package)
    function = spec.mlProgram.functions["main"]
    block = function.block_specializations[function.opset]
    silu = [op for op in block.operations if op.type == "silu"][4]
    given, result = silu.inputs["x"].arguments[0].name, silu.outputs[0].name
    for op in block.operations:
        for argument in op.inputs.values():
            for bound in argument.arguments:
                if bound.name == result:
                    bound.name = given
    block.operations.remove(silu)
    spec_path(package).write_bytes(spec.SerializeToString())


@pytest.mark.parametrize("fault", [permute_weight, drop_operation])
def test_a_planted_fault_is_found(
    fault: Callable[[Path], None], small: Path, small_folder: Path, tmp_path: Path
) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(small, damaged)
    fault(damaged / "coreml" / "unet.mlpackage")
    rows = {row["component"]: row for row in reports(damaged, small_folder, tmp_path / "parity")}
    assert rows["unet"]["state"] == "failed"
    assert rows["unet"]["psnr_db"] < rows["unet"]["floor_db"]
    assert rows["vae_decoder"]["reason"] is None


def test_chunks_hold_half_the_weights_each_and_compute_what_the_whole_does(
    exported: Path, pruned_xl_folder: Path
) -> None:
    whole = exported / "coreml" / "unet.mlpackage"
    sizes = [
        next(p.rglob("weight.bin")).stat().st_size for p in (whole, *to_coreml.chunks_of(whole))
    ]
    assert sum(sizes[1:]) == pytest.approx(sizes[0], rel=0.02)
    rows = json.loads((exported / "artifacts.json").read_text())["artifacts"]
    assert [row["chunks"] for row in rows if row["component"] == "unet"] == [
        ["coreml/unet_chunk1.mlpackage", "coreml/unet_chunk2.mlpackage"]
    ]
    assert max(sizes[1:]) < 0.6 * sizes[0]
    pipe = loading.load_pipeline(str(pruned_xl_folder))
    example = record(pipe, PROMPTS, Sampling(1), seed=3)["unet"][0]
    to_coreml.check_chunks(whole, {k: v.numpy() for k, v in example.items()})


def test_chunks_that_compute_something_else_are_an_error(exported: Path, tmp_path: Path) -> None:
    shutil.copytree(exported / "coreml", tmp_path / "coreml")
    whole = tmp_path / "coreml" / "unet.mlpackage"
    permute_weight(to_coreml.chunks_of(whole)[0])
    rng = np.random.default_rng(0)
    example = {k: rng.normal(size=t.shape) for k, t in read(whole).inputs.items()}
    with pytest.raises(LaptopError, match=r"chunks of .* give another out_sample"):
        to_coreml.check_chunks(whole, example)


def test_a_small_model_is_not_chunked(small: Path) -> None:
    assert not (small / "coreml" / "unet_chunk1.mlpackage").exists()


def test_the_compute_units_stand_in_the_package(spec: Any) -> None:
    assert spec.description.metadata.userDefined["laptop.compute_units"] == "cpu_and_ne"


@pytest.mark.parametrize(
    ("system", "version", "precision", "floor"),
    [("iOS16", 7, "fp16", 50), ("iOS18", 9, "fp32", 100), ("iOS18", 9, "palette6", 30)],
)
def test_the_deployment_target_is_that_of_the_settings(
    system: str, version: int, precision: str, floor: float, job: Callable[..., Job]
) -> None:
    config = CoremlConfig(minimum_deployment_target=system)
    one = job(f"{system}-{precision}", config, precision=precision)
    to_coreml.export(one)
    assert read_spec(one.path).specificationVersion == version
    assert closeness.psnr(exact_output(one), output_of(one.path, one.examples()[0])) > floor


def test_settings_that_are_not_known_are_refused_with_the_choices() -> None:
    with pytest.raises(BadInput, match=r"attention is 'flash'; known are original, split-einsum"):
        CoremlConfig(attention="flash")


def swift_inputs(example: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The U-Net's inputs as Apple's runner gives them."""
    arrays = {k: v.numpy() for k, v in example.items()}
    states = arrays["encoder_hidden_states"].transpose(0, 2, 1)[:, :, None]  # (B, C, 1, T)
    times = np.repeat(arrays["timestep"].reshape(1), 2)
    return {**arrays, "encoder_hidden_states": states, "timestep": times}


def test_resources_of_an_xl_model_take_what_apples_runner_gives(
    exported: Path, pruned_xl_folder: Path
) -> None:
    folder = exported / "coreml" / "Resources"
    assert {p.name for p in folder.iterdir()} == {
        "UnetChunk1.mlpackage",
        "UnetChunk2.mlpackage",
        "TextEncoder2.mlpackage",
        "vocab.json",
        "merges.txt",
        "compile.sh",
    }
    pipe = loading.load_pipeline(str(pruned_xl_folder))
    recorded = record(pipe, PROMPTS, Sampling(1), seed=0)
    example = recorded["unet"][0]
    given: dict[str, Any] = swift_inputs(example)
    for name in ("UnetChunk1", "UnetChunk2"):  # as Unet.swift hands them on
        package = folder / f"{name}.mlpackage"
        taken = {k: given[k] for k in read(package).inputs}
        given = {**given, **mil_interpreter.load(package)(taken)}
    plain = output_of(exported / "coreml" / "unet.mlpackage", example)
    np.testing.assert_array_equal(given["noise_pred"], plain)

    ids = recorded["text_encoder_2"][0]["input_ids"].numpy()
    text = mil_interpreter.load(folder / "TextEncoder2.mlpackage")
    got = text({"input_ids": ids.astype(np.float32)})
    whole = to_coreml.load(exported / "coreml" / "text_encoder_2.mlpackage")({"input_ids": ids})
    last = pipe.text_encoder_2.config.num_hidden_layers - 1  # hidden_states[-2]
    assert set(got) == {"hidden_embeds", "pooled_outputs"}
    np.testing.assert_array_equal(got["hidden_embeds"], whole[f"hidden_states.{last}"])
    np.testing.assert_array_equal(got["pooled_outputs"], whole["text_embeds"])


def test_resources_of_an_older_model_take_what_apples_runner_gives(
    small: Path, small_folder: Path
) -> None:
    folder = small / "coreml" / "Resources"
    pipe = loading.load_pipeline(str(small_folder))
    recorded = record(pipe, PROMPTS, Sampling(1), seed=0)
    run = mil_interpreter.load(folder / "Unet.mlpackage")
    example = recorded["unet"][0]
    np.testing.assert_array_equal(
        run(swift_inputs(example))["noise_pred"],
        output_of(small / "coreml" / "unet.mlpackage", example),
    )
    text = mil_interpreter.load(folder / "TextEncoder.mlpackage")
    ids = recorded["text_encoder"][0]["input_ids"].numpy().astype(np.float32)
    assert set(text({"input_ids": ids})) == {"last_hidden_state", "pooled_outputs"}
    picture = mil_interpreter.load(folder / "VAEDecoder.mlpackage")
    latent = recorded["vae_decoder"][0]["latent_sample"].numpy()
    assert picture({"z": latent})["image"].shape == (1, 3, 16, 16)
    spec = read_spec(folder / "TextEncoder.mlpackage").description
    assert described(spec.input) == {"input_ids": ([1, 16], FLOAT32)}
    vocabulary = json.loads((folder / "vocab.json").read_text())
    assert vocabulary == pipe.tokenizer.get_vocab()


def test_resources_take_no_second_place_on_the_disk(small: Path) -> None:
    (one,) = (small / "coreml" / "unet.mlpackage").rglob("weight.bin")
    (other,) = (small / "coreml" / "Resources" / "Unet.mlpackage").rglob("weight.bin")
    assert one.samefile(other)


def test_only_what_leads_to_nothing_but_sines_stays_fp32() -> None:
    def op(kind: str, *users: Any) -> Any:
        return SimpleNamespace(op_type=kind, outputs=[SimpleNamespace(child_ops=list(users))])

    sine, cosine, conv = op("sin"), op("cos"), op("conv")
    assert feeds_angles(sine)
    assert feeds_angles(op("expand_dims", op("mul", sine, cosine)))
    assert not feeds_angles(op("mul", sine, conv))
    assert not feeds_angles(conv)


def test_items_of_a_package_have_the_same_names_each_time(tmp_path: Path) -> None:
    for folder, first, second in (("a", "1f", "0c"), ("b", "77", "e2")):
        (tmp_path / folder).mkdir()
        items = {first: {"path": "com.apple.CoreML/weights"}, second: {"path": "model.mlmodel"}}
        manifest = {"itemInfoEntries": items, "rootModelIdentifier": second}
        (tmp_path / folder / "Manifest.json").write_text(json.dumps(manifest))
        to_coreml.name_items_(tmp_path / folder)
    one, two = ((tmp_path / folder / "Manifest.json").read_text() for folder in "ab")
    assert one == two
    manifest = json.loads(one)
    root = manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]
    assert root == {"path": "model.mlmodel"}
