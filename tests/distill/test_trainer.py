"""Distillation on the tiny model: it learns, survives kills, full disks and bad numbers."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint import state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException

from conftest import REMOVED, TRAINING_SCRIPT, logged
from laptop.distill import checkpoint, checks, trainer
from laptop.distill.cache import Cache
from laptop.distill.checkpoint import TrainingState
from laptop.distill.divergence import Diverged, RunningLoss
from laptop.distill.optimizer import OPTIMIZERS
from laptop.distill.settings import DistillConfig, TrainConfig
from laptop.distill.trainer import Training, distill, rehearse, start
from laptop.errors import BadInput, NoSpace
from laptop.models import loading
from laptop.pruning.surgery import prune_unet, write_model

CONFIG = DistillConfig(steps=6, batch_size=4, warmup_steps=2)
TRAIN = TrainConfig(checkpoint_every=2)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(next((folder / "unet").glob("*.safetensors")))


def assert_same_weights(a: Path, b: Path) -> None:
    for name, value in weights(a).items():
        assert torch.equal(value, weights(b)[name]), name


@pytest.fixture(scope="module")
def unbroken(pair, pair_cache, tmp_path_factory) -> Path:
    """What `CONFIG` and `TRAIN` train where nothing happens."""
    return distill(*pair, pair_cache, tmp_path_factory.mktemp("unbroken") / "out", CONFIG, TRAIN)


@pytest.mark.long
def test_a_run_killed_at_any_moment_ends_bit_for_bit_like_an_unbroken_one(
    pair, pair_cache, tmp_path
) -> None:
    """Killed by the system, three times, wherever it happens to be; another time in a save."""
    settings = [json.dumps({"steps": 16, "batch_size": 4, "warmup_steps": 2})]
    settings += [json.dumps({"checkpoint_every": 4, "log_every": 1})]
    whole, out = tmp_path / "whole", tmp_path / "broken"
    start = [sys.executable, TRAINING_SCRIPT, *pair, str(pair_cache)]
    subprocess.run([*start, str(whole), *settings], check=True, capture_output=True)
    command = [*start, str(out), *settings]
    metrics = tmp_path / ".broken.partial" / "metrics.jsonl"
    for lines in (2, 9, 13):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        until = time.monotonic() + 120
        while not (metrics.exists() and metrics.read_text().count("\n") >= lines):
            assert process.poll() is None, "it should not end before it is killed"
            assert time.monotonic() < until
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert not out.exists()
    subprocess.run(command, check=True, capture_output=True)
    assert_same_weights(whole, out)
    kept = [{k: v for k, v in row.items() if k != "seconds"} for row in logged(out)]
    assert kept == [{k: v for k, v in row.items() if k != "seconds"} for row in logged(whole)]
    assert not (out / ".resume").exists(), "a finished model carries no checkpoint"


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(
    optimizer, pair, pair_cache, tmp_path, monkeypatch
) -> None:
    if optimizer == "adamw-8bit":
        pytest.importorskip("bitsandbytes", reason="the extra adam8bit is not installed")
    train_config = replace(TRAIN, optimizer=optimizer)
    whole = distill(*pair, pair_cache, tmp_path / "whole", CONFIG, train_config)
    write = TrainingState.write

    def killed(state: TrainingState, path: Path) -> None:
        if state.done == 4:
            raise KeyboardInterrupt
        write(state, path)

    monkeypatch.setattr(TrainingState, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        distill(*pair, pair_cache, tmp_path / "broken", CONFIG, train_config)
    kept = checkpoint.latest(tmp_path / ".broken.partial" / ".resume")
    assert kept is not None
    assert kept.name.endswith("02")
    monkeypatch.undo()
    resumed = distill(*pair, pair_cache, tmp_path / "broken", CONFIG, train_config)
    assert_same_weights(whole, resumed)


def test_a_full_disk_is_an_error_that_keeps_the_last_checkpoint(
    pair, pair_cache, tmp_path, monkeypatch
) -> None:
    save, saves = state_dict_saver.save, []

    def full(*args, **kwargs) -> None:
        saves.append(args)
        if len(saves) == 2:
            error = OSError(errno.ENOSPC, "No space left on device")
            raise CheckpointException("write", {0: (error, None)})
        save(*args, **kwargs)

    monkeypatch.setattr(state_dict_saver, "save", full)
    with pytest.raises(NoSpace, match="disk is full"):
        distill(*pair, pair_cache, tmp_path / "out", CONFIG, TRAIN)
    kept = checkpoint.latest(tmp_path / ".out.partial" / ".resume")
    assert kept is not None
    assert kept.name.endswith("02")
    out = distill(*pair, pair_cache, tmp_path / "out", CONFIG, TRAIN)
    assert logged(out)[-1]["step"] == 5


def test_training_brings_the_student_nearer_to_its_teacher(trained_cache, tmp_path) -> None:
    teacher, student = loading.load_unet("tiny-sdxl"), tmp_path / "student"
    write_model(student, prune_unet(teacher, REMOVED), "tiny-sdxl")
    config = replace(CONFIG, steps=30, batch_size=8)
    out = distill("tiny-sdxl", str(student), trained_cache, tmp_path / "out", config)
    assert logged(out)[-1]["feature"] < 0.5 * logged(out)[0]["feature"]
    assert loading.load_unet(str(out)).config["removed"]


def test_a_loss_that_is_not_finite_stops_with_step_term_and_samples(
    pair, pair_cache, tmp_path
) -> None:
    config = replace(CONFIG, steps=200, learning_rate=1000.0)
    with pytest.raises(Diverged, match=r"step \d+: .*task.* not finite .* on samples scene \d+"):
        distill(*pair, pair_cache, tmp_path / "out", config, TRAIN)


def test_a_bad_sample_is_named_and_the_last_checkpoint_kept(
    pair, pair_cache, unbroken, tmp_path, monkeypatch
) -> None:
    good, seen = Cache.samples, []

    def damaged(self, index, keep):
        samples = good(self, index, keep)
        seen.append(index)
        if len(seen) == 4:
            samples.latents[2, 0, 0, 0] = float("nan")
        return samples

    monkeypatch.setattr(Cache, "samples", damaged)
    with pytest.raises(Diverged) as caught:
        distill(*pair, pair_cache, tmp_path / "out", CONFIG, TRAIN)
    guilty = Cache(pair_cache).ids[int(seen[3][2])]
    assert "step 3: loss, task, output, feature, gradient_norm not finite" in str(caught.value)
    assert f"on samples {guilty}. Their own numbers" in str(caught.value)
    assert "The last good checkpoint is kept (that after step 2" in str(caught.value)
    monkeypatch.undo()
    assert_same_weights(unbroken, distill(*pair, pair_cache, tmp_path / "out", CONFIG, TRAIN))


def kill() -> None:
    raise KeyboardInterrupt


def test_a_run_that_runs_away_goes_back_and_on_at_half_the_rate(
    pair, pair_cache, tmp_path, monkeypatch
) -> None:
    calls = []

    def once(self, factor: float) -> bool:
        calls.append(factor)
        return len(calls) == 6

    monkeypatch.setattr(RunningLoss, "has_run_away", once)
    config = replace(CONFIG, steps=8, schedule="constant")
    train_config = replace(TRAIN, log_every=1)
    with pytest.raises(Diverged, match=r"step 5: the loss has run away .*set back_offs"):
        distill(*pair, pair_cache, tmp_path / "none", config, train_config)
    calls.clear()
    patient = replace(train_config, back_offs=1)
    with monkeypatch.context() as patch:  # killed just after it has gone back
        patch.setattr(trainer, "say", lambda text: kill() if "Back to" in text else None)
        with pytest.raises(KeyboardInterrupt):
            distill(*pair, pair_cache, tmp_path / "out", config, patient)
    out = distill(*pair, pair_cache, tmp_path / "out", config, patient)
    assert json.loads((out / "manifest.json").read_text())["back_offs"] == 1
    lines = logged(out)
    assert [line["step"] for line in lines] == list(range(8))
    assert [line["lr"] for line in lines[2:]] == [5e-4] * 2 + [2.5e-4] * 4


def test_leave_to_back_off_changes_nothing_where_nothing_diverges(
    pair, pair_cache, unbroken, tmp_path
) -> None:
    made = distill(*pair, pair_cache, tmp_path / "with", CONFIG, replace(TRAIN, back_offs=2))
    assert_same_weights(unbroken, made)


@pytest.mark.parametrize("file", ["__0_0.distcp", ".metadata", "state.json"])
def test_a_damaged_checkpoint_is_an_error_that_says_so(pair, pair_cache, tmp_path, file) -> None:
    session = start(Training(*pair, pair_cache, CONFIG, TRAIN))
    session.step(0)
    session.save(tmp_path, 0.0)
    path = checkpoint.latest(tmp_path)
    assert path is not None
    whole = (path / file).read_bytes()
    for damaged in (whole[: len(whole) // 2], bytes(len(whole)), None):
        (path / file).unlink() if damaged is None else (path / file).write_bytes(damaged)
        with pytest.raises(BadInput, match=r"step-000000001 is damaged .*--overwrite"):
            session.restore(path)
    os.mkfifo(path / file)  # at which a reader would wait
    with pytest.raises(BadInput, match="is a pipe"):
        session.restore(path)


def test_a_checkpoint_holds_nothing_of_the_teacher_s(pair, pair_cache) -> None:
    session = start(Training(*pair, pair_cache, CONFIG, TRAIN))
    session.step(0)
    teacher = {p.data_ptr() for p in session.teacher.parameters()}
    held = session.tensors()
    assert set(held["student"]) == set(held["average"]) == set(session.names)
    assert set(held["optimizer"]["state"]) == set(session.names)
    optimized = [p for group in session.optimizer.param_groups for p in group["params"]]
    assert len(optimized) == len(session.names)
    assert not teacher & {p.data_ptr() for p in (*optimized, *held["student"].values())}


def test_a_rehearsal_says_what_training_will_cost_and_writes_nothing(pair, tmp_path) -> None:
    forecast = rehearse(*pair, CONFIG, TRAIN)
    assert forecast["student_params"] < forecast["teacher_params"] == 203_204
    assert forecast["images"] == 24
    speed = 4 / forecast["seconds_per_step"]
    assert forecast["images_per_second"] == pytest.approx(speed, rel=0.01)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weighting": "l2"}, "weighting is 'l2'; known are none, relative"),
        ({"schedule": "linear"}, "known are cosine, constant"),
        ({"features": "heads"}, "known are blocks, attentions, layers"),
        ({"steps": 0}, "steps is 0; it must be at least 1"),
        ({"learning_rate": -1e-3}, "learning_rate is -0.001; it must be above 0"),
        ({"learning_rate": float("nan")}, "learning_rate is nan; it must be a number"),
        ({"drop_caption": 2.0}, "drop_caption is 2.0; it must be at most 1"),
        ({"ema_decay": 1.0}, "ema_decay is 1.0; it must be below 1"),
        ({"snr_gamma": 0.0}, "snr_gamma is 0.0; it must be above 0"),
        ({"max_grad_norm": 0.0}, "max_grad_norm is 0.0; it must be above 0"),
        ({"task_weight": -1.0}, "task_weight is -1.0; it must be at least 0"),
        ({"seed": -1}, "seed is -1; it must be at least 0"),
        ({"task_weight": 0.0, "output_weight": 0.0, "feature_weight": 0.0}, "are all 0"),
    ],
)
def test_settings_that_cannot_be_trained_with_are_refused(change, message) -> None:
    with pytest.raises(BadInput, match=message):
        replace(CONFIG, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"micro_batch": 0}, "micro_batch is 0; it must be at least 1"),
        ({"back_offs": -1}, "back_offs is -1; it must be at least 0"),
        ({"runaway": 1.0}, "runaway is 1.0; it must be above 1"),
        ({"mixed_precision": "half"}, "known are no, bf16, fp16"),
    ],
)
def test_ways_of_computing_that_cannot_be_are_refused(change, message) -> None:
    with pytest.raises(BadInput, match=message):
        replace(TRAIN, **change)


def test_a_batch_that_the_processes_cannot_share_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(checks, "count", lambda: 3)
    with pytest.raises(BadInput, match="batch_size 4 cannot be shared by 3 processes"):
        checks.check_batch(CONFIG)
