"""Compare the paper's criterion with its rivals: `python -m laptop.studies.criteria_study`.

For each criterion and pruning ratio: the joint output loss of the layers it drops, and the prompt
accuracy that is left, before any retraining; with them a refined plan, a healed one, plans made by
hand and random ones. And whether losses add up, and what racing costs. Writes rivals.json and
rivals.md, and as pictures rivals.svg and additivity.svg; docs/explanation/appendix.md is made of
them.
"""

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from laptop.benchmarks.report.figures import additivity_chart, rivals_chart
from laptop.benchmarks.report.text import table
from laptop.console import say, track
from laptop.models import loading
from laptop.models.description import context_length
from laptop.prompts import calibration_prompts, evaluation_prompts
from laptop.pruning.additivity import random_set, random_sets, report
from laptop.pruning.budgets import conditions, implications
from laptop.pruning.calibration import CALIBRATION, Calibration
from laptop.pruning.heal import fit, with_corrections
from laptop.pruning.joint import JointLoss
from laptop.pruning.knapsack import solve
from laptop.pruning.ledger import replay
from laptop.pruning.plan import choose, refined
from laptop.pruning.sampling_config import Sampling
from laptop.pruning.score import forwards_in_all, score
from laptop.pruning.scores import Additivity, Scores
from laptop.pruning.settings import PlanConfig, ScoreConfig
from laptop.pruning.units import anatomy_of, removed
from laptop.records import Record, read_lines
from laptop.studies.handmade import FAMILIES, handmade
from laptop.studies.pictures import draw_prompts
from laptop.tiny.checker import judge

CRITERIA = (
    "output-loss",
    "task-loss",
    "block-influence",
    "magnitude",
    "taylor",
    "latent-statistics",
)  # all but `clip`, whose model cannot be fetched everywhere
RATIOS = (0.3, 0.5, 0.7)
RANDOM_PLANS = 10
SETS = 20  # random ones at each ratio, for additivity
EVALUATIONS = 100  # of refinement
REFINED = f"output-loss, --refine {EVALUATIONS}"
HEALED = "output-loss, --heal affine"
RACE_BATCH = 8
ORDERS = 10  # of the rows, in which a race is replayed
MODEL = "tiny-sdxl"


@dataclass(frozen=True, kw_only=True)
class JudgedPlan(Record):
    """A plan, and what is left of the model without its layers."""

    LEFT_OUT = frozenset({"removed", "params"})

    by: str  # what chose the layers
    ratio: float
    removed: int | None = None  # layers
    params: float | None = None  # share that is left
    loss: float  # joint output loss
    accuracy: float  # share of right prompts


@dataclass(frozen=True, kw_only=True)
class RaceResult(Record):
    """A race, compared with scoring all layers on all rows."""

    ratio: float
    seed: int  # of the order of the rows
    spent: float  # share of the forwards
    same_plan: bool
    excess_sum: float  # of the plan's summed scores, as a share
    excess_loss: float  # of its joint loss


@dataclass(frozen=True, kw_only=True)
class CriteriaDocument(Record):
    """A rivals.json: everything that the study measured."""

    SCHEMA = "laptop.rivals/1"

    model: str
    prompts: int
    teacher_accuracy: float
    plans: tuple[JudgedPlan, ...]
    additivity: Mapping[str, Additivity]  # by criterion
    races: tuple[RaceResult, ...]


class Measurements:
    """Losses and accuracies of the calibrated model without some layers, kept in files."""

    def __init__(self, folder: Path, prompts: int):
        self.log = folder / "accuracy.jsonl"
        self.pipe = loading.load_pipeline(MODEL)
        self.prompts = evaluation_prompts(MODEL, prompts)
        samples = Calibration.read(folder / "output-loss" / CALIBRATION, 64)
        self.joint = JointLoss(self.pipe.unet, samples, folder / "joint.jsonl")
        lines = read_lines(self.log, tuple[str, float]) if self.log.exists() else []
        self.accuracies = dict(lines)

    def loss(self, names: Iterable[str]) -> float:
        """The output loss of removing all of the layers."""
        layers = frozenset(names)
        return self.joint([layers])[layers]

    def accuracy(self, names: Iterable[str]) -> float:
        """The share of prompts whose picture shows all they ask for, without the layers."""
        key = f"{len(self.prompts)} " + " ".join(sorted(names))
        if key not in self.accuracies:
            with removed(self.pipe.unet, names):
                self._keep(key, self._share_right())
        return self.accuracies[key]

    def healed(self, names: Sequence[str]) -> tuple[float, float]:
        """Joint output loss and accuracy without the layers, with corrections in their places."""
        unet, samples = self.pipe.unet, self.joint.samples
        student = with_corrections(unet, names, fit(unet, names, samples)[0])
        key = f"{len(self.prompts)} healed " + " ".join(sorted(names))
        if key not in self.accuracies:
            self.pipe.register_modules(unet=student)
            self._keep(key, self._share_right())
            self.pipe.register_modules(unet=unet)
        return samples.loss(student), self.accuracies[key]

    def _share_right(self) -> float:
        pictures = draw_prompts(self.pipe, self.prompts, Sampling(25))
        return judge(pictures, self.prompts)["prompt_accuracy"]

    def _keep(self, key: str, accuracy: float) -> None:
        self.accuracies[key] = accuracy
        with self.log.open("a", encoding="utf-8") as file:
            file.write(json.dumps([key, accuracy]) + "\n")


def compare(folder: Path, prompts: int) -> CriteriaDocument:
    """Measure everything; `folder` keeps what is finished."""
    scores = {criterion: _score(folder, criterion) for criterion in CRITERIA}
    losses, measured = scores["output-loss"], Measurements(folder, prompts)
    plans = _plans(scores, measured.joint)
    say(f"{len(plans)} plans")
    judged = [
        JudgedPlan(
            by=by,
            ratio=ratio,
            removed=len(names),
            params=_params_left(losses, names),
            loss=measured.loss(names),
            accuracy=measured.accuracy(names),
        )
        for (by, ratio), names in track(plans.items(), "plans", len(plans))
    ]
    for ratio in RATIOS:
        loss, accuracy = measured.healed(plans["output-loss", ratio])
        judged.append(JudgedPlan(by=HEALED, ratio=ratio, loss=loss, accuracy=accuracy))
    sets = random_sets(losses, SETS)
    joint = [measured.loss(names) for _, names in track(sets, "sets", len(sets))]
    return CriteriaDocument(
        model=MODEL,
        prompts=prompts,
        teacher_accuracy=measured.accuracy([]),
        plans=tuple(judged),
        additivity={name: report(scored, sets, joint) for name, scored in scores.items()},
        races=tuple(_races(folder / "output-loss", measured)),
    )


def _score(folder: Path, criterion: str) -> Scores:
    say(f"score by {criterion}")
    is_slow = criterion == "latent-statistics"  # samples whole pictures for every layer
    steps, prompts = (10, 8) if is_slow else (25, 32)
    config = ScoreConfig(criterion=criterion, samples=128, batch_size=64, steps=steps)
    return Scores.read(
        score(MODEL, folder / criterion, config, calibration_prompts(MODEL, prompts))
    )


def _plans(scores: Mapping[str, Scores], joint: JointLoss) -> dict[tuple[str, float], list[str]]:
    """The layers that each way of choosing drops at each ratio."""
    losses = scores["output-loss"]
    anatomy, plans = losses.anatomy, {}
    for ratio in RATIOS:
        config = PlanConfig(ratio=ratio)
        for criterion, scored in scores.items():
            plans[criterion, ratio] = [u.name for u in choose(scored, config)]
        first, rules = plans["output-loss", ratio], conditions(anatomy, config, 4)
        plans[REFINED, ratio] = refined(joint, losses, rules, first, EVALUATIONS)[0]
        units, params = anatomy.units, anatomy.params
        for family in FAMILIES:
            plans[f"by hand: {family}", ratio] = handmade(family, units, ratio, params)
        for seed in range(RANDOM_PLANS):
            plans[f"random {seed}", ratio] = random_set(units, ratio * params, seed)
    return plans


def _params_left(scores: Scores, names: Sequence[str]) -> float:
    """The share of parameters without the layers."""
    gone = sum(unit.params for unit in scores.units if unit.name in set(names))
    return 1 - gone / scores.base.params


def _races(folder: Path, measured: Measurements) -> list[RaceResult]:
    """Replay races on the rows of a whole scoring, in ten orders, against the plan of all rows.

    Forwards are counted as `score` counts them: a walk of each batch for the units still running.
    """
    anatomy = anatomy_of(loading.empty_unet(MODEL), context_length(MODEL))
    values = load_file(folder / "values.safetensors")["values"]  # (units, rows)
    scores, params = values.mean(1), [u.params for u in anatomy.units]
    index = {u.name: i for i, u in enumerate(anatomy.units)}
    implied = [(index[i], [index[j] for j in js]) for i, js in implications(anatomy, "any")]
    batches = [slice(i, i + RACE_BATCH) for i in range(0, values.shape[1], RACE_BATCH)]
    all_forwards, races = forwards_in_all(anatomy, values, batches), []

    def loss(chosen: Iterable[int]) -> float:
        return measured.loss(anatomy.units[i].name for i in chosen)

    for ratio in RATIOS:
        least = ratio * anatomy.params
        best = solve(scores.tolist(), [(params, least)], implied)
        for seed in range(ORDERS):
            order = np.random.default_rng(seed).permutation(values.shape[1])
            seen = replay(anatomy.units, values[:, order], least, RACE_BATCH)
            chosen = solve(np.nanmean(seen, axis=1).tolist(), [(params, least)], implied)
            races.append(
                RaceResult(
                    ratio=ratio,
                    seed=seed,
                    spent=forwards_in_all(anatomy, seen, batches) / all_forwards,
                    same_plan=set(chosen) == set(best),
                    excess_sum=float(scores[chosen].sum() / scores[best].sum() - 1),
                    excess_loss=loss(chosen) / loss(best) - 1,
                )
            )
    return races


def as_markdown(study: CriteriaDocument) -> str:
    """The tables of docs/explanation/appendix.md."""
    tables = (
        _plan_table(_random_as_one(study.plans)),
        _additivity_table(study.additivity),
        _race_table(study.races),
    )
    return "\n\n".join(tables) + "\n"


def _random_as_one(plans: Sequence[JudgedPlan]) -> list[JudgedPlan]:
    """The plans, with one name for the random ones of all seeds."""
    name = f"random ({RANDOM_PLANS} seeds)"
    return [replace(p, by=name) if p.by.startswith("random ") else p for p in plans]


def _plan_table(plans: Sequence[JudgedPlan]) -> str:
    by_name: dict[str, list[JudgedPlan]] = {}
    for plan in plans:
        by_name.setdefault(plan.by, []).append(plan)
    ratios = sorted({plan.ratio for plan in plans})
    header = [f"{r:.0%}: {measure}" for r in ratios for measure in ("loss", "accuracy")]
    rows = [
        [by, *(cell for r in ratios for cell in _cells([p for p in same if p.ratio == r]))]
        for by, same in by_name.items()
    ]
    return table(["layers chosen by", *header], rows)


def _cells(plans: Sequence[JudgedPlan]) -> list[str]:
    """Loss and accuracy; of several plans the median, and the range."""
    losses, accuracies = [p.loss for p in plans], [p.accuracy for p in plans]
    if len(plans) == 1:
        return [f"{losses[0]:.1e}", f"{accuracies[0]:.2f}"]
    return [
        f"{np.median(losses):.1e} ({min(losses):.1e} to {max(losses):.1e})",
        f"{np.median(accuracies):.2f} ({min(accuracies):.2f} to {max(accuracies):.2f})",
    ]


def _additivity_table(reports: Mapping[str, Additivity]) -> str:
    ratios = list(next(iter(reports.values())).by_ratio)
    heads = [f"Pearson at {float(r):.0%}" for r in ratios]
    rows = []
    for criterion, sums in reports.items():
        values = [sums.all.pearson_log, sums.all.spearman, sums.all.slope_log]
        values += [sums.by_ratio[r].pearson_log for r in ratios]
        rows.append([criterion, *(f"{value:.2f}" for value in values)])
    return table(["sums of scores by", "Pearson", "Spearman", "slope", *heads], rows)


def _race_table(races: Sequence[RaceResult]) -> str:
    header = ("race for", "forwards spent", "same plan", "most excess of the sum")
    rows = []
    for ratio in sorted({race.ratio for race in races}):
        same = [race for race in races if race.ratio == ratio]
        spent = [race.spent for race in same]
        rows.append(
            [
                f"{ratio:.0%}",
                f"{np.mean(spent):.0%} ({min(spent):.0%} to {max(spent):.0%})",
                f"{sum(race.same_plan for race in same)} of {len(same)}",
                f"{max(race.excess_sum for race in same):.1%}",
                f"{max(race.excess_loss for race in same):.1%}",
            ]
        )
    return table([*header, "of the joint loss"], rows)


def main() -> None:
    """Run the study and write its results."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder; goes on if it can")
    parser.add_argument("--prompts", type=int, default=200, help="pictures for each accuracy")
    arguments = parser.parse_args()
    out = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    study = compare(out, arguments.prompts)
    study.write(out / "rivals.json")
    (out / "rivals.md").write_text(as_markdown(study), encoding="utf-8")
    additivity_chart(study.additivity["output-loss"], out / "additivity")
    rivals_chart([plan.as_json() for plan in _random_as_one(study.plans)], out / "rivals")
    print(as_markdown(study))


if __name__ == "__main__":
    main()
