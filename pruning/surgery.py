"""Drop layers for real and write a diffusers folder that loads without this package.

A stock `UNet2DConditionModel` config is used when the model built from it has exactly the surviving
weights under their own names; that is so when each transformer loses only its last blocks and the
depths fit diffusers' nested lists. Otherwise the class file `laptop_unet_v1.py` goes with the
weights (`trust_remote_code=True`).
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from safetensors import safe_open
from torch import nn

from laptop import models
from laptop.pruning.plan import read_plan
from laptop.run import Overwrite, need_space, read_json, run_stage, write_json


def prune_unet(unet: UNet2DConditionModel, names: Sequence[str]) -> UNet2DConditionModel:
    """A U-Net without the layers `names`; it shares the surviving weights with `unet`."""
    if not names:
        return unet
    weights = dict(unet.state_dict())
    gone = [*unet.config.get("removed", []), *names]
    student = _build(models.shipped_unet_class(), {**unet.config, "removed": gone})
    kept = set(student.state_dict())
    if "removed" not in unet.config and (config := _stock_config(unet, names)):
        stock = _build(UNet2DConditionModel, config)
        if set(stock.state_dict()) == kept:
            student = stock
    student.load_state_dict({name: weights[name] for name in kept}, assign=True)
    return student.train(unet.training)


def _build(cls: Any, config: dict[str, Any]) -> Any:
    """A U-Net without memory for its weights, from every value in `config`."""
    config.pop("_use_default_values", None)  # diffusers would ignore what stands for these keys
    with torch.device("meta"):
        return cls.from_config(config)


def _stock_config(unet: UNet2DConditionModel, names: Sequence[str]) -> dict[str, Any] | None:
    """The stock config with the depths that would remain, or None if only depths will not do."""
    if not all(".transformer_blocks." in name for name in names):
        return None

    def depths(blocks: Any) -> list[Any]:
        levels: list[Any] = []
        for block in blocks:
            left = [
                sum(f"{path}.{i}" not in gone for i in range(len(t.transformer_blocks)))
                for t in getattr(block, "attentions", [])
                if (path := f"{where[t]}.transformer_blocks")
            ]
            levels.append(left or 1)
        return levels

    gone, where = set(names), {m: name for name, m in unet.named_modules()}
    return {
        **unet.config,
        "transformer_layers_per_block": depths(unet.down_blocks),
        "reverse_transformer_layers_per_block": depths(unet.up_blocks),
    }


def prune(model: str, plan_path: Path, out: Path, *, overwrite: Overwrite = False) -> Path:
    """Write `model` without the plan's layers as a diffusers folder with the teacher's dtype."""
    plan = read_plan(plan_path, models.empty_unet(model))
    inputs, settings = models.identity("model", model)

    def work(folder: Path) -> dict[str, Any]:
        student = prune_unet(models.load_unet(model), plan["remove"])
        write_model(folder, student, model)
        return {"unet_class": type(student).__name__, "removed": len(plan["remove"])}

    inputs["plan"] = plan_path
    return run_stage("prune", out, settings, inputs, work, overwrite=overwrite)


def write_model(folder: Path, unet: Any, like: str) -> None:
    """Write `unet`, in the stored precision of the model `like`, with all its other components."""
    where = models.locate(like)
    source = Path(where) if Path(where).is_dir() else Path(DiffusionPipeline.download(where))
    dtype = stored_dtype(source)
    index = read_json(source / "model_index.json")
    parts = [k for k, v in index.items() if isinstance(v, list) and v[0] and k != "unet"]
    files = [f for part in parts for f in (source / part).rglob("*") if f.is_file()]
    need_space(
        folder, sum(f.stat().st_size for f in files) + dtype.itemsize * unet.num_parameters()
    )
    for part in parts:
        shutil.copytree(source / part, folder / part, dirs_exist_ok=True)
    # Not unet.to(): diffusers' own warns of modules to be kept in float32 even when there are none.
    nn.Module.to(unet, dtype).save_pretrained(folder / "unet")
    library = "diffusers" if type(unet) is UNet2DConditionModel else type(unet).__module__
    write_json(folder / "model_index.json", index | {"unet": [library, type(unet).__name__]})


def stored_dtype(folder: Path) -> torch.dtype:
    """Precision in which the U-Net of a diffusers folder is stored."""
    path = min((folder / "unet").glob("*.safetensors"), default=None)
    if path is None:
        return torch.float32
    with safe_open(path, framework="pt") as file:
        dtype: torch.dtype = file.get_tensor(next(iter(file.keys()))).dtype
    return dtype
