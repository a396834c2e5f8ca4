"""The distillation loss against its formula in float64."""

import pytest
import torch

from laptop.distill.losses import WEIGHTINGS, distillation_loss

SHAPES = {"a": (2, 3, 8, 8), "b": (2, 5, 4, 4), "c": (2, 7, 2, 2)}
SCALES = {"a": 0.1, "b": 1.0, "c": 30.0}


def maps(seed: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {k: SCALES[k] * torch.randn(s, generator=g) for k, s in SHAPES.items()}


def formula(weighting: str, student, teacher) -> dict[str, float]:
    """method.md section 4, in float64, with means over elements."""
    square = {k: float(t.double().square().mean()) for k, t in teacher.items()}
    alpha = {
        "none": lambda _: 1.0,
        "relative": lambda k: 1 / square[k],
        "relative-scaled": lambda k: sum(square.values()) / len(square) / square[k],
        "norm-ratio": lambda k: sum(v**0.5 for v in square.values()) / square[k] ** 0.5,
    }[weighting]
    return {
        k: alpha(k) * float((student[k].double() - t.double()).square().mean())
        for k, t in teacher.items()
    }


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_every_weighting_follows_its_formula(weighting: str) -> None:
    student, teacher = maps(0), maps(1)
    out = torch.randn(3, 2, 4, 8, 8)
    terms = distillation_loss(*out, student, teacher, weighting=weighting, weights=(1.0, 0.5, 0.25))
    wanted = formula(weighting, student, teacher)
    for name, value in wanted.items():
        assert float(terms.features[name]) == pytest.approx(value, rel=1e-5)
    task = float((out[0].double() - out[1].double()).square().mean())
    output = float((out[2].double() - out[1].double()).square().mean())
    total = task + 0.5 * output + 0.25 * sum(wanted.values())
    assert float(terms.loss) == pytest.approx(total, rel=1e-5)


def test_normalization_cures_the_imbalance() -> None:
    def largest_share(weighting: str) -> float:
        zeros = torch.zeros(1)
        terms = distillation_loss(
            zeros, zeros, zeros, maps(0), maps(1), weighting=weighting, weights=(1, 1, 1)
        )
        return max(float(v / terms.feature) for v in terms.features.values())

    assert largest_share("none") > 0.99
    assert largest_share("relative") < 0.5


def test_a_dead_teacher_feature_does_not_divide_by_zero() -> None:
    zeros = torch.zeros(2, 3, 4, 4)
    terms = distillation_loss(
        zeros, zeros, zeros, {"a": zeros}, {"a": zeros}, weighting="relative", weights=(1, 1, 1)
    )
    assert float(terms.loss) == 0
