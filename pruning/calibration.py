"""Calibration samples: what the U-Net is really given while the teacher draws pictures.

Random tensors would score layers by what they do to noise; the expectation in the paper's criterion
runs over latents, timesteps and conditionings of sampling trajectories.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from laptop.console import track
from laptop.errors import BadInput
from laptop.files import reason, shown
from laptop.models.description import of_pipeline
from laptop.models.stored_weights import header
from laptop.pruning.noising import noising
from laptop.pruning.sampling import draw, starts
from laptop.pruning.sampling_config import Sampling
from laptop.pruning.units import ADDED, example_inputs, forward_rows

INPUTS = ("sample", "timestep", "encoder_hidden_states", "text_embeds", "time_ids", "timestep_cond")
TOLERANCE = 1e-3  # of the mean squared output: most error of a model on rows recorded with it
REMEDY = "Pass what `laptop score` made of this model."


def record(
    pipe: Any,
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
    given = starts(pipe, batches, sampling, generator)
    total = len(prompts) * _rows_each(pipe, batches[0], sampling, given[0])
    if samples > total:
        raise BadInput(
            f"{samples} calibration samples asked; {len(prompts)} prompts give {total} at "
            f"{sampling.steps} steps. Lower the samples, or give more prompts."
        )
    chosen = torch.randperm(total, generator=generator)[:samples].sort().values
    rows: list[dict[str, Tensor]] = []
    seen = 0

    def keep(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal seen
        values = _inputs(args, kwargs)
        count = len(values["sample"])
        wanted = chosen[(chosen >= seen) & (chosen < seen + count)] - seen
        rows.append({k: v.float().cpu()[wanted] for k, v in values.items()})
        seen += count

    hook = pipe.unet.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        for batch, start in track(zip(batches, given, strict=True), "calibration", len(batches)):
            draw(pipe, batch, sampling, generator, start)
    finally:
        hook.remove()
    if seen != total:
        raise RuntimeError(f"sampling made {seen} U-Net rows where {total} were expected")
    return {k: torch.cat([row[k] for row in rows]) for k in rows[0]}


def _inputs(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors that a U-Net was called with, by `INPUTS`, each with a row a sample."""
    values: dict[str, Any] = {**dict(zip(INPUTS, args, strict=False)), **kwargs}
    values |= values.get("added_cond_kwargs") or {}
    values["timestep"] = torch.as_tensor(values["timestep"]).expand(len(values["sample"]))
    return {k: values[k] for k in INPUTS if values.get(k) is not None}


def _rows_each(
    pipe: Any, batch: Sequence[str], sampling: Sampling, given: Mapping[str, Any]
) -> int:
    """Rows that the U-Net sees for each prompt; found by drawing with one that computes nothing.

    Guidance, strength and schedulers of higher order all have a say in it.
    """
    seen = 0

    def count(sample: Tensor, *_args: Any, return_dict: bool = True, **_kwargs: Any) -> Any:
        nonlocal seen
        seen += len(sample)
        nothing = sample.new_zeros(len(sample), pipe.unet.config.out_channels, *sample.shape[2:])
        return UNet2DConditionOutput(sample=nothing) if return_dict else (nothing,)

    pipe.unet.forward = count
    try:
        draw(pipe, batch, sampling, torch.Generator().manual_seed(0), given)
    finally:
        del pipe.unet.forward
    return seen // len(batch)


def denoising(
    pipe: Any,
    prompts: Sequence[str],
    sampling: Sampling,
    *,
    samples: int,
    seed: int,
    batch_size: int,
) -> tuple[dict[str, Tensor], Tensor]:
    """Training rows without training pictures: the teacher's own latents, noised; and the targets.

    Keys as `INPUTS`, first dimension `samples`, timesteps drawn evenly; target (samples, C, H, W).
    """
    generator = torch.Generator().manual_seed(seed)
    latents: list[Tensor] = []
    rows: list[dict[str, Tensor]] = []
    size = max(1, batch_size // sampling.rows)
    batches = [list(prompts[i : i + size]) for i in range(0, len(prompts), size)]
    given = starts(pipe, batches, sampling, generator)

    def keep(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if len(rows) == len(latents):  # the first call of this batch
            values = _inputs(args, kwargs)
            rows.append({k: v.float().cpu()[-count:] for k, v in values.items() if k != "timestep"})

    hook = pipe.unet.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        for batch, start in track(zip(batches, given, strict=True), "denoising", len(batches)):
            count = len(batch)
            latents.append(draw(pipe, batch, sampling, generator, start).float().cpu())
    finally:
        hook.remove()
    picked = torch.arange(samples) % len(prompts)
    clean = torch.cat(latents)[picked]
    noise = noising(of_pipeline(pipe).scheduler)
    level = torch.randint(noise.levels, (samples,), generator=generator)
    noised = noise(clean, torch.randn(clean.shape, generator=generator), level)
    conditions = {k: torch.cat([row[k] for row in rows])[picked] for k in rows[0]}
    beside = conditions.pop("sample")[:, clean.shape[1] :]  # an inpainting model's mask and picture
    noisy = torch.cat([noised.sample, beside], 1)
    return {"sample": noisy, "timestep": noised.timestep.float(), **conditions}, noised.target


def check_rows(unet: Any, rows: Mapping[str, Tensor], output: Tensor, what: str) -> None:
    """Raise `BadInput` unless `unet`, which may be empty, takes such rows and gives such output."""
    example = example_inputs(unet.config, 1)
    example |= example.pop("added_cond_kwargs", {})
    wanted = _widths(example) | {"output": unet.config.out_channels}
    found = _widths({**rows, "output": output})
    if found != wanted:
        raise BadInput(
            f"{what} was recorded with another model: channels {found} where this one has "
            f"{wanted}. {REMEDY}"
        )
    counts = {len(v) for v in (*rows.values(), output)}
    if len(counts) != 1 or not min(counts):
        raise BadInput(f"{what} has {sorted(counts)} rows by tensor; it is broken. {REMEDY}")


def _widths(tensors: Mapping[str, Tensor]) -> dict[str, int | None]:
    """Channels of (B, C, H, W), (B, T, C) and (B, C); None for scalars and what XL joins anyway."""
    return {
        k: v.shape[1 if v.ndim == 4 else -1] if v.ndim > 1 and k not in ADDED else None
        for k, v in tensors.items()
    }


def check_output(
    unet: nn.Module, rows: Mapping[str, Tensor], output: Tensor, batch_size: int, what: str
) -> None:
    """Raise `BadInput` unless `unet` gives the recorded output on the first rows."""
    first = {k: v[:batch_size] for k, v in rows.items()}
    recorded = output[:batch_size]
    error = (forward_rows(unet, first, batch_size) - recorded).square().mean()
    share = float(error / recorded.square().mean())
    if not share <= TOLERANCE:  # nan is in no range
        raise BadInput(
            f"{what} was recorded with another model: the output of this one is off by {share:.1e} "
            f"of the recorded mean square ({TOLERANCE:g} is allowed). {REMEDY}"
        )


def save(path: Path, rows: dict[str, Tensor], output: Tensor) -> None:
    """Write rows and the original U-Net's output (`output`) as one safetensors file.

    Raises `BadInput` for values that are not finite.
    """
    if bad := [k for k, v in (rows | {"output": output}).items() if not v.isfinite().all()]:
        raise BadInput(
            f"the model computes values that are not finite while it draws ({', '.join(bad)}). Its "
            "weights or its noise schedule are damaged, or its values exceed half precision: "
            "score in another dtype, or fetch the model again."
        )
    save_file({k: v.contiguous() for k, v in (rows | {"output": output}).items()}, path)


def load(path: Path) -> tuple[dict[str, Tensor], Tensor]:
    """Rows and the original U-Net's output; `BadInput` when the file is missing or damaged."""
    again = "Run `laptop score` again."
    header(path)  # refuses what is no ordinary file of tensors
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as e:
        raise BadInput(f"{path} cannot be read ({reason(e)}). {again}") from None
    if missing := {"sample", "timestep", "output"} - tensors.keys():
        raise BadInput(f"{path} holds no {min(missing)!r}. {again}")
    if unknown := tensors.keys() - {*INPUTS, "output"}:
        raise BadInput(f"{path} holds {shown(min(unknown))}, which no U-Net takes. {again}")
    for name, value in tensors.items():
        if not value.is_floating_point() or not value.ndim or not value.isfinite().all():
            raise BadInput(f"{path}: {name} is not made of rows of finite numbers. {again}")
    output = tensors.pop("output")
    return tensors, output
