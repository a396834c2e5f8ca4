"""Calibration samples: inputs that the U-Net gets while the teacher draws pictures.

Random tensors would score layers by what they do to noise; the expectation in the paper's criterion
runs over latents, timesteps and conditionings of sampling trajectories.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from laptop.console import track
from laptop.errors import BadInput
from laptop.files import reason, shown, whole
from laptop.models.description import of_pipeline
from laptop.models.stored_weights import header
from laptop.pruning.noising import noising
from laptop.pruning.sampling import Start, draw, starts
from laptop.pruning.sampling_config import Sampling
from laptop.pruning.units import ADDED, example_inputs, forward_rows

CALIBRATION = "calibration.safetensors"  # in the folder of scores
INPUTS = ("sample", "timestep", "encoder_hidden_states", "text_embeds", "time_ids", "timestep_cond")
TOLERANCE = 1e-3  # of the mean squared output: most error of a model on rows recorded with it
REMEDY = "Pass what `laptop score` made of this model."
AGAIN = "Run `laptop score` again."


@dataclass(frozen=True)
class Calibration:
    """Rows of U-Net inputs, and the output that is wanted on them; one safetensors file.

    Of a score stage, `output` is what the original U-Net computes.
    """

    rows: Mapping[str, Tensor]  # by `INPUTS`, (N, …), float32
    output: Tensor  # (N, C, H, W)
    batch_size: int = 1  # rows of one forward

    @classmethod
    def read(cls, path: Path, batch_size: int = 1) -> Self:
        """The samples in a file; `BadInput` when it is missing or damaged."""
        header(path)  # refuses what is no ordinary file of tensors
        try:
            tensors = load_file(path)
        except (OSError, SafetensorError) as e:
            raise BadInput(f"{path} cannot be read ({reason(e)}). {AGAIN}") from None
        if missing := {"sample", "timestep", "output"} - tensors.keys():
            raise BadInput(f"{path} holds no {min(missing)!r}. {AGAIN}")
        if unknown := tensors.keys() - {*INPUTS, "output"}:
            raise BadInput(f"{path} holds {shown(min(unknown))}, which no U-Net takes. {AGAIN}")
        for name, value in tensors.items():
            if not value.is_floating_point() or not value.ndim or not value.isfinite().all():
                raise BadInput(f"{path}: {name} is not made of rows of finite numbers. {AGAIN}")
        output = tensors.pop("output")
        return cls(tensors, output, batch_size)

    def write(self, path: Path) -> None:
        """Write the file, whole or not at all; `BadInput` for values that are not finite."""
        tensors = {**self.rows, "output": self.output}
        if bad := [k for k, v in tensors.items() if not v.isfinite().all()]:
            raise BadInput(
                f"the model computes values that are not finite while it draws ({', '.join(bad)}). "
                "Its weights or its noise schedule are damaged, or its values exceed half "
                "precision: score in another dtype, or fetch the model again."
            )
        with whole(path) as unfinished:
            save_file({k: v.contiguous() for k, v in tensors.items()}, unfinished)

    def part(self, index: Tensor | slice) -> "Calibration":
        """Some of the samples."""
        rows = {k: v[index] for k, v in self.rows.items()}
        return Calibration(rows, self.output[index], self.batch_size)

    def batches(self) -> Iterator["Calibration"]:
        """All samples, `batch_size` at a time."""
        for start in range(0, len(self.output), self.batch_size):
            yield self.part(slice(start, start + self.batch_size))

    def forward(self, unet: nn.Module) -> Tensor:
        """The output of `unet` on the rows (N, C, H, W), float32."""
        return forward_rows(unet, self.rows, self.batch_size)

    def loss(self, unet: nn.Module) -> float:
        """Mean squared error of the output of `unet`."""
        return float((self.forward(unet) - self.output).square().mean())

    def check_shapes(self, unet: ModelMixin, where: str) -> None:
        """Raise `BadInput` unless `unet`, which may be empty, has such inputs and outputs."""
        example = example_inputs(unet.config, 1)
        example |= example.pop("added_cond_kwargs", {})
        needed = _widths(example) | {"output": unet.config.out_channels}
        widths = _widths({**self.rows, "output": self.output})
        if widths != needed:
            raise BadInput(
                f"{where} was recorded with another model: channels {widths} where this one has "
                f"{needed}. {REMEDY}"
            )
        counts = {len(v) for v in (*self.rows.values(), self.output)}
        if len(counts) != 1 or not min(counts):
            raise BadInput(f"{where} has {sorted(counts)} rows by tensor; it is broken. {REMEDY}")

    def check_output(self, unet: nn.Module, where: str) -> None:
        """Raise `BadInput` unless `unet` gives the recorded output on the first batch."""
        first = self.part(slice(0, self.batch_size))
        error = first.loss(unet) / float(first.output.square().mean())
        if not error <= TOLERANCE:  # nan is in no range
            raise BadInput(
                f"{where} was recorded with another model: the output of this one is off by "
                f"{error:.1e} of the recorded mean square ({TOLERANCE:g} is allowed). {REMEDY}"
            )


def _widths(tensors: Mapping[str, Tensor]) -> dict[str, int | None]:
    """Channels of (B, C, H, W), (B, T, C) and (B, C); None for scalars and what XL joins anyway."""
    return {
        k: v.shape[1 if v.ndim == 4 else -1] if v.ndim > 1 and k not in ADDED else None
        for k, v in tensors.items()
    }


def record(
    pipe: DiffusionPipeline,
    prompts: Sequence[str],
    sampling: Sampling,
    *,
    samples: int,
    seed: int,
    batch_size: int,
) -> dict[str, Tensor]:
    """`samples` rows of U-Net inputs, drawn evenly from sampling trajectories of all `prompts`.

    Keys as `INPUTS`, as far as the U-Net takes them; first dimension `samples`; float32 on the CPU.
    """
    generator = torch.Generator().manual_seed(seed)
    batches = [list(prompts[i : i + batch_size]) for i in range(0, len(prompts), batch_size)]
    begun = starts(pipe, batches, sampling, generator)
    total = len(prompts) * _rows_each(pipe, batches[0], sampling, begun[0])
    if samples > total:
        raise BadInput(
            f"{samples} calibration samples asked; {len(prompts)} prompts give {total} at "
            f"{sampling.steps} steps. Lower the samples, or give more prompts."
        )
    chosen = torch.randperm(total, generator=generator)[:samples].sort().values
    rows: list[dict[str, Tensor]] = []
    seen = 0

    def keep(inputs: dict[str, Tensor]) -> None:
        nonlocal seen
        count = len(inputs["sample"])
        picked = chosen[(chosen >= seen) & (chosen < seen + count)] - seen
        rows.append({k: v.float().cpu()[picked] for k, v in inputs.items()})
        seen += count

    with recording(pipe.unet, keep):
        for batch, start in track(zip(batches, begun, strict=True), "calibration", len(batches)):
            draw(pipe, batch, sampling, generator, start)
    if seen != total:
        raise RuntimeError(f"sampling made {seen} U-Net rows where {total} were expected")
    return {k: torch.cat([row[k] for row in rows]) for k in rows[0]}


@contextmanager
def recording(unet: nn.Module, note: Callable[[dict[str, Tensor]], None]) -> Iterator[None]:
    """Call `note` with the inputs of each forward of `unet`, by `INPUTS`, a row a sample."""

    def hook(_unet: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        inputs = {**dict(zip(INPUTS, args, strict=False)), **kwargs}
        inputs |= inputs.get("added_cond_kwargs") or {}
        inputs["timestep"] = torch.as_tensor(inputs["timestep"]).expand(len(inputs["sample"]))
        note({k: inputs[k] for k in INPUTS if inputs.get(k) is not None})

    handle = unet.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _rows_each(
    pipe: DiffusionPipeline, batch: Sequence[str], sampling: Sampling, start: Start
) -> int:
    """Rows that the U-Net sees for each prompt, counted by drawing with one that computes nothing.

    It depends on guidance, strength and the order of the scheduler.
    """
    seen = 0

    def count(
        sample: Tensor, *_args: object, return_dict: bool = True, **_kwargs: object
    ) -> UNet2DConditionOutput | tuple[Tensor]:
        nonlocal seen
        seen += len(sample)
        nothing = sample.new_zeros(len(sample), pipe.unet.config.out_channels, *sample.shape[2:])
        return UNet2DConditionOutput(sample=nothing) if return_dict else (nothing,)

    pipe.unet.forward = count
    try:
        draw(pipe, batch, sampling, torch.Generator().manual_seed(0), start)
    finally:
        del pipe.unet.forward
    return seen // len(batch)


def denoising(
    pipe: DiffusionPipeline,
    prompts: Sequence[str],
    sampling: Sampling,
    *,
    samples: int,
    seed: int,
    batch_size: int,
) -> Calibration:
    """Training rows without training pictures: the teacher's own latents, noised; and the targets.

    Timesteps are drawn evenly; the output of the result is the target (samples, C, H, W).
    """
    generator = torch.Generator().manual_seed(seed)
    latents: list[Tensor] = []
    rows: list[dict[str, Tensor]] = []
    size = max(1, batch_size // sampling.rows)
    batches = [list(prompts[i : i + size]) for i in range(0, len(prompts), size)]
    begun = starts(pipe, batches, sampling, generator)

    def keep(inputs: dict[str, Tensor]) -> None:
        if len(rows) == len(latents):  # the first call of this batch
            rows.append({k: v.float().cpu()[-count:] for k, v in inputs.items() if k != "timestep"})

    with recording(pipe.unet, keep):
        for batch, start in track(zip(batches, begun, strict=True), "denoising", len(batches)):
            count = len(batch)
            latents.append(draw(pipe, batch, sampling, generator, start).float().cpu())
    picked = torch.arange(samples) % len(prompts)
    clean = torch.cat(latents)[picked]
    noise = noising(of_pipeline(pipe).scheduler)
    level = torch.randint(noise.levels, (samples,), generator=generator)
    noised = noise(clean, torch.randn(clean.shape, generator=generator), level)
    conditions = {k: torch.cat([row[k] for row in rows])[picked] for k in rows[0]}
    others = conditions.pop("sample")[:, clean.shape[1] :]  # an inpainting model's mask and picture
    noisy = torch.cat([noised.sample, others], 1)
    inputs = {"sample": noisy, "timestep": noised.timestep.float(), **conditions}
    return Calibration(inputs, noised.target, batch_size)
