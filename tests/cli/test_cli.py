"""The command line on bad input: one message, the right exit code, nothing lost, no traceback."""

import json
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from laptop.cli import main

Usage = namedtuple("Usage", "total used free")


def run(*args: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in args])


def refused(result: Result, *words: str, code: int = 1) -> None:
    """One message that holds `words`, and the exit code."""
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    for word in words:
        assert word in result.output, result.output


@pytest.fixture
def broken(tiny_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_folder, tmp_path / "broken"))


def test_an_unknown_model_is_named_with_the_nearest_known_one(tmp_path) -> None:
    result = run("compress", "--model", "tiny-sdlx", "-o", tmp_path / "run")
    refused(result, "'tiny-sdlx'", "Did you mean 'tiny-sdxl'?")
    assert not (tmp_path / "run").exists()


def test_a_folder_that_is_no_pipeline_is_refused(tmp_path) -> None:
    refused(run("score", "--model", tmp_path, "-o", tmp_path / "x"), "model_index.json")


def test_a_hub_id_without_network_is_refused_in_seconds(tmp_path, monkeypatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "https://no-such-host.invalid")
    result = run("score", "--model", "no-such/model", "-o", tmp_path / "x")
    refused(result, "no-such/model", "local diffusers folder")


def test_an_unsupported_denoiser_is_named(broken, tmp_path) -> None:
    index = json.loads((broken / "model_index.json").read_text())
    del index["unet"]
    index["transformer"] = ["diffusers", "FluxTransformer2DModel"]
    (broken / "model_index.json").write_text(json.dumps(index))
    refused(run("score", "--model", broken, "-o", tmp_path / "x"), "FluxTransformer2DModel")


@pytest.mark.parametrize(
    ("ratio", "words"), [("0.95", "Ask for"), ("-0.1", "at least 0"), ("1", "below 1")]
)
def test_a_ratio_that_cannot_be_is_refused_before_anything_runs(
    tiny_folder, tmp_path, ratio, words
) -> None:
    out = tmp_path / "run"
    result = run("compress", "--model", tiny_folder, "--ratio", ratio, "-o", out)
    refused(result, "ratio", words)
    assert not out.exists()


def test_a_ratio_that_is_no_number_is_a_usage_error(tmp_path) -> None:
    result = run("compress", "--model", "tiny-sdxl", "--ratio", "half", "-o", tmp_path)
    refused(result, "half", code=2)


@pytest.mark.parametrize("command", ["compress", "score"])
def test_a_folder_with_something_else_in_it_is_left_alone(tiny_folder, tmp_path, command) -> None:
    out = tmp_path / "photos"
    out.mkdir()
    (out / "holiday.jpg").write_bytes(b"dear")
    for extra in ([], ["--overwrite"]):
        refused(run(command, "--model", tiny_folder, "-o", out, *extra), "left alone")
    assert [p.name for p in out.iterdir()] == ["holiday.jpg"]


def test_truncated_weights_are_named(broken, tmp_path) -> None:
    weights = next((broken / "unet").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1000])
    refused(run("compress", "--model", broken, "-o", tmp_path / "run"), weights.name, "cut off")


def test_a_truncated_json_file_is_named(broken, tmp_path) -> None:
    (broken / "unet" / "config.json").write_text('{"_class_name": "UNet2')
    refused(run("score", "--model", broken, "-o", tmp_path / "x"), "config.json", "not valid JSON")


def test_a_plan_for_another_model_is_refused(tiny_folder, tmp_path) -> None:
    plan = tmp_path / "plan.json"
    names = ["down_blocks.3.resnets.1"]
    params = {"before": 859_520_964, "after": 5}
    plan.write_text(json.dumps({"schema": "laptop.plan/1", "remove": names, "params": params}))
    result = run("prune", "--model", tiny_folder, "--plan", plan, "-o", tmp_path / "out")
    refused(result, "another model", "down_blocks.3.resnets.1")


def test_a_full_disk_is_seen_before_the_work(tiny_folder, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 10**9 - 1000, 1000))
    result = run("compress", "--model", "tiny-sdxl", "-o", tmp_path / "run")
    refused(result, "GB free", "GB are needed")


def test_unknown_recipe_keys_and_wrong_types_are_refused(tmp_path) -> None:
    recipe = tmp_path / "recipe.toml"
    for text, words in [
        ("[distill]\nstep = 3", "learning_rate"),
        ("[distil]\nsteps = 3", "'distil' is unknown"),
        ('[distill]\nsteps = "many"', "steps is 'many'; it must be a whole number"),
        ("[distill\n", "cannot be read"),
    ]:
        recipe.write_text(text)
        result = run("compress", "--model", "tiny-sdxl", "-c", recipe, "-o", tmp_path / "run")
        refused(result, words)


def test_an_unknown_target_is_refused_with_the_list(tmp_path) -> None:
    result = run("compress", "--model", "tiny-sdxl", "--to", "onxx", "-o", tmp_path / "run")
    refused(result, "onxx", "onnx", "coreml")


def test_data_that_cannot_be_had_are_refused_before_anything_runs(broken, tmp_path) -> None:
    out, empty = tmp_path / "run", tmp_path / "empty"
    empty.mkdir()
    for source, word in [
        (empty, "metadata.jsonl"),
        (tmp_path / "none", "there is no such folder"),
        (f"prompts:{tmp_path / 'none.txt'}", "cannot be read"),
    ]:
        refused(run("compress", "--model", broken, "--data", source, "-o", out), word)
    vocabulary = broken / "tokenizer" / "vocab.json"
    ids = json.loads(vocabulary.read_text())
    vocabulary.write_text(json.dumps(ids | {"a": ids["b"], "b": ids["a"]}))
    result = run("compress", "--model", broken, "--data", "scenes", "-o", out)
    refused(result, "tiny-sdxl", "prompts[:FILE]")
    assert not out.exists()


def test_a_cache_serves_distill_and_compress_of_its_model(
    tiny_folder, pruned_folder, tmp_path
) -> None:
    cached, out, recipe = tmp_path / "cached", tmp_path / "student", tmp_path / "r.toml"
    made = run(
        "cache", "--model", tiny_folder, "--data", "scenes", "--count", 6, "-o", cached, "--json"
    )
    assert made.exit_code == 0, made.output
    assert json.loads(made.stdout)["count"] == 6
    recipe.write_text("[distill]\nsteps = 1\nbatch_size = 2\n")
    command = ["distill", "--teacher", tiny_folder, "--student", pruned_folder, "-c", recipe]
    done = run(*command, "--data", cached, "-o", out)
    assert done.exit_code == 0, done.output
    assert not (tmp_path / "student-data").exists(), "nothing is cached twice"
    other = run("compress", "--model", "tiny-sdxl", "--data", cached, "-o", tmp_path / "run")
    refused(other, "vae is another than that of tiny-sdxl")
    again = run("cache", "--model", tiny_folder, "--data", cached, "-o", tmp_path / "twice")
    refused(again, "is a cache already")


def test_pictures_that_the_teacher_draws_are_in_the_estimate(tiny_folder, tmp_path) -> None:
    command = ["compress", "--model", tiny_folder, "--dry-run", "-o", tmp_path / "run", "--data"]
    drawn, scenes = (json.loads(run(*command, s).stdout) for s in ("prompts", "scenes"))
    assert drawn["estimate"]["teacher_evaluations"]["data"] == 2 * 25 * 8000
    assert scenes["estimate"]["teacher_evaluations"]["data"] == 0


def test_a_json_result_must_be_called_so(tmp_path) -> None:
    refused(run("plan", tmp_path, "-o", tmp_path / "plan"), ".json", code=2)


def test_a_dry_run_prints_recipe_and_cost_and_writes_nothing(tmp_path) -> None:
    out = tmp_path / "run"
    result = run("compress", "--model", "tiny-sdxl", "--ratio", "0.4", "--dry-run", "-o", out)
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["recipe"]["plan"]["ratio"] == 0.4
    assert document["estimate"]["tera_macs"]["distill"] > 0
    assert not out.exists()


def test_json_output_is_one_document_and_progress_goes_elsewhere(tiny_folder, tmp_path) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text("[score]\nsamples = 4\nsteps = 2\n[prompts]\ncalibration = 2\n")
    out = tmp_path / "s"
    result = run("score", "--model", tiny_folder, "-c", recipe, "-o", out, "--json")
    assert result.exit_code == 0, result.output
    scores = json.loads(result.stdout)
    assert scores["schema"] == "laptop.scores/1"
    assert scores["forwards"]["naive"] > len(scores["units"]) > scores["forwards"]["spent"]
    assert all(u["score"] >= 0 for u in scores["units"])
    again = run("score", "--model", tiny_folder, "-c", recipe, "-o", out)
    assert "up to date" in again.stderr
