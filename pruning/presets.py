"""Presets: hand-made architectures, each as changes of its teacher and as a plan.json.

A preset holds the changes of the teacher's stock config, and the sources of the student's
weights. Only the layout of blocks counts: fine-tunes, other widths and other inputs fit.

- BK-SDM (arXiv 2305.15798): which weights go where is what its authors' code does
  (Nota-NetsPresso/BK-SDM, `copy_weight_from_teacher`).
- SSD-1B (arXiv 2401.02677): its authors do not publish which blocks stayed. A third party found, by
  comparing weights, numbers 1, 2, 3 and 7 of ten, number 1 of two and the first of the middle's
  resnets (furusu/SSD-1B-anime). That counts from one, so blocks 0, 1, 2 and 6 stay here.
- Segmind-Vega and KOALA (arXiv 2312.04005): the first blocks of a transformer stay, and of three
  layers in an up block the first and the last, as in BK-SDM. What the authors did is not
  published: this is our choice.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import torch
from diffusers import ModelMixin, UNet2DConditionModel
from torch import nn

from laptop.errors import BadInput
from laptop.files import reason, shown
from laptop.models import loading, locating
from laptop.models.architectures import UNETS
from laptop.models.component_classes import Config
from laptop.models.description import context_length
from laptop.pruning.expressible import build
from laptop.pruning.plan_file import CostChange, Plan
from laptop.pruning.units import anatomy_of, blocks
from laptop.run import Overwrite, run_stage

LAYOUT = (
    "down_block_types", "mid_block_type", "up_block_types", "layers_per_block",
    "transformer_layers_per_block", "reverse_transformer_layers_per_block",
)  # fmt: skip
BY_LEVEL = (
    "block_out_channels", "attention_head_dim", "cross_attention_dim", "only_cross_attention",
    "transformer_layers_per_block",
)  # fmt: skip
RESNETS, PAIRS = ("resnets",), ("resnets", "attentions")


@dataclass(frozen=True)
class Preset:
    """A hand-made architecture; modules that `rename` leaves out keep the paths of the teacher."""

    teacher: str  # a name in UNETS; any U-Net of its layout fits
    config: Config  # what the student's stock config changes
    rename: Mapping[str, str] = field(default_factory=dict)  # the student's path: the teacher's


def _ends(up_blocks: Sequence[tuple[str, ...]], first: int = 0) -> dict[str, str]:
    """The first and the last of three layers stay in up blocks with these kinds of layers.

    The student's first up block is its teacher's up block `first`.
    """
    rename: dict[str, str] = {}
    for i, kinds in enumerate(up_blocks):
        student, teacher = f"up_blocks.{i}", f"up_blocks.{i + first}"
        rename |= {student: teacher} if first else {}
        rename |= {f"{student}.{kind}.1": f"{teacher}.{kind}.2" for kind in kinds}
    return rename


BK = _ends([RESNETS, PAIRS, PAIRS, PAIRS])
KOALA = _ends([PAIRS, PAIRS, RESNETS])
SSD_1B = {
    f"{block}.attentions.{i}.transformer_blocks.3": f"{block}.attentions.{i}.transformer_blocks.6"
    for block in ("down_blocks.2", "up_blocks.0")
    for i in (0, 1)
}
PRESETS = {
    "bk-base": Preset("sd15", {"layers_per_block": 1}, BK),
    "bk-small": Preset("sd15", {"layers_per_block": 1, "mid_block_type": None}, BK),
    "bk-tiny": Preset(
        "sd15",
        {
            "layers_per_block": 1,
            "mid_block_type": None,
            "down_block_types": ["CrossAttnDownBlock2D"] * 3,
            "up_block_types": ["CrossAttnUpBlock2D"] * 3,
        },
        _ends([PAIRS, PAIRS, PAIRS], first=1),
    ),
    "ssd-1b": Preset(
        "sdxl",
        {
            "mid_block_type": "UNetMidBlock2D",  # one resnet
            "transformer_layers_per_block": [1, [2, 2], [4, 4]],
            "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1],
        },
        SSD_1B,
    ),
    "segmind-vega": Preset(
        "sdxl",
        {
            "mid_block_type": "UNetMidBlock2D",
            "transformer_layers_per_block": [1, [1, 1], [2, 2]],
            "reverse_transformer_layers_per_block": [[2, 2, 2], [1, 1, 1], 1],
        },
    ),
    "koala-1b": Preset(
        "sdxl", {"layers_per_block": 1, "transformer_layers_per_block": [1, 2, 6]}, KOALA
    ),
    "koala-700m": Preset(
        "sdxl",
        {
            "layers_per_block": 1,
            "mid_block_type": None,
            "transformer_layers_per_block": [1, 2, 5],
        },
        KOALA,
    ),
}


def changes(config: Config, name: str) -> dict[str, object]:
    """The changes of the teacher's config; lists by level lose the levels that are gone."""
    changed = dict(PRESETS[name].config)
    levels = len({**config, **changed}["down_block_types"])
    for key in BY_LEVEL:
        value = config[key]
        if key not in changed and isinstance(value, list | tuple) and len(value) > levels:
            changed[key] = list(value[:levels])
    return changed


def check_layout(unet: ModelMixin, name: str) -> None:
    """Raise `BadInput` unless `unet` has the blocks of the teacher that the preset is made for."""
    if unet.config.get("removed"):
        raise BadInput(
            f"--preset {name} needs a whole U-Net; {len(unet.config['removed'])} layers of this "
            "one are removed already. Pass the model that it was pruned from."
        )
    own, needed = layout(unet.config), _layout_of(PRESETS[name].teacher)
    if wrong := [key for key in LAYOUT if own[key] != needed[key]]:
        fitting = [n for n, preset in PRESETS.items() if _layout_of(preset.teacher) == own]
        advice = (
            f"For this model: {', '.join(fitting)}."
            if fitting
            else "No preset is made for this model: score it, and plan with a budget."
        )
        raise BadInput(
            f"--preset {name} needs the blocks of {PRESETS[name].teacher}: {wrong[0]} is "
            f"{own[wrong[0]]}; needed is {needed[wrong[0]]}. {advice}"
        )


def layout(config: Config) -> dict[str, object]:
    """The part of a U-Net's config that lays out its blocks and layers."""
    levels = len(config["down_block_types"])
    parts = {key: config[key] for key in LAYOUT}
    for key in ("layers_per_block", "transformer_layers_per_block"):
        if isinstance(parts[key], int):
            parts[key] = [parts[key]] * levels
    return {k: list(v) if isinstance(v, tuple) else v for k, v in parts.items()}


@cache
def _layout_of(architecture: str) -> dict[str, object]:
    with torch.device("meta"):
        return layout(UNet2DConditionModel(**UNETS[architecture]).config)


def transplant(
    unet: UNet2DConditionModel, config: Config, rename: Mapping[str, str]
) -> UNet2DConditionModel:
    """A stock U-Net of `unet`'s config changed by `config`; it shares its weights with `unet`.

    `rename` maps module paths of the new U-Net to those of `unet` where they differ. Raises
    `BadInput` for a tensor that `unet` lacks or has in another shape.
    """
    try:
        student = build(UNet2DConditionModel, {**unet.config, **config})
    except Exception as e:  # noqa: BLE001 - whatever the config of a foreign plan makes it raise
        raise BadInput(
            f"the plan's config describes no U-Net that can be built: {reason(e)}. Make the plan "
            "again."
        ) from None
    weights, chosen = dict(unet.state_dict()), {}
    for name, tensor in student.state_dict().items():
        source = source_of(name, rename)
        if source not in weights or weights[source].shape != tensor.shape:
            shape = list(weights[source].shape) if source in weights else "missing"
            raise BadInput(
                f"the plan fills {name} {list(tensor.shape)} from {source}, which is {shape} in "
                "this model. Make the plan from this model."
            )
        chosen[name] = weights[source]
    student.load_state_dict(chosen, assign=True)
    return student.train(unet.training)


def source_of(name: str, rename: Mapping[str, str]) -> str:
    """The source of the tensor `name`: the innermost renamed module around it decides."""
    path = name
    while path:
        path = path.rpartition(".")[0]
        if path in rename:
            return rename[path] + name[len(path) :]
    return name


def make_preset_plan(model: str, name: str, out: Path, *, overwrite: Overwrite = False) -> Path:
    """Write plan.json for the preset `name` of `model`; reads configs only, no weights."""
    folders, identity = locating.identity("model", model)
    configs = {role: folder / "unet" / "config.json" for role, folder in folders.items()}
    teacher, tokens = loading.empty_unet(model), context_length(model)

    def work(folder: Path) -> None:
        replace(preset_plan(teacher, name, tokens), model=model).write(folder / out.name)

    settings = {"model": model, "preset": name, "tokens": tokens} | identity
    return run_stage("plan", out, settings, configs, work, overwrite=overwrite)


def preset_plan(teacher: UNet2DConditionModel, name: str, tokens: int = 77) -> Plan:
    """The plan of the preset `name`, without the model's name.

    `teacher` may be on the meta device. Raises `BadInput` when its layout is another one.
    """
    check_layout(teacher, name)
    config, rename = changes(teacher.config, name), dict(PRESETS[name].rename)
    student = transplant(teacher, config, rename)
    kept = {source_of(tensor, rename) for tensor in student.state_dict()}
    before, after = anatomy_of(teacher, tokens), anatomy_of(student, tokens)
    return Plan(
        preset=name,
        remove=tuple(gone(teacher, kept)),
        params=CostChange(before=before.params, after=after.params),
        macs=CostChange(before=before.macs, after=after.macs),
        stock_config=True,
        config=config,
        rename=rename,
    )


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


def check_preset(plan: Plan, name: str, unet: ModelMixin, where: str) -> None:
    """Raise `BadInput` unless a plan changes what the preset `name` changes in this U-Net."""
    if name not in PRESETS:
        raise BadInput(f"{where}: preset {shown(name)} is unknown; known are {', '.join(PRESETS)}.")
    if plan.config is None or plan.rename is None:
        raise BadInput(
            f"{where} lacks the preset's 'config' or 'rename'; it is no whole plan.json."
        )
    check_layout(unet, name)
    for key, needed in (("config", changes(unet.config, name)), ("rename", PRESETS[name].rename)):
        if getattr(plan, key) != needed:
            raise BadInput(
                f"{where}: {key} is not what the preset {name} changes in this model. It was "
                "edited, or made by another version. Make the plan again."
            )
