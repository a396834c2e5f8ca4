"""`laptop bench` on small real models and exports: what is timed, kept, told and refused."""

import json
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from laptop.benchmarks.devices.computer import Computer, Process
from laptop.benchmarks.devices.device import Workload
from laptop.benchmarks.latency import bench as latency
from laptop.benchmarks.latency.bench import bench
from laptop.cli import main
from laptop.files import write_json
from laptop.hosts.host import Local
from support.onnx_files import onnx_folder
from support.sleepers import HERE, QUICK

IDENTITY = {  # of a finished report of version 0.1.0
    *("components", "runtimes", "guidance", "steps", "threads", "rounds", "iterations", "seconds"),
    *("warmup_iterations", "warmup_s", "cv_bound", "sustained_s", "cool_down_s", "python", "seed"),
    *("subjects", "device", "versions", "size"),
}


def test_bench_times_pytorch_and_onnx_of_two_models_and_states_the_conditions(
    tiny_folder: Path, pruned_folder: Path, tmp_path: Path
) -> None:
    unet = tiny_folder / "unet" / "config.json"
    subjects = {
        "teacher": (tiny_folder, onnx_folder(tmp_path / "base", unet)),
        "student": (str(pruned_folder), onnx_folder(tmp_path / "artifacts", unet)),
    }
    config = replace(QUICK, steps=4)
    out = tmp_path / "bench" / "local.json"
    bench(subjects, out, config, HERE, unet_only=("teacher",))
    found = json.loads(out.read_text())
    assert found["schema"] == "laptop.bench/1"
    manifest = json.loads(out.with_suffix(".manifest.json").read_text())
    assert manifest["config"].keys() == IDENTITY, "a finished report of 0.1.0 is kept"
    assert found["device"]["address"] == "local"
    rows = {(r["label"], r["runtime"]): r for r in found["results"] if r["component"] == "unet"}
    assert len(rows) == 4
    others = [(r["label"], r["component"]) for r in found["results"] if r["component"] != "unet"]
    assert others == [("student", c) for c in ("text_encoder", "text_encoder_2", "vae_decoder")]
    assert [(p["runtime"], p["a"], p["b"]) for p in found["ratios"]] == [
        ("pytorch", "teacher", "student"),
        ("onnxruntime", "teacher", "student"),
    ]
    row = rows["student", "pytorch"]
    assert row["params"] < rows["teacher", "pytorch"]["params"]
    assert row["size_bytes"] > row["params"]
    assert row["load_s"]["cold"] > 0
    assert row["latency_ms"]["first"] > 0
    for one in found["results"]:
        has_size = one["component"] == "vae_decoder" or one["runtime"] == "pytorch"
        size = [64, 64] if has_size and not one["component"].startswith("text") else None
        assert one["conditions"]["resolution"] == size, "the stand-in's export has no VAE beside it"
    shapes = row["conditions"]["shapes"]
    assert shapes["encoder_hidden_states"] == [2, 16, 128]
    assert shapes["text_embeds"] == [2, 64]
    assert len(row["sha256"]) == 64
    assert row["conditions"]["steps"] == 4
    images = {r["label"]: r for r in found["images"]}
    assert images.keys() == {"teacher", "student"}
    image = images["teacher"]
    assert image["latency_ms"]["p50"] == pytest.approx(
        sum(
            calls * part["latency_ms"]["p50"]
            for calls, part in (
                (4, rows["teacher", "pytorch"]),
                *(
                    (2 if r["component"] != "vae_decoder" else 1, r)
                    for r in found["results"]
                    if r["component"] != "unet"
                ),
            )
        )
    )
    assert image["parts"]["vae_decoder"] == "student"
    before = out.stat().st_mtime_ns
    bench(subjects, out, config, HERE, unet_only=("teacher",))
    assert out.stat().st_mtime_ns == before, "a finished bench is not done again"


def two_precisions(folder: Path, unet: Path) -> Path:
    """Artifacts in two precisions that run here, and one that does not."""
    onnx_folder(folder, unet)
    shutil.copytree(folder / "onnx", folder / "onnx-int8")
    shutil.copytree(folder / "onnx" / "unet", folder / "coreml" / "unet.mlpackage")
    rows = [
        {
            "target": target,
            "component": "unet",
            "file": file,
            "precision": precision,
            "params": 7,
        }
        for target, file, precision in (
            ("onnx", "onnx/unet/model.onnx", "fp32"),
            ("onnx", "onnx-int8/unet/model.onnx", "int8"),
            ("coreml", "coreml/unet.mlpackage", "fp16"),  # for Apple's systems only
        )
    ]
    listed = {"schema": "laptop.artifacts/1", "resolution": None, "artifacts": rows}
    write_json(folder / "artifacts.json", listed)
    return folder


def test_every_precision_of_a_target_is_timed_and_has_its_own_ratio(
    tiny_folder: Path, tmp_path: Path
) -> None:
    unet = tiny_folder / "unet" / "config.json"
    subjects = {name: two_precisions(tmp_path / name, unet) for name in ("a", "b")}
    out = bench(subjects, tmp_path / "x.json", QUICK, HERE)
    found = json.loads(out.read_text())
    assert [(r["label"], r["target"], r["precision"]) for r in found["results"]] == [
        ("a", "onnx", "fp32"), ("b", "onnx", "fp32"), ("a", "onnx-int8", "int8"),
        ("b", "onnx-int8", "int8"),
    ]  # fmt: skip
    assert [pair["target"] for pair in found["ratios"]] == ["onnx", "onnx-int8"]


@dataclass(frozen=True)
class Stopped(Computer):
    """This machine, until `stops` is loaded there; `loaded` has what was."""

    stops: str = ""
    loaded: list[str] = field(default_factory=list)

    def meter(self, workload: Workload, warmup_iterations: int, warmup_s: float) -> Process:
        if workload.target == self.stops:
            raise KeyboardInterrupt
        self.loaded.append(workload.target)
        return super().meter(workload, warmup_iterations, warmup_s)


@pytest.mark.parametrize("is_valid", [True, False])
def test_a_stopped_bench_goes_on_with_what_it_had_not_finished(
    tiny_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    is_valid: bool,
) -> None:
    reasons = [] if is_valid else ["busy"]
    monkeypatch.setattr(latency, "invalid_reasons", lambda *_, **__: reasons)
    subjects = {"a": two_precisions(tmp_path / "a", tiny_folder / "unet" / "config.json")}
    out = tmp_path / "x.json"
    with pytest.raises(KeyboardInterrupt):
        bench(subjects, out, QUICK, Stopped(Local(), stops="onnx-int8"))
    (kept,) = tmp_path.glob(".x.json.partial/.resume/group-*.json")
    (before,) = json.loads(kept.read_text())["results"]
    again = Stopped(Local())
    bench(subjects, out, QUICK, again)
    first, second = json.loads(out.read_text())["results"]
    assert second["target"] == "onnx-int8"
    if is_valid:
        assert again.loaded == ["onnx-int8"]
        assert "unet onnx was measured by an earlier call" in capsys.readouterr().err
        assert first == before
    else:
        assert again.loaded == ["onnx", "onnx-int8"], "what cannot be trusted is measured again"
    assert not list(tmp_path.glob(".x*"))


def test_the_command_exits_1_for_what_is_not_valid_unless_told_otherwise(
    tiny_folder: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "quick.toml"
    recipe.write_text("[bench]\nrounds = 1\niterations = 2\nseconds = 0\nwarmup_s = 0\n")
    out, unet = tmp_path / "x.json", tiny_folder / "unet" / "config.json"
    artifacts = str(two_precisions(tmp_path / "a", unet))
    command = ["bench", artifacts, "--component", "unet", "-c", str(recipe), "-o", str(out)]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 1
    assert "2 samples; 20 are needed" in done.output
    assert out.exists()
    assert CliRunner().invoke(main, [*command, "--allow-invalid"]).exit_code == 0
    copy, second = shutil.copytree(artifacts, tmp_path / "copy"), tmp_path / "y.json"
    command[1], command[-1] = str(copy), str(second)
    assert CliRunner().invoke(main, [*command, "--allow-invalid"]).exit_code == 0
    compare = ["compare", str(out), str(second), "--fail-on"]
    assert CliRunner().invoke(main, [*compare, "params>+0%"]).exit_code == 0
    done = CliRunner().invoke(main, [*compare, "latency_ms.p50>+100000%"])
    assert done.exit_code == 1
    assert "(measurement not valid)" in done.output


def test_a_dry_run_says_what_would_be_timed(tiny_folder: Path, tmp_path: Path) -> None:
    artifacts = two_precisions(tmp_path / "a", tiny_folder / "unet" / "config.json")
    command = ["bench", str(artifacts), "--dry-run", "-o", str(tmp_path / "x.json")]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)["estimate"]
    assert found["timed"] == [
        "model: unet, onnx in onnxruntime", "model: unet, onnx-int8 in onnxruntime",
    ]  # fmt: skip
    assert found["least_seconds"] == 24
    command = ["bench", str(tiny_folder), "--layers", "--dry-run", "-o", str(tmp_path / "x.json")]
    found = json.loads(CliRunner().invoke(main, command).stdout)["estimate"]
    assert found["layers"] == 44
    assert not list(tmp_path.glob("x*"))
    done = CliRunner().invoke(main, [*command, "--device", "orin"])
    assert "is no device" in done.output


def test_a_plot_is_not_written_over_what_lies_there(tmp_path: Path) -> None:
    (tmp_path / "x.svg").write_text("precious")
    done = CliRunner().invoke(
        main, ["bench", "tiny-sdxl", "--sustained", "1s", "-o", str(tmp_path / "x.json")]
    )
    assert done.exit_code == 1
    assert "x.svg exists" in done.output


def test_a_plot_lies_beside_a_sustained_report(tiny_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.json"
    artifacts = two_precisions(tmp_path / "a", tiny_folder / "unet" / "config.json")
    command = ["bench", str(artifacts), "--component", "unet", "--sustained", "1s"]
    done = CliRunner().invoke(main, [*command, "--allow-invalid", "-o", str(out)])
    assert done.exit_code == 0, done.output
    assert "last / first part: " in done.output
    assert "<svg" in (tmp_path / "x.svg").read_text()
    done = CliRunner().invoke(main, ["bench", "x", "--sustained", "10", "-o", str(out)])
    assert done.exit_code == 2
    assert "write 90s, 10m or 1h" in done.output
