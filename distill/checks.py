"""Refusals of a distillation that settings and configs reveal, before any expensive step."""

from laptop.console import say
from laptop.distill.settings import DistillConfig
from laptop.errors import BadInput
from laptop.models import loading, locating
from laptop.models.shapes import native_size, text_width
from laptop.processes import count

PAIRED = (
    "in_channels", "out_channels", "sample_size", "addition_embed_type",
    "encoder_hid_dim", "encoder_hid_dim_type", "time_cond_proj_dim",
)  # fmt: skip


def check_batch(config: DistillConfig) -> None:
    """Raise `BadInput` unless the processes can take equally many samples of a batch."""
    if config.batch_size % count():
        raise BadInput(
            f"batch_size {config.batch_size} cannot be shared by {count()} processes. It is the "
            "batch of all together: choose a multiple of their number."
        )


def check_smaller(teacher: str, student: str) -> None:
    """Raise `BadInput` for a student that is its teacher or larger; report one of equal size."""
    if locating.locate(student) == locating.locate(teacher):
        raise BadInput(f"{student} is student and teacher. Pass the pruned model as the student.")
    more = _params(student) - _params(teacher)
    if more > 0:
        raise BadInput(
            f"{student} has {more:,} parameters more than {teacher}: a student is pruned from its "
            "teacher. Are they the wrong way round?"
        )
    if more == 0:
        say(f"distill: {student} has as many parameters as {teacher}: nothing was pruned.")


def _params(model: str) -> int:
    return sum(p.numel() for p in loading.empty_unet(model).parameters())


def check_pair(teacher: str, student: str) -> None:
    """Raise `BadInput` unless the student can be a pruned teacher: their blocks must pair."""
    a, b = (locating.unet_config(model) for model in (teacher, student))
    levels = len(b["down_block_types"])  # innermost ones may be gone
    for key in ("block_out_channels", "down_block_types"):
        a[key], b[key] = list(a[key][:levels]), list(b[key])
    a["up_block_types"], b["up_block_types"] = a["up_block_types"][-levels:], b["up_block_types"]
    for config in (a, b):  # one value or one for each level may mean the same
        config |= {"sample_size": native_size(config), "width of text": text_width(config)}
    by_level = ("block_out_channels", "down_block_types", "up_block_types")
    unlike = [key for key in (*by_level, *PAIRED, "width of text") if a.get(key) != b.get(key)]
    if unlike:
        key = unlike[0]
        raise BadInput(
            f"{student} is no pruned {teacher}: its {key} is {b.get(key)}, needed {a.get(key)}."
        )
