"""TensorRT's graphs: types, shapes, plan and the check against its list of operators."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from conftest import small_sd15
from laptop import files
from laptop.errors import BadInput, CheckFailed, Unsupported
from laptop.export import parity
from laptop.export.artifacts import ExportConfig, check_exported, export_model
from laptop.export.inputs import record
from laptop.export.job import Job, save_examples
from laptop.export.parity_report import ParityReport, check
from laptop.export.settings import TensorrtConfig, VerifyConfig
from laptop.export.to_onnx import folding, onnx_session
from laptop.export.to_tensorrt import operators, trtexec
from laptop.export.to_tensorrt import target as to_tensorrt
from laptop.export.to_tensorrt.plan import check_graph, read_plan
from laptop.export.to_tensorrt.trtexec import Tensor, Version
from laptop.models import loading
from laptop.pruning.sampling_config import Sampling

PROMPTS = ["a large red circle on white"]
CONFIG = ExportConfig(targets=("tensorrt",), steps=1)


@pytest.fixture(scope="module")
def exported(pruned_xl_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All components of a pruned model, shapes static."""
    out = export_model(
        str(pruned_xl_folder), tmp_path_factory.mktemp("trt") / "out", CONFIG, PROMPTS
    )
    check_exported(out)
    return out


def one_node(operator: str, dtype: int, shape: tuple[int, ...] = (2,), **more: Any) -> Any:
    """A graph of one node from `x` to `y`."""
    return helper.make_model(
        helper.make_graph(
            [helper.make_node(operator, ["x"], ["y"], name="the_node", **more)],
            "g",
            [helper.make_tensor_value_info("x", dtype, shape)],
            [onnx.ValueInfoProto(name="y")],
        ),
        opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)],
    )


def test_the_graph_is_fp16_throughout_but_for_what_feeds_angles(exported: Path) -> None:
    plan = read_plan(exported / "tensorrt/unet/model.onnx").plan
    assert plan.precision == "fp16"
    assert plan.inputs == {
        "sample": Tensor("FLOAT16", (2, 4, 8, 8)),
        "timestep": Tensor("FLOAT", ()),
        "encoder_hidden_states": Tensor("FLOAT16", (2, 16, 128)),
        "text_embeds": Tensor("FLOAT16", (2, 64)),
        "time_ids": Tensor("FLOAT", (2, 6)),
    }
    assert plan.outputs == {"out_sample": Tensor("FLOAT16", (2, 4, 8, 8))}
    model = onnx.load(exported / "tensorrt/unet/model.onnx")
    types = operators.tensor_types(model)
    for node in model.graph.node:
        if node.op_type in ("Conv", "MatMul", "Gemm", "Softmax", "LayerNormalization"):
            assert {types[name] for name in node.input} == {TensorProto.FLOAT16}, node.name
        if node.op_type in ("Sin", "Cos"):
            assert types[node.input[0]] == TensorProto.FLOAT


def test_the_vae_has_its_own_precision(exported: Path) -> None:
    rows = json.loads((exported / "artifacts.json").read_text())["artifacts"]
    found = {row["component"]: row["precision"] for row in rows}
    assert found == {
        "text_encoder": "fp16",
        "text_encoder_2": "fp16",
        "unet": "fp16",
        "vae_encoder": "fp32",
        "vae_decoder": "fp32",
    }
    plan = read_plan(exported / "tensorrt/vae_decoder/model.onnx").plan
    assert trtexec.build_flags(Version(11, 0, 0), plan) == ["--noTF32"]


def test_no_shape_arithmetic_is_left_and_every_generation_takes_the_graph(exported: Path) -> None:
    for path in exported.rglob("model.onnx"):
        model = onnx.load(path)
        used = {node.op_type for node in model.graph.node}
        assert not used & {"Shape", "ConstantOfShape", "Range"}, path
        assert model.opset_import[0].version == 17
        assert json.loads((path.parent / "engine.json").read_text())["operators"] == {
            "8": [],
            "10": [],
        }


def test_the_plan_shows_the_flags_of_each_version(exported: Path) -> None:
    content = json.loads((exported / "tensorrt/unet/engine.json").read_text())
    assert content["flags"] == {"8.6": ["--fp16"], "10.0": ["--stronglyTyped"], "11.0": []}


def test_parity_holds_and_the_report_says_that_no_engine_was_built(
    exported: Path, pruned_xl_folder: Path, tmp_path: Path
) -> None:
    config = VerifyConfig(steps=2)
    out = parity.verify(exported, str(pruned_xl_folder), tmp_path / "parity", config, PROMPTS)
    report = json.loads((out / "report.json").read_text())
    check(ParityReport.read(out / "report.json"))
    assert report["results"], "nothing was compared"
    states = {row["state"] for row in report["results"]}
    assert states == {"ONNX graph computed by ONNX Runtime; no engine was built"}


def test_a_profile_makes_batch_and_picture_size_dynamic(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    small_sd15().save_pretrained(folder)
    config = ExportConfig(
        targets=("tensorrt",),
        components=("text_encoder", "unet", "vae_decoder"),
        steps=1,
        tensorrt=TensorrtConfig(batch=(1, 1, 2), resolution=(16, 16, 32), workspace_mib=512),
    )
    out = export_model(str(folder), tmp_path / "out", config, PROMPTS)
    check_exported(out)
    plan = read_plan(out / "tensorrt/unet/model.onnx").plan
    assert plan.profile == {
        "sample": ((2, 4, 8, 8), (2, 4, 8, 8), (4, 4, 16, 16)),
        "encoder_hidden_states": ((2, 16, 32), (2, 16, 32), (4, 16, 32)),
    }
    flags = trtexec.build_flags(Version(10, 3, 0), plan)
    assert "--maxShapes=sample:4x4x16x16,encoder_hidden_states:4x16x32" in flags
    run = onnx_session.load(out / "tensorrt/unet/model.onnx")
    generator = np.random.default_rng(0)
    given = {
        "sample": generator.normal(size=(4, 4, 16, 16)),
        "timestep": np.float32(500),
        "encoder_hidden_states": generator.normal(size=(4, 16, 32)),
    }
    assert run(given)["out_sample"].shape == (4, 4, 16, 16)
    decoder = read_plan(out / "tensorrt/vae_decoder/model.onnx").plan
    assert decoder.profile["latent_sample"][2] == (2, 4, 16, 16)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"batch": (2, 1, 4)}, r"batch is \[2, 1, 4\]: needed are three ascending"),
        ({"resolution": (64, 64)}, r"resolution is \[64, 64\]"),
        ({"optimization_level": 6}, "optimization_level is 6; it must be at most 5"),
        ({"workspace_mib": 0}, "workspace_mib is 0; it must be at least 1"),
    ],
)
def test_settings_that_cannot_be_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        TensorrtConfig(**given)


def test_a_resolution_without_whole_latents_is_refused(xl_folder: Path, tmp_path: Path) -> None:
    config = TensorrtConfig(resolution=(60, 64, 64))
    wanted = ExportConfig(targets=("tensorrt",), components=("unet",), steps=1, tensorrt=config)
    out = export_model(str(xl_folder), tmp_path / "out", wanted, PROMPTS)
    with pytest.raises(CheckFailed, match="resolution 60 makes no whole number of latents"):
        check_exported(out)


@pytest.mark.parametrize(
    ("model", "generation", "said"),
    [
        (one_node("NonZero", TensorProto.FLOAT), 10, ["NonZero (node the_node)"]),
        (one_node("Gelu", TensorProto.FLOAT, domain="com.microsoft"), 10, ["com.microsoft.Gelu"]),
        (one_node("Sqrt", TensorProto.DOUBLE), 10, ["Sqrt of DOUBLE (node the_node)"]),
        (one_node("Sqrt", TensorProto.FLOAT16), 8, []),
        (one_node("ConstantOfShape", TensorProto.INT64), 8, []),
        (one_node("ArgMax", TensorProto.INT64), 8, []),
    ],
)
def test_what_is_not_on_the_list_is_named(model: Any, generation: int, said: list[str]) -> None:
    found = operators.unsupported(model, generation)
    assert len(found) == len(said)
    assert all(f.startswith(s) for f, s in zip(found, said, strict=True)), found


def test_a_filled_integer_tensor_is_too_much_for_tensorrt_8() -> None:
    value = helper.make_tensor("v", TensorProto.INT64, [1], [7])
    model = one_node("ConstantOfShape", TensorProto.INT64, value=value)
    assert operators.unsupported(model, 8) == ["ConstantOfShape of INT64 (node the_node)"]
    assert operators.unsupported(model, 10) == []


def test_types_that_do_not_mix_are_an_error() -> None:
    model = one_node("Sqrt", TensorProto.FLOAT)
    model.graph.input.append(helper.make_tensor_value_info("h", TensorProto.FLOAT16, (2,)))
    model.graph.node.append(helper.make_node("Add", ["y", "h"], ["z"]))
    with pytest.raises(onnx.shape_inference.InferenceError, match="inconsistent type"):
        operators.unsupported(model, 10)


def test_a_graph_that_no_tensorrt_takes_is_not_exported(
    xl_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    less = {k: v for k, v in operators.SUPPORTED[10].items() if k != "Erf"}
    monkeypatch.setitem(operators.SUPPORTED, 10, less)
    given = tmp_path / "text_encoder_2.safetensors"
    save_examples(
        record(loading.load_pipeline(str(xl_folder)), PROMPTS, Sampling(1), seed=0)[
            "text_encoder_2"
        ],
        given,
    )
    job = Job(
        *("tensorrt", "text_encoder_2", "fp16", str(xl_folder)),
        *(given, tmp_path / "model.onnx", CONFIG),
    )
    with pytest.raises(Unsupported, match=r"text_encoder_2: TensorRT takes none of Erf \(node"):
        to_tensorrt.export(job)


def test_a_graph_for_another_generation_is_refused_before_a_build(
    exported: Path, tmp_path: Path
) -> None:
    artifact = exported / "tensorrt/unet/model.onnx"
    check_graph(artifact, Version(8, 6, 2))
    content = json.loads((artifact.parent / "engine.json").read_text())
    content["operators"]["8"] = ["ConstantOfShape of INT64 (node n)"]
    (tmp_path / "engine.json").write_text(json.dumps(content))
    check_graph(tmp_path / "model.onnx", Version(10, 3, 0))
    with pytest.raises(Unsupported, match=r"TensorRT 8\.6\.2 does not take ConstantOfShape"):
        check_graph(tmp_path / "model.onnx", Version(8, 6, 2))


def test_folding_changes_no_value_and_leaves_what_depends_on_inputs() -> None:
    nodes = [
        helper.make_node("Shape", ["x"], ["s"]),
        helper.make_node("Gather", ["s", "one"], ["width"]),
        helper.make_node("Mul", ["width", "one"], ["twice"]),
        helper.make_node("Concat", ["minus", "twice"], ["shape"], axis=0),
        helper.make_node("Reshape", ["x", "shape"], ["y"]),
    ]
    constants = {"one": np.array([1]), "minus": np.array([-1]), "unread": np.array([5])}

    def graph(shape: tuple[Any, ...]) -> Any:
        return helper.make_model(
            helper.make_graph(
                nodes,
                "g",
                [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
                [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
                [numpy_helper.from_array(v, k) for k, v in constants.items()],
            ),
            opset_imports=[helper.make_opsetid("", 17)],
            ir_version=8,
        )

    model = graph((2, 3))
    assert folding.fold_(model) == 4
    assert [node.op_type for node in model.graph.node] == ["Reshape"]
    assert [i.name for i in model.graph.initializer] == ["shape"]
    np.testing.assert_array_equal(numpy_helper.to_array(model.graph.initializer[0]), [-1, 3])
    assert folding.fold_(graph((2, "width"))) == 0


def test_a_wrong_plan_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "engine.json").write_text('{"schema": "laptop.engine-plan/9"}')
    with pytest.raises(BadInput, match=r"laptop\.engine-plan/9"):
        read_plan(tmp_path / "model.onnx")


def test_tensorrt_8_is_named_where_the_graph_keeps_attention_in_float32(
    small_folder: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(small_folder, tmp_path / "model")
    config = files.read_json(model / "unet" / "config.json") | {"upcast_attention": True}
    files.write_json(model / "unet" / "config.json", config)
    rows = record(loading.load_pipeline(str(model)), PROMPTS, Sampling(1), seed=0)["unet"]
    save_examples(rows, tmp_path / "unet.safetensors")
    save_examples([{"sample": torch.zeros(1, 3, 64, 64)}], tmp_path / "vae_encoder.safetensors")
    inputs, path = tmp_path / "unet.safetensors", tmp_path / "model.onnx"
    to_tensorrt.export(Job("tensorrt", "unet", "fp16", str(model), inputs, path, CONFIG))
    check_graph(path, Version(10, 0, 0))
    with pytest.raises(Unsupported, match=r"8.6.0 does not take attention scores in float32"):
        check_graph(path, Version(8, 6, 0))
