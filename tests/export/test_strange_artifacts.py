"""Artifacts and graphs of strangers: names never lead outside, no code of theirs runs."""

import json
from pathlib import Path
from typing import Any

import pytest
from onnx import TensorProto, helper

from laptop.errors import BadInput, Unsupported
from laptop.export import artifact_list
from laptop.export.to_onnx import onnx_checks
from laptop.export.to_onnx import target as to_onnx

OUTSIDE = ("../x", "/x", "a/../../x", "..", "C:/x", "a\\..\\x", "", "x\0y", None, ["x"])


def artifacts_list(folder: Path, **row: Any) -> Path:
    (folder / "onnx/unet").mkdir(parents=True, exist_ok=True)
    (folder / "onnx/unet/model.onnx").write_bytes(b"")
    plain = {"target": "onnx", "component": "unet", "precision": "fp32"}
    rows = [{**plain, "file": "onnx/unet/model.onnx", "chunks": [], **row}]
    content = {"schema": artifact_list.Artifacts.SCHEMA, "artifacts": rows, "resolution": None}
    (folder / artifact_list.LIST).write_text(json.dumps(content))
    return folder


BAD_ARTIFACTS = (
    *OUTSIDE,
    *("unet/model.onnx", "onnx/vae_decoder/model.onnx", "onnx-$(touch x)/unet/model.onnx"),
    *("onnx/unet/$(x).onnx", "onnx/../onnx/unet/model.onnx", "./onnx/unet/model.onnx", "onnx/unet"),
)


@pytest.mark.parametrize("name", BAD_ARTIFACTS)
def test_a_list_of_artifacts_names_what_export_writes(tmp_path: Path, name: Any) -> None:
    with pytest.raises(BadInput, match=r"artifacts\.json"):
        artifact_list.read_list(artifacts_list(tmp_path, file=name))


@pytest.mark.parametrize("name", [*OUTSIDE, "onnx/$(touch x)"])
def test_chunks_of_artifacts_are_in_the_folder_too(tmp_path: Path, name: Any) -> None:
    with pytest.raises(BadInput, match=r"artifacts\.json"):
        artifact_list.read_list(artifacts_list(tmp_path, chunks=[name]))


def test_artifacts_as_export_writes_them_are_read(tmp_path: Path) -> None:
    (artifact,) = artifact_list.read_list(artifacts_list(tmp_path)).artifacts
    assert artifact.file == "onnx/unet/model.onnx"


def graph(node: Any = None, weight: Any = None) -> Any:
    nodes = [node or helper.make_node("Relu", ["x"], ["y"])]
    return helper.make_graph(nodes, "g", [], [], [weight] if weight else [])


def external(location: str) -> Any:
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4])
    tensor.data_location = TensorProto.EXTERNAL
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", location
    return tensor


def saved(path: Path, content: Any, *functions: Any) -> Path:
    model = helper.make_model(content, functions=functions)
    path.write_bytes(model.SerializeToString())
    return path


def branch(inner: Any) -> Any:
    return helper.make_node("If", ["c"], ["z"], then_branch=inner, else_branch=graph())


@pytest.mark.parametrize("location", ["../secret", "/etc/passwd", "/proc/self/mem", "", "link"])
@pytest.mark.parametrize("where", ["weight", "branch", "constant", "sparse", "function"])
def test_weights_of_a_graph_outside_its_folder_are_refused(
    tmp_path: Path, location: str, where: str
) -> None:
    (tmp_path / "secret").write_bytes(bytes(16))
    folder = tmp_path / "unet"
    folder.mkdir()
    (folder / "link").symlink_to("../secret")
    tensor = external(location)
    constant = helper.make_node("Constant", [], ["k"], value=tensor)
    content, functions = graph(weight=tensor), []
    if where == "branch":
        content = graph(branch(graph(branch(graph(weight=tensor)))))
    elif where == "constant":
        content = graph(constant)
    elif where == "sparse":
        content = graph()
        content.sparse_initializer.add().values.CopyFrom(tensor)
    elif where == "function":
        content = graph(helper.make_node("F", [], ["k"], domain="own"))
        functions = [helper.make_function("own", "F", [], ["k"], [constant], [])]
    with pytest.raises(BadInput, match=r"model\.onnx"):
        onnx_checks.read_graph(saved(folder / "model.onnx", content, *functions))


def test_weights_of_a_graph_in_its_folder_are_fine(tmp_path: Path) -> None:
    (tmp_path / "model.onnx_data").write_bytes(bytes(16))
    path = saved(tmp_path / "model.onnx", graph(weight=external("model.onnx_data")))
    assert len(onnx_checks.read_graph(path).graph.initializer) == 1


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_an_operator_of_a_library_from_elsewhere_is_refused(tmp_path: Path, depth: int) -> None:
    content = graph(helper.make_node("Evil", ["x"], ["y"], domain="evil"))
    for _ in range(depth):
        content = graph(branch(content))
    with pytest.raises(BadInput, match="'Evil' of 'evil'"):
        onnx_checks.read_graph(saved(tmp_path / "model.onnx", content))
    known = graph(helper.make_node("Gelu", ["x"], ["y"], domain="com.microsoft"))
    onnx_checks.read_graph(saved(tmp_path / "known.onnx", known))


@pytest.mark.parametrize("content", [b"", b"no graph", bytes(100)])
def test_what_is_no_graph_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(BadInput, match="cannot be read"):
        onnx_checks.read_graph(tmp_path / "model.onnx")


@pytest.mark.parametrize(
    "index",
    [
        {"_class_name": ["evil", "Pipe"]},
        {"_class_name": "Evil"},
        {"scheduler": ["evil", "Evil"]},
        {"scheduler": ["subprocess", "Popen"]},
        {"tokenizer": ["transformers", "AutoTokenizer"]},
        {"tokenizer_3": ["transformers", "CLIPTokenizer"]},
        {"feature_extractor": ["os", "system"]},
        {"tokenizer": "evil"},
    ],
)
def test_classes_of_onnx_pipelines_are_of_the_list(tmp_path: Path, index: Any) -> None:
    for name in to_onnx.NEEDED:
        (tmp_path / name).mkdir()
        saved(tmp_path / name / "model.onnx", graph())
    plain = {"_class_name": "StableDiffusionPipeline", "scheduler": ["diffusers", "DDIMScheduler"]}
    (tmp_path / "model_index.json").write_text(json.dumps(plain | index))
    with pytest.raises(Unsupported):
        to_onnx.load_pipeline(tmp_path)
