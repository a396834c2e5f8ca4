"""One zip of all artifacts."""

import subprocess
import zipfile
from pathlib import Path

from laptop.export.bundle import bundle


def artifacts(folder: Path) -> Path:
    (folder / "onnx" / "unet").mkdir(parents=True)
    (folder / "onnx" / "unet" / "model.onnx").write_bytes(b"a graph")
    (folder / "artifacts.json").write_text("{}")
    return folder


def test_sha256sum_checks_the_unpacked_bundle(tmp_path: Path) -> None:
    with zipfile.ZipFile(bundle(artifacts(tmp_path / "artifacts"))) as archive:
        archive.extractall(tmp_path / "there")
    checked = ["sha256sum", "--strict", "-c", "SHA256SUMS"]
    done = subprocess.run(checked, cwd=tmp_path / "there", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["artifacts.json: OK", "onnx/unet/model.onnx: OK"]


def test_the_same_artifacts_make_the_same_bytes(tmp_path: Path) -> None:
    one, two = (bundle(artifacts(tmp_path / name / "artifacts")) for name in "ab")
    assert one.read_bytes() == two.read_bytes()
    assert one.name == "artifacts.zip"
