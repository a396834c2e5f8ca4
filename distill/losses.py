"""The distillation loss (paper, section 3.3) and the weightings of its feature terms.

    L = w_task * L_task + w_output * L_out + w_feature * sum_l alpha_l * L_l
    L_task = E||target - out_S||^2    L_out = E||out_T - out_S||^2    L_l = E||f_T^l - f_S^l||^2

with means over all elements, in float32. Without normalization (alpha = 1) a few blocks with large
features dominate the sum; the weightings take alpha from the teacher's features.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from laptop.distill.log_lines import BY_MODULE, TERMS

FLOOR = 1e-8  # of a mean square, so that a dead feature map cannot divide by zero
UNIT_NORM = "unit-norm"  # both maps are divided by their own norms at each pixel; alpha is 1

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
    """One batch's loss, whole and in parts: scalars, the parts without their weights."""

    loss: Tensor
    task: Tensor
    output: Tensor
    feature: Tensor  # sum of alpha_l * L_l
    features: dict[str, Tensor]  # alpha_l * L_l by the teacher's module, as are those below
    alphas: dict[str, Tensor]
    norms: dict[str, Tensor]  # root mean square of the teacher's maps
    weights: tuple[float, float, float]  # of task, output, feature

    def weighed(self) -> dict[str, Tensor]:
        """The summands of the loss: task, output, and the feature term of each module."""
        task, output, feature = self.weights
        terms = {"task": task * self.task, "output": output * self.output}
        return terms | {name: feature * term for name, term in self.features.items()}

    def named(self) -> dict[str, Tensor]:
        """All values for the log, by "loss", "task", ... and "features/down_blocks.0", ..."""
        values = {name: getattr(self, name) for name in TERMS}
        for group in BY_MODULE:
            values |= {f"{group}/{module}": v for module, v in getattr(self, group).items()}
        return values

    def gradient_norms(
        self, student: nn.Module, scaler: torch.amp.GradScaler | None = None
    ) -> dict[str, float]:
        """The L2 norm of the gradient that each weighed term alone would give, by term.

        With a `scaler`, gradients are computed at its scale.
        """
        scale = scaler.get_scale() if scaler else 1.0
        parameters, norms = list(student.parameters()), {}
        for name, term in self.weighed().items():
            gradients = torch.autograd.grad(
                term * scale, parameters, retain_graph=True, allow_unused=True
            )
            squares = [g.float().square().sum() for g in gradients if g is not None]
            norms[name] = float(torch.stack(squares).sum().sqrt()) / scale
        return norms


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
    sample_weights: Tensor | None = None,
) -> Terms:
    """Compute all terms of outputs (B, C, H, W) and feature maps; `weights` are as in `Terms`.

    `squares` (L,) are the mean squares of the teacher's maps from which alpha is computed; None
    takes this batch's. `sample_weights` (B,) weigh samples in the task and output terms, as SNR
    weighting does. The teacher's tensors may be inference tensors.
    """
    task = _mean_square(student, target, sample_weights)
    output = _mean_square(student, teacher, sample_weights)
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
    """The mean square (L,) of each map, in float32, at least `FLOOR`."""
    with torch.no_grad():
        return torch.stack([f.float().square().mean() for f in features.values()]).clamp_min(FLOOR)


def _mean_square(student: Tensor, teacher: Tensor, sample_weights: Tensor | None = None) -> Tensor:
    """The mean squared difference, in float32.

    `square` keeps the difference for its gradient, never the teacher's tensor.
    """
    square = (student.float() - teacher.float()).square()
    if sample_weights is None:
        return square.mean()
    return (square.flatten(1).mean(1) * sample_weights).mean()


def _unit_norm(student: Tensor, teacher: Tensor) -> Tensor:
    """The mean over pixels or tokens of the squared distance between the maps' directions."""
    with torch.no_grad():
        target = _directions(teacher)
    return (_directions(student) - target).square().sum(_channels(student)).mean()


def _directions(features: Tensor) -> Tensor:
    vectors = features.float()
    square = vectors.square().sum(_channels(features), keepdim=True)
    return vectors / square.clamp_min(FLOOR).sqrt()


def _channels(features: Tensor) -> int:
    """The dimension of channels: maps are (B, C, H, W), tokens (B, T, C)."""
    return 1 if features.ndim == 4 else -1
