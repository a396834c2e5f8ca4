"""One run of the study `retraining`: prune, retrain, judge; and what all runs share."""

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Annotated

import numpy as np
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from numpy.typing import NDArray

from laptop.benchmarks.frechet import frechet_distance, latent_features
from laptop.distill.log_lines import LogLine
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
from laptop.records import Record, read_lines
from laptop.run import run_stage
from laptop.studies.design import GROUPS, RATIOS, Run
from laptop.studies.pictures import draw_prompts
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
class StudyConfig(Record):
    """Settings of all students; students differ in layers, loss and seed."""

    steps: Count = 300
    batch_size: Samples = 32
    learning_rate: Annotated[float, Range(above=0, most=1000)] = 1e-3
    prompts: Samples = 300  # unseen ones, to judge by
    drawing_steps: Steps = 12  # denoising steps of a judged picture
    images: Count = 8000  # training scenes
    rows: Samples = 128  # U-Net inputs to score layers on, and as many held-out ones
    seeds: Annotated[int, Range(1, 1000)] = 3
    main_seeds: Annotated[int, Range(1, 1000)] = 5  # of the comparison at design.MAIN_RATIO
    ratios: Annotated[tuple[Share, ...], Length(100, least=1)] = RATIOS
    groups: Annotated[tuple[Annotated[str, OneOf(*GROUPS)], ...], Length(100)] = GROUPS

    def __post_init__(self) -> None:
        check_fields(self, "study")

    @property
    def calibration_prompts(self) -> int:
        """The number of prompts that the rows come from."""
        return min(CALIBRATION_PROMPTS, self.rows)

    @property
    def distill(self) -> DistillConfig:
        """The training of every student, but for loss and seed."""
        return DistillConfig(
            steps=self.steps,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            warmup_steps=max(1, self.steps // 10),
        )


@dataclass(frozen=True, kw_only=True)
class Judgement(Record):
    """What a U-Net draws, with the teacher's other components."""

    accuracy: float  # share of the unseen prompts whose picture is right
    right: str  # which prompts, see `as_hex`
    attributes: float  # share of right attributes: still tells poor students apart
    held_out_loss: float  # output loss on held-out rows
    frechet: float | None  # distance to drawn scenes
    params: int


@dataclass(frozen=True, kw_only=True)
class TeacherResult(Judgement):
    """The file of the teacher, which students are compared with."""

    SCHEMA = "laptop.study-run/1"


@dataclass(frozen=True, kw_only=True)
class RunResult(Judgement):
    """The file of a finished run."""

    SCHEMA = "laptop.study-run/1"

    # loss terms at the end of training; the feature term as it was weighted
    task: float
    output: float
    feature: float
    removed: tuple[str, ...]
    seconds: float  # of processor time


def make_shared(out: Path, config: StudyConfig) -> None:
    """Make training data, and rows of U-Net inputs taken while the teacher draws unseen prompts."""
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


def train_and_judge(run: Run, out: Path, folder: Path, config: StudyConfig) -> RunResult:
    """Do one run of the study `out`; if it is killed, it continues from what `folder` holds."""
    start = time.process_time()
    teacher = loading.load_unet(MODEL, stored_dtype(MODEL))
    write_model(folder / "pruned", prune_unet(teacher, run.remove), MODEL)
    student = folder / "student"
    pruned, data = str(folder / "pruned"), out / DATA
    distill(MODEL, pruned, data, student, run.config, TRAINING, overwrite="stale")
    task, output, feature = last_terms(read_lines(student / "metrics.jsonl", LogLine))
    judgement = judge_unet(loading.load_unet(str(student)), out, config)
    result = RunResult(
        **vars(judgement),
        task=task,
        output=output,
        feature=feature,
        removed=run.remove,
        seconds=round(time.process_time() - start, 1),
    )
    metrics = out / METRICS / f"{run.key}.jsonl"
    metrics.parent.mkdir(exist_ok=True)
    shutil.copyfile(student / "metrics.jsonl", metrics)
    shutil.rmtree(folder)
    return result


def last_terms(lines: Sequence[LogLine]) -> tuple[float, float, float]:
    """Means of the task, output and feature terms over the last logged steps."""
    last = lines[-LAST:]
    task, output, feature = (
        fmean(getattr(line, term) or 0.0 for line in last) for term in ("task", "output", "feature")
    )
    return task, output, feature


def judge_teacher(out: Path, config: StudyConfig) -> TeacherResult:
    """Judge the teacher as its students are judged."""
    return TeacherResult(**vars(judge_unet(loading.load_unet(MODEL), out, config)))


@torch.inference_mode()
def judge_unet(unet: UNet2DConditionModel, out: Path, config: StudyConfig) -> Judgement:
    """Draw the unseen prompts with a U-Net and the teacher's other components, and check them."""
    pipe, prompts = _teacher(), evaluation_prompts(MODEL, config.prompts)
    sampling = choose_sampling(MODEL, steps=config.drawing_steps)
    teacher = pipe.unet
    pipe.register_modules(unet=unet.eval())
    pictures = draw_prompts(pipe, prompts, sampling)
    pipe.register_modules(unet=teacher)
    checks = [check(image, prompt) for image, prompt in zip(pictures, prompts, strict=True)]
    right = [shown["prompt"] for shown in checks]
    held_out = Calibration.read(out / HELD_OUT / "rows.safetensors", 64)
    return Judgement(
        accuracy=round(float(np.mean(right)), 6),
        right=as_hex(right),
        attributes=float(np.mean([[shown[k] for k in ATTRIBUTES] for shown in checks])),
        held_out_loss=held_out.loss(unet),
        frechet=frechet_distance(
            latent_features(pipe.vae, np.stack(pictures)), _reference(config.prompts)
        ),
        params=unet.num_parameters(),
    )


def as_hex(right: Sequence[bool]) -> str:
    """One bit a prompt, four to a digit."""
    return np.packbits(right).tobytes().hex()


@cache
def _teacher() -> DiffusionPipeline:
    pipe = loading.load_pipeline(MODEL)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@cache
def _reference(prompts: int) -> NDArray[np.float64]:
    """Features of one drawn scene for each prompt."""
    rng = np.random.default_rng(0)
    pictures = [scenes.draw(scenes.parse(p), rng) for p in evaluation_prompts(MODEL, prompts)]
    return latent_features(_teacher().vae, np.stack(pictures))
