"""The distillation loss (paper, section 3.3) and the weightings of its feature terms.

    L = w_task * L_task + w_output * L_out + w_feature * sum_l alpha_l * L_l
    L_task = E||target - out_S||^2    L_out = E||out_T - out_S||^2    L_l = E||f_T^l - f_S^l||^2

with means over all elements, in float32. Without normalization (alpha = 1) a few blocks with large
features dominate the sum; the weightings take alpha from the teacher's features, per batch.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

FLOOR = 1e-8  # of a mean square, so that a dead feature map cannot divide by zero

# From the mean square of each teacher feature map (L,) to alpha (L,).
WEIGHTINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": torch.ones_like,  # BK-SDM's loss
    "relative": lambda square: 1 / square,
    "relative-scaled": lambda square: square.mean() / square,
    "norm-ratio": lambda square: square.sqrt().sum() / square.sqrt(),
}


@dataclass(frozen=True)
class Terms:
    """One batch's loss, whole and in parts; the parts are unweighted means, scalars."""

    loss: Tensor
    task: Tensor
    output: Tensor
    feature: Tensor  # sum of alpha_l * L_l
    features: dict[str, Tensor]  # alpha_l * L_l by block

    def as_floats(self) -> dict[str, float | dict[str, float]]:
        """For the log."""
        named = {k: float(getattr(self, k).detach()) for k in ("loss", "task", "output", "feature")}
        return {**named, "features": {k: float(v.detach()) for k, v in self.features.items()}}


def distillation_loss(
    target: Tensor,
    student: Tensor,
    teacher: Tensor,
    student_features: Mapping[str, Tensor],
    teacher_features: Mapping[str, Tensor],
    *,
    weighting: str,
    weights: tuple[float, float, float],
) -> Terms:
    """All terms; `target`, `student`, `teacher` (B, C, H, W), `weights` (task, output, feature)."""
    task = F.mse_loss(student.float(), target.float())
    output = F.mse_loss(student.float(), teacher.float())
    square = torch.stack([f.detach().float().square().mean() for f in teacher_features.values()])
    alphas = WEIGHTINGS[weighting](square.clamp_min(FLOOR))
    features = {
        name: alpha * F.mse_loss(student_features[name].float(), f.detach().float())
        for alpha, (name, f) in zip(alphas, teacher_features.items(), strict=True)
    }
    feature = torch.stack(list(features.values())).sum()
    loss = weights[0] * task + weights[1] * output + weights[2] * feature
    return Terms(loss, task, output, feature, features)
