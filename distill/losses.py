"""The distillation loss (paper, section 3.3) and the weightings of its feature terms.

    L = w_task * L_task + w_output * L_out + w_feature * sum_l alpha_l * L_l
    L_task = E||target - out_S||^2    L_out = E||out_T - out_S||^2    L_l = E||f_T^l - f_S^l||^2

with means over all elements, in float32. Without normalization (alpha = 1) a few blocks with large
features dominate the sum; the weightings take alpha from the teacher's features.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

FLOOR = 1e-8  # of a mean square, so that a dead feature map cannot divide by zero
UNIT_NORM = "unit-norm"  # both maps are divided by their own norms at each place; alpha is 1

# From the mean square of each teacher feature map (L,) to alpha (L,).
WEIGHTINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": torch.ones_like,  # BK-SDM's loss
    "relative": lambda square: 1 / square,
    "relative-scaled": lambda square: square.mean() / square,
    "norm-ratio": lambda square: square.sqrt().sum() / square.sqrt(),
    UNIT_NORM: torch.ones_like,
}


@dataclass(frozen=True)
class Terms:
    """One batch's loss, whole and in parts; the parts are without their weights, scalars."""

    loss: Tensor
    task: Tensor
    output: Tensor
    feature: Tensor  # sum of alpha_l * L_l
    features: dict[str, Tensor]  # alpha_l * L_l by place
    alphas: dict[str, Tensor]
    norms: dict[str, Tensor]  # root mean square of the teacher's maps
    weights: tuple[float, float, float]  # of task, output, feature

    def weighed(self) -> dict[str, Tensor]:
        """The summands of the loss: task, output, and the feature term of each place."""
        task, output, feature = self.weights
        found = {"task": task * self.task, "output": output * self.output}
        return found | {name: feature * term for name, term in self.features.items()}


def distillation_loss(
    target: Tensor,
    student: Tensor,
    teacher: Tensor,
    student_features: Mapping[str, Tensor],
    teacher_features: Mapping[str, Tensor],
    *,
    weighting: str,
    weights: tuple[float, float, float],
    squares: Tensor | None = None,
    of_sample: Tensor | None = None,
) -> Terms:
    """All terms; `target`, `student`, `teacher` (B, C, H, W), `weights` (task, output, feature).

    `squares` (L,) are the mean squares of the teacher's maps that alpha is made of; None takes this
    batch's. `of_sample` (B,) weighs samples in the task and output terms, as SNR weighting does.
    What comes from the teacher may be inference tensors.
    """
    task = _mean_square(student, target, of_sample)
    output = _mean_square(student, teacher, of_sample)
    if squares is None:
        squares = mean_squares(teacher_features)
    alphas = dict(zip(teacher_features, WEIGHTINGS[weighting](squares), strict=True))
    compare = _unit_norm if weighting == UNIT_NORM else _mean_square
    features = {
        name: alpha * compare(student_features[name], teacher_features[name])
        for name, alpha in alphas.items()
    }
    feature = torch.stack(list(features.values())).sum()
    loss = weights[0] * task + weights[1] * output + weights[2] * feature
    norms = dict(zip(teacher_features, squares.sqrt(), strict=True))
    return Terms(loss, task, output, feature, features, alphas, norms, weights)


def mean_squares(features: Mapping[str, Tensor]) -> Tensor:
    """Mean square (L,) of each map, in float32, at least `FLOOR`."""
    with torch.no_grad():
        return torch.stack([f.float().square().mean() for f in features.values()]).clamp_min(FLOOR)


def _mean_square(student: Tensor, teacher: Tensor, of_sample: Tensor | None = None) -> Tensor:
    """In float32. `square` keeps the difference for its gradient, never the teacher's tensor."""
    square = (student.float() - teacher.float()).square()
    return square.mean() if of_sample is None else (square.flatten(1).mean(1) * of_sample).mean()


def _unit_norm(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over places of the squared distance between the maps' directions there."""
    with torch.no_grad():
        wanted = _directions(teacher)
    return (_directions(student) - wanted).square().sum(_channels(student)).mean()


def _directions(features: Tensor) -> Tensor:
    whole = features.float()
    square = whole.square().sum(_channels(features), keepdim=True)
    return whole / square.clamp_min(FLOOR).sqrt()


def _channels(features: Tensor) -> int:
    """Maps are (B, C, H, W), tokens (B, T, C)."""
    return 1 if features.ndim == 4 else -1
