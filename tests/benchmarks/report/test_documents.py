"""Any value of any file of a run or of an export may be wrong: what comes out is a message."""

import json
from pathlib import Path

import onnx
import pytest
from onnx import helper

from laptop.benchmarks import compare, gate_files
from laptop.benchmarks.devices.device import Facts
from laptop.benchmarks.latency.workloads import workloads
from laptop.benchmarks.report import latency_section, report
from laptop.benchmarks.settings import IMAGE
from laptop.errors import BadInput
from laptop.export.artifact_list import LIST, Artifacts
from laptop.export.artifacts import failures
from laptop.export.parity_report import ParityReport, check
from support.garbage import refused_in
from support.run_folder import write_run

FLOATS = onnx.TensorProto.FLOAT
GRAPH = helper.make_model(
    helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"])],
        "graph",
        [helper.make_tensor_value_info("x", FLOATS, [1])],
        [helper.make_tensor_value_info("y", FLOATS, [1])],
    )
)
COMPONENTS = {
    "text_encoder": {"input_ids": [1, 16]},
    "unet": {"sample": [2, 4, 8, 8], "timestep": [], "encoder_hidden_states": [2, 16, 128]},
    "vae_decoder": {"latent_sample": [1, 4, 8, 8]},
}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run with every file; of its report, only the text is made."""
    for name in ("score_chart", "loss_curves", "image_grid"):
        monkeypatch.setattr(report.figures, name, lambda *_: None)
    monkeypatch.setattr(latency_section, "bar_chart", lambda *_: None)
    write_run(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "every"),
    [
        ("plan.json", 5),
        ("laptop.json", 11),
        ("score/scores.json", 3),
        ("parity/report.json", 5),
        ("bench/local.json", 13),
        ("eval/eval.json", 7),
        ("model/model_index.json", 1),
    ],
)
def test_a_report_of_a_damaged_run_is_a_message(run: Path, name: str, every: int) -> None:
    assert refused_in(run / name, lambda: report._parts(report.read_run(run)), every) > 0


def test_a_comparison_with_a_damaged_result_is_a_message(run: Path, tmp_path: Path) -> None:
    for name in ("plan.json", "bench/local.json", "eval/eval.json"):
        (tmp_path / "base.json").write_bytes((run / name).read_bytes())

        def read(name: str = name) -> None:
            changes, _ = compare.compare(tmp_path / "base.json", run / name)
            for form in (gate_files.junit, gate_files.markdown, gate_files.benchmark):
                form(changes)

        refused_in(run / name, read, 7)


def write_artifacts(folder: Path) -> Path:
    rows = [
        {"target": "onnx", "component": part, "file": f"onnx/{part}/model.onnx", "bytes": 1,
         "sha256": "0", "precision": "fp32", "chunks": [], "shapes": shapes, "params": 9}
        for part, shapes in COMPONENTS.items()
    ]  # fmt: skip
    for row in rows:
        path = folder / row["file"]
        path.parent.mkdir(parents=True)
        onnx.save(GRAPH, path)
    failed = [{"target": "ort", "precision": "fp32", "component": "unet", "error": "no"}]
    sampling = {"steps": 3, "guidance": 5.0}
    head = {"schema": Artifacts.SCHEMA, "resolution": 64, "pixels_per_latent": 8}
    content = head | {"sampling": sampling, "artifacts": rows, "left_out": [], "failed": failed}
    (folder / LIST).write_text(json.dumps(content))
    return folder


def test_a_damaged_list_of_artifacts_is_a_message(tmp_path: Path) -> None:
    folder = write_artifacts(tmp_path)
    facts = Facts("board", "Linux", {"onnxruntime": "1.0"})

    def read() -> None:
        failures(folder)
        _ = Artifacts.read(folder / LIST).picture_size
        timed = workloads({"model": str(folder)}, IMAGE, facts)
        assert [w.resolution for w in timed]

    assert refused_in(folder / LIST, read) > 100


def test_a_damaged_parity_report_is_a_message(run: Path) -> None:
    def read() -> None:
        check(ParityReport.read(run / "parity" / "report.json"))

    assert refused_in(run / "parity" / "report.json", read) > 10


def test_a_message_names_file_and_key(run: Path) -> None:
    path = run / "bench" / "local.json"
    bench = json.loads(path.read_text())
    bench["results"][1]["latency_ms"]["p50"] = None
    path.write_text(json.dumps(bench))
    with pytest.raises(BadInput, match=r"local\.json: results\[1\]\.latency_ms\.p50 is None"):
        report.write_report(run)
