"""Choose the layers to drop: the cheapest set that meets the budgets, exactly (`knapsack`)."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from laptop import mistakes, processes
from laptop.errors import BadInput, Infeasible
from laptop.files import shown, write_json
from laptop.models import loading, locating
from laptop.pruning import calibration
from laptop.pruning.budgets import bytes_each, check_config, conditions, with_default
from laptop.pruning.expressible import stock_config
from laptop.pruning.joint import JointLoss
from laptop.pruning.knapsack import solve
from laptop.pruning.latency_table import NS, with_latencies
from laptop.pruning.layouts import PRESETS, changes, check_layout
from laptop.pruning.plan_file import SCHEMA, Plan, Scores
from laptop.pruning.refine import refined
from laptop.pruning.score import CALIBRATION
from laptop.pruning.score import SCHEMA as SCORES_SCHEMA
from laptop.pruning.settings import PlanConfig
from laptop.pruning.units import Anatomy, Unit, check_names
from laptop.records import read_record
from laptop.run import Overwrite, run_stage
from laptop.unfinished import resume_folder

MENU_SCHEMA = "laptop.menu/1"


def choose(scores: Mapping[str, Any], config: PlanConfig, bytes_each: int = 4) -> list[Unit]:
    """The layers to drop, from the content of a scores.json; in the order in which they run."""
    return _cheapest(scores, with_latencies(as_anatomy(scores), config), config, bytes_each)


def _cheapest(
    scores: Mapping[str, Any], known: Anatomy, config: PlanConfig, bytes_each: int
) -> list[Unit]:
    c = conditions(known, config, bytes_each)
    chosen = solve([u["score"] for u in scores["units"]], c.savings, c.implied, c.stay)
    return [known.units[i] for i in chosen]


def make_plan(
    scores_path: Path, out: Path, config: PlanConfig, *, overwrite: Overwrite = False
) -> Path:
    """Write plan.json from scores.json; the joint loss is measured on the scores' own samples."""
    scores_path, config = scores_file(scores_path), with_default(config)
    scores = read_checked(scores_path)
    model, known = scores["model"], with_latencies(as_anatomy(scores), config)
    check_config(config, known, model)
    check_race(scores.get("race"), config, str(scores_path))
    each = bytes_each(config, model)
    samples = read_samples(scores_path, model)

    def work(folder: Path) -> None:
        joint = joint_loss(scores, samples, folder, str(scores_path))
        names = [u.name for u in _cheapest(scores, known, config, each)]
        losses = {"measured_loss": joint([frozenset(names)])[frozenset(names)]}
        if config.refine:
            losses["one_shot_loss"] = losses["measured_loss"]
            rules = conditions(known, config, each)
            names, losses["measured_loss"] = refined(joint, scores, rules, names, config.refine)
        losses["predicted_loss"] = predicted_loss(scores, names)
        plan = as_plan(model, known, names, asdict(config))
        if config.expressible != "any":
            if not plan["stock_config"]:
                raise RuntimeError(f"a plan for {config.expressible} that no stock config can say")
            free = _cheapest(scores, known, replace(config, expressible="any"), each)
            losses["unrestricted_predicted_loss"] = predicted_loss(scores, [u.name for u in free])
        solver = {"solver": "scipy.optimize.milp (HiGHS), optimal"}
        sampling = {"sampling": scores.get("sampling", {})}  # for the student's folder
        write_json(folder / out.name, plan | sampling | solver | losses)

    inputs, which = locating.identity("model", model)
    inputs |= {"scores": scores_path, "calibration": scores_path.parent / CALIBRATION}
    if config.latency_table is not None:
        inputs["latency_table"] = Path(config.latency_table)
    settings = asdict(config) | which
    return run_stage("plan", out, settings, inputs, work, overwrite=overwrite)


def read_samples(scores_path: Path, model: str) -> tuple[dict[str, Tensor], Tensor]:
    """The calibration beside scores.json, checked against the model by its shapes."""
    path = scores_path.parent / CALIBRATION
    rows, output = calibration.load(path)
    calibration.check_rows(loading.empty_unet(model), rows, output, str(path))
    return rows, output


def joint_loss(
    scores: Mapping[str, Any], samples: tuple[dict[str, Tensor], Tensor], folder: Path, what: str
) -> JointLoss:
    """Joint losses of the scored model on its own samples, kept in the stage's `folder`.

    Raises `BadInput` when the model does not give the recorded output.
    """
    unet = loading.load_unet(scores["model"], getattr(torch, scores.get("dtype", "float32")))
    unet, size = nn.Module.to(unet, processes.device()), scores.get("batch_size", 1)
    calibration.check_output(unet, *samples, size, what)
    return JointLoss(unet, *samples, size, resume_folder(folder) / "joint.jsonl")


def scores_file(path: Path) -> Path:
    """The scores.json that is meant by a file or by the folder that `laptop score` made."""
    if path.is_dir() and not (path / "scores.json").exists():
        raise BadInput(mistakes.refusal(path, "scores"))
    return path / "scores.json" if path.is_dir() else path


def read_checked(path: Path) -> dict[str, Any]:
    """The content of a scores.json, checked against the model that it names."""
    scores = read_scores(path)
    unet = loading.empty_unet(scores["model"])
    check_names(unet, [u["name"] for u in scores["units"]], str(path))
    _check_size(unet, scores["base"]["params"], str(path))
    return scores


def check_race(raced: float | None, config: PlanConfig, what: str) -> None:
    """Raise `BadInput` for a plan from a race for another one: only that one's layers are exact."""
    if raced is not None and replace(config, refine=0) != PlanConfig(ratio=raced):
        raise BadInput(
            f"{what}: a race for --ratio {raced:g} gives the plan of this ratio and no other limit "
            "(layers that were certain to go or to stay are not scored on all samples). Score "
            "without --race for other plans."
        )


def as_plan(
    model: str, known: Anatomy, names: Sequence[str], budget: Mapping[str, Any]
) -> dict[str, Any]:
    """The content of a plan.json that removes the units `names`, without its losses."""
    gone = [u for u in known.units if u.name in set(names)]
    plan = {
        "schema": SCHEMA,
        "model": model,
        "budget": dict(budget),
        "remove": [u.name for u in gone],
        "params": _change(known.params, sum(u.params for u in gone)),
        "macs": _change(known.macs, sum(u.macs for u in gone)),
        "stock_config": stock_config(loading.empty_unet(model), names) is not None,
    }
    if (before := known.latency_ns) is not None:
        after = before - sum(known.latencies_ns[u.name] for u in gone)
        plan["latency_ms"] = {"before": before / NS, "after": after / NS}
    return plan


def predicted_loss(scores: Mapping[str, Any], names: Sequence[str]) -> float:
    """The sum of the units' own losses."""
    return float(sum(u["score"] for u in scores["units"] if u["name"] in set(names)))


def as_anatomy(scores: Mapping[str, Any]) -> Anatomy:
    """Units and costs from the content of a scores.json."""
    return Anatomy(
        tuple(
            Unit(u["name"], u["kind"], u["params"], u["macs"], tuple(u.get("needs", ())))
            for u in scores["units"]
        ),
        params=scores["base"]["params"],
        macs=scores["base"]["macs"],
    )


def menu(scores: Mapping[str, Any], config: PlanConfig) -> list[dict[str, Any]]:
    """The best plan at every hundredth of pruning ratio that can be reached."""
    points = [_point(scores, [])]
    for hundredth in range(1, 100):
        try:
            chosen = choose(scores, replace(config, ratio=hundredth / 100))
        except Infeasible:
            break
        point = _point(scores, chosen)
        if point["params"] < points[-1]["params"]:
            points.append(point)
    return points


def _point(scores: Mapping[str, Any], chosen: Sequence[Unit]) -> dict[str, Any]:
    params = scores["base"]["params"] - sum(u.params for u in chosen)
    return {
        "ratio": 1 - params / scores["base"]["params"],
        "params": params,
        "macs": scores["base"]["macs"] - sum(u.macs for u in chosen),
        "predicted_loss": predicted_loss(scores, names := [u.name for u in chosen]),
        "remove": names,
    }


def make_menu(
    scores_path: Path, out: Path, config: PlanConfig, *, overwrite: Overwrite = False
) -> Path:
    """Write the Pareto curve of parameters against predicted loss as JSON.

    Of `config`, what layers stay and where the model must load counts; budgets do not.
    """
    scores_path = scores_file(scores_path)
    scores = read_checked(scores_path)
    free = PlanConfig(ratio=0.0, keep=config.keep, expressible=config.expressible)
    check_config(free, as_anatomy(scores), scores["model"])
    check_race(scores.get("race"), free, str(scores_path))

    def work(folder: Path) -> None:
        document = {"schema": MENU_SCHEMA, "model": scores["model"], "points": menu(scores, free)}
        write_json(folder / out.name, document)

    return run_stage("menu", out, free, {"scores": scores_path}, work, overwrite=overwrite)


def _change(before: int, less: int) -> dict[str, int]:
    return {"before": before, "after": before - less}


def read_scores(path: Path) -> dict[str, Any]:
    """The content of a scores.json (or of its folder), checked as far as it can be alone."""
    path = scores_file(path)
    scores = read_record(path, Scores, SCORES_SCHEMA, "Score the model again.")
    names = {unit["name"] for unit in scores["units"]}
    if len(names) < len(scores["units"]):
        raise BadInput(f"{path} names a layer twice. Score the model again.")
    for unit in scores["units"]:
        if not names.issuperset(unit.get("needs", ())):
            raise BadInput(f"{path}: {unit['name']} needs a layer that is not scored.")
    return {**scores}


def read_plan(path: Path, unet: Any) -> Mapping[str, Any]:
    """The content of a plan.json, checked against the U-Net that it is to be applied to."""
    if path.is_dir():
        raise BadInput(mistakes.refusal(path, "plan"))
    plan = read_record(path, Plan, SCHEMA, "Make the plan again.")
    if "preset" not in plan:
        check_names(unet, plan["remove"], str(path))
    _check_size(unet, plan["params"]["before"], str(path))
    if "preset" in plan:
        _check_preset(plan, unet, str(path))
    return {**plan}


def _check_preset(plan: Plan, unet: Any, where: str) -> None:
    """Raise `BadInput` unless a plan changes what its preset changes in this U-Net."""
    name = plan["preset"]
    if name not in PRESETS:
        raise BadInput(f"{where}: preset {shown(name)} is unknown; known are {', '.join(PRESETS)}.")
    if "config" not in plan or "rename" not in plan:
        raise BadInput(
            f"{where} lacks the preset's 'config' or 'rename'; it is no whole plan.json."
        )
    check_layout(unet, name)
    for key, needed in (("config", changes(unet.config, name)), ("rename", PRESETS[name].rename)):
        if plan.get(key) != needed:
            raise BadInput(
                f"{where}: {key} is not what the preset {name} changes in this model. It was "
                "edited, or made by another version. Make the plan again."
            )


def _check_size(unet: Any, params: int, what: str) -> None:
    if params != unet.num_parameters():
        raise BadInput(
            f"{what} was made for another model: a U-Net of {params:,} parameters; this one has "
            f"{unet.num_parameters():,}. Make the plan from this model's own scores."
        )
