"""Drop layers for real and write a diffusers folder that loads without this package.

A stock config is used where it can express what is gone (`expressible`), otherwise the class file
`laptop_unet_v1.py` goes with the weights (`trust_remote_code=True`). The plan of a preset holds the
stock config, and which weights go where.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from diffusers import ModelMixin, UNet2DConditionModel

from laptop.errors import BadInput
from laptop.files import copy_folder, files_in, read_json, write_json
from laptop.machine import need_space
from laptop.models import component_classes, loading, locating
from laptop.models.precision import round_to_, stored_dtype, stored_dtypes
from laptop.pruning.calibration import CALIBRATION, Calibration
from laptop.pruning.expressible import build, stock_config
from laptop.pruning.heal import (
    HEALING,
    Correction,
    check_samples,
    fit,
    fold,
    with_corrections,
)
from laptop.pruning.plan_file import Plan
from laptop.pruning.presets import check_preset, transplant
from laptop.pruning.sampling_choice import of_folders
from laptop.pruning.sampling_config import SamplingConfig, of_values, write_file
from laptop.pruning.scores import Scores, scores_file
from laptop.pruning.settings import PruneConfig
from laptop.pruning.units import check_names, check_size
from laptop.run import Overwrite, manifest_of, run_stage

SHARD = "2GB"  # a file: older safetensors copy all of its tensors before they write it


def prune_unet(
    unet: ModelMixin, names: Sequence[str], corrections: Mapping[str, Correction] | None = None
) -> ModelMixin:
    """A U-Net without the layers `names`; it shares the surviving weights with `unet`.

    Corrections are folded into new weights where possible, else they are in the stand-ins.
    """
    if not names:
        return unet
    folded, left = fold(unet, names, corrections or {})
    config = None if left else stock_config(unet, names)
    if config is None:
        student = with_corrections(unet, names, left)
        weights = student.state_dict() | folded
    else:
        student = build(UNet2DConditionModel, config).train(unet.training)
        weights = unet.state_dict() | folded
    student.load_state_dict({name: weights[name] for name in student.state_dict()}, assign=True)
    return student


def apply_plan(
    unet: ModelMixin, plan: Plan, corrections: Mapping[str, Correction] | None = None
) -> ModelMixin:
    """The student of a plan that fits `unet` (`check_plan`); it shares its weights with `unet`."""
    if plan.preset is not None:
        return transplant(unet, plan.config or {}, plan.rename or {})
    return prune_unet(unet, plan.remove, corrections)


def check_plan(plan: Plan, unet: ModelMixin, where: str) -> None:
    """Raise `BadInput` unless the plan, which was read from `where`, fits the U-Net."""
    if plan.preset is None:
        check_names(unet, plan.remove, where)
    check_size(unet, plan.params.before, where)
    if plan.preset is not None:
        check_preset(plan, plan.preset, unet, where)


def prune(
    model: str,
    plan_path: Path,
    out: Path,
    config: PruneConfig | None = None,
    scores: Path | None = None,
    *,
    overwrite: Overwrite = False,
) -> Path:
    """Write `model` without the plan's layers as a diffusers folder with the teacher's dtype.

    `scores`, which `laptop score` made of this model, is for healing only.
    """
    config = config or PruneConfig()
    teacher = loading.empty_unet(model)
    plan = Plan.read(plan_path)
    check_plan(plan, teacher, str(plan_path))
    apply_plan(teacher, plan)  # refuses a plan that does not fit before any weight is read
    stated = of_values(plan.sampling, f"{plan_path}: sampling")
    inputs, settings = locating.identity("model", model)
    inputs["plan"] = plan_path
    samples = None
    if config.heal != "none":
        scores = _need_scores(config, plan, scores)
        samples, dtype = _recorded(teacher, scores)
        inputs |= {"scores": scores, "calibration": scores.parent / CALIBRATION}
        settings |= {"heal": config.heal}

    def work(folder: Path) -> dict[str, str | float]:
        corrections: dict[str, Correction] = {}
        facts: dict[str, float] = {}
        if samples is not None:
            unet = loading.load_unet(model, dtype)
            samples.check_output(unet, str(scores))
            corrections, facts = fit(unet, plan.remove, samples)
            del unet  # the stored precision may be another one
        unet = loading.load_unet(model, stored_dtype(model))
        student = apply_plan(unet, plan, corrections)
        write_model(folder, student, model, stated)
        return {"unet_class": type(student).__name__, "removed": len(plan.remove), **facts}

    return run_stage("prune", out, settings, inputs, work, overwrite=overwrite)


def healing(folder: Path) -> dict[str, float]:
    """The facts of healing in the manifest of a pruned model; empty if it was not healed."""
    facts = read_json(manifest_of(folder))
    return {k: facts[k] for k in HEALING if k in facts}


def _need_scores(config: PruneConfig, plan: Plan, scores: Path | None) -> Path:
    """The scores.json to heal from; `BadInput` if it is not given or the plan cannot be healed."""
    if plan.preset is not None:
        raise BadInput(
            f"--heal {config.heal} is not possible for the plan of the preset {plan.preset!r}: "
            "it moves weights between layers. Leave --heal out, or plan from SCORES."
        )
    if scores is None:
        raise BadInput(
            f"--heal {config.heal} needs --calibration SCORES, the folder that `laptop score` made "
            "of this model."
        )
    return scores_file(scores)


def _recorded(unet: ModelMixin, scores: Path) -> tuple[Calibration, torch.dtype]:
    """The samples of a score stage, checked by their shapes, and the precision they were run in."""
    scored, path = Scores.read(scores), scores.parent / CALIBRATION
    samples = Calibration.read(path, scored.batch_size)
    check_samples(unet, samples, str(path))
    return samples, getattr(torch, scored.dtype)


def write_model(
    folder: Path, unet: ModelMixin, like: str, sampling: SamplingConfig | None = None
) -> None:
    """Write `unet` with all other components of the model `like`, and its sampling settings.

    The settings are those of `sampling` and of the folder of `like`. Each tensor is rounded to the
    precision in which `like` stores the one of its name; a tensor that `like` lacks to the one that
    holds all of them. `unet` is changed.
    """
    source, dtype = locating.folder(like), stored_dtype(like)
    index = read_json(source / "model_index.json")
    parts = [k for k, v in index.items() if isinstance(v, list) and v[0] and k != "unet"]
    files = [f for part in parts for f in files_in(source / part)]
    need_space(
        folder, sum(f.stat().st_size for f in files) + dtype.itemsize * unet.num_parameters()
    )
    for part in parts:
        copy_folder(source / part, folder / part)
    unet.register_to_config(_name_or_path="")  # diffusers keeps there where it was loaded from
    round_to_(unet, stored_dtypes(like), dtype)
    unet.save_pretrained(folder / "unet", max_shard_size=SHARD, variant=locating.variant(like))
    write_file(folder, of_folders(sampling or SamplingConfig(), like))
    library = (
        "diffusers"
        if type(unet).__name__ in component_classes.STOCK_UNETS
        else type(unet).__module__
    )
    write_json(folder / "model_index.json", index | {"unet": [library, type(unet).__name__]})
