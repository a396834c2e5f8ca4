"""Choose the layers to drop: a 0-1 knapsack in its covering form, solved exactly.

    min  sum_{i in R} v_i     s.t.  sum_{i in R} params(i) >= ratio * params

solved by `scipy.optimize.milp` (HiGHS, branch and bound).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from laptop import models
from laptop.errors import BadInput, Infeasible
from laptop.pruning import calibration
from laptop.pruning.score import SCHEMA as SCORES_SCHEMA
from laptop.pruning.score import output_loss
from laptop.pruning.units import Anatomy, Unit, anatomy, check_names
from laptop.run import Overwrite, read_json, run_stage, write_json

SCHEMA = "laptop.plan/1"


@dataclass(frozen=True)
class PlanConfig:
    ratio: float = 0.5  # least share of the U-Net's parameters to remove, in [0, 1)


def check_ratio(ratio: float, known: Anatomy) -> None:
    """Raise `Infeasible` unless the removable layers hold `ratio` of the U-Net's parameters."""
    if not 0 <= ratio < 1 or math.isnan(ratio):
        raise Infeasible(f"--ratio {ratio:g} is out of range; it must be at least 0 and below 1.")
    if ratio > known.largest_ratio:
        held = known.largest_ratio * known.params
        most = math.floor(known.largest_ratio * 1000) / 1000
        raise Infeasible(
            f"--ratio {ratio:g} needs {ratio * known.params / 1e6:,.1f} M of the U-Net's "
            f"{known.params / 1e6:,.1f} M parameters removed; removable layers hold "
            f"{held / 1e6:,.1f} M (ratio {most:.3f}). Ask for {most:.3f} or less."
        )


def solve(scores: Sequence[float], params: Sequence[int], least: float) -> list[int]:
    """Indices of the set with the smallest sum of `scores` whose `params` sum to at least `least`.

    HiGHS stops within an absolute gap of 1e-6, while scores span many decades. So the objective is
    scaled to about 1000 at the best sum known, and layers that alone exceed that sum are left out;
    a much better sum is the next round's scale.
    """
    if least <= 0:
        return []
    values = np.asarray(scores, float)
    sizes = np.minimum(np.asarray(params, float) / least, 1.0)  # one that suffices, suffices
    constraints = [LinearConstraint(sizes[None, :], lb=1.0)]
    best = values.sum()
    while True:
        result = milp(
            1000 * values / (best or 1.0),
            constraints=constraints,
            integrality=np.ones(len(values)),
            bounds=Bounds(0, values <= best),
            options={"mip_rel_gap": 0.0},
        )
        if result.x is None:
            raise Infeasible(
                f"{least:,.0f} parameters are to go; all {len(params)} layers hold {sum(params):,}."
            )
        chosen = np.flatnonzero(result.x > 0.5)
        if sum(params[int(i)] for i in chosen) < least:  # met within HiGHS's tolerance only
            others = np.ones(len(values))
            others[chosen] = 0
            constraints.append(LinearConstraint(others[None, :], lb=1.0))  # not this set again
            continue
        if values[chosen].sum() >= best / 10 or best == 0:
            return [int(i) for i in chosen]
        best = values[chosen].sum()


def make_plan(
    scores_path: Path, out: Path, config: PlanConfig, *, overwrite: Overwrite = False
) -> Path:
    """Write plan.json from scores.json; the joint loss is measured on the scores' own samples."""
    if scores_path.is_dir():
        scores_path = scores_path / "scores.json"
    scores = read_scores(scores_path)
    known = Anatomy(
        tuple(Unit(u["name"], u["kind"], u["params"], u["macs"]) for u in scores["units"]),
        **scores["base"],
    )
    check_ratio(config.ratio, known)

    def work(folder: Path) -> None:
        values = [u["score"] for u in scores["units"]]
        least = config.ratio * known.params
        chosen = solve(values, [u.params for u in known.units], least)
        names = [known.units[i].name for i in chosen]
        gone = [known.units[i] for i in chosen]
        plan = {
            "schema": SCHEMA,
            "model": scores["model"],
            "budget": asdict(config),
            "solver": "scipy.optimize.milp (HiGHS), optimal",
            "remove": names,
            "params": _change(known.params, sum(u.params for u in gone)),
            "macs": _change(known.macs, sum(u.macs for u in gone)),
            "predicted_loss": float(sum(values[i] for i in chosen)),
            "measured_loss": _measure(scores, scores_path.parent, names),
        }
        write_json(folder / out.name, plan)

    return run_stage("plan", out, config, {"scores": scores_path}, work, overwrite=overwrite)


def _change(before: int, less: int) -> dict[str, int]:
    return {"before": before, "after": before - less}


def _measure(scores: Mapping[str, Any], folder: Path, names: Sequence[str]) -> float:
    rows, output = calibration.load(folder / "calibration.safetensors")
    return output_loss(
        models.load_unet(scores["model"]), names, rows, output, scores.get("batch_size", 1)
    )


def read_scores(path: Path) -> dict[str, Any]:
    """The content of a scores.json, checked as far as the planner needs it."""
    scores = read_json(path, SCORES_SCHEMA)
    try:
        scores["model"], scores["base"]["params"], scores["base"]["macs"]
        for unit in scores["units"]:
            unit["name"], unit["kind"], unit["macs"]
            if not math.isfinite(unit["score"]) or unit["params"] < 0:
                raise BadInput(
                    f"{path}: {unit['name']} has score {unit['score']} and {unit['params']} "
                    "parameters; both must be finite. Score the model again."
                )
    except (KeyError, TypeError) as e:
        raise BadInput(f"{path} lacks {e}; it is no whole scores.json.") from None
    return scores


def read_plan(path: Path, unet: Any) -> Mapping[str, Any]:
    """The content of a plan.json, checked against the U-Net that it is to be applied to."""
    plan = read_json(path, SCHEMA)
    known = anatomy(unet)
    names = plan.get("remove")
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
        raise BadInput(f"{path} has no list 'remove' of layer names; it is no whole plan.json.")
    check_names(names, known, str(path))
    before = plan.get("params", {}).get("before")
    if not isinstance(before, int):
        raise BadInput(f"{path} has no params.before; it is no whole plan.json.")
    if before != known.params:
        raise BadInput(
            f"{path} was made for another model: a U-Net of {before:,} parameters; this one has "
            f"{known.params:,}. Make the plan from this model's own scores."
        )
    return plan
