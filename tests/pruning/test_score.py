"""Scoring: equal to its definition, resumable, and at home with SD 1.x pipelines too."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conftest import small_sd15
from laptop.errors import BadInput, OutputExists, Unsupported
from laptop.generate import generate
from laptop.models import loading
from laptop.pruning.calibration import Calibration
from laptop.pruning.ledger import Ledger
from laptop.pruning.plan import make_plan
from laptop.pruning.score import score
from laptop.pruning.scores import Unit
from laptop.pruning.settings import PlanConfig, ScoreConfig
from laptop.pruning.surgery import prune, prune_unet
from laptop.pruning.units import forward_rows

CONFIG = ScoreConfig(samples=6, steps=3, batch_size=4)
PROMPTS = ["a large red circle on white", "a small blue cross on black"]


def scores_of(folder: Path) -> dict[str, float]:
    document = json.loads((folder / "scores.json").read_text())
    return {unit["name"]: unit["score"] for unit in document["units"]}


def test_a_score_is_the_mean_squared_change_of_the_output(tiny_folder, tmp_path) -> None:
    out = score(str(tiny_folder), tmp_path / "scores", CONFIG, PROMPTS)
    samples = Calibration.read(out / "calibration.safetensors")
    rows, output = samples.rows, samples.output
    assert {len(v) for v in (*rows.values(), output)} == {CONFIG.samples}
    unet = loading.load_unet(str(tiny_folder))
    assert torch.allclose(forward_rows(unet, rows, 3), output, atol=1e-6)
    for unit in json.loads((out / "scores.json").read_text())["units"][::8]:
        before = forward_rows(prune_unet(unet, unit["needs"]), rows, 6)
        changed = forward_rows(prune_unet(unet, [unit["name"], *unit["needs"]]), rows, 6)
        error = float((changed.double() - before.double()).square().mean())
        assert unit["score"] == pytest.approx(error, rel=1e-4, abs=1e-12), unit["name"]


def test_a_killed_run_scores_no_layer_twice(tiny_folder, tmp_path, monkeypatch) -> None:
    whole = scores_of(score(str(tiny_folder), tmp_path / "whole", CONFIG, PROMPTS))
    real, lines = Ledger.note, []

    def dies_after_fifty(ledger, start, name, values) -> None:
        real(ledger, start, name, values)
        lines.append((start, name))
        if len(lines) == 50:  # of 2 batches of 44
            raise KeyboardInterrupt

    monkeypatch.setattr(Ledger, "note", dies_after_fifty)
    with pytest.raises(KeyboardInterrupt):
        score(str(tiny_folder), tmp_path / "broken", CONFIG, PROMPTS)
    with (tmp_path / ".broken.partial" / ".resume" / "values-0.jsonl").open("a") as log:
        log.write('[4, "up_blocks.2.resn')  # a line that was cut off
    out = score(str(tiny_folder), tmp_path / "broken", CONFIG, PROMPTS)
    assert scores_of(out) == whole
    assert len(lines) == len(set(lines)) == 2 * len(whole)
    values = load_file(out / "values.safetensors")["values"]
    assert values.shape == (len(whole), CONFIG.samples)
    assert values.mean(1).tolist() == pytest.approx(list(whole.values()), rel=1e-5)


@pytest.mark.parametrize("granularity", ["coarse", "sublayer"])
def test_the_other_granularities_go_through_to_a_pruned_folder(
    tiny_folder, tmp_path, granularity
) -> None:
    config = replace(CONFIG, granularity=granularity)
    scores = score(str(tiny_folder), tmp_path / "scores", config, PROMPTS)
    assert json.loads((scores / "scores.json").read_text())["granularity"] == granularity
    plan = make_plan(scores, tmp_path / "plan.json", PlanConfig(ratio=0.6))
    out = prune(str(tiny_folder), plan, tmp_path / "pruned")
    student, content = loading.load_unet(str(out)), json.loads(plan.read_text())
    assert student.num_parameters() == content["params"]["after"]
    samples = Calibration.read(scores / "calibration.safetensors")
    rows, output = samples.rows, samples.output
    error = float((forward_rows(student, rows, 4) - output).square().mean())
    assert content["measured_loss"] == pytest.approx(error, rel=1e-4)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PNDM's steps_offset
def test_an_sd15_pipeline_is_scored_planned_pruned_and_drawn_with(tmp_path) -> None:
    small_sd15().save_pretrained(tmp_path / "sd")
    model = str(tmp_path / "sd")
    scores = score(model, tmp_path / "scores", CONFIG, ["a cat", "a dog"])
    rows = Calibration.read(scores / "calibration.safetensors").rows
    assert "text_embeds" not in rows
    plan = make_plan(scores, tmp_path / "plan.json", PlanConfig(ratio=0.3))
    out = prune(model, plan, tmp_path / "pruned")
    size = generate(str(out), "a cat", tmp_path / "cat.png", steps=2, guidance=5.0, seed=0)
    assert size[0] == size[1] > 0


def test_a_changed_text_encoder_is_another_model(tiny_folder, tmp_path) -> None:
    copy = Path(shutil.copytree(tiny_folder, tmp_path / "copy"))
    score(str(copy), tmp_path / "scores", CONFIG, PROMPTS)
    pipe = loading.load_pipeline(str(copy))
    pipe.text_encoder.text_model.embeddings.token_embedding.weight.data.mul_(2)
    pipe.text_encoder.save_pretrained(copy / "text_encoder")
    with pytest.raises(OutputExists, match="input model changed"):
        score(str(copy), tmp_path / "scores", CONFIG, PROMPTS)


def test_what_cannot_be_scored_is_refused(tiny_folder, tmp_path) -> None:
    with pytest.raises(BadInput, match="known are coarse, fine, sublayer"):
        score(str(tiny_folder), tmp_path / "x", replace(CONFIG, granularity="layer"), PROMPTS)
    for change, message in [
        ({"criterion": "beauty"}, "known are output-loss, task-loss"),
        ({"timestep_weighting": "late"}, "known are none, x0"),
        ({"timestep_weighting": "x0", "criterion": "random"}, "nothing to weigh"),
        ({"samples": 0}, "must be at least 1"),
        ({"race": 1.5}, "below 1"),
        ({"race": 0.5, "criterion": "random"}, "not possible"),
        ({"criterion": "clip"}, "needs a CLIP model"),
    ]:
        with pytest.raises(BadInput, match=message):
            score(str(tiny_folder), tmp_path / "x", replace(CONFIG, **change), PROMPTS)
    with pytest.raises(BadInput, match="12"):
        score(str(tiny_folder), tmp_path / "x", replace(CONFIG, samples=99), PROMPTS)
    assert scores_of(score(str(tiny_folder), tmp_path / "x", CONFIG, PROMPTS)), "no obstacle left"


def test_a_ledger_reads_what_others_write_and_changes_its_own_file_only(tmp_path) -> None:
    units = [Unit(name, "resnet", 1, 1) for name in "abc"]
    other = Ledger(tmp_path, units, 4, 2, process=1)
    other.note(0, "b", [1.0, 2.0])
    with other.path.open("a") as file:
        file.write('[2, "b"')  # being written
    before = other.path.read_bytes()
    mine = Ledger(tmp_path, units, 4, 2)
    assert [u.name for u in mine.todo(0)] == ["a", "c"]
    assert [u.name for u in mine.todo(2)] == ["a", "b", "c"]
    assert other.path.read_bytes() == before
    assert not mine.path.exists(), "nothing found, nothing written"


@pytest.mark.parametrize("config", [{"class_embed_type": "timestep"}, {"sample_size": None}])
def test_a_unet_that_cannot_be_calibrated_is_refused_by_its_config(
    tiny_folder, tmp_path, config
) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "m"))
    path = folder / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    with pytest.raises(Unsupported, match=r"class labels|no sample_size"):
        score(str(folder), tmp_path / "s", CONFIG, PROMPTS)


def test_a_resolution_that_does_not_fit_is_refused_before_anything_is_loaded(
    tiny_folder, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(loading, "load_pipeline", None)
    with pytest.raises(BadInput, match="multiple of"):
        score(str(tiny_folder), tmp_path / "s", replace(CONFIG, resolution=33), PROMPTS)
