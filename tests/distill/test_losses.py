"""The distillation loss against its formula in float64."""

import pytest
import torch
import torch.nn.functional as F

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
        "unit-norm": None,
    }[weighting]
    if alpha is None:
        return {
            k: float(2 - 2 * F.cosine_similarity(student[k].double(), t.double()).mean())
            for k, t in teacher.items()
        }
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


def test_tokens_and_maps_are_normalized_over_their_channels() -> None:
    maps_, tokens = torch.randn(2, 2, 5, 4, 4)
    maps_of = {"a": maps_}, {"a": tokens}
    tokens_of = tuple({"a": m["a"].flatten(2).mT} for m in maps_of)
    zeros = torch.zeros(1)
    found = [
        distillation_loss(zeros, zeros, zeros, *pair, weighting="unit-norm", weights=(1, 1, 1))
        for pair in (maps_of, tokens_of)
    ]
    assert float(found[0].feature) == pytest.approx(float(found[1].feature), rel=1e-5)


def test_samples_are_weighed_in_the_task_and_output_terms_only() -> None:
    target, student, teacher = torch.randn(3, 2, 4, 8, 8)
    weight = torch.tensor([2.0, 0.0])
    terms = distillation_loss(
        *(target, student, teacher), maps(0), maps(1),
        weighting="none", weights=(1, 1, 1), sample_weights=weight,
    )  # fmt: skip
    assert float(terms.task) == pytest.approx(float((student - target)[0].square().mean()))
    assert float(terms.output) == pytest.approx(float((student - teacher)[0].square().mean()))
    assert float(terms.feature) == pytest.approx(sum(formula("none", maps(0), maps(1)).values()))


def test_given_norms_take_the_place_of_the_batch_s() -> None:
    squares = torch.tensor([1.0, 4.0, 9.0])
    zeros = torch.zeros(1)
    terms = distillation_loss(
        *(zeros, zeros, zeros), maps(0), maps(1),
        weighting="relative", weights=(0, 0, 1), squares=squares,
    )  # fmt: skip
    assert [float(a) for a in terms.alphas.values()] == pytest.approx([1, 1 / 4, 1 / 9])
    assert [float(n) for n in terms.norms.values()] == pytest.approx([1, 2, 3])


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_what_the_teacher_computed_in_inference_mode_gives_gradients(weighting: str) -> None:
    student = {k: v.requires_grad_() for k, v in maps(0).items()}
    out = torch.randn(2, 4, 8, 8, requires_grad=True)
    with torch.inference_mode():
        teacher, teacher_out = maps(1), torch.randn(2, 4, 8, 8)
    terms = distillation_loss(
        torch.zeros(2, 4, 8, 8), out, teacher_out, student, teacher,
        weighting=weighting, weights=(1, 1, 1),
    )  # fmt: skip
    terms.loss.backward()
    assert all(v.grad.abs().sum() > 0 for v in (out, *student.values()))


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
