"""What is passed by mistake: a refusal says what it is, and names the right thing to pass."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from laptop.benchmarks.compare import compare
from laptop.benchmarks.report.report import write_report
from laptop.distill.settings import DataConfig
from laptop.errors import BadInput, LaptopError, UnknownModel
from laptop.export.artifact_list import read_list
from laptop.models import locating, mistakes
from laptop.pruning.plan_file import Plan
from laptop.pruning.scores import Scores
from laptop.training_data import source_of

RUN_FILES = (
    "laptop.json",
    "plan.json",
    "score/scores.json",
    "pruned/model_index.json",
    "distill/model_index.json",
    "model/model_index.json",
    "model/plan.json",
    "model/unet/config.json",
    "artifacts/artifacts.json",
    "artifacts/onnx/unet/model.onnx",
    "data/cache.json",
    "parity/report.json",
    "eval/eval.json",
    "eval/images/teacher/0.png",
)
READERS: dict[str, Callable[[Path], object]] = {
    "model": lambda path: locating.locate(str(path)),
    "scores": Scores.read,
    "plan": Plan.read,
    "artifacts": read_list,
    "cache": lambda path: source_of("x", DataConfig(source=str(path))),
    "run": write_report,
    "two runs": lambda path: compare(path, path),
}
CASES = {  # what is passed, as which of READERS: what to pass instead
    (".", "model"): "model",
    (".", "scores"): "score",
    (".", "plan"): "plan.json",
    (".", "artifacts"): "artifacts",
    (".", "cache"): "data",
    ("model", "run"): ".",
    ("model/unet", "run"): ".",
    ("score", "run"): ".",
    ("artifacts", "run"): ".",
    ("score", "two runs"): ".",
    ("model/unet", "model"): "model",
    ("model", "plan"): "model/plan.json",
    ("artifacts", "model"): None,
    ("artifacts/onnx/unet", "model"): None,
    ("eval/images", "scores"): None,
    ("parity", "artifacts"): None,
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder, of empty files."""
    for name in RUN_FILES:
        path = tmp_path / "home" / "run" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    return tmp_path / "home" / "run"


@pytest.mark.parametrize(("passed", "wanted"), CASES)
def test_a_folder_of_another_kind_is_named_with_the_right_one_nearby(
    passed: str, wanted: str, run: Path
) -> None:
    before = sorted(run.rglob("*"))
    with pytest.raises(LaptopError) as error:
        READERS[wanted](run / passed)
    said, right = str(error.value), CASES[passed, wanted]
    assert str(run / passed) in said
    assert "needed is" in said
    assert ("Pass " in said) == (right is not None)
    if right:
        assert said.endswith(f"Pass {run / right}.")
    assert sorted(run.rglob("*")) == before, "a refusal writes nothing"


@pytest.mark.parametrize(
    ("holds", "words"),
    [
        ([], "is an empty folder"),
        (["a.onnx"], "holds an ONNX graph"),
        (["holiday.jpg"], "holds 'holiday.jpg'"),
        (["unpacked/model_index.json"], "Pass {folder}/unpacked."),
        (["config.json"], "holds one component of a pipeline ('UNet2DConditionModel')"),
    ],
)
def test_a_folder_that_is_no_model_is_described(
    holds: list[str], words: str, tmp_path: Path
) -> None:
    for name in holds:
        (tmp_path / "x" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "x" / name).write_text('{"_class_name": "UNet2DConditionModel"}')
    (tmp_path / "x").mkdir(exist_ok=True)
    with pytest.raises(UnknownModel, match=r"needed is a diffusers folder") as error:
        locating.locate(str(tmp_path / "x"))
    assert words.format(folder=tmp_path / "x") in str(error.value)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("sdxl.safetensors", "from_single_file('sdxl.safetensors')"),
        ("models/sd.ckpt", "is a pickle, which can run code"),
        ("/no/such/pytorch_lora_weights.safetensors", "pipe.fuse_lora()"),
        ("my-lora-v2.safetensors", "pipe.fuse_lora()"),
        ("model.Q4_0.gguf", "GGUF"),
        ("unet/model.onnx", "the model that it was made from"),
        ("model.zip", "unpack it"),
        ("model.tar.gz", "unpack it"),
        ("some/model_index.json", "Pass its folder: some."),
        ("https://huggingface.co/owner/name", "pass 'owner/name'"),
        ("https://huggingface.co/owner/name/tree/main", "pass 'owner/name'"),
        ("huggingface.co/owner/name/", "pass 'owner/name'"),
        ("hf:owner/name", "pass 'owner/name'"),
        ("https://hf.co/owner/name/blob/main/x.safetensors", "from_single_file('x.safetensors')"),
        ("https://civitai.com/models/1/some-model", "from the Hub only"),
        ("C:\\models\\sdxl", "path of Windows"),
        ("models\\sdxl", "path of Windows"),
        ("~/model", f"pass {Path.home() / 'model'}"),
        ("owner/name/", "Did you mean 'owner/name'?"),
        ("tiny-sdxl/", "Did you mean 'tiny-sdxl'?"),
        ("", "no known model"),
        ("x" * 5000, "…"),
    ],
)
def test_what_is_no_name_of_a_model_comes_with_advice(
    name: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a look at the Hub."""
    monkeypatch.setattr(locating, "_check_hub", pytest.fail)
    with pytest.raises(UnknownModel, match="no known model") as error:
        locating.locate(name)
    assert words in str(error.value)
    assert len(str(error.value)) < 700


@pytest.mark.parametrize("part", ["unet", "text_encoder", "vae"])
def test_weights_in_a_pickle_only_are_refused_unread_with_the_way_out(
    part: str, small_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(small_folder, tmp_path / "model")
    (weights,) = (folder / part).glob("*.safetensors")
    name = "pytorch_model.bin" if part == "text_encoder" else "diffusion_pytorch_model.bin"
    torch.save(load_file(weights), folder / part / name)
    locating.locate(str(folder))  # with the safe format beside it, it is not looked at
    weights.unlink()
    with pytest.raises(BadInput, match=rf"{part}/ are in '{name}' only.*use_safetensors=False"):
        locating.locate(str(folder))


def test_a_hub_repository_with_pickles_only_is_refused_before_it_is_downloaded() -> None:
    names = ["model_index.json", "unet/diffusion_pytorch_model.bin", "unet/config.json"]
    with pytest.raises(BadInput, match="owner/name: the weights of unet/"):
        mistakes.need_safetensors(names, "owner/name")


@pytest.mark.parametrize(
    "name", ["pytorch_lora_weights.safetensors", "unet/adapter_model.safetensors"]
)
def test_a_lora_file_in_a_models_folder_is_warned_of_once(
    name: str, small_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(small_folder, tmp_path / "model")
    weights = next((folder / "unet").glob("*.safetensors"))
    shutil.copy(weights, folder / name)
    for _ in range(2):
        locating.locate(str(folder))
    said = capsys.readouterr().err
    assert said.count(f"{folder / name} is not used") == 1
    assert "fuse_lora" in said


NO_MODEL = {
    "score": ["score", "--model", "x.zip", "-o", "out"],
    "compress": ["compress", "--model", "x.zip", "-o", "out"],
    "prune": ["prune", "--model", "x.zip", "--plan", "plan.json", "-o", "out"],
    "cache": ["cache", "--model", "x.zip", "--data", "scenes", "-o", "out"],
    "distill": ["distill", "--teacher", "x.zip", "--student", "pruned", "-o", "out"],
    "export": ["export", "x.zip", "--to", "onnx", "-o", "out"],
    "eval": ["eval", "x.zip", "-o", "out"],
    "verify": ["verify", "artifacts", "--against", "x.zip"],
}
REFUSE = """
import json, sys
from click.testing import CliRunner
from laptop.cli import main

results = [CliRunner().invoke(main, command) for command in json.loads(sys.argv[1])]
assert all("unpack it" in r.output and r.exit_code == 1 for r in results), results
print([name for name in ("torch", "diffusers", "numpy") if name in sys.modules])
"""


def test_every_command_refuses_what_is_no_model_before_it_imports_torch() -> None:
    command = [sys.executable, "-c", REFUSE, json.dumps([*NO_MODEL.values()])]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr
