"""Noise and targets against their formulas in float64, and against diffusers' own schedulers."""

from typing import Any

import pytest
import torch
from diffusers import (
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
)

from laptop.errors import Unsupported
from laptop.pruning.noising import KINDS, Noising, noising

G = torch.Generator().manual_seed(0)
LATENTS, NOISE = torch.randn(2, 5, 4, 8, 8, generator=G)
LEVEL = torch.tensor([0, 10, 400, 900, 999])


def config(kind: str, **more: object) -> dict[str, object]:
    return stated(DDPMScheduler(beta_schedule="scaled_linear")) | {"prediction_type": kind, **more}


def stated(scheduler: Any) -> dict[str, Any]:
    return {"_class_name": type(scheduler).__name__, **scheduler.config}


def wide(values: torch.Tensor) -> torch.Tensor:
    return values.double()[:, None, None, None]


@pytest.mark.parametrize("kind", KINDS)
def test_a_target_is_what_gives_the_latents_back(kind: str) -> None:
    noised = Noising(config(kind))(LATENTS, NOISE, LEVEL)
    snr = noised.snr.double()
    if kind == "sample":
        assert torch.equal(noised.target, LATENTS)
        return
    x, y = noised.sample.double(), noised.target.double()
    if kind == "flow_prediction":
        share = wide(1 / (1 + snr.sqrt()))
        found = x - share * y
    else:
        a = wide(snr / (1 + snr))
        found = (x - (1 - a).sqrt() * y) / a.sqrt()
        if kind == "v_prediction":
            found = a.sqrt() * x - (1 - a).sqrt() * y
    assert torch.allclose(found, LATENTS.double(), atol=2e-3)


def test_flow_noises_as_diffusers_samples() -> None:
    """The sampler's own pairs of timestep and sigma are levels of the training."""
    sampler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    sampler.set_timesteps(999)  # whose shares of noise are thousandths
    noising = Noising(sampler.config)
    zeros = torch.zeros(999, 1, 1, 1)
    noised = noising(zeros, torch.ones_like(zeros), torch.arange(999))
    sigmas = noised.sample.flatten().flip(0)  # of pure noise, its share is what is seen
    assert torch.allclose(sigmas, sampler.sigmas[:999].float(), atol=1e-5)
    assert torch.allclose(noised.timestep.flip(0).floor(), sampler.timesteps.float(), atol=1)


def test_min_snr_weights_follow_their_paper() -> None:
    """Hang et al., section 3.4: min(SNR, 5) / SNR for noise, min(SNR, 5) / (SNR + 1) for v."""
    snr = Noising(config("epsilon"))(LATENTS, NOISE, LEVEL).snr
    capped = snr.clamp(max=5)
    assert torch.allclose(Noising(config("epsilon")).min_snr_weights(snr, 5), capped / snr)
    assert torch.allclose(
        Noising(config("v_prediction")).min_snr_weights(snr, 5), capped / (1 + snr)
    )
    nothing = torch.zeros(1)  # of a schedule whose last step is pure noise
    assert Noising(config("epsilon")).min_snr_weights(nothing, 5) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_picture_errors_are_what_an_error_does_to_the_predicted_picture(kind: str) -> None:
    noising = Noising(config(kind))
    noised = noising(LATENTS, NOISE, LEVEL)
    snr = noised.snr
    wanted = {
        "epsilon": 1 / snr,
        "v_prediction": 1 / (1 + snr),
        "sample": torch.ones_like(snr),
        "flow_prediction": 1 / (1 + snr.sqrt()).square(),
    }[kind]
    assert torch.allclose(noising.picture_errors(noised.timestep), wanted, rtol=1e-4)


CONTINUOUS = {
    "edm epsilon": EDMEulerScheduler(sigma_schedule="exponential", sigma_min=0.01),
    "edm v": EDMEulerScheduler(prediction_type="v_prediction", sigma_data=1.0),
    "edm solver": EDMDPMSolverMultistepScheduler(),
    "euler": EulerDiscreteScheduler(
        prediction_type="v_prediction", timestep_type="continuous", beta_schedule="scaled_linear"
    ),
    "euler of its own sigmas": EulerDiscreteScheduler(
        prediction_type="v_prediction", timestep_type="continuous", beta_schedule="scaled_linear",
        use_karras_sigmas=True, sigma_min=0.01, sigma_max=80.0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CONTINUOUS)
def test_a_scheduler_with_continuous_time_takes_the_target_for_the_picture(name: str) -> None:
    """Its own step to sigma 0, from the training's sample and target, ends at the latents."""
    noise = noising(stated(CONTINUOUS[name]))
    levels = torch.tensor([noise.levels // 5, noise.levels // 2, noise.levels - 1])
    noised = noise(LATENTS[:3], NOISE[:3], levels)
    for i, level in enumerate(levels.tolist()):
        sampler = type(CONTINUOUS[name]).from_config(CONTINUOUS[name].config)
        sampler.set_timesteps(noise.levels)
        nearest = int((sampler.timesteps - noised.timestep[i]).abs().argmin())
        assert torch.isclose(sampler.timesteps[nearest].float(), noised.timestep[i], atol=2e-3)
        sampler.timesteps = sampler.timesteps[nearest : nearest + 1]
        sampler.sigmas = torch.tensor([float(noise.sigmas[level]), 0.0])
        sampler.num_inference_steps = 1
        noisy = LATENTS[i] + noise.sigmas[level] * NOISE[i]
        scaled = sampler.scale_model_input(noisy, sampler.timesteps[0])
        assert torch.allclose(scaled, noised.sample[i], atol=1e-4)
        drawn = sampler.step(noised.target[i], sampler.timesteps[0], noisy).prev_sample
        assert torch.allclose(drawn, LATENTS[i], atol=2e-3 * max(1, float(noise.sigmas[level])))


@pytest.mark.parametrize("name", CONTINUOUS)
def test_errors_of_a_continuous_model_weigh_what_they_do_to_the_picture(name: str) -> None:
    noise = noising(stated(CONTINUOUS[name]))
    level = torch.tensor([noise.levels // 2])
    noised = noise(LATENTS[:1], NOISE[:1], level)
    sigma, d = noise.sigmas[level], noise.data
    worth = (sigma * d) ** 2 / (sigma**2 + d**2)
    assert torch.allclose(noise.picture_errors(noised.timestep), worth, rtol=1e-3)
    assert torch.allclose(noise.min_snr_weights(noised.snr, 1e9), noised.snr * worth / d**2)


def test_a_schedule_that_ends_in_pure_noise_has_no_infinite_weight() -> None:
    """With `rescale_betas_zero_snr` nothing of the picture is left at the last time."""
    for kind in ("epsilon", "v_prediction", "sample"):
        noise = noising(config(kind, rescale_betas_zero_snr=True))
        noised = noise(LATENTS, NOISE, LEVEL)
        assert float(noised.snr[-1]) == 0
        assert noise.picture_errors(LEVEL).isfinite().all()
        assert noise.min_snr_weights(noised.snr, 5).isfinite().all()


def test_betas_that_are_the_defaults_of_the_models_scheduler_are_not_those_of_another() -> None:
    """LCMScheduler's defaults are Stable Diffusion's betas, DDPMScheduler's are not."""
    model = LCMScheduler()
    noise = noising(stated(model))
    assert torch.equal(noise.schedule.alphas_cumprod, model.alphas_cumprod)


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (config("epsilom"), "'epsilom'; known are epsilon, v_prediction, sample, flow"),
        (stated(EDMEulerScheduler()) | {"prediction_type": "sample"},
         "'sample'; known are epsilon, v_prediction"),
        (config("flow_prediction"), "flow_prediction and use_flow_sigmas go together"),
        (stated(DPMSolverMultistepScheduler(use_flow_sigmas=True)), "go together"),
        (stated(HeunDiscreteScheduler(beta_schedule="exp")), "beta_schedule 'exp', which"),
        (stated(FlowMatchEulerDiscreteScheduler()), "FlowMatchEulerDiscreteScheduler adds noise"),
    ],
)  # fmt: skip
def test_noise_that_is_not_known_is_refused_with_the_known_kinds(scheduler, message: str) -> None:
    with pytest.raises(Unsupported, match=message):
        noising(scheduler)
