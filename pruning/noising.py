"""Noised latents and the U-Net's targets for them, as the model's scheduler states both.

With x the latents, e the noise, a = alphas_cumprod of a DDPM schedule:

epsilon          x_t = sqrt(a) x + sqrt(1 - a) e   target e                          (DDPM)
v_prediction     the same x_t                      target sqrt(a) e - sqrt(1 - a) x  (2202.00512)
sample           the same x_t                      target x
flow_prediction  x_t = (1 - s) x + s e             target e - x                      (2210.02747)
EDM              x_t = c_in (x + sigma e)          target (x - c_skip (x + sigma e)) / c_out,
                 at the time ln(sigma) / 4                                           (2206.00364)
"""

from dataclasses import dataclass

import diffusers
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from laptop.errors import Unsupported
from laptop.files import shown
from laptop.models.component_classes import Config
from laptop.models.description import describe

KINDS = ("epsilon", "v_prediction", "sample", "flow_prediction")
EDM = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")
LEAST_ALPHA = 2**-24  # of alphas_cumprod where a schedule ends in pure noise; as diffusers' Euler


@dataclass(frozen=True)
class Noised:
    """A noised batch, and what the U-Net should predict for it."""

    sample: Tensor  # (B, C, h, w)
    timestep: Tensor  # (B,)
    target: Tensor  # (B, C, h, w)
    snr: Tensor  # (B,) signal-to-noise ratio, of powers; 0 is pure noise


class Noising:
    """The noise of a scheduler with discrete times, on `levels` levels."""

    def __init__(self, config: Config):
        self.kind = config.get("prediction_type", "epsilon")
        self.levels: int = config.get("num_train_timesteps", 1000)
        self.shift: float = config.get("flow_shift", 1.0)
        if self.kind != "flow_prediction":
            self.schedule = _schedule(config)

    def __call__(self, latents: Tensor, noise: Tensor, level: Tensor) -> Noised:
        """Latents (B, C, h, w) with `noise`, at noise levels (B,) from 0 to `levels` - 1."""
        if self.kind == "flow_prediction":
            return self._flow(latents, noise, level)
        noisy = self.schedule.add_noise(latents, noise, level)
        target = latents if self.kind == "sample" else noise
        if self.kind == "v_prediction":
            target = self.schedule.get_velocity(latents, noise, level)
        a = self.schedule.alphas_cumprod[level]
        return Noised(noisy, level, target, a / (1 - a))

    def _flow(self, latents: Tensor, noise: Tensor, level: Tensor) -> Noised:
        """Noise as diffusers' `use_flow_sigmas`: a timestep is a fraction of noise, x 1000."""
        even = (level + 1) / self.levels
        sigma = self.shift * even / (1 + (self.shift - 1) * even)
        s = _wide(sigma)
        noisy = (1 - s) * latents + s * noise
        return Noised(noisy, sigma * self.levels, noise - latents, ((1 - sigma) / sigma).square())

    def min_snr_weights(self, snr: Tensor, gamma: float) -> Tensor:
        """Weights (B,) of squared errors: min(SNR, gamma) in the picture (2303.09556)."""
        if self.kind == "epsilon":
            return (gamma / snr).clamp(max=1)
        per_snr = {
            "v_prediction": 1 / (1 + snr),
            "sample": torch.ones_like(snr),
            "flow_prediction": 1 / (1 + snr.sqrt()).square(),
        }
        return snr.clamp(max=gamma) * per_snr[self.kind]

    def picture_errors(self, timestep: Tensor) -> Tensor:
        """Squared errors in the predicted picture (N,), for squared errors of 1 in the output."""
        if self.kind == "flow_prediction":
            return (timestep / self.levels).square()
        a: Tensor = self.schedule.alphas_cumprod[timestep.long()].clamp(min=LEAST_ALPHA)
        if self.kind == "sample":
            return torch.ones_like(a)
        return (1 - a) / a if self.kind == "epsilon" else 1 - a


class ContinuousNoising:
    """The noise of a model of Karras et al. (2206.00364, table 1), whose time is ln(sigma) / 4.

    Its levels are the sigmas that its scheduler samples at in `levels` steps, the least one first;
    that they are drawn evenly is our choice. `snr` holds for latents with the deviation `data`.
    """

    def __init__(self, sigmas: Tensor, data: float, sign: int):
        self.sigmas, self.data, self.sign = sigmas, data, sign
        self.levels = len(sigmas)

    def __call__(self, latents: Tensor, noise: Tensor, level: Tensor) -> Noised:
        """Latents (B, C, h, w) with `noise`, at noise levels (B,) from 0 to `levels` - 1."""
        sigma = self.sigmas[level]
        s, data = _wide(sigma), self.data
        noisy, norm = latents + s * noise, (s**2 + data**2).sqrt()
        target = (latents - noisy * data**2 / norm**2) * norm / (self.sign * s * data)
        return Noised(noisy / norm, sigma.log() / 4, target, (data / sigma).square())

    def min_snr_weights(self, snr: Tensor, gamma: float) -> Tensor:
        """Weights (B,) of squared errors: min(SNR, gamma) in the picture, in units of `data`²."""
        return snr.clamp(max=gamma) / (1 + snr)

    def picture_errors(self, timestep: Tensor) -> Tensor:
        """Squared errors in the predicted picture (N,), for squared errors of 1 in the output."""
        sigma = (4 * timestep).exp()
        return (sigma * self.data).square() / (sigma**2 + self.data**2)


def _schedule(config: Config) -> DDPMScheduler:
    try:
        return DDPMScheduler.from_config(dict(config))
    except NotImplementedError:
        raise Unsupported(
            f"the scheduler {config['_class_name']} has beta_schedule "
            f"{shown(config.get('beta_schedule'))}, which diffusers' DDPMScheduler has not, so "
            "noise cannot be added by it. Write its betas into trained_betas in "
            "scheduler/scheduler_config.json."
        ) from None


def noising(config: Config) -> Noising | ContinuousNoising:
    """The noise that a scheduler's config states; `Unsupported` for an unknown kind."""
    # diffusers forgets values that this lists, and takes the defaults of the other class instead
    config = {key: value for key, value in config.items() if key != "_use_default_values"}
    name, kind = config["_class_name"], config.get("prediction_type", "epsilon")
    is_continuous = config.get("timestep_type") == "continuous" and kind == "v_prediction"
    if is_continuous or (name in EDM and kind in ("epsilon", "v_prediction")):
        return _continuous(config)
    if name in EDM or kind not in KINDS:
        kinds = KINDS[:2] if name in EDM else KINDS
        raise Unsupported(
            f"the scheduler {name} has prediction_type {shown(kind)}; known are "
            f"{', '.join(kinds)}. Set it in scheduler/scheduler_config.json to what the model was "
            "trained for."
        )
    if "beta_schedule" not in config:
        raise Unsupported(
            f"the scheduler {name} adds noise in a way that is not known here; known are "
            f"schedulers with a beta_schedule, as DDPM's, and {', '.join(EDM)}."
        )
    if bool(config.get("use_flow_sigmas")) != (kind == "flow_prediction"):
        raise Unsupported(
            f"the scheduler {name} has prediction_type {kind!r} and use_flow_sigmas "
            f"{shown(config.get('use_flow_sigmas'))}: flow_prediction and use_flow_sigmas go "
            "together. Set both in scheduler/scheduler_config.json, or neither."
        )
    return Noising(config)


def _continuous(config: Config) -> ContinuousNoising:
    """The noise of an EDM scheduler, and of an Euler scheduler with continuous times."""
    scheduler = getattr(diffusers, config["_class_name"]).from_config(dict(config))
    scheduler.set_timesteps(scheduler.config.num_train_timesteps)
    sigmas = scheduler.sigmas[: len(scheduler.timesteps)].flip(0).float()
    sign = 1 if scheduler.config.prediction_type == "epsilon" else -1
    return ContinuousNoising(sigmas, scheduler.config.get("sigma_data", 1.0), sign)


def of_model(model: str) -> Noising | ContinuousNoising:
    """The noise that the scheduler of `model` states."""
    return noising(describe(model).scheduler)


def _wide(values: Tensor) -> Tensor:
    """Values (B,), one a sample, in a shape that multiplies latents (B, C, h, w)."""
    return values.reshape(-1, 1, 1, 1)
