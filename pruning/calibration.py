"""Calibration samples: what the U-Net is really given while the teacher draws pictures.

Random tensors would score layers by what they do to noise; the expectation in the paper's criterion
runs over latents, timesteps and conditionings of sampling trajectories.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from laptop import models
from laptop.errors import BadInput
from laptop.run import track

INPUTS = ("sample", "timestep", "encoder_hidden_states", "text_embeds", "time_ids")


def record(
    pipe: Any, prompts: Sequence[str], *, samples: int, steps: int, seed: int, batch_size: int
) -> dict[str, Tensor]:
    """`samples` rows of U-Net inputs, drawn evenly from guided trajectories of all `prompts`.

    Keys as `INPUTS` (the last two for SDXL only), first dimension `samples`; float32 on the CPU.
    """
    generator = torch.Generator().manual_seed(seed)
    batches = [list(prompts[i : i + batch_size]) for i in range(0, len(prompts), batch_size)]
    guided = 2  # classifier-free guidance evaluates each latent with and without the prompt
    pipe.scheduler.set_timesteps(steps)
    calls = len(pipe.scheduler.timesteps)  # more than `steps` for schedulers of higher order
    total = len(prompts) * calls * guided
    if samples > total:
        raise BadInput(
            f"{samples} calibration samples asked; {len(prompts)} prompts give {total} at {steps} "
            "steps. Lower the samples or raise the steps."
        )
    chosen = torch.randperm(total, generator=generator)[:samples].sort().values
    rows: list[dict[str, Tensor]] = []
    seen = 0

    def keep(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal seen
        values = dict(zip(INPUTS, args, strict=False)) | kwargs
        values |= values.get("added_cond_kwargs") or {}
        count = len(values["sample"])
        wanted = chosen[(chosen >= seen) & (chosen < seen + count)] - seen
        values["timestep"] = torch.as_tensor(values["timestep"]).expand(count)
        rows.append({k: values[k].float().cpu()[wanted] for k in INPUTS if k in values})
        seen += count

    hook = pipe.unet.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        for batch in track(batches, "calibration", len(batches)):
            pipe(batch, num_inference_steps=steps, generator=generator, output_type="latent")
    finally:
        hook.remove()
    if seen != total:
        raise BadInput(
            f"sampling made {seen} U-Net evaluations where {total} were expected; the pipeline "
            "does no classifier-free guidance, which calibration needs in this version."
        )
    return {k: torch.cat([row[k] for row in rows]) for k in rows[0]}


def denoising(
    pipe: Any, prompts: Sequence[str], *, samples: int, steps: int, seed: int, batch_size: int
) -> tuple[dict[str, Tensor], Tensor]:
    """Training rows without training pictures: the teacher's own latents, noised; and the targets.

    Keys as `INPUTS`, first dimension `samples`, timesteps drawn evenly; target (samples, C, H, W).
    """
    generator = torch.Generator().manual_seed(seed)
    latents: list[Tensor] = []
    rows: list[dict[str, Tensor]] = []
    size = max(1, batch_size // 2)  # guidance doubles it

    def keep(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if len(rows) == len(latents):  # the first call of this batch
            values = kwargs | (kwargs.get("added_cond_kwargs") or {})
            rows.append({k: values[k].float()[-count:] for k in INPUTS if k in values})

    hook = pipe.unet.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        for i in track(range(0, len(prompts), size), "denoising", -(-len(prompts) // size)):
            count = len(batch := list(prompts[i : i + size]))
            out = pipe(batch, num_inference_steps=steps, generator=generator, output_type="latent")
            latents.append(out.images.float())
    finally:
        hook.remove()
    picked = torch.arange(samples) % len(prompts)
    clean = torch.cat(latents)[picked]
    schedule = DDPMScheduler.from_config(pipe.scheduler.config)
    t = torch.randint(schedule.config.num_train_timesteps, (samples,), generator=generator)
    noise = torch.randn(clean.shape, generator=generator)
    conditions = {k: torch.cat([row[k] for row in rows])[picked] for k in rows[0]}
    noisy = {"sample": schedule.add_noise(clean, noise, t), "timestep": t.float()}
    return noisy | conditions, target(schedule, clean, noise, t)


def target(schedule: Any, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """What a U-Net should predict from noised latents; `BadInput` for an unknown kind."""
    kind = schedule.config.prediction_type
    if kind == "epsilon":
        return noise
    if kind == "v_prediction":
        velocity: Tensor = schedule.get_velocity(latents, noise, t)
        return velocity
    raise BadInput(f"the scheduler predicts {kind!r}; known: epsilon, v_prediction.")


def picture_errors(model: str, timesteps: Tensor) -> Tensor:
    """How much a unit squared error of the output is worth in the predicted picture, by row (N,).

    The picture follows from x_t and the output: its factor is (1 - a) / a for noise, 1 - a for v,
    with a the cumulated alpha of the timestep.
    """
    schedule = DDPMScheduler.from_pretrained(models.locate(model), subfolder="scheduler")
    a: Tensor = schedule.alphas_cumprod[timesteps.long()]
    if schedule.config.prediction_type == "epsilon":
        return (1 - a) / a
    return 1 - a


def save(path: Path, rows: dict[str, Tensor], output: Tensor) -> None:
    """Write rows and the original U-Net's output (`output`) as one safetensors file."""
    save_file({k: v.contiguous() for k, v in (rows | {"output": output}).items()}, path)


def load(path: Path) -> tuple[dict[str, Tensor], Tensor]:
    """Rows and the original U-Net's output; `BadInput` when the file is missing or cut off."""
    try:
        tensors = load_file(path)
    except (FileNotFoundError, SafetensorError) as e:
        raise BadInput(f"{path} cannot be read ({e}). Run `laptop score` again.") from None
    if "output" not in tensors:
        raise BadInput(f"{path} holds no 'output'. Run `laptop score` again.")
    output = tensors.pop("output")
    return tensors, output
