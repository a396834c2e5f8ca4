"""Compare the paper's criterion with its rivals: `python -m laptop.studies.criteria_study`.

For each criterion and pruning ratio: the joint output loss of the layers it drops, and what is left
of the prompt accuracy, before any retraining; with them a refined plan, a healed one, plans made by
hand and random ones. And whether losses add up, and what racing costs. Writes rivals.json and
rivals.md, and as pictures rivals.svg and additivity.svg; docs/explanation/appendix.md is made of
them.
"""

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from laptop.benchmarks.quality import draw
from laptop.benchmarks.report.figures import additivity_chart, rivals_chart
from laptop.benchmarks.settings import EvalConfig
from laptop.console import say, track
from laptop.files import write_json
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
from laptop.records import read_lines
from laptop.studies.handmade import FAMILIES, handmade
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
MODEL = "tiny-sdxl"


class Study:
    """The calibrated model, and files of what has been measured."""

    def __init__(self, folder: Path, prompts: int):
        self.log = folder / "accuracy.jsonl"
        self.pipe = loading.load_pipeline(MODEL)
        self.prompts = evaluation_prompts(MODEL, prompts)
        samples = Calibration.read(folder / "output-loss" / CALIBRATION, 64)
        self.joint = JointLoss(self.pipe.unet, samples, folder / "joint.jsonl")
        self.known = dict(read_lines(self.log, tuple[str, float])) if self.log.exists() else {}

    def loss(self, names: Iterable[str]) -> float:
        """Output loss of removing all of them."""
        one = frozenset(names)
        return self.joint([one])[one]

    def accuracy(self, names: Iterable[str]) -> float:
        """Share of prompts whose picture shows all that was asked for, without the layers."""
        key = f"{len(self.prompts)} " + " ".join(sorted(names))
        if key not in self.known:
            with removed(self.pipe.unet, names):
                self._keep(key, self._share_right())
        return self.known[key]

    def healed(self, names: Sequence[str]) -> tuple[float, float]:
        """Joint output loss and accuracy without the layers, with corrections in their places."""
        samples, whole = self.joint.samples, self.pipe.unet
        student = with_corrections(whole, names, fit(whole, names, samples)[0])
        key = f"{len(self.prompts)} healed " + " ".join(sorted(names))
        if key not in self.known:
            self.pipe.register_modules(unet=student)
            self._keep(key, self._share_right())
            self.pipe.register_modules(unet=whole)
        return samples.loss(student), self.known[key]

    def _share_right(self) -> float:
        config, sampling, images = EvalConfig(), Sampling(25), []
        for start in range(0, len(self.prompts), config.batch):
            numbers = range(start, min(start + config.batch, len(self.prompts)))
            images += list(draw(self.pipe, self.prompts, numbers, sampling, config.seed)[0])
        return float(judge(images, self.prompts)["prompt_accuracy"])

    def _keep(self, key: str, value: float) -> None:
        self.known[key] = value
        with self.log.open("a", encoding="utf-8") as file:
            file.write(json.dumps([key, value]) + "\n")


def compare(folder: Path, prompts: int) -> dict[str, Any]:
    """Everything that is asked, as one document; its additivity reports are records."""
    scores = {}
    for criterion in CRITERIA:
        say(f"score by {criterion}")
        few = criterion == "latent-statistics"  # samples whole pictures for every layer
        out = score(
            MODEL,
            folder / criterion,
            ScoreConfig(criterion=criterion, samples=128, batch_size=64, steps=10 if few else 25),
            calibration_prompts(MODEL, 8 if few else 32),
        )
        scores[criterion] = Scores.read(out)
    study = Study(folder, prompts)
    plans = _plans(scores, study.joint)
    say(f"{len(plans)} plans")
    rows: list[dict[str, Any]] = [
        {
            "by": by,
            "ratio": ratio,
            "removed": len(names),
            "params": _share(scores["output-loss"], names),
            "loss": study.loss(names),
            "accuracy": study.accuracy(names),
        }
        for (by, ratio), names in track(plans.items(), "plans", len(plans))
    ]
    for ratio in RATIOS:
        loss, accuracy = study.healed(plans["output-loss", ratio])
        rows.append({"by": HEALED, "ratio": ratio, "loss": loss, "accuracy": accuracy})
    sets = random_sets(scores["output-loss"], SETS)
    joint = [study.loss(names) for _, names in track(sets, "sets", len(sets))]
    return {
        "schema": "laptop.rivals/1",
        "model": MODEL,
        "prompts": prompts,
        "teacher_accuracy": study.accuracy([]),
        "plans": rows,
        "additivity": {name: report(scored, sets, joint) for name, scored in scores.items()},
        "races": _races(folder / "output-loss", study),
    }


def _plans(scores: Mapping[str, Scores], joint: JointLoss) -> dict[tuple[str, float], list[str]]:
    """What each way of choosing drops at each ratio."""
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


def _share(scores: Scores, names: Sequence[str]) -> float:
    gone = sum(unit.params for unit in scores.units if unit.name in set(names))
    return 1 - gone / scores.base.params


def _races(folder: Path, study: Study) -> list[dict[str, Any]]:
    """Races replayed on the rows of a whole scoring, in ten orders, beside the plan of all rows.

    Forwards are counted as `score` counts them: a walk of each batch for the units still running.
    """
    anatomy = anatomy_of(loading.empty_unet(MODEL), context_length(MODEL))
    values = load_file(folder / "values.safetensors")["values"]
    true, params = values.mean(1), [u.params for u in anatomy.units]
    place = {u.name: i for i, u in enumerate(anatomy.units)}
    implied = [(place[i], [place[j] for j in js]) for i, js in implications(anatomy, "any")]
    batches = [slice(i, i + RACE_BATCH) for i in range(0, values.shape[1], RACE_BATCH)]
    full, races = forwards_in_all(anatomy, values, batches), []

    def loss(chosen: Iterable[int]) -> float:
        return study.loss(anatomy.units[i].name for i in chosen)

    for ratio in RATIOS:
        least = ratio * anatomy.params
        wanted = solve(true.tolist(), [(params, least)], implied)
        for seed in range(10):
            order = np.random.default_rng(seed).permutation(values.shape[1])
            seen = replay(anatomy.units, values[:, order], least, RACE_BATCH)
            found = solve(np.nanmean(seen, axis=1).tolist(), [(params, least)], implied)
            races.append(
                {
                    "ratio": ratio,
                    "seed": seed,
                    "spent": forwards_in_all(anatomy, seen, batches) / full,
                    "same_plan": set(found) == set(wanted),
                    "excess_sum": float(true[found].sum() / true[wanted].sum() - 1),
                    "excess_loss": loss(found) / loss(wanted) - 1,
                }
            )
    return races


def as_markdown(study: Mapping[str, Any]) -> str:
    """The tables of docs/explanation/appendix.md."""
    rows: dict[str, dict[float, list[Mapping[str, Any]]]] = {}
    for plan in _named(study["plans"]):
        rows.setdefault(plan["by"], {}).setdefault(plan["ratio"], []).append(plan)
    ratios = sorted({plan["ratio"] for plan in study["plans"]})
    lines = [
        "| layers chosen by | " + " | ".join(f"{r:.0%}: loss | accuracy" for r in ratios) + " |",
        "| --- |" + " --- |" * (2 * len(ratios)),
    ]
    for by, found in rows.items():
        cells = [cell for r in ratios for cell in _cells(found[r])]
        lines.append(f"| {by} | " + " | ".join(cells) + " |")
    lines += ["", *_additivity_table(study["additivity"]), "", *_race_table(study["races"])]
    return "\n".join(lines) + "\n"


def _named(plans: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The plans, those by chance under one name."""
    chance = f"random ({RANDOM_PLANS} seeds)"
    return [{**p, "by": chance if p["by"].startswith("random ") else p["by"]} for p in plans]


def _additivity_table(reports: Mapping[str, Additivity]) -> list[str]:
    within = list(next(iter(reports.values())).by_ratio)
    heads = [f"Pearson at {float(r):.0%}" for r in within]
    lines = [
        "| " + " | ".join(["sums of scores by", "Pearson", "Spearman", "slope", *heads]) + " |"
    ]
    lines.append("| --- |" + " --- |" * (3 + len(within)))
    for criterion, sums in reports.items():
        values = [sums.all.pearson_log, sums.all.spearman, sums.all.slope_log]
        values += [sums.by_ratio[r].pearson_log for r in within]
        lines.append(f"| {criterion} | " + " | ".join(f"{v:.2f}" for v in values) + " |")
    return lines


def _race_table(races: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [
        "| race for | forwards spent | same plan | most excess of the sum | of the joint loss |",
        "| --- | --- | --- | --- | --- |",
    ]
    for ratio in sorted({race["ratio"] for race in races}):
        some = [race for race in races if race["ratio"] == ratio]
        spent = [race["spent"] for race in some]
        same = sum(race["same_plan"] for race in some)
        cells = [
            f"{np.mean(spent):.0%} ({min(spent):.0%} to {max(spent):.0%})",
            f"{same} of {len(some)}",
            *(f"{max(race[k] for race in some):.1%}" for k in ("excess_sum", "excess_loss")),
        ]
        lines.append(f"| {ratio:.0%} | " + " | ".join(cells) + " |")
    return lines


def _cells(plans: Sequence[Mapping[str, Any]]) -> list[str]:
    """Loss and accuracy; of several plans the median, and the range."""
    losses, shares = [p["loss"] for p in plans], [p["accuracy"] for p in plans]
    if len(plans) == 1:
        return [f"{losses[0]:.1e}", f"{shares[0]:.2f}"]
    return [
        f"{np.median(losses):.1e} ({min(losses):.1e} to {max(losses):.1e})",
        f"{np.median(shares):.2f} ({min(shares):.2f} to {max(shares):.2f})",
    ]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder; goes on if it can")
    parser.add_argument("--prompts", type=int, default=200, help="pictures for each accuracy")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    study = compare(args.out, args.prompts)
    reports = {name: sums.as_json() for name, sums in study["additivity"].items()}
    write_json(args.out / "rivals.json", study | {"additivity": reports})
    (args.out / "rivals.md").write_text(as_markdown(study), encoding="utf-8")
    additivity_chart(study["additivity"]["output-loss"], args.out / "additivity")
    rivals_chart(_named(study["plans"]), args.out / "rivals")
    print(as_markdown(study))


if __name__ == "__main__":
    main()
