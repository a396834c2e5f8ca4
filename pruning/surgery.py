"""Drop layers for real and write a diffusers folder that loads without this package.

A stock config is used where that can say what is gone (`expressible`), otherwise the class file
`laptop_unet_v1.py` goes with the weights (`trust_remote_code=True`). The plan of a preset says what
the stock config is, and which weights go where.
"""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusers import UNet2DConditionModel
from torch import nn

from laptop import models
from laptop.errors import BadInput
from laptop.pruning.expressible import build, stock_config, without
from laptop.pruning.plan import read_plan
from laptop.run import Overwrite, need_space, read_json, run_stage, write_json

SHARD = "2GB"  # safetensors copies all tensors of a file before it writes it


def prune_unet(unet: Any, names: Sequence[str]) -> Any:
    """A U-Net without the layers `names`; it shares the surviving weights with `unet`."""
    if not names:
        return unet
    weights = dict(unet.state_dict())
    config = stock_config(unet, names)
    student = build(UNet2DConditionModel, config) if config else without(unet, names)
    student.load_state_dict({name: weights[name] for name in student.state_dict()}, assign=True)
    return student.train(unet.training)


def transplant(
    unet: UNet2DConditionModel, config: Mapping[str, Any], rename: Mapping[str, str]
) -> UNet2DConditionModel:
    """A stock U-Net of `unet`'s config changed by `config`; it shares its weights with `unet`.

    `rename` maps module paths of the new U-Net to those of `unet` where they differ. Raises
    `BadInput` for a tensor that `unet` lacks or has in another shape.
    """
    student = build(UNet2DConditionModel, {**unet.config, **config})
    weights, taken = dict(unet.state_dict()), {}
    for name, tensor in student.state_dict().items():
        source = source_of(name, rename)
        if source not in weights or weights[source].shape != tensor.shape:
            found = list(weights[source].shape) if source in weights else "missing"
            raise BadInput(
                f"the plan fills {name} {list(tensor.shape)} from {source}, which is {found} in "
                "this model. Make the plan from this model."
            )
        taken[name] = weights[source]
    student.load_state_dict(taken, assign=True)
    return student.train(unet.training)


def source_of(name: str, rename: Mapping[str, str]) -> str:
    """Where the tensor `name` comes from; of several renamed modules around it, the innermost."""
    path = name
    while path:
        path = path.rpartition(".")[0]
        if path in rename:
            return rename[path] + name[len(path) :]
    return name


def apply_plan(unet: Any, plan: Mapping[str, Any]) -> Any:
    """The student of a plan.json's content; it shares its weights with `unet`."""
    if "preset" in plan:
        return transplant(unet, plan["config"], plan["rename"])
    return prune_unet(unet, plan["remove"])


def prune(model: str, plan_path: Path, out: Path, *, overwrite: Overwrite = False) -> Path:
    """Write `model` without the plan's layers as a diffusers folder with the teacher's dtype."""
    teacher = models.empty_unet(model)
    plan = read_plan(plan_path, teacher)
    apply_plan(teacher, plan)  # what does not fit is refused before any weight is read
    inputs, settings = models.identity("model", model)

    def work(folder: Path) -> dict[str, Any]:
        student = apply_plan(models.load_unet(model, models.stored_dtype(model)), plan)
        write_model(folder, student, model)
        return {"unet_class": type(student).__name__, "removed": len(plan["remove"])}

    inputs["plan"] = plan_path
    return run_stage("prune", out, settings, inputs, work, overwrite=overwrite)


def write_model(folder: Path, unet: Any, like: str) -> None:
    """Write `unet`, in the stored precision of the model `like`, with all its other components."""
    source, dtype = models.folder(like), models.stored_dtype(like)
    index = read_json(source / "model_index.json")
    parts = [k for k, v in index.items() if isinstance(v, list) and v[0] and k != "unet"]
    files = [f for part in parts for f in (source / part).rglob("*") if f.is_file()]
    need_space(
        folder, sum(f.stat().st_size for f in files) + dtype.itemsize * unet.num_parameters()
    )
    for part in parts:
        shutil.copytree(source / part, folder / part, dirs_exist_ok=True)
    # Not unet.to(): diffusers' own warns of modules to be kept in float32 even when there are none.
    nn.Module.to(unet, dtype).save_pretrained(
        folder / "unet", max_shard_size=SHARD, variant=models.variant(like)
    )
    library = "diffusers" if type(unet).__name__ in models.STOCK_UNETS else type(unet).__module__
    write_json(folder / "model_index.json", index | {"unet": [library, type(unet).__name__]})
