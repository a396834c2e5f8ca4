"""Distillation on the untrained tiny model: it learns, resumes bit for bit, refuses bad data."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conftest import REMOVED
from laptop import models
from laptop.distill import trainer
from laptop.distill.encoding import DataConfig, make_cache
from laptop.distill.trainer import DistillConfig, Diverged, distill
from laptop.errors import BadInput
from laptop.pruning.surgery import prune_unet, write_model
from laptop.training_data import Scenes

CONFIG = DistillConfig(steps=6, batch_size=4, warmup_steps=2, checkpoint_every=2)


@pytest.fixture(scope="module")
def data(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of twelve scenes, by the untrained model."""
    folder = tmp_path_factory.mktemp("data") / "cache"
    return make_cache(str(tiny_folder), Scenes(12, seed=0), folder, DataConfig())


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(next((folder / "unet").glob("*.safetensors")))


def test_a_killed_run_ends_bit_for_bit_like_an_unbroken_one(
    tiny_folder, pruned_folder, data, tmp_path, monkeypatch
) -> None:
    models_ = str(tiny_folder), str(pruned_folder)
    whole = distill(*models_, data, tmp_path / "whole", CONFIG)
    step = trainer._Session.step

    def killed(self, number):
        if number == 5:
            raise KeyboardInterrupt
        return step(self, number)

    monkeypatch.setattr(trainer._Session, "step", killed)
    with pytest.raises(KeyboardInterrupt):
        distill(*models_, data, tmp_path / "broken", CONFIG)
    assert not (tmp_path / "broken").exists()
    monkeypatch.undo()
    broken = distill(*models_, data, tmp_path / "broken", CONFIG)
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(broken)[name]), name
    rows = [json.loads(line) for line in (broken / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 5]
    assert set(rows[0]["features"]) >= {"down_blocks.0", "mid_block", "up_blocks.2"}
    assert not list(broken.rglob("*.pt")), "a finished model carries no checkpoint"


def test_training_brings_the_student_nearer_to_its_teacher(tmp_path) -> None:
    teacher, student = models.load_unet("tiny-sdxl"), tmp_path / "student"
    data = make_cache("tiny-sdxl", Scenes(12, seed=0), tmp_path / "data", DataConfig())
    write_model(student, prune_unet(teacher, REMOVED), "tiny-sdxl")
    config = replace(CONFIG, steps=30, batch_size=8, checkpoint_every=30)
    out = distill("tiny-sdxl", str(student), data, tmp_path / "out", config)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["feature"] < 0.5 * rows[0]["feature"]
    assert models.load_unet(str(out)).config["removed"]


def test_a_loss_that_is_not_finite_stops_with_the_step(
    tiny_folder, pruned_folder, data, tmp_path
) -> None:
    config = replace(CONFIG, steps=200, learning_rate=1e30)
    with pytest.raises(Diverged, match=r"step \d+"):
        distill(str(tiny_folder), str(pruned_folder), data, tmp_path / "out", config)


def test_data_that_are_no_cache_of_the_teacher_are_refused(tiny_folder, data, tmp_path) -> None:
    out = tmp_path / "out"
    with pytest.raises(BadInput, match=r"cache\.json does not exist"):
        distill("tiny-sdxl", "tiny-sdxl", tmp_path, out, CONFIG)
    with pytest.raises(BadInput, match=r"whose vae is another than that of tiny-sdxl"):
        distill("tiny-sdxl", "tiny-sdxl", data, out, CONFIG)
    with pytest.raises(BadInput, match="weighting"):
        distill("tiny-sdxl", "tiny-sdxl", data, out, replace(CONFIG, weighting="l2"))
