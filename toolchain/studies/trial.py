"""One run of the study `retraining`: prune, retrain, judge; and what all runs share."""

import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray

from laptop.benchmarks.documents import LossRow
from laptop.benchmarks.frechet import frechet_distance, latent_features
from laptop.benchmarks.quality import draw
from laptop.benchmarks.settings import EvalConfig
from laptop.distill.settings import DataConfig, DistillConfig, TrainConfig
from laptop.distill.trainer import distill
from laptop.fields import Count, Length, OneOf, Range, Samples, Share, Steps, check_fields
from laptop.models import loading
from laptop.models.precision import stored_dtype
from laptop.prompts import evaluation_prompts
from laptop.pruning import calibration
from laptop.pruning.calibration import Calibration
from laptop.pruning.sampling_choice import choose_sampling
from laptop.pruning.sampling_config import Sampling
from laptop.pruning.surgery import prune_unet, write_model
from laptop.pruning.units import forward_rows
from laptop.records import read_lines
from laptop.run import run_stage
from laptop.studies.design import GROUPS, RATIOS, Run
from laptop.tiny import scenes
from laptop.tiny.checker import check
from laptop.training_data import prepared

MODEL = "tiny-sdxl"
DATA, HELD_OUT, METRICS = "data", "held-out", "metrics"
TRAINING = TrainConfig(checkpoint_every=100, shares_every=150)
CALIBRATION_PROMPTS = 32  # at most: of the rows to score layers on, and of the held-out ones
ATTRIBUTES = ("count", "place", "shape", "colour", "background")  # a right picture has all
LAST = 5  # logged steps at the end, over which the loss terms are averaged


@dataclass(frozen=True)
class StudyConfig:
    """The same for all students; arms differ in layers, loss and seed."""

    steps: Count = 300
    batch_size: Samples = 32
    learning_rate: Annotated[float, Range(above=0, most=1000)] = 1e-3
    prompts: Samples = 300  # unseen ones, to judge by
    drawing_steps: Steps = 12  # denoising steps of a judged picture
    images: Count = 8000  # training scenes
    rows: Samples = 128  # U-Net inputs to score layers on, and as many held-out ones
    seeds: Annotated[int, Range(1, 1000)] = 3
    main_seeds: Annotated[int, Range(1, 1000)] = 5  # of the comparison at arms.MAIN_RATIO
    ratios: Annotated[tuple[Share, ...], Length(100, least=1)] = RATIOS
    groups: Annotated[tuple[Annotated[str, OneOf(*GROUPS)], ...], Length(100)] = GROUPS

    def __post_init__(self) -> None:
        check_fields(self, "study")

    @property
    def calibration_prompts(self) -> int:
        """How many prompts the rows come from."""
        return min(CALIBRATION_PROMPTS, self.rows)

    @property
    def distill(self) -> DistillConfig:
        """How every student is trained, but for loss and seed."""
        return DistillConfig(
            steps=self.steps,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            warmup_steps=max(1, self.steps // 10),
        )


def make_shared(out: Path, config: StudyConfig) -> None:
    """Training data; and rows of U-Net inputs, taken while the teacher draws unseen prompts."""
    source = DataConfig(source="scenes", count=config.images)
    prepared(MODEL, source, out / DATA)

    def write_rows(folder: Path) -> None:
        prompts = scenes.held_out_prompts(config.calibration_prompts, seed=1)
        rows = calibration.record(
            _teacher(), prompts, Sampling(25), samples=config.rows, seed=1, batch_size=32
        )
        output = forward_rows(_teacher().unet, rows, 64)
        Calibration(rows, output).write(folder / "rows.safetensors")

    run_stage("held-out rows", out / HELD_OUT, {"rows": config.rows}, {}, write_rows)


def train_and_judge(run: Run, out: Path, folder: Path, config: StudyConfig) -> dict[str, Any]:
    """The result of one run; what it has in `folder` when it is killed, it goes on from."""
    start = time.process_time()
    teacher = loading.load_unet(MODEL, stored_dtype(MODEL))
    write_model(folder / "pruned", prune_unet(teacher, run.remove), MODEL)
    student = folder / "student"
    pruned, data = str(folder / "pruned"), out / DATA
    distill(MODEL, pruned, data, student, run.config, TRAINING, overwrite="stale")
    found = {
        **judged(loading.load_unet(str(student)), out, config),
        **last_terms(read_lines(student / "metrics.jsonl", LossRow)),
        "removed": list(run.remove),
        "seconds": round(time.process_time() - start, 1),
    }
    kept = out / METRICS / f"{run.key}.jsonl"
    kept.parent.mkdir(exist_ok=True)
    shutil.copyfile(student / "metrics.jsonl", kept)
    shutil.rmtree(folder)
    return found


def last_terms(metrics: list[Mapping[str, Any]]) -> dict[str, float]:
    """The loss terms at the end of training; the feature term as it was weighted."""
    last = metrics[-LAST:]
    return {k: float(np.mean([row[k] for row in last])) for k in ("task", "output", "feature")}


def judge_teacher(out: Path, config: StudyConfig) -> dict[str, Any]:
    """What students are compared with."""
    return judged(loading.load_unet(MODEL), out, config)


@torch.inference_mode()
def judged(unet: Any, out: Path, config: StudyConfig) -> dict[str, Any]:
    """Which of the unseen prompts a U-Net draws right, with the teacher's other components.

    Also the share of attributes that are right, which still tells students apart that draw hardly a
    whole prompt; the output loss on held-out rows; the Fréchet distance to drawn scenes.
    """
    pipe, prompts = _teacher(), evaluation_prompts(MODEL, config.prompts)
    drawing, pictures = EvalConfig(), []
    sampling = choose_sampling(MODEL, steps=config.drawing_steps)
    whole = pipe.unet
    pipe.register_modules(unet=unet.eval())
    for first in range(0, len(prompts), drawing.batch):
        numbers = range(first, min(first + drawing.batch, len(prompts)))
        pictures += list(draw(pipe, prompts, numbers, sampling, drawing.seed)[0])
    pipe.register_modules(unet=whole)
    seen = [check(image, prompt) for image, prompt in zip(pictures, prompts, strict=True)]
    right = [one["prompt"] for one in seen]
    held_out = Calibration.read(out / HELD_OUT / "rows.safetensors", 64)
    return {
        "accuracy": round(float(np.mean(right)), 6),
        "right": as_hex(right),
        "attributes": float(np.mean([[one[k] for k in ATTRIBUTES] for one in seen])),
        "held_out_loss": held_out.loss(unet),
        "frechet": frechet_distance(
            latent_features(pipe.vae, np.stack(pictures)), _reference(config.prompts)
        ),
        "params": unet.num_parameters(),
    }


def as_hex(right: list[bool]) -> str:
    """One bit a prompt, four to a digit."""
    return np.packbits(right).tobytes().hex()


@cache
def _teacher() -> Any:
    pipe = loading.load_pipeline(MODEL)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@cache
def _reference(prompts: int) -> NDArray[np.float64]:
    """Features of one drawn scene for each prompt."""
    rng = np.random.default_rng(0)
    pictures = [scenes.draw(scenes.parse(p), rng) for p in evaluation_prompts(MODEL, prompts)]
    return latent_features(_teacher().vae, np.stack(pictures))
