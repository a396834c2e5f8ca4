"""Hand-made architectures as plans, in the file format of scored ones; they are in `layouts`."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diffusers import UNet2DConditionModel
from torch import nn

from laptop.files import write_json
from laptop.models import loading, locating
from laptop.models.description import context_length
from laptop.pruning.layouts import PRESETS, changes, check_layout
from laptop.pruning.plan_file import SCHEMA
from laptop.pruning.surgery import source_of, transplant
from laptop.pruning.units import anatomy, blocks
from laptop.run import Overwrite, run_stage


def make_preset_plan(model: str, name: str, out: Path, *, overwrite: Overwrite = False) -> Path:
    """Write plan.json for the preset `name` of `model`; reads configs only, no weights."""
    folders, which = locating.identity("model", model)
    configs = {role: folder / "unet" / "config.json" for role, folder in folders.items()}
    teacher, tokens = loading.empty_unet(model), context_length(model)

    def work(folder: Path) -> None:
        write_json(folder / out.name, {"model": model} | preset_plan(teacher, name, tokens))

    settings = {"model": model, "preset": name, "tokens": tokens} | which
    return run_stage("plan", out, settings, configs, work, overwrite=overwrite)


def preset_plan(teacher: UNet2DConditionModel, name: str, tokens: int = 77) -> dict[str, Any]:
    """The content of a plan.json for the preset `name`, but for the model's name.

    `teacher` may be on the meta device. Raises `BadInput` when its layout is another one.
    """
    check_layout(teacher, name)
    config, rename = changes(teacher.config, name), dict(PRESETS[name].rename)
    student = transplant(teacher, config, rename)
    kept = {source_of(tensor, rename) for tensor in student.state_dict()}
    before, after = anatomy(teacher, tokens), anatomy(student, tokens)
    return {
        "schema": SCHEMA,
        "preset": name,
        "budget": {},
        "solver": None,
        "remove": list(gone(teacher, kept)),
        "params": {"before": before.params, "after": after.params},
        "macs": {"before": before.macs, "after": after.macs},
        "predicted_loss": None,
        "measured_loss": None,
        "stock_config": True,
        "config": config,
        "rename": rename,
    }


def gone(teacher: nn.Module, kept: set[str]) -> Iterator[str]:
    """The outermost modules of which no tensor is in `kept`, as they run; lists do not count."""
    for block_name, block in blocks(teacher).items():
        last = None
        for name, module in block.named_modules(prefix=block_name):
            if isinstance(module, nn.ModuleList) or (last and name.startswith(f"{last}.")):
                continue
            tensors = {f"{name}.{tensor}" for tensor in module.state_dict()}
            if tensors and not tensors & kept:
                last = name
                yield name
