"""What cannot be trained with, found from settings and configs before any expensive step."""

import math
from collections.abc import Collection
from dataclasses import asdict

from laptop import models
from laptop.distill.features import PLACES
from laptop.distill.losses import WEIGHTINGS
from laptop.distill.optimizer import OPTIMIZERS, SCHEDULES
from laptop.distill.session import DistillConfig, TrainConfig
from laptop.errors import BadInput
from laptop.processes import count

CHOICES: dict[str, Collection[str | None]] = {
    "weighting": WEIGHTINGS,
    "features": PLACES,
    "schedule": SCHEDULES,
    "norms": ("batch", "calibration"),
    "optimizer": OPTIMIZERS,
    "mixed_precision": (None, "no", "bf16", "fp16"),
}
AT_LEAST = {
    **dict.fromkeys(("steps", "batch_size", "micro_batch", "checkpoint_every", "log_every"), 1),
    **dict.fromkeys(("warmup_steps", "shares_every", "back_offs", "seed"), 0),
    **dict.fromkeys(("task_weight", "output_weight", "feature_weight"), 0),
    **dict.fromkeys(("drop_caption", "ema_decay"), 0),
}
ABOVE = {"learning_rate": 0, "max_grad_norm": 0, "snr_gamma": 0, "runaway": 1}
AT_MOST = {"drop_caption": 1, "seed": 2**63 - 1}
BELOW = {"ema_decay": 1}
PAIRED = (
    "in_channels", "out_channels", "sample_size", "cross_attention_dim", "addition_embed_type",
    "encoder_hid_dim", "encoder_hid_dim_type", "time_cond_proj_dim",
)  # fmt: skip


def check_config(config: DistillConfig, how: TrainConfig) -> None:
    """Raise `BadInput` for settings that cannot be trained with."""
    given = asdict(config) | asdict(how)
    for name, known in CHOICES.items():
        if given[name] not in known:
            choices = ", ".join(k for k in known if k is not None)
            raise BadInput(f"{name} {given[name]!r} is unknown; known are {choices}.")
    for name, value in given.items():
        if isinstance(value, int | float):
            _check_number(name, value)
    if not config.task_weight + config.output_weight + config.feature_weight:
        raise BadInput("task_weight, output_weight and feature_weight are all 0: one must not be.")
    if config.batch_size % count():
        raise BadInput(
            f"batch_size {config.batch_size} cannot be shared by {count()} processes. It is the "
            "batch of all together: choose a multiple of their number."
        )


def _check_number(name: str, value: float) -> None:
    if not math.isfinite(value):
        raise BadInput(f"{name} must be a number, not {value}.")
    for limits, word, holds in (
        (AT_LEAST, "at least", value >= AT_LEAST.get(name, value)),
        (ABOVE, "above", value > ABOVE.get(name, -math.inf)),
        (AT_MOST, "at most", value <= AT_MOST.get(name, value)),
        (BELOW, "below", value < BELOW.get(name, math.inf)),
    ):
        if not holds:
            raise BadInput(f"{name} must be {word} {limits[name]}, not {value}.")


def check_pair(teacher: str, student: str) -> None:
    """Raise `BadInput` unless the student can be a pruned teacher: their blocks must pair."""
    a, b = (models.unet_config(model) for model in (teacher, student))
    levels = len(b["down_block_types"])  # innermost ones may be gone
    for key in ("block_out_channels", "down_block_types"):
        a[key], b[key] = list(a[key][:levels]), list(b[key])
    a["up_block_types"], b["up_block_types"] = a["up_block_types"][-levels:], b["up_block_types"]
    by_level = ("block_out_channels", "down_block_types", "up_block_types")
    unlike = [key for key in (*by_level, *PAIRED) if a.get(key) != b.get(key)]
    if unlike:
        key = unlike[0]
        raise BadInput(
            f"{student} is no pruned {teacher}: its {key} is {b.get(key)}, needed {a.get(key)}."
        )
