"""Noise and targets against their formulas in float64, and against diffusers' own schedulers."""

import pytest
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler

from laptop.errors import BadInput
from laptop.pruning.noising import KINDS, Noising

G = torch.Generator().manual_seed(0)
LATENTS, NOISE = torch.randn(2, 5, 4, 8, 8, generator=G)
LEVEL = torch.tensor([0, 10, 400, 900, 999])


def config(kind: str, **more: object) -> dict[str, object]:
    return {**DDPMScheduler(beta_schedule="scaled_linear").config, "prediction_type": kind, **more}


def wide(values: torch.Tensor) -> torch.Tensor:
    return values.double()[:, None, None, None]


@pytest.mark.parametrize("kind", KINDS)
def test_a_target_is_what_gives_the_latents_back(kind: str) -> None:
    noised = Noising(config(kind))(LATENTS, NOISE, LEVEL)
    snr = noised.snr.double()
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
        "flow_prediction": 1 / (1 + snr.sqrt()).square(),
    }[kind]
    assert torch.allclose(noising.picture_errors(noised.timestep), wanted, rtol=1e-4)


def test_an_unknown_kind_of_prediction_is_refused_with_the_known_ones() -> None:
    with pytest.raises(BadInput, match="'sample'; known are epsilon, v_prediction, flow"):
        Noising(config("sample"))
