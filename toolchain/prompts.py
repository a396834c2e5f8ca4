"""The prompts that a model is calibrated, checked and judged with."""

import itertools
from pathlib import Path

from laptop.distill.sources import LONGEST
from laptop.errors import BadInput
from laptop.files import lines, read_text, shown
from laptop.tiny import draws_scenes

GENERAL = Path(__file__).parent / "prompts.txt"  # our own; for models that draw anything
HELD_OUT = 100  # of them, the last ones, are judged by and never trained on


def read_prompts(path: Path) -> list[str]:
    """One prompt a line; empty lines do not count."""
    try:
        text = read_text(path)
    except BadInput as e:
        raise BadInput(f"the prompts {shown(str(path))[1:-1]} cannot be read: {e}") from None
    prompts = [line.strip() for line in lines(text) if line.strip()]
    if too_long := [prompt for prompt in prompts if len(prompt) > LONGEST]:
        raise BadInput(
            f"{path} holds a prompt of {len(too_long[0]):,} characters; {LONGEST:,} are the most. "
            "Write one a line."
        )
    if not prompts:
        raise BadInput(f"{path} holds no prompt; write one a line.")
    return prompts


def calibration_prompts(model: str, count: int, file: Path | None = None) -> list[str]:
    """Return prompts for calibration and parity: from `file`, or the model's own kind."""
    if file is None and draws_scenes(model):
        from laptop.tiny.scenes import scenes

        return [scene.caption for scene in itertools.islice(scenes(seed=1), count)]
    prompts = read_prompts(file) if file else training_prompts()
    return list(itertools.islice(itertools.cycle(prompts), count))


def training_prompts() -> list[str]:
    """Return our own prompts, for calibration and for training without pictures."""
    return read_prompts(GENERAL)[:-HELD_OUT]


def evaluation_prompts(model: str, count: int, file: Path | None = None) -> list[str]:
    """Return prompts to judge pictures by: from `file`, or ones that training never saw."""
    if file is None and draws_scenes(model):
        from laptop.tiny.scenes import held_out_prompts

        return held_out_prompts(count)
    return (read_prompts(file) if file else read_prompts(GENERAL)[-HELD_OUT:])[:count]
