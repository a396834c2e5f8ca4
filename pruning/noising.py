"""Noised latents, and what a U-Net should predict of them: noise, velocity or flow.

noise     x_t = sqrt(a) x + sqrt(1 - a) e          target e                        (DDPM)
velocity  the same x_t                             sqrt(a) e - sqrt(1 - a) x       (2202.00512)
flow      x_t = (1 - s) x + s e                    e - x                           (2210.02747)
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from diffusers import DDPMScheduler
from torch import Tensor

from laptop import models
from laptop.errors import BadInput

KINDS = ("epsilon", "v_prediction", "flow_prediction")


@dataclass(frozen=True)
class Noised:
    """A batch as the U-Net sees it, and what it should say."""

    sample: Tensor  # (B, C, h, w)
    timestep: Tensor  # (B,)
    target: Tensor  # (B, C, h, w)
    snr: Tensor  # (B,) signal-to-noise ratio, of powers; 0 is pure noise


class Noising:
    """How a model's scheduler adds noise; `BadInput` for a kind of prediction that is unknown."""

    def __init__(self, config: Mapping[str, Any]):
        self.kind = config.get("prediction_type", "epsilon")
        if self.kind not in KINDS:
            raise BadInput(
                f"the scheduler predicts {self.kind!r}; known are {', '.join(KINDS)}. Set "
                "prediction_type in scheduler/scheduler_config.json."
            )
        self.levels: int = config.get("num_train_timesteps", 1000)
        self.shift: float = config.get("flow_shift", 1.0)
        if self.kind != "flow_prediction":
            self.schedule = DDPMScheduler.from_config(dict(config))

    def __call__(self, latents: Tensor, noise: Tensor, level: Tensor) -> Noised:
        """Latents (B, C, h, w) with `noise`, at noise levels (B,) from 0 to `levels` - 1."""
        if self.kind == "flow_prediction":
            return self._flow(latents, noise, level)
        noisy = self.schedule.add_noise(latents, noise, level)
        target = noise
        if self.kind == "v_prediction":
            target = self.schedule.get_velocity(latents, noise, level)
        a = self.schedule.alphas_cumprod[level]
        return Noised(noisy, level, target, a / (1 - a))

    def _flow(self, latents: Tensor, noise: Tensor, level: Tensor) -> Noised:
        """As diffusers' `use_flow_sigmas`: the timestep is the share of noise, in thousandths."""
        share = (level + 1) / self.levels
        share = self.shift * share / (1 + (self.shift - 1) * share)
        s = share.reshape(-1, 1, 1, 1)
        noisy = (1 - s) * latents + s * noise
        return Noised(noisy, share * self.levels, noise - latents, ((1 - share) / share).square())

    def min_snr_weights(self, snr: Tensor, gamma: float) -> Tensor:
        """Weights (B,) of squared errors: min(SNR, gamma) in the picture (2303.09556)."""
        if self.kind == "epsilon":
            return (gamma / snr).clamp(max=1)
        share = 1 / (1 + snr) if self.kind == "v_prediction" else 1 / (1 + snr.sqrt()).square()
        return snr.clamp(max=gamma) * share

    def picture_errors(self, timestep: Tensor) -> Tensor:
        """How much a unit squared error of the output is worth in the predicted picture (N,)."""
        if self.kind == "flow_prediction":
            return (timestep / self.levels).square()
        a: Tensor = self.schedule.alphas_cumprod[timestep.long()]
        return (1 - a) / a if self.kind == "epsilon" else 1 - a


def of_model(model: str) -> Noising:
    """That of the scheduler of `model`."""
    return Noising(DDPMScheduler.load_config(models.locate(model), subfolder="scheduler"))
