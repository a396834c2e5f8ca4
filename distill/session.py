"""The state of a distillation, and its training step.

The same code runs on one GPU, several, several machines and the CPU, through accelerate.
"""

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed.checkpoint.state_dict as states
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, gather_object
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from laptop.distill import checkpoint
from laptop.distill.batches import Batch, Batches
from laptop.distill.checkpoint import Tensors, TrainingState
from laptop.distill.divergence import Diverged, RunningLoss, explain
from laptop.distill.ema import Average
from laptop.distill.features import Features, module_pairs
from laptop.distill.log_lines import TERMS, LogLine, log_line
from laptop.distill.losses import Terms, distillation_loss, mean_squares
from laptop.distill.optimizer import OPTIMIZERS, learning_rate
from laptop.distill.settings import DistillConfig, TrainConfig
from laptop.errors import BadInput
from laptop.pruning.noising import ContinuousNoising, Noised, Noising
from laptop.pruning.units import ADDED

HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
CALIBRATION_STEPS = 8  # whose teacher features give the norms, with norms = calibration
Inputs = tuple[Tensor, Tensor, dict[str, Tensor]]  # samples, timesteps, conditions by name


class Session:
    """Teacher, student, optimizer and average; `step` by `step`."""

    def __init__(
        self,
        teacher: UNet2DConditionModel,
        student: UNet2DConditionModel,
        noising: Noising | ContinuousNoising,
        batches: Batches,
        config: DistillConfig,
        train_config: TrainConfig,
    ):
        self.config, self.train_config = config, train_config
        self.noising, self.batches = noising, batches
        self.accelerator = accelerator(train_config)
        modules = module_pairs(teacher, student, config.features)
        dtype = HALVES.get(self.accelerator.mixed_precision, torch.float32)
        self.teacher = nn.Module.to(teacher, self.accelerator.device, dtype)
        self.teacher.requires_grad_(False).eval()
        self.raw = student.requires_grad_(True).train()
        self.names = [name for name, _ in student.named_parameters()]
        if train_config.gradient_checkpointing:
            student.enable_gradient_checkpointing()
        self.teacher_features = Features(teacher, {name: name for name in modules})
        self.student_features = Features(student, modules)
        if train_config.compile:
            teacher.compile_repeated_blocks()
            student.compile_repeated_blocks()
        make_optimizer = OPTIMIZERS[train_config.optimizer]
        optimizer = make_optimizer(student.parameters(), config.learning_rate)
        self.student, self.optimizer = self.accelerator.prepare(student, optimizer)
        self.average = None
        if config.ema_decay > 0:
            self.average = Average(self.raw.parameters(), config.ema_decay)
        self.done, self.back_offs, self.running_loss = 0, 0, RunningLoss()
        self.squares: Tensor | None = None
        if config.norms == "calibration":
            self.squares = self._calibrate()

    def step(self, step: int) -> LogLine:
        """Update the student once; returns the losses before the update.

        Raises `Diverged` before a bad gradient can touch the weights.
        """
        torch.manual_seed(self.config.seed + step)  # of dropout, where a model has any
        batches, values = self.batches(step), []
        sizes = [len(batch.ids) for batch in batches]
        norms: dict[str, float] = {}
        for number, batch in enumerate(batches):
            is_last = number == len(batches) - 1
            with contextlib.nullcontext() if is_last else self.accelerator.no_sync(self.student):
                terms = self._terms(batch)
                if number == 0 and self._measures_gradients(step):
                    norms = terms.gradient_norms(self.raw, self.accelerator.scaler)
                values.append(terms.named())
                self.accelerator.backward(terms.loss * (sizes[number] / sum(sizes)))
        means = self._mean(values, sizes)
        parameters = self.raw.parameters()
        norm = float(self.accelerator.clip_grad_norm_(parameters, self.config.max_grad_norm))
        self._check(step, means, norm, batches)
        self._update(step)
        return replace(
            log_line(step, means),
            gradient_norm=norm,
            gradient_norms=norms or None,
            lr=self.learning_rate(step),
        )

    def _update(self, step: int) -> None:
        """Change the weights by the gradients of `step`."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.average:
            self.average.update(self.raw.parameters(), step + 1)
        self.done = step + 1

    def learning_rate(self, step: int) -> float:
        """The learning rate of `step`, halved by each back-off."""
        c = self.config
        return 0.5**self.back_offs * learning_rate(
            step,
            peak=c.learning_rate,
            schedule=c.schedule,
            warmup=c.warmup_steps,
            steps=c.steps,
        )

    def save(self, folder: Path, seconds: float) -> None:
        """Write a checkpoint into `folder`; all processes must call this."""
        scaler = self.accelerator.scaler
        state = TrainingState(
            done=self.done,
            watch=self.running_loss,
            scaler=scaler.state_dict() if scaler else None,
            seconds=seconds,
        )
        checkpoint.save(folder, self.tensors(), state)

    def restore(self, path: Path) -> float:
        """Continue from a checkpoint; returns the seconds that training had taken by then."""
        tensors = self.tensors()
        state = checkpoint.load_(path, tensors)
        states.set_model_state_dict(self.student, tensors["student"])
        states.set_optimizer_state_dict(
            self.student, self.optimizer.optimizer, tensors["optimizer"]
        )
        self.done, self.running_loss = state.done, state.watch
        if self.accelerator.scaler and state.scaler:
            self.accelerator.scaler.load_state_dict(state.scaler)
        return state.seconds

    def result(self) -> dict[str, Tensor]:
        """The weights to ship, whole and on the CPU, in the main process; empty in the others."""
        if self.average:
            self.average.copy_to(self.raw.parameters())
        options = states.StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights = states.get_model_state_dict(self.student, options=options)
        return {name: value for name, value in weights.items() if isinstance(value, Tensor)}

    def tensors(self) -> Tensors:
        """The tensors of a checkpoint; the teacher's are not among them."""
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
        teacher, teacher_maps = self._run_teacher(*inputs)
        self.student_features.collect()
        student = _output(self.student, *inputs)
        squares, sample_weights = self.squares, None
        if squares is None:
            squares = self._mean_of_processes(mean_squares(teacher_maps))
        if c.snr_gamma is not None:
            sample_weights = self.noising.min_snr_weights(noised.snr, c.snr_gamma).to(device)
        return distillation_loss(
            noised.target.to(device),
            student,
            teacher,
            self.student_features.take(),
            teacher_maps,
            weighting=c.weighting,
            weights=(c.task_weight, c.output_weight, c.feature_weight),
            squares=squares,
            sample_weights=sample_weights,
        )

    def _inputs(self, batch: Batch) -> tuple[Noised, Inputs]:
        """The noised batch, and the U-Net's inputs on the device."""
        device = self.accelerator.device
        noised = self.noising(batch.latents, batch.noise, batch.level)
        conditions = {k: v.to(device) for k, v in batch.conditions.items()}
        return noised, (noised.sample.to(device), noised.timestep.to(device), conditions)

    @torch.inference_mode()
    def _run_teacher(
        self, sample: Tensor, timestep: Tensor, conditions: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The teacher's output and feature maps, in its own precision."""
        dtype = self.teacher.dtype
        # A size of 1333 pixels is not in bfloat16; the U-Net embeds sizes before it casts them.
        halves = {k: v if k == "time_ids" else v.to(dtype) for k, v in conditions.items()}
        self.teacher_features.collect()
        output = _output(self.teacher, sample.to(dtype), timestep, halves)
        return output, self.teacher_features.take()

    def _calibrate(self) -> Tensor:
        """Mean squares (L,) of the teacher's maps over the first steps' samples."""
        sums, samples = [], 0
        for batch in (b for step in range(CALIBRATION_STEPS) for b in self.batches(step)):
            _, inputs = self._inputs(batch)
            sums.append(mean_squares(self._run_teacher(*inputs)[1]) * len(batch.ids))
            samples += len(batch.ids)
        return self._mean_of_processes(torch.stack(sums).sum(0) / samples)

    def _mean_of_processes(self, values: Tensor) -> Tensor:
        mean: Tensor = self.accelerator.reduce(values, "mean")
        return mean

    def _mean(
        self, values: Sequence[Mapping[str, Tensor]], sizes: Sequence[int]
    ) -> dict[str, float]:
        """The mean of named values over the samples of micro-batches (of `sizes`) and processes."""
        with torch.no_grad():
            stacked = torch.stack([torch.stack(list(v.values())) for v in values])
            weights = stacked.new_tensor(sizes) / sum(sizes)
            mean = self._mean_of_processes((stacked * weights[:, None]).sum(0)).tolist()
        return dict(zip(values[0], mean, strict=True))

    def _measures_gradients(self, step: int) -> bool:
        every = self.train_config.shares_every
        is_sharded = self.accelerator.distributed_type == DistributedType.FSDP
        return every > 0 and step % every == 0 and not is_sharded

    def _check(
        self, step: int, means: Mapping[str, float], norm: float, batches: Sequence[Batch]
    ) -> None:
        """Raise `Diverged` unless loss and gradient are finite and the loss has not run away."""
        loss = means["loss"]
        # With a scaler, gradients that overflow are skipped, and the scale is lowered.
        is_finite = math.isfinite(loss) and (self.accelerator.scaler or math.isfinite(norm))
        if is_finite:
            self.running_loss = self.running_loss.after(loss)
            if not self.running_loss.has_run_away(self.train_config.runaway):
                return
        self.optimizer.zero_grad()
        values = {k: means[k] for k in TERMS} | {"gradient_norm": norm}
        # Every process comes here, since the loss is the mean over all.
        bad = gather_object([name for batch in batches for name in batch.not_finite()])
        ids = gather_object([name for batch in batches for name in batch.ids])
        raise Diverged(explain(step, values, bad or ids, bool(bad)))


def accelerator(config: TrainConfig) -> Accelerator:
    """accelerate's `Accelerator`, on a GPU if there is one; `BadInput` for what cannot run here."""
    AcceleratorState._reset_state()  # else a second run of one process keeps the first's precision
    has_gpu = torch.accelerator.is_available()
    try:
        accelerator = Accelerator(cpu=not has_gpu, mixed_precision=config.mixed_precision)
    except ValueError as e:
        raise BadInput(
            f"mixed_precision {config.mixed_precision!r} is not available here: {e}"
        ) from None
    accelerator.gradient_accumulation_steps = 1  # `Session.step` does it, whatever is configured
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise BadInput(
            "mixed_precision 'fp16' needs a GPU, for it scales the loss. Use bf16 or no."
        )
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise BadInput("FSDP needs fsdp_version: 2 in accelerate's config, which says version 1.")
    return accelerator


def _output(
    unet: UNet2DConditionModel, sample: Tensor, timestep: Tensor, conditions: Mapping[str, Tensor]
) -> Tensor:
    added = {k: conditions[k] for k in ADDED if k in conditions} or None
    text = conditions["encoder_hidden_states"]
    guidance = conditions.get("timestep_cond")
    output: Tensor = unet(
        sample, timestep, text, timestep_cond=guidance, added_cond_kwargs=added, return_dict=False
    )[0]
    return output
