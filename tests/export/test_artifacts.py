"""The export stage: a process for each component, what fails, what is killed, what is refused."""

import json
import os
import shutil
import signal
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from laptop import files
from laptop.errors import BadInput, CheckFailed, LaptopError, OutputExists
from laptop.export import job, needs, target_folder
from laptop.export.artifact_list import read_list
from laptop.export.artifacts import ExportConfig, check_exported, export_model
from laptop.export.job import Job, run_apart
from laptop.export.targets import Request
from laptop.models import loading

PROMPTS = ["a large red circle on white"]
TWO = ExportConfig(targets=("onnx", "onnx:fp16"), components=("text_encoder",), steps=1)


def listed(out: Path) -> dict:
    return json.loads((out / "artifacts.json").read_text())


def fail_at(monkeypatch: pytest.MonkeyPatch, precision: str, error: BaseException) -> list[str]:
    """Let one target's process fail; the precisions that are asked for from now on."""
    asked: list[str] = []

    def run_or_fail(what, work, *given, **place):
        if given and isinstance(given[0], Job):
            asked.append(given[0].precision)
            if given[0].precision == precision:
                given[0].path.mkdir(parents=True)
                raise error
        return run_apart(what, work, *given, **place)

    monkeypatch.setattr(target_folder, "run_apart", run_or_fail)
    return asked


def test_a_target_that_fails_leaves_nothing_and_does_not_stop_the_others(
    small_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "artifacts"
    with monkeypatch.context() as patch:
        fail_at(patch, "fp32", LaptopError("out of luck"))
        export_model(str(small_folder), out, TWO, PROMPTS)
    assert [r["precision"] for r in listed(out)["artifacts"]] == ["fp16"]
    assert not (out / "onnx").exists()
    with pytest.raises(CheckFailed, match=r"onnx \(fp32\) of text_encoder: out of luck"):
        check_exported(out)
    asked = fail_at(monkeypatch, "none", LaptopError(""))
    export_model(str(small_folder), out, TWO, PROMPTS)
    check_exported(out)
    assert asked == ["fp32"], "the other one is kept"
    assert [r["precision"] for r in listed(out)["artifacts"]] == ["fp32", "fp16"]


def test_other_settings_do_not_take_away_what_succeeded(
    small_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "artifacts"
    fail_at(monkeypatch, "fp32", LaptopError("out of luck"))
    export_model(str(small_folder), out, TWO, PROMPTS)
    before = files.sha256(out)
    with pytest.raises(OutputExists, match="made from something else"):
        export_model(str(small_folder), out, replace(TWO, targets=("onnx:fp16",)), PROMPTS)
    (tmp_path / ".artifacts.partial").mkdir()
    with pytest.raises(OutputExists, match="holds unfinished work"):
        export_model(str(small_folder), out, TWO, PROMPTS)
    assert files.sha256(out) == before


def test_what_cannot_be_laid_beside_the_components_fails_its_target_only(
    small_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_or_fail(what, work, *given, **place):
        if work is job.complete and str(given[2]).endswith("onnx"):
            raise LaptopError("no room beside")
        return run_apart(what, work, *given, **place)

    monkeypatch.setattr(target_folder, "run_apart", run_or_fail)
    out = export_model(str(small_folder), tmp_path / "artifacts", TWO, PROMPTS)
    assert [r["precision"] for r in listed(out)["artifacts"]] == ["fp16"]
    with pytest.raises(CheckFailed, match=r"onnx \(fp32\) of all: no room beside"):
        check_exported(out)


def test_a_target_finished_before_a_kill_is_not_made_again(
    small_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "artifacts"
    with monkeypatch.context() as patch:
        fail_at(patch, "fp16", KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            export_model(str(small_folder), out, TWO, PROMPTS)
    assert not out.exists(), "a half-written result is never taken for a whole one"
    asked = fail_at(monkeypatch, "none", LaptopError(""))
    export_model(str(small_folder), out, TWO, PROMPTS)
    assert asked == ["fp16"]


def test_a_result_from_which_files_are_gone_is_not_taken_for_whole(
    small_folder: Path, tmp_path: Path
) -> None:
    config = ExportConfig(components=("text_encoder",), steps=1)
    out = export_model(str(small_folder), tmp_path / "artifacts", config, PROMPTS)
    (out / "onnx" / "text_encoder" / "model.onnx").unlink()
    with pytest.raises(OutputExists, match=r"changed since\. Pass --overwrite"):
        export_model(str(small_folder), out, config, PROMPTS)
    export_model(str(small_folder), out, config, PROMPTS, overwrite=True)
    assert (out / "onnx" / "text_encoder" / "model.onnx").exists()


ROW = {"target": "onnx", "component": "unet", "file": "unet.onnx", "precision": "fp32"}


@pytest.mark.parametrize(
    "changed",
    [
        {"artifacts": None},
        {"artifacts": [{**ROW, "file": None}]},
        {"artifacts": [{**ROW, "target": "foo"}]},
        {"artifacts": [{**ROW, "component": "foo"}]},
        {"artifacts": [ROW], "resolution": "x"},
    ],
)
def test_a_list_that_was_changed_by_hand_is_refused(tmp_path: Path, changed: dict) -> None:
    files.write_json(tmp_path / "artifacts.json", {"schema": "laptop.artifacts/1", **changed})
    with pytest.raises(BadInput, match="Export again"):
        read_list(tmp_path)


def test_every_artifact_says_what_its_process_took(small_folder: Path, tmp_path: Path) -> None:
    config = ExportConfig(components=("unet",), steps=1)
    out = export_model(str(small_folder), tmp_path / "artifacts", config, PROMPTS)
    (row,) = listed(out)["artifacts"]
    assert row["seconds"] > 0
    assert 100e6 < row["peak_memory_bytes"] < 3e9
    assert row["sha256"] == files.sha256(out / row["file"])
    assert row["shapes"]["sample"] == [2, 4, 8, 8]
    assert row["params"] == loading.load_unet(str(small_folder)).num_parameters()
    assert listed(out)["pixels_per_latent"] == 2
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["files"]["onnx/unet/model.onnx"] == row["sha256"]
    assert {"versions", "device", "config", "inputs"} <= set(manifest)


def test_an_export_that_does_not_fit_is_refused_with_the_figure(
    small_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ExportConfig(components=("text_encoder",), steps=1)
    free = iter([10**12, 10**6])  # enough to sample
    monkeypatch.setattr(needs, "available_memory_bytes", lambda: next(free))
    out = export_model(str(small_folder), tmp_path / "artifacts", config, PROMPTS)
    with pytest.raises(
        CheckFailed, match=r"text_encoder \(0 M weights\) to onnx takes about .* GB"
    ):
        check_exported(out)


def test_a_sampling_that_does_not_fit_is_refused_with_the_figure(
    small_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(needs, "available_memory_bytes", lambda: 10**6)
    with pytest.raises(BadInput, match=r"sampling for example inputs takes about .* GB"):
        export_model(str(small_folder), tmp_path / "artifacts", TWO, PROMPTS)
    assert not list(tmp_path.iterdir())


def test_weights_are_counted_in_one_variant(tiny_folder: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_folder, tmp_path / "model")
    once = needs.count_weights(str(model))
    for part, name in (("unet", "diffusion_pytorch_model"), ("text_encoder", "model")):
        weights = model / part / f"{name}.safetensors"
        shutil.copy(weights, weights.with_name(f"{name}.fp16.safetensors"))
    assert needs.count_weights(str(model)) == once > 3_000_000


def test_a_component_that_the_model_lacks_fails(small_folder: Path, tmp_path: Path) -> None:
    config = ExportConfig(components=("text_encoder_2",), steps=1)
    out = export_model(str(small_folder), tmp_path / "artifacts", config, PROMPTS)
    with pytest.raises(CheckFailed, match="the model has none of text_encoder_2"):
        check_exported(out)


def dies() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def refuses() -> None:
    raise BadInput("no such thing")


def starts(path: Path) -> None:
    path.write_text(str(os.getpid()))
    signal.pause()


def test_a_process_that_dies_is_an_error_that_says_how() -> None:
    with pytest.raises(LaptopError, match="the test: the process was killed by signal 9"):
        run_apart("the test", dies)


def test_an_error_of_ours_crosses_the_process() -> None:
    with pytest.raises(BadInput, match="no such thing"):
        run_apart("the test", refuses)


def litters(path: Path) -> None:
    path.write_text(tempfile.mkdtemp())
    os.kill(os.getpid(), signal.SIGKILL)


def test_temporary_files_go_with_the_process_that_left_them(tmp_path: Path) -> None:
    with pytest.raises(LaptopError, match="signal 9"):
        run_apart("the test", litters, tmp_path / "where", temporary=tmp_path)
    left = Path((tmp_path / "where").read_text())
    assert left.parent.parent == tmp_path
    assert [path.name for path in tmp_path.iterdir()] == ["where"]


def test_a_process_ends_with_the_one_that_started_it(tmp_path: Path) -> None:
    import multiprocessing

    path = tmp_path / "pid"
    starter = multiprocessing.get_context("spawn").Process(target=_starter, args=(path,))
    starter.start()
    while not (path.exists() and path.read_text()):
        assert starter.is_alive()
        time.sleep(0.05)
    child = psutil.Process(int(path.read_text()))
    starter.kill()
    starter.join()
    child.wait(60)


def _starter(path: Path) -> None:
    job.run_apart("a pause", starts, path)


def test_the_vae_stays_in_the_library_of_the_rest() -> None:
    config = ExportConfig(targets=("executorch",), vae_precision="fp32")
    half = Request("executorch", "coreml-fp16")
    assert half.precision_of("vae_decoder", config) == "coreml-fp32"
    assert half.precision_of("unet", config) == "coreml-fp16"
    assert Request("executorch", "int8").precision_of("vae_decoder", config) == "fp32"


def test_a_retry_that_is_refused_leaves_what_there_is(
    small_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "artifacts"
    with monkeypatch.context() as patch:
        fail_at(patch, "fp32", LaptopError("out of luck"))
        export_model(str(small_folder), out, TWO, PROMPTS)
    before = files.sha256(out)
    monkeypatch.setattr(needs, "available_memory_bytes", lambda: 10**6)
    with pytest.raises(BadInput, match="sampling for example inputs takes"):
        export_model(str(small_folder), out, TWO, PROMPTS)
    assert files.sha256(out) == before
    assert [path.name for path in tmp_path.iterdir()] == ["artifacts"]
