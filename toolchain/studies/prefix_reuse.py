"""Measure the time that prefix reuse saves.

    python -m laptop.studies.prefix_reuse --model sdxl --latents 16

A known U-Net architecture with seeded random weights and inputs. Each round scores every unit by
plain removal and by one walk, in turns, and compares the losses. Prints one JSON document.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from laptop.console import say
from laptop.machine import machine, peak_memory_bytes
from laptop.models.architectures import UNETS
from laptop.pruning.criteria import walked
from laptop.pruning.score import forwards_spent
from laptop.pruning.scores import Unit
from laptop.pruning.units import anatomy_of, example_inputs, forward_rows, removed

Losses = dict[str, float]


def random_rows(unet: UNet2DConditionModel, samples: int, latents: int) -> dict[str, Tensor]:
    """Calibration rows of the right shapes: normal values, at random timesteps."""
    inputs = example_inputs({**unet.config, "sample_size": latents}, 77, samples)
    rows = inputs | inputs.pop("added_cond_kwargs", {})
    normal = {k: torch.randn(v.shape) for k, v in rows.items()}
    return normal | {"timestep": torch.randint(1000, (samples,))}


def by_plain_removal(
    unet: nn.Module, units: list[Unit], rows: dict[str, Tensor], output: Tensor
) -> Losses:
    """The output loss of each unit, by a whole forward for each."""
    losses: Losses = {}
    for unit in units:
        with removed(unet, [unit.name]):
            changed = forward_rows(unet, rows, len(output))
        losses[unit.name] = float((changed - output).square().mean())
    return losses


def by_walk(unet: nn.Module, units: list[Unit], rows: dict[str, Tensor], output: Tensor) -> Losses:
    """The output loss of each unit, by prefix reuse."""
    losses: Losses = {}

    def note(name: str, before: Tensor, after: Tensor) -> None:
        losses[name] = float((after - before).square().mean())

    walked(unet, units, rows, output, note)
    return losses


def compare(
    model: str, latents: int, samples: int, rounds: int, dtype: torch.dtype
) -> dict[str, object]:
    """Seconds of both ways, their ratio, and the largest relative difference of a loss."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**UNETS[model]).to(dtype).eval()
    anatomy, rows = anatomy_of(unet), random_rows(unet, samples, latents)
    units = [u for u in anatomy.units if not u.needs]
    output = forward_rows(unet, rows, samples)
    ways: dict[str, Callable[..., Losses]] = {"plain": by_plain_removal, "reuse": by_walk}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    difference = 0.0
    for turn in range(rounds):
        losses = {}
        for name, way in ways.items():
            start = time.perf_counter()
            losses[name] = way(unet, units, rows, output)
            seconds[name].append(round(time.perf_counter() - start, 3))
            say(f"round {turn + 1} of {rounds}: {name} {seconds[name][-1]:.1f} s")
        gaps = [abs(a / b - 1) for a, b in zip(*(x.values() for x in losses.values()), strict=True)]
        difference = max(difference, *gaps)
    ratios = [p / r for p, r in zip(seconds["plain"], seconds["reuse"], strict=True)]
    return {
        "model": model,
        "units": len(units),
        "latents": latents,
        "samples": samples,
        "dtype": str(dtype),
        "seconds": seconds,
        "times_faster": statistics.median(ratios),
        "limit": len(units) / forwards_spent(anatomy, units),
        "largest_relative_difference": difference,
        "peak_memory_bytes": peak_memory_bytes(),
        **machine(),
    }


def main() -> None:
    """Print the comparison as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=UNETS, default="sd15")
    parser.add_argument("--latents", type=int, default=16, help="height and width")
    parser.add_argument("--samples", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    arguments = parser.parse_args()
    dtype = getattr(torch, arguments.dtype)
    sizes = arguments.latents, arguments.samples, arguments.rounds
    print(json.dumps(compare(arguments.model, *sizes, dtype), indent=1))


if __name__ == "__main__":
    main()
