"""The distillation stage: a pruned student learns from its teacher, can be killed, and resumes.

All randomness of a step comes from a generator seeded by (seed, step), so a resumed run takes the
steps that an unbroken one would have taken.
"""

import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import EMAModel
from torch import Tensor

from laptop import models
from laptop.distill.buckets import Order
from laptop.distill.cache import INFO, Cache, check_cache
from laptop.distill.features import Features, pairs
from laptop.distill.losses import WEIGHTINGS, Terms, distillation_loss
from laptop.errors import BadInput, LaptopError
from laptop.pruning import calibration
from laptop.pruning.surgery import write_model
from laptop.run import Overwrite, resume_folder, run_stage, track, whole_lines

CHECKPOINT = "checkpoint.pt"
PAIRED = (
    "in_channels", "out_channels", "sample_size", "cross_attention_dim", "addition_embed_type",
)  # fmt: skip


@dataclass(frozen=True)
class DistillConfig:
    steps: int = 1000
    batch_size: int = 64
    learning_rate: float = 5e-4  # peak; linear warm-up, then cosine to zero
    warmup_steps: int = 50
    weighting: str = "relative"  # of the feature terms, see losses.WEIGHTINGS
    task_weight: float = 1.0
    output_weight: float = 1.0
    feature_weight: float = 1.0
    drop_caption: float = 0.1  # share of samples without a caption, for guidance
    ema_decay: float = 0.995
    checkpoint_every: int = 100  # steps
    seed: int = 0


class Diverged(LaptopError):
    """The loss is not finite; the last good checkpoint is kept."""


def distill(
    teacher: str,
    student: str,
    data: Path,
    out: Path,
    config: DistillConfig,
    *,
    overwrite: Overwrite = False,
) -> Path:
    """Train `student` on the cache `data`; writes its averaged weights as a diffusers folder.

    `out` also holds metrics.jsonl: one line a logged step, every loss term apart.
    """
    check_config(config)
    models.need_whole_chain(teacher, "distill")
    check_pair(teacher, student)
    check_cache(data, teacher)
    inputs: dict[str, Path] = {"data": data / INFO}
    settings: dict[str, Any] = asdict(config)
    for role, model in (("teacher", teacher), ("student", student)):
        files, which = models.identity(role, model)
        inputs |= files
        settings |= which

    def work(folder: Path) -> dict[str, Any]:
        seconds = train(teacher, student, data, folder, config)
        return {"train_seconds": round(seconds, 1)}

    settings |= {"teacher": teacher}
    return run_stage("distill", out, settings, inputs, work, overwrite=overwrite)


def check_config(config: DistillConfig) -> None:
    """Raise `BadInput` for settings that cannot be trained with."""
    if config.weighting not in WEIGHTINGS:
        raise BadInput(
            f"weighting {config.weighting!r} is unknown; known are {', '.join(WEIGHTINGS)}."
        )
    for name in ("steps", "batch_size", "checkpoint_every"):
        if getattr(config, name) < 1:
            raise BadInput(f"{name} must be at least 1, not {getattr(config, name)}.")


def check_pair(teacher: str, student: str) -> None:
    """Raise `BadInput` unless the student can be a pruned teacher: their blocks must pair."""
    a, b = (models.unet_config(model) for model in (teacher, student))
    levels = len(b["down_block_types"])  # innermost ones may be gone
    for key in ("block_out_channels", "down_block_types"):
        a[key], b[key] = list(a[key][:levels]), list(b[key])
    a["up_block_types"], b["up_block_types"] = a["up_block_types"][-levels:], b["up_block_types"]
    by_level = ("block_out_channels", "down_block_types", "up_block_types")
    unlike = [key for key in (*by_level, *PAIRED) if a.get(key) != b.get(key)]
    if unlike:
        key = unlike[0]
        raise BadInput(
            f"{student} is no pruned {teacher}: its {key} is {b.get(key)}, needed {a.get(key)}."
        )


def train(teacher: str, student: str, data: Path, folder: Path, config: DistillConfig) -> float:
    """Run all steps in `folder`, from its checkpoint if it has one; returns seconds of training."""
    pipe = models.load_pipeline(teacher)
    session = _Session(pipe, models.load_unet(student), Cache(data), config, folder)
    session.resume()
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as log:
        for step in track(range(session.done, config.steps), "distill", config.steps, session.done):
            terms = session.step(step)
            if step % 10 == 0 or step == config.steps - 1:
                log.write(json.dumps(session.row(step, terms)) + "\n")
                log.flush()
            if (step + 1) % config.checkpoint_every == 0:
                session.save()
    session.save()
    session.ema.copy_to(session.student.parameters())
    write_model(folder, session.student.eval(), student)
    return session.seconds


class _Session:
    """What training holds between steps."""

    def __init__(self, pipe: Any, student: Any, data: Cache, config: DistillConfig, folder: Path):
        self.config, self.data, self.folder = config, data, folder
        self.order = Order(data.buckets, config.batch_size, config.seed)
        self.teacher = pipe.unet.requires_grad_(False).eval()
        self.student = student.requires_grad_(True).train()
        blocks = pairs(self.teacher, student)
        self.teacher_features = Features(self.teacher, {name: name for name in blocks})
        self.student_features = Features(student, blocks)
        self.schedule = DDPMScheduler.from_config(pipe.scheduler.config)
        self.optimizer = torch.optim.AdamW(
            student.parameters(), lr=config.learning_rate, betas=(0.9, 0.99), fused=True
        )
        self.ema = EMAModel(
            student.parameters(), decay=config.ema_decay, use_ema_warmup=True, power=0.75
        )
        self.done, self.seconds = 0, 0.0
        self.started = time.perf_counter()

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then a cosine to zero at the last step."""
        c = self.config
        if step < c.warmup_steps:
            return c.learning_rate * (step + 1) / c.warmup_steps
        share = (step - c.warmup_steps) / max(1, c.steps - c.warmup_steps)
        return c.learning_rate * 0.5 * (1 + math.cos(math.pi * share))

    def step(self, step: int) -> Terms:
        """One update; raises `Diverged` before a bad gradient can touch the weights."""
        noisy, t, target, rows = self._batch(step)
        added = {k: rows[k] for k in ("text_embeds", "time_ids") if k in rows} or None
        states = rows["encoder_hidden_states"]
        with torch.no_grad():
            teacher_out = self.teacher(noisy, t, states, added_cond_kwargs=added).sample
        student_out = self.student(noisy, t, states, added_cond_kwargs=added).sample
        c = self.config
        terms = distillation_loss(
            target,
            student_out,
            teacher_out,
            self.student_features.maps,
            self.teacher_features.maps,
            weighting=c.weighting,
            weights=(c.task_weight, c.output_weight, c.feature_weight),
        )
        self.optimizer.zero_grad()
        terms.loss.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
        if not math.isfinite(float(terms.loss.detach()) + float(norm)):
            raise Diverged(
                f"gradient norm {float(norm)}, loss {terms.as_floats()} at step {step}. The last "
                f"good checkpoint is kept in {self.folder}. Lower learning_rate "
                f"({c.learning_rate:g}) and start again with --overwrite."
            )
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(step)
        self.optimizer.step()
        self.ema.step(self.student.parameters())
        self.done = step + 1
        return terms

    def _batch(self, step: int) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """Noisy latents (B, C, h, w), timesteps (B,), the task's target and the conditioning."""
        c = self.config
        g = torch.Generator().manual_seed(c.seed * 1_000_003 + step)
        keep = torch.rand(c.batch_size, generator=g) >= c.drop_caption
        latents, rows = self.data.rows(self.order(step), keep)
        noise = torch.randn(latents.shape, generator=g)
        steps = self.schedule.config.num_train_timesteps
        t = torch.randint(steps, (c.batch_size,), generator=g)
        noisy = self.schedule.add_noise(latents, noise, t)
        target = calibration.target(self.schedule, latents, noise, t)
        return noisy, t, target, rows

    def row(self, step: int, terms: Terms) -> dict[str, Any]:
        """A line of metrics.jsonl."""
        return {
            "step": step,
            **terms.as_floats(),
            "lr": self.learning_rate(step),
            "seconds": round(self._elapsed(), 2),
        }

    def _elapsed(self) -> float:
        return self.seconds + time.perf_counter() - self.started

    def save(self) -> None:
        """Write the checkpoint beside and rename it."""
        self.seconds, self.started = self._elapsed(), time.perf_counter()
        state = {
            "student": self.student.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema.state_dict(),
            "done": self.done,
            "seconds": self.seconds,
        }
        path = resume_folder(self.folder) / CHECKPOINT
        torch.save(state, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)

    def resume(self) -> None:
        """Take up the checkpoint, and forget logged steps that come after it."""
        path = resume_folder(self.folder) / CHECKPOINT
        metrics = self.folder / "metrics.jsonl"
        if path.exists():
            state = torch.load(path, weights_only=True)
            self.student.load_state_dict(state["student"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.ema.load_state_dict(state["ema"])
            self.done, self.seconds = state["done"], state["seconds"]
        if metrics.exists():
            kept = [line for line in whole_lines(metrics) if json.loads(line)["step"] < self.done]
            beside = metrics.with_suffix(".tmp")
            beside.write_text("".join(kept), encoding="utf-8")
            beside.replace(metrics)
