"""Calibration samples: what the U-Net is really given while the teacher draws pictures.

Random tensors would score layers by what they do to noise; the expectation in the paper's criterion
runs over latents, timesteps and conditionings of sampling trajectories.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

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
