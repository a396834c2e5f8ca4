"""The main job on a small model with short settings: it ends, resumes, and adds up."""

import doctest
import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from laptop import api, preflight, recipe
from laptop import compress as pipeline
from laptop.benchmarks.devices.device import Facts
from laptop.cli import main
from laptop.errors import BadInput
from laptop.files import sha256
from laptop.models import loading

RECIPE = """
[score]
samples = 4
steps = 2
[prompts]
calibration = 2
[data]
source = "scenes"
count = 8
[distill]
steps = 3
batch_size = 4
warmup_steps = 1
[export]
components = ["text_encoder", "unet", "vae_decoder"]
[verify]
prompts = 1
steps = 1
[bench]
components = ["unet"]
runtimes = ["onnxruntime"]
rounds = 3
iterations = 9
seconds = 0.1
warmup_s = 0.0
[eval]
prompts = 4
steps = 2
"""


def compress(out: Path, *more: str) -> Result:
    model, recipe = out.parent / "model", out.parent / "recipe.toml"
    command = ["compress", "--model", str(model), "-c", str(recipe), "--ratio", "0.3"]
    return CliRunner().invoke(main, [*command, "--to", "onnx", "--json", "-o", str(out), *more])


@pytest.fixture(scope="module")
def smoke(small_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, which was interrupted before its distillation."""
    out = tmp_path_factory.mktemp("smoke") / "run"
    shutil.copytree(small_folder, out.parent / "model")
    (out.parent / "recipe.toml").write_text(RECIPE)

    def interrupted(*_: object, **__: object) -> Path:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "distill", interrupted)
        assert compress(out).exit_code != 0
    assert not (out / "report.html").exists()
    done = compress(out)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["report"] == str(out / "report.html")
    assert "score: " in done.stderr, "a finished stage is not done again"
    return out


def test_every_stage_leaves_what_the_contract_names(smoke: Path) -> None:
    for name in (
        "laptop.json",
        "score/scores.json",
        "score/calibration.safetensors",
        "plan.json",
        "pruned/unet",
        "distill/metrics.jsonl",
        "model/README.md",
        "model/model_index.json",
        "model/manifest.json",
        "artifacts/onnx/unet/model.onnx",
        "parity/report.json",
        "bench/local.json",
        "eval/eval.json",
        "report.md",
        "report.html",
        "images",
    ):
        assert (smoke / name).exists(), name
    assert not list(smoke.rglob("*.partial"))
    run = json.loads((smoke / "laptop.json").read_text())
    assert {"score", "plan", "prune", "distill", "export", "verify"} <= set(run["stages"])
    assert all(stage["state"] == "done" for stage in run["stages"].values())


def test_a_board_may_measure_a_precision_that_has_no_teacher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Board:
        refused = ("coreml",)

        def check_settings(self) -> None: ...

        def probe(self) -> Facts:
            return Facts("board", "Linux", {"onnxruntime": "1"})

    monkeypatch.setattr(preflight, "device", lambda *_: Board())
    read = recipe.read("tiny-sdxl")
    asked = {"export": {"targets": ("onnx:int8",)}, "devices": {"addresses": ("ssh://board",)}}
    preflight.check_devices(recipe.changed(read, asked, "a test"), tmp_path)
    asked["export"] = {"targets": ("coreml",)}
    with pytest.raises(BadInput, match="none of --to coreml runs there"):
        preflight.check_devices(recipe.changed(read, asked, "a test"), tmp_path)


def test_the_numbers_of_the_plan_are_those_of_the_model(smoke: Path) -> None:
    plan = json.loads((smoke / "plan.json").read_text())
    for folder in ("pruned", "model"):
        unet = loading.load_unet(str(smoke / folder))
        assert unet.num_parameters() == plan["params"]["after"]
    assert plan["params"]["after"] <= 0.7 * plan["params"]["before"]
    scores = {
        u["name"]: u["score"]
        for u in json.loads((smoke / "score/scores.json").read_text())["units"]
    }
    assert plan["predicted_loss"] == pytest.approx(sum(scores[n] for n in plan["remove"]))
    assert plan["measured_loss"] > 0


def test_every_artifact_is_compared_with_pytorch(smoke: Path) -> None:
    results = json.loads((smoke / "parity/report.json").read_text())["results"]
    assert {row["state"] for row in results} == {"verified"}
    assert all(row["samples"] > 0 for row in results)


def test_the_same_command_again_does_nothing_and_other_settings_are_refused(smoke: Path) -> None:
    before = sha256(smoke / "model")
    again = compress(smoke)
    assert again.exit_code == 0, again.output
    assert again.stderr.count("up to date") >= 11
    other = compress(smoke, "--steps", "4")
    assert other.exit_code == 1
    assert "steps: 3 there, 4 asked" in other.stderr
    assert sha256(smoke / "model") == before


def test_the_same_job_by_a_call_from_python_finds_everything_done(
    smoke: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The example of `api.compress`, with the model and the settings of this file."""
    model, tables = (
        str(smoke.parent / "model"),
        {"plan": {"ratio": 0.3}, "export": {"targets": ("onnx",)}},
    )
    settings = api.recipe(model, smoke.parent / "recipe.toml", **tables)
    names = {
        "recipe": lambda *_, **__: settings,
        "compress": lambda *_: api.compress(model, smoke, settings),
    }
    (example,) = doctest.DocTestFinder().find(api.compress, "compress", globs=names)
    assert doctest.DocTestRunner().run(example).failed == 0, capsys.readouterr().out
    assert capsys.readouterr().err.count("up to date") >= 11
