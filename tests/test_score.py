"""Scoring: equal to its definition, resumable, and at home with SD 1.x pipelines too."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_inputs import small_sd15

from laptop import models
from laptop.errors import BadInput, OutputExists
from laptop.generate import generate
from laptop.pruning import calibration
from laptop.pruning import score as stage
from laptop.pruning.plan import PlanConfig, make_plan
from laptop.pruning.score import ScoreConfig, score
from laptop.pruning.surgery import prune, prune_unet
from laptop.pruning.units import forward_rows

CONFIG = ScoreConfig(samples=6, steps=3, batch_size=4)
PROMPTS = ["a large red circle on white", "a small blue cross on black"]


def scores_of(folder: Path) -> dict[str, float]:
    document = json.loads((folder / "scores.json").read_text())
    return {unit["name"]: unit["score"] for unit in document["units"]}


def test_a_score_is_the_mean_squared_change_of_the_output(tiny_folder, tmp_path) -> None:
    out = score(str(tiny_folder), tmp_path / "scores", CONFIG, PROMPTS)
    rows, output = calibration.load(out / "calibration.safetensors")
    assert {len(v) for v in (*rows.values(), output)} == {CONFIG.samples}
    unet = models.load_unet(str(tiny_folder))
    assert torch.allclose(forward_rows(unet, rows, 3), output, atol=1e-6)
    scores = scores_of(out)
    for name in list(scores)[::8]:
        changed = forward_rows(prune_unet(unet, [name]), rows, 6)  # really removed
        error = float((changed.double() - output.double()).square().mean())
        assert scores[name] == pytest.approx(error, rel=1e-4, abs=1e-12), name


def test_a_killed_run_scores_no_layer_twice(tiny_folder, tmp_path, monkeypatch) -> None:
    whole = scores_of(score(str(tiny_folder), tmp_path / "whole", CONFIG, PROMPTS))
    real, scored = stage.output_loss, []

    def dies_at_the_tenth(unet, names, *args):
        if len(scored) == 10:
            raise KeyboardInterrupt
        scored.extend(names)
        return real(unet, names, *args)

    monkeypatch.setattr(stage, "output_loss", dies_at_the_tenth)
    with pytest.raises(KeyboardInterrupt):
        score(str(tiny_folder), tmp_path / "broken", CONFIG, PROMPTS)
    with (tmp_path / ".broken.partial" / "units.jsonl").open("a") as log:
        log.write('["up_blocks.2.resn')  # a line that was cut off
    rest: list[str] = []
    monkeypatch.setattr(
        stage, "output_loss", lambda u, names, *args: rest.extend(names) or real(u, names, *args)
    )
    assert scores_of(score(str(tiny_folder), tmp_path / "broken", CONFIG, PROMPTS)) == whole
    assert not set(rest) & set(scored)
    assert set(rest) | set(scored) == set(whole)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PNDM's steps_offset
def test_an_sd15_pipeline_is_scored_planned_pruned_and_drawn_with(tmp_path) -> None:
    small_sd15().save_pretrained(tmp_path / "sd")
    model = str(tmp_path / "sd")
    scores = score(model, tmp_path / "scores", CONFIG, ["a cat", "a dog"])
    rows, _ = calibration.load(scores / "calibration.safetensors")
    assert "text_embeds" not in rows
    plan = make_plan(scores, tmp_path / "plan.json", PlanConfig(0.3))
    out = prune(model, plan, tmp_path / "pruned")
    size = generate(str(out), "a cat", tmp_path / "cat.png", steps=2, guidance=5.0, seed=0)
    assert size[0] == size[1] > 0


def test_a_changed_text_encoder_is_another_model(tiny_folder, tmp_path) -> None:
    copy = Path(shutil.copytree(tiny_folder, tmp_path / "copy"))
    score(str(copy), tmp_path / "scores", CONFIG, PROMPTS)
    pipe = models.load_pipeline(str(copy))
    pipe.text_encoder.text_model.embeddings.token_embedding.weight.data.mul_(2)
    pipe.text_encoder.save_pretrained(copy / "text_encoder")
    with pytest.raises(OutputExists, match="input model changed"):
        score(str(copy), tmp_path / "scores", CONFIG, PROMPTS)


def test_what_cannot_be_scored_is_refused(tiny_folder, tmp_path) -> None:
    with pytest.raises(BadInput, match="sublayer"):
        score(str(tiny_folder), tmp_path / "x", replace(CONFIG, granularity="sublayer"), PROMPTS)
    with pytest.raises(BadInput, match="12"):
        score(str(tiny_folder), tmp_path / "x", replace(CONFIG, samples=99), PROMPTS)
    assert scores_of(score(str(tiny_folder), tmp_path / "x", CONFIG, PROMPTS)), "no obstacle left"
