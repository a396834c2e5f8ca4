"""Choose the layers to drop: the cheapest set that meets the budgets, found exactly (`knapsack`).

Budgets are any mix of parameters, bytes of weights and multiply-accumulates; layers can be kept by
pattern, and the plan be restricted to what a stock diffusers config can say.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from laptop import models
from laptop.errors import BadInput, Infeasible, Unsupported
from laptop.pruning import calibration
from laptop.pruning.criteria import output_loss
from laptop.pruning.expressible import stock_config
from laptop.pruning.knapsack import solve
from laptop.pruning.score import SCHEMA as SCORES_SCHEMA
from laptop.pruning.units import Anatomy, Unit, check_names
from laptop.run import Overwrite, read_json, run_stage, write_json

SCHEMA = "laptop.plan/1"
MENU_SCHEMA = "laptop.menu/1"
CALIBRATION = "calibration.safetensors"
EXPRESSIBLE = ("any", "stock", "comfyui")
DEFAULT_RATIO = 0.5  # where no budget is given
NOUNS = {"params": "parameters", "macs": "multiply-accumulates"}


@dataclass(frozen=True)
class PlanConfig:
    """Budgets of the pruned U-Net; all that are given must hold."""

    ratio: float | None = None  # least share of the U-Net's parameters to remove, in [0, 1)
    max_params: int | None = None
    max_bytes: int | None = None  # of the weights, in the precision in which the model is stored
    max_macs: int | None = None  # of one forward, batch 1, at the model's native size
    keep: tuple[str, ...] = ()  # patterns of layers that stay, such as mid_block.*
    expressible: str = "any"  # stock: by a plain diffusers config; comfyui: loads there too


@dataclass(frozen=True)
class Budget:
    """A limit as the user gave it, as what it asks to remove."""

    flag: str
    cost: str  # field of Unit and Anatomy
    least: float  # of the cost, to be removed
    each: int | None  # how many of the flag's units one of the cost is; None for a ratio


def with_default(config: PlanConfig) -> PlanConfig:
    """`config` with the default ratio if it sets no limit at all."""
    limits = (config.ratio, config.max_params, config.max_bytes, config.max_macs)
    return config if any(x is not None for x in limits) else replace(config, ratio=DEFAULT_RATIO)


def budgets(config: PlanConfig, known: Anatomy, bytes_each: int) -> list[Budget]:
    """The limits of `config`; `Infeasible` for one that makes no sense."""
    caps: list[tuple[str, int | None, str, int]] = [
        ("--max-params", config.max_params, "params", 1),
        ("--max-bytes", config.max_bytes, "params", bytes_each),
        ("--max-macs", config.max_macs, "macs", 1),
    ]
    given = [(flag, cap, cost, each) for flag, cap, cost, each in caps if cap is not None]
    ratio = with_default(config).ratio
    if ratio is not None and not 0 <= ratio < 1:  # not in range either: nan
        raise Infeasible(f"--ratio {ratio:g} is out of range; it must be at least 0 and below 1.")
    found = []
    if ratio is not None:
        found.append(Budget(f"--ratio {ratio:g}", "params", ratio * known.params, None))
    for flag, cap, cost, each in given:
        if cap <= 0:
            raise Infeasible(f"{flag} {cap} is out of range; it must be above 0.")
        least = max(0.0, getattr(known, cost) - cap / each)
        found.append(Budget(f"{flag} {cap:,}", cost, least, each))
    return found


def check_budgets(config: PlanConfig, known: Anatomy, bytes_each: int) -> None:
    """Raise `Infeasible` unless the layers that may go hold what every budget asks for."""
    stays = _stays(known, config)
    free = [u for u in known.units if u.name not in stays]
    for budget in budgets(config, known, bytes_each):
        before = getattr(known, budget.cost)
        held = sum(getattr(u, budget.cost) for u in free)
        if budget.least > held:
            share = math.floor(held / before * 1000) / 1000
            reachable = math.ceil((before - held) * (budget.each or 1))
            advice = f"{share:.3f} or less" if budget.each is None else f"{reachable:,} or more"
            raise Infeasible(
                f"{budget.flag} needs {budget.least / 1e6:,.1f} M of the U-Net's "
                f"{before / 1e6:,.1f} M {NOUNS[budget.cost]} removed; removable layers hold "
                f"{held / 1e6:,.1f} M (ratio {share:.3f}). Ask for {advice}."
            )


def _stays(known: Anatomy, config: PlanConfig) -> set[str]:
    """The units that the config keeps, and those that may go only after one of them."""
    stays = {u.name for u in known.units if _is_kept(u, config)}
    implied = implications(known, config.expressible)
    while more := {i for i, j in implied if j in stays} - stays:
        stays |= more
    return stays


def _is_kept(unit: Unit, config: PlanConfig) -> bool:
    if any(fnmatchcase(unit.name, pattern) for pattern in config.keep):
        return True
    if config.expressible == "comfyui":  # it knows U-Nets by what comes down, and no empty depths
        is_first = unit.name.endswith(".transformer_blocks.0")
        if is_first or not unit.name.startswith("up_blocks."):
            return True
    return config.expressible != "any" and unit.kind != "transformer_block"


def implications(known: Anatomy, expressible: str) -> list[tuple[str, str]]:
    """Pairs (i, j): the layer i may go only if j goes.

    A shell goes after its content. A stock config says how many blocks a transformer has, so that
    the last go first; and the mid block's depth is that of the first transformer of the last down
    block, if this has any.
    """
    pairs = [(u.name, other) for u in known.units for other in u.needs]
    if expressible == "any":
        return pairs
    depths: dict[str, list[str]] = {}
    for unit in known.units:
        if unit.kind == "transformer_block":
            depths.setdefault(unit.name.rsplit(".transformer_blocks.", 1)[0], []).append(unit.name)
    for blocks in depths.values():
        pairs += itertools.pairwise(blocks)
    down = [u.name.split(".")[1] for u in known.units if u.name.startswith("down_blocks.")]
    tied = depths.get(f"down_blocks.{max(down, key=int, default='')}.attentions.0", [])
    mid = depths.get("mid_block.attentions.0", [])
    if len(mid) == len(tied):
        pairs += [pair for a, b in zip(mid, tied, strict=True) for pair in ((a, b), (b, a))]
    return pairs


def choose(scores: Mapping[str, Any], config: PlanConfig, bytes_each: int = 4) -> list[Unit]:
    """The layers to drop, from the content of a scores.json; in the order in which they run."""
    known = as_anatomy(scores)
    check_budgets(config, known, bytes_each)
    place = {u.name: i for i, u in enumerate(known.units)}
    stays = _stays(known, config)
    chosen = solve(
        [u["score"] for u in scores["units"]],
        [
            ([getattr(u, b.cost) for u in known.units], b.least)
            for b in budgets(config, known, bytes_each)
        ],
        [(place[i], place[j]) for i, j in implications(known, config.expressible)],
        [u.name in stays for u in known.units],
    )
    return [known.units[i] for i in chosen]


def check_config(config: PlanConfig, known: Anatomy, model: str) -> None:
    """Raise `BadInput` for a config that cannot be met, before anything is scored or solved."""
    if not known.units:
        raise Unsupported(f"the U-Net of {model} has no layer left that can be removed.")
    if config.expressible not in EXPRESSIBLE:
        raise BadInput(
            f"--expressible {config.expressible!r} is unknown; known are {', '.join(EXPRESSIBLE)}."
        )
    if config.expressible != "any":
        _check_restriction(config, known, model)
    for pattern in config.keep:
        if not any(fnmatchcase(u.name, pattern) for u in known.units):
            raise BadInput(
                f"--keep {pattern!r} names no removable layer; a layer is called, for example, "
                f"{known.units[0].name}."
            )
    check_budgets(config, known, bytes_each(config, model))


def _check_restriction(config: PlanConfig, known: Anatomy, model: str) -> None:
    if not any(u.kind == "transformer_block" for u in known.units):
        raise BadInput(
            f"--expressible {config.expressible} drops transformer blocks, which these scores do "
            "not have as layers. Score with --granularity fine."
        )
    if models.unet_config(model).get("removed"):
        raise BadInput(
            f"--expressible {config.expressible}: {model} is pruned already, in a way that no "
            "stock config can say. Plan from the original model."
        )


def bytes_each(config: PlanConfig, model: str) -> int:
    """Bytes of a stored weight; not looked up where nobody asks."""
    return models.stored_dtype(model).itemsize if config.max_bytes is not None else 4


def make_plan(
    scores_path: Path, out: Path, config: PlanConfig, *, overwrite: Overwrite = False
) -> Path:
    """Write plan.json from scores.json; the joint loss is measured on the scores' own samples."""
    if scores_path.is_dir():
        scores_path = scores_path / "scores.json"
    scores, config = read_scores(scores_path), with_default(config)
    model, known = scores["model"], as_anatomy(scores)
    unet = models.empty_unet(model)
    check_names(unet, [u.name for u in known.units], str(scores_path))
    _check_size(unet, known.params, str(scores_path))
    check_config(config, known, model)
    _check_race(scores, config, scores_path)
    each = bytes_each(config, model)

    def work(folder: Path) -> None:
        chosen = choose(scores, config, each)
        plan = as_plan(model, known, [u.name for u in chosen], asdict(config))
        if config.expressible != "any" and not plan["stock_config"]:
            raise RuntimeError(f"a plan for {config.expressible} that no stock config can say")
        plan["solver"] = "scipy.optimize.milp (HiGHS), optimal"
        plan["predicted_loss"] = predicted_loss(scores, plan["remove"])
        if config.expressible != "any":
            free = choose(scores, replace(config, expressible="any"), each)
            names = [u.name for u in free]
            plan["unrestricted_predicted_loss"] = predicted_loss(scores, names)
        plan["measured_loss"] = _measure(scores, scores_path.parent / CALIBRATION, plan["remove"])
        write_json(folder / out.name, plan)

    inputs, which = models.identity("model", model)
    inputs |= {"scores": scores_path, "calibration": scores_path.parent / CALIBRATION}
    settings = asdict(config) | which
    return run_stage("plan", out, settings, inputs, work, overwrite=overwrite)


def _check_race(scores: Mapping[str, Any], config: PlanConfig, path: Path) -> None:
    """Scores of a race are exact where they decide its own ratio only."""
    raced, asked = scores.get("race"), replace(config, keep=())
    if raced is not None and asked != PlanConfig(ratio=raced):
        raise BadInput(
            f"{path} is of a race for --ratio {raced:g}: layers that were certain to go or to stay "
            "there were not scored on all samples. Score again without --race for other budgets."
        )


def as_plan(
    model: str, known: Anatomy, names: Sequence[str], budget: Mapping[str, Any]
) -> dict[str, Any]:
    """The content of a plan.json that removes the units `names`, without its losses."""
    gone = [u for u in known.units if u.name in set(names)]
    return {
        "schema": SCHEMA,
        "model": model,
        "budget": dict(budget),
        "remove": [u.name for u in gone],
        "params": _change(known.params, sum(u.params for u in gone)),
        "macs": _change(known.macs, sum(u.macs for u in gone)),
        "stock_config": stock_config(models.empty_unet(model), names) is not None,
    }


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
        **scores["base"],
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
    scores_path = scores_path / "scores.json" if scores_path.is_dir() else scores_path
    scores = read_scores(scores_path)
    free = PlanConfig(ratio=0.0, keep=config.keep, expressible=config.expressible)
    check_config(free, as_anatomy(scores), scores["model"])

    def work(folder: Path) -> None:
        document = {"schema": MENU_SCHEMA, "model": scores["model"], "points": menu(scores, free)}
        write_json(folder / out.name, document)

    return run_stage("menu", out, free, {"scores": scores_path}, work, overwrite=overwrite)


def _change(before: int, less: int) -> dict[str, int]:
    return {"before": before, "after": before - less}


def _measure(scores: Mapping[str, Any], path: Path, names: Sequence[str]) -> float:
    rows, output = calibration.load(path)
    dtype = getattr(torch, scores.get("dtype", "float32"))
    unet = models.load_unet(scores["model"], dtype)
    return output_loss(unet, names, rows, output, scores.get("batch_size", 1))


def read_scores(path: Path) -> dict[str, Any]:
    """The content of a scores.json, checked as far as the planner needs it."""
    scores = read_json(path, SCORES_SCHEMA)
    try:
        scores["model"], scores["base"]["params"], scores["base"]["macs"]
        names = {unit["name"] for unit in scores["units"]}
        for unit in scores["units"]:
            unit["kind"], unit["macs"]
            if not math.isfinite(unit["score"]) or unit["params"] < 0:
                raise BadInput(
                    f"{path}: {unit['name']} has score {unit['score']} and {unit['params']} "
                    "parameters; both must be finite. Score the model again."
                )
            if not names.issuperset(unit.get("needs", ())):
                raise BadInput(f"{path}: {unit['name']} needs a layer that is not scored.")
    except (KeyError, TypeError) as e:
        raise BadInput(f"{path} lacks {e}; it is no whole scores.json.") from None
    return scores


def read_plan(path: Path, unet: Any) -> Mapping[str, Any]:
    """The content of a plan.json, checked against the U-Net that it is to be applied to."""
    plan = read_json(path, SCHEMA)
    names, params = plan.get("remove"), plan.get("params")
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
        raise BadInput(f"{path} has no list 'remove' of layer names; it is no whole plan.json.")
    if "preset" not in plan:
        check_names(unet, names, str(path))
    elif not all(isinstance(plan.get(k), dict) for k in ("config", "rename")):
        raise BadInput(f"{path} lacks the preset's 'config' or 'rename'; it is no whole plan.json.")
    if not isinstance(params, dict) or not isinstance(params.get("before"), int):
        raise BadInput(f"{path} has no params.before; it is no whole plan.json.")
    _check_size(unet, params["before"], str(path))
    return plan


def _check_size(unet: Any, params: int, what: str) -> None:
    if params != unet.num_parameters():
        raise BadInput(
            f"{what} was made for another model: a U-Net of {params:,} parameters; this one has "
            f"{unet.num_parameters():,}. Make the plan from this model's own scores."
        )
