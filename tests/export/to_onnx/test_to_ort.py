"""Files in ONNX Runtime's own format."""

from dataclasses import replace
from pathlib import Path

import pytest

from laptop.errors import BadInput
from laptop.export.job import Job
from laptop.export.to_onnx import ort as to_ort
from support.onnx_files import lowest_psnr


@pytest.mark.parametrize(("precision", "floor"), [("fp32", 60), ("int8", 30), ("int8-qdq", 30)])
def test_a_file_computes_what_pytorch_does(precision: str, floor: float, onnx_job: Job) -> None:
    job = replace(onnx_job, precision=precision, path=onnx_job.path.with_name("unet.ort"))
    to_ort.export(job)
    assert job.path.read_bytes()[4:8] == b"ORTM"  # the identifier of such a flatbuffer
    assert {p.name for p in job.path.parent.iterdir()} == {"unet.ort"}
    assert lowest_psnr(job) >= floor


def test_the_same_job_makes_the_same_bytes(onnx_job: Job, tmp_path: Path) -> None:
    """Though ONNX Runtime writes one of its tables in another order each time."""
    jobs = [replace(onnx_job, path=tmp_path / f"{i}.ort", component="text_encoder") for i in "abc"]
    for job in jobs:
        to_ort.export(replace(job, inputs=job.inputs.with_name("text_encoder.safetensors")))
    first, *others = (job.path.read_bytes() for job in jobs)
    assert all(other == first for other in others)


def test_the_operators_of_all_components_are_listed(onnx_job: Job, tmp_path: Path) -> None:
    for component in ("unet", "text_encoder"):
        given = onnx_job.inputs.with_name(f"{component}.safetensors")
        path = tmp_path / f"{component}.ort"
        to_ort.export(replace(onnx_job, component=component, inputs=given, path=path))
    to_ort.complete(onnx_job.model, tmp_path)
    text = (tmp_path / "required_operators.config").read_text()
    assert "# - text_encoder.ort\n# - unet.ort" in text
    assert all(name in text for name in ("Conv{", "ArgMax", "Resize"))  # of the one, of the other


def test_what_the_format_cannot_hold_is_refused(
    onnx_job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(to_ort, "LARGEST", 1_000_000)
    with pytest.raises(BadInput, match="the ORT format ends"):
        to_ort.export(replace(onnx_job, path=onnx_job.path.with_name("unet.ort")))
    assert not list(onnx_job.path.parent.iterdir())
