"""`laptop doctor` and `laptop models`: true, without network, with the command that helps."""

import io
import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from rich.console import Console

from laptop.cli import installation
from laptop.models import locating


def printed(write: object, width: int = 160) -> str:
    """What a printing function writes to a console of `width` columns."""
    out = io.StringIO()
    write(Console(file=out, width=width))  # type: ignore[operator]
    return out.getvalue()


def without(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    """As if the distribution `missing` were not installed."""
    real = metadata.version

    def version(name: str) -> str:
        if name == missing:
            raise metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(metadata, "version", version)


def test_every_extra_that_a_user_can_ask_for_is_explained() -> None:
    declared = metadata.metadata("laptop-diff").get_all("Provides-Extra") or []
    assert set(installation.GIVES) == {*declared} - {"all", "dev", "docs"}


def test_what_is_installed_is_told_with_its_version() -> None:
    core = {p.name: p for p in installation.core_packages()}
    assert core["torch"].installed == metadata.version("torch")
    assert core["torch"].ok
    assert "onnx" not in core, "an extra's package is no core package"
    onnx = next(e for e in installation.extras() if e.name == "onnx")
    assert {p.name for p in onnx.packages} == {
        "onnx",
        "onnxruntime",
        "onnxscript",
        "onnxslim",
    }
    assert onnx.ok


def test_a_missing_extra_says_what_it_gives_and_the_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    without(monkeypatch, "coremltools")
    coreml = next(e for e in installation.extras() if e.name == "coreml")
    assert not coreml.ok
    assert "Core ML" in coreml.gives
    assert coreml.install == "pip install 'laptop-diff[coreml]'"
    text = printed(installation.print_report, width=60)
    assert "[coreml]" in text
    assert "pip install 'laptop-diff[coreml]'" in text
    assert "pip install 'laptop-diff[onnx]'" not in text


def test_a_missing_core_package_comes_with_the_repair(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "scipy")
    assert "Repair with: pip install 'scipy>=1.11'" in printed(installation.print_report)


def test_a_version_that_does_not_fit_is_not_ok(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", lambda _: "0.0.1")
    assert not any(p.ok for p in installation.core_packages())
    assert "0.0.1 (does not fit)" in printed(installation.print_report)


def test_the_report_is_json_and_names_the_devices() -> None:
    report = json.loads(json.dumps(installation.report().as_json()))
    assert report["schema"] == "laptop.doctor/1"
    assert report["devices"][0]["name"] == "cpu"
    assert report["devices"][0]["memory_bytes"] > 1e8
    assert report["disk"]["free_bytes"] > 0


def test_every_known_model_is_listed_with_size_and_source() -> None:
    rows = {m.name: m for m in installation.known_models()}
    assert set(rows) == set(locating.MODELS)
    assert rows["sdxl"].source == "stabilityai/stable-diffusion-xl-base-1.0"
    assert rows["sdxl"].unet_params == 2_567_463_684
    text = printed(installation.print_models)
    assert "2,567.5 M" in text
    assert "stable-diffusion-v1-5/stable-diffusion-v1-5" in text


def test_the_embedded_model_is_on_this_machine() -> None:
    tiny = next(m for m in installation.known_models() if m.name == "tiny-sdxl")
    assert tiny.local == str(locating.EMBEDDED)
    assert tiny.source == "this package"


def test_a_model_in_the_hub_cache_is_found_only_with_its_weights(tmp_path: Path) -> None:
    """In a process of its own, because the Hub client reads its cache's place at import."""
    cached = tmp_path / "hub" / "models--stabilityai--stable-diffusion-xl-base-1.0"
    snapshot = cached / "snapshots" / "a1"
    (snapshot / "unet").mkdir(parents=True)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("a1")
    (snapshot / "model_index.json").write_text("{}")
    assert local_sdxl(tmp_path) is None
    (snapshot / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    assert local_sdxl(tmp_path) == str(snapshot)


def local_sdxl(hf_home: Path) -> str | None:
    """What `known_models` says of sdxl where the Hub cache is `hf_home`/hub."""
    code = (
        "import json; from laptop.cli import installation;"
        "rows = {m.name: m.local for m in installation.known_models()};"
        "print(json.dumps(rows['sdxl']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"HF_HOME": str(hf_home), "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    found: str | None = json.loads(done.stdout)
    return found


def test_listing_the_models_imports_no_torch() -> None:
    code = (
        "import sys; from laptop.cli import installation; installation.print_models();"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_programs_are_found_where_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    found = {p.name: p.path for p in installation.programs()}
    assert found["ssh"] is None
    (tmp_path / "ssh").write_text("#!/bin/sh\n")
    (tmp_path / "ssh").chmod(0o755)
    found = {p.name: p.path for p in installation.programs()}
    assert found["ssh"] == str(tmp_path / "ssh")
    assert "TensorRT engines on this machine" in printed(installation.print_report)
