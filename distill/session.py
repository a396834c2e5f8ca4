"""What distillation holds between steps, and the step itself.

One code for one GPU, several, several machines and the CPU: accelerate says which.
"""

import contextlib
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint.state_dict as states
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, gather_object
from torch import Tensor, nn

from laptop.distill import checkpoint, log_lines
from laptop.distill.batches import Batch, Batches
from laptop.distill.divergence import Diverged, Watch, explain
from laptop.distill.ema import Average
from laptop.distill.features import Features, pairs
from laptop.distill.losses import Terms, distillation_loss, mean_squares
from laptop.distill.optimizer import OPTIMIZERS, learning_rate
from laptop.distill.settings import DistillConfig, TrainConfig
from laptop.errors import BadInput
from laptop.pruning.noising import ContinuousNoising, Noised, Noising
from laptop.pruning.units import ADDED

HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
Rows = dict[str, Tensor]  # a U-Net's conditions by name, (B, ...)
CALIBRATION_STEPS = 8  # whose teacher features the weighting is made of, with norms = calibration


class Session:
    """Teacher, student, optimizer and average; `step` by `step`."""

    def __init__(
        self,
        teacher: Any,
        student: Any,
        noising: Noising | ContinuousNoising,
        batches: Batches,
        config: DistillConfig,
        how: TrainConfig,
    ):
        self.config, self.how, self.noising, self.batches = config, how, noising, batches
        self.accelerator = accelerator(how)
        places = pairs(teacher, student, config.features)
        dtype = HALVES.get(self.accelerator.mixed_precision, torch.float32)
        self.teacher = nn.Module.to(teacher, self.accelerator.device, dtype)
        self.teacher.requires_grad_(False).eval()
        self.raw = student.requires_grad_(True).train()
        self.names = [name for name, _ in student.named_parameters()]
        if how.gradient_checkpointing:
            student.enable_gradient_checkpointing()
        self.teacher_features = Features(teacher, {name: name for name in places})
        self.student_features = Features(student, places)
        if how.compile:
            teacher.compile_repeated_blocks()
            student.compile_repeated_blocks()
        optimizer = OPTIMIZERS[how.optimizer](student.parameters(), config.learning_rate)
        self.student, self.optimizer = self.accelerator.prepare(student, optimizer)
        self.average = None
        if config.ema_decay > 0:
            self.average = Average(self.raw.parameters(), config.ema_decay)
        self.done, self.back_offs, self.watch = 0, 0, Watch()
        self.squares: Tensor | None = None
        if config.norms == "calibration":
            self.squares = self._calibrate()

    def step(self, step: int) -> dict[str, Any]:
        """One update; what the log says of it.

        Raises `Diverged` before a bad gradient can touch the weights.
        """
        torch.manual_seed(self.config.seed + step)  # of dropout, where a model has any
        micro, found, shares = self.batches(step), [], {}
        parts = [len(batch.ids) for batch in micro]
        for number, batch in enumerate(micro):
            is_last = number == len(micro) - 1
            with contextlib.nullcontext() if is_last else self.accelerator.no_sync(self.student):
                terms = self._terms(batch)
                if number == 0 and self._measures_shares(step):
                    shares = log_lines.gradient_norms(terms, self.raw, self.accelerator.scaler)
                found.append(log_lines.flat(terms))
                self.accelerator.backward(terms.loss * (parts[number] / sum(parts)))
        values = self._mean(found, parts)
        parameters = self.raw.parameters()
        norm = self.accelerator.clip_grad_norm_(parameters, self.config.max_grad_norm)
        self._check(step, values, float(norm), micro)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.average:
            self.average.update(self.raw.parameters(), step + 1)
        self.done = step + 1
        more = {"gradient_norms": shares} if shares else {}
        return {"step": step, **log_lines.nested(values), "gradient_norm": float(norm), **more}

    def learning_rate(self, step: int) -> float:
        """That of `step`, after back-offs."""
        c = self.config
        return 0.5**self.back_offs * learning_rate(
            step,
            peak=c.learning_rate,
            schedule=c.schedule,
            warmup=c.warmup_steps,
            steps=c.steps,
        )

    def save(self, folder: Path, seconds: float) -> None:
        """Write a checkpoint into `folder`; all processes must come here."""
        scaler = self.accelerator.scaler
        state = {
            "done": self.done,
            "watch": asdict(self.watch),
            "scaler": scaler.state_dict() if scaler else None,
            "seconds": seconds,
        }
        checkpoint.save(folder, self.done, self.tensors(), state)

    def restore(self, path: Path) -> float:
        """Take up a checkpoint; returns the seconds that training had taken by then."""
        tensors = self.tensors()
        state = checkpoint.load(path, tensors)
        states.set_model_state_dict(self.student, tensors["student"])
        states.set_optimizer_state_dict(
            self.student, self.optimizer.optimizer, tensors["optimizer"]
        )
        self.done, self.watch = state["done"], Watch(**state["watch"])
        if self.accelerator.scaler and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        return float(state["seconds"])

    def result(self) -> dict[str, Tensor]:
        """The weights to ship, whole and on the CPU, in the main process; empty in the others."""
        if self.average:
            self.average.copy_to(self.raw.parameters())
        options = states.StateDictOptions(full_state_dict=True, cpu_offload=True)
        found: dict[str, Any] = states.get_model_state_dict(self.student, options=options)
        return found

    def tensors(self) -> dict[str, Any]:
        """What a checkpoint holds; nothing of the teacher's."""
        average = self.average.named(self.names) if self.average else {}
        return {
            "student": states.get_model_state_dict(self.student),
            "optimizer": states.get_optimizer_state_dict(self.student, self.optimizer.optimizer),
            "average": average,
        }

    def _terms(self, batch: Batch) -> Terms:
        """All loss terms of a batch, with the student's graph."""
        device, c = self.accelerator.device, self.config
        noised, inputs = self._inputs(batch)
        teacher, teacher_maps = self._ask_teacher(*inputs)
        self.student_features.collect()
        student = _output(self.student, *inputs)
        squares, of_sample = self.squares, None
        if squares is None:
            squares = self._over_processes(mean_squares(teacher_maps))
        if c.snr_gamma is not None:
            of_sample = self.noising.min_snr_weights(noised.snr, c.snr_gamma).to(device)
        return distillation_loss(
            noised.target.to(device),
            student,
            teacher,
            self.student_features.take(),
            teacher_maps,
            weighting=c.weighting,
            weights=(c.task_weight, c.output_weight, c.feature_weight),
            squares=squares,
            of_sample=of_sample,
        )

    def _inputs(self, batch: Batch) -> tuple[Noised, tuple[Tensor, Tensor, Rows]]:
        """The noised batch, and on the device: samples, timesteps and conditions."""
        device = self.accelerator.device
        noised = self.noising(batch.latents, batch.noise, batch.level)
        rows = {k: v.to(device) for k, v in batch.rows.items()}
        return noised, (noised.sample.to(device), noised.timestep.to(device), rows)

    @torch.inference_mode()
    def _ask_teacher(
        self, sample: Tensor, timestep: Tensor, rows: Rows
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The teacher's output and feature maps, in its own precision."""
        dtype = self.teacher.dtype
        # A size of 1333 pixels is not in bfloat16; the U-Net embeds sizes before it casts them.
        halves = {k: v if k == "time_ids" else v.to(dtype) for k, v in rows.items()}
        self.teacher_features.collect()
        output = _output(self.teacher, sample.to(dtype), timestep, halves)
        return output, self.teacher_features.take()

    def _calibrate(self) -> Tensor:
        """Mean squares (L,) of the teacher's maps over the first steps' samples."""
        found, total = [], 0
        for batch in (b for step in range(CALIBRATION_STEPS) for b in self.batches(step)):
            _, inputs = self._inputs(batch)
            found.append(mean_squares(self._ask_teacher(*inputs)[1]) * len(batch.ids))
            total += len(batch.ids)
        return self._over_processes(torch.stack(found).sum(0) / total)

    def _over_processes(self, values: Tensor) -> Tensor:
        """Their mean over all processes."""
        found: Tensor = self.accelerator.reduce(values, "mean")
        return found

    def _mean(self, found: list[dict[str, Tensor]], parts: list[int]) -> dict[str, float]:
        """Of logged values over the samples of micro-batches and processes."""
        with torch.no_grad():
            stacked = torch.stack([torch.stack(list(v.values())) for v in found])
            weights = stacked.new_tensor(parts) / sum(parts)
            mean = self._over_processes((stacked * weights[:, None]).sum(0)).tolist()
        return dict(zip(found[0], mean, strict=True))

    def _measures_shares(self, step: int) -> bool:
        every = self.how.shares_every
        is_sharded = self.accelerator.distributed_type == DistributedType.FSDP
        return every > 0 and step % every == 0 and not is_sharded

    def _check(self, step: int, values: dict[str, float], norm: float, micro: list[Batch]) -> None:
        """Raise `Diverged` unless loss and gradient are as they should be."""
        loss = values["loss"]
        # With a scaler, gradients that overflow are skipped, and the scale is lowered.
        is_finite = math.isfinite(loss) and (self.accelerator.scaler or math.isfinite(norm))
        if is_finite and not self.watch.runs_away(loss, self.how.runaway):
            return
        self.optimizer.zero_grad()
        named = {k: values[k] for k in log_lines.TERMS}
        # All processes are here, for the loss is that of all.
        bad = gather_object([name for batch in micro for name in batch.not_finite()])
        ids = gather_object([name for batch in micro for name in batch.ids])
        raise Diverged(explain(step, named | {"gradient_norm": norm}, bad or ids, bool(bad)))


def accelerator(how: TrainConfig) -> Accelerator:
    """accelerate's, on a GPU where there is one; `BadInput` for what it cannot do here."""
    AcceleratorState._reset_state()  # else a second run of one process keeps the first's precision
    has_gpu = torch.accelerator.is_available()
    try:
        made = Accelerator(cpu=not has_gpu, mixed_precision=how.mixed_precision)
    except ValueError as e:
        raise BadInput(f"mixed_precision {how.mixed_precision!r} cannot be had here: {e}") from None
    made.gradient_accumulation_steps = 1  # `Session.step` does it, whatever the launcher says
    if made.mixed_precision == "fp16" and made.device.type == "cpu":
        raise BadInput(
            "mixed_precision 'fp16' needs a GPU, for it scales the loss. Use bf16 or no."
        )
    if made.distributed_type == DistributedType.FSDP and not made.is_fsdp2:
        raise BadInput("FSDP needs fsdp_version: 2 in accelerate's config; version 1 was asked.")
    return made


def _output(unet: Any, sample: Tensor, timestep: Tensor, rows: Rows) -> Tensor:
    added = {k: rows[k] for k in ADDED if k in rows} or None
    text = rows["encoder_hidden_states"]
    guidance = rows.get("timestep_cond")
    output: Tensor = unet(
        sample, timestep, text, timestep_cond=guidance, added_cond_kwargs=added, return_dict=False
    )[0]
    return output
