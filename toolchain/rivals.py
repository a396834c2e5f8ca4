"""The paper's criterion beside its rivals: `python -m laptop.rivals -o runs/rivals`.

For each criterion and pruning ratio: the joint output loss of the layers it drops, and what is left
of the prompt accuracy, before any retraining; with them a plan made by hand and random plans. And
whether losses add up: over random sets of layers, the sum of their own scores against the joint
loss. Writes rivals.json, rivals.md and additivity.svg; docs/results.md is made of them.
"""

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file
from scipy.stats import pearsonr, spearmanr

from laptop import models
from laptop.benchmarks.figures import additivity_chart
from laptop.benchmarks.quality import EvalConfig, draw
from laptop.prompts import calibration_prompts, evaluation_prompts
from laptop.pruning import calibration
from laptop.pruning.budgets import PlanConfig, implications
from laptop.pruning.criteria import output_loss
from laptop.pruning.knapsack import solve
from laptop.pruning.plan import (
    as_anatomy,
    choose,
    predicted_loss,
    read_scores,
)
from laptop.pruning.race import replay
from laptop.pruning.score import ScoreConfig, forwards_in_all, score
from laptop.pruning.units import Unit, anatomy, removed
from laptop.run import say, track, write_json
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
RANDOM_SETS = 60
RACE_BATCH = 8
MODEL = "tiny-sdxl"


def by_hand(units: Sequence[Unit], ratio: float, params: int) -> list[str]:
    """A plan as BK-SDM's authors made theirs, until `ratio` of `params` is gone.

    The mid block, then the second resnet and attention of the down blocks, the middle ones of the
    up blocks, and the last ones of the up blocks; the innermost block first.
    """
    groups = ["mid_block."]
    groups += [f"down_blocks.{i}.{kind}.1" for i in (2, 1, 0) for kind in ("resnets", "attentions")]
    for place in (1, 2):
        groups += [
            f"up_blocks.{i}.{kind}.{place}" for i in (0, 1, 2) for kind in ("resnets", "attentions")
        ]
    gone: list[Unit] = []
    for group in groups:
        if sum(u.params for u in gone) >= ratio * params:
            break
        gone += [u for u in units if f"{u.name}.".startswith(group)]
    return [u.name for u in gone]


class Study:
    """The calibrated model, and a file of what has been measured."""

    def __init__(self, folder: Path, prompts: int):
        self.folder, self.log = folder, folder / "measured.jsonl"
        self.pipe = models.load_pipeline(MODEL)
        self.prompts = evaluation_prompts(MODEL, prompts)
        self.rows, self.output = calibration.load(folder / "output-loss/calibration.safetensors")
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        self.known: dict[str, float] = dict(json.loads(line) for line in lines)

    def _keep(self, key: str, value: float) -> float:
        self.known[key] = value
        with self.log.open("a") as file:
            file.write(json.dumps([key, value]) + "\n")
        return value

    def joint_loss(self, names: Iterable[str]) -> float:
        """Output loss of removing all of them."""
        key = "loss " + " ".join(sorted(names))
        if key in self.known:
            return self.known[key]
        return self._keep(key, output_loss(self.pipe.unet, list(names), self.rows, self.output))

    def accuracy(self, names: Iterable[str]) -> float:
        """Share of prompts whose picture shows all that was asked for."""
        key = f"accuracy {len(self.prompts)} " + " ".join(sorted(names))
        if key in self.known:
            return self.known[key]
        config, images = EvalConfig(), []
        with removed(self.pipe.unet, names):
            for start in range(0, len(self.prompts), config.batch):
                numbers = range(start, min(start + config.batch, len(self.prompts)))
                images += list(draw(self.pipe, self.prompts, numbers, config)[0])
        return self._keep(key, judge(images, self.prompts)["prompt_accuracy"])


def random_plan(units: Sequence[Unit], ratio: float, params: int, seed: int) -> list[str]:
    """Layers in random order until `ratio` of `params` is gone; shells only after their content."""
    gone: list[Unit] = []
    for i in np.random.default_rng(seed).permutation(len(units)):
        if sum(u.params for u in gone) >= ratio * params:
            break
        if not units[i].needs:
            gone.append(units[i])
    return [u.name for u in gone]


def compare(folder: Path, prompts: int) -> dict[str, Any]:
    """Everything that is asked, as one JSON document."""
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
        scores[criterion] = read_scores(out / "scores.json")
    study = Study(folder, prompts)
    plans = _plans(scores)
    say(f"{len(plans)} plans")
    rows = [
        {
            "by": by,
            "ratio": ratio,
            "removed": len(names),
            "params": _share(scores["output-loss"], names),
            "loss": study.joint_loss(names),
            "accuracy": None if by.startswith("random") else study.accuracy(names),
        }
        for (by, ratio), names in track(plans.items(), "plans", len(plans))
    ]
    return {
        "schema": "laptop.rivals/1",
        "model": MODEL,
        "prompts": prompts,
        "teacher_accuracy": study.accuracy([]),
        "plans": rows,
        "additivity": _additivity(study, scores),
        "races": _races(folder / "output-loss"),
    }


def _plans(scores: Mapping[str, Mapping[str, Any]]) -> dict[tuple[str, float], list[str]]:
    one = scores["output-loss"]
    units, params = as_anatomy(one).units, one["base"]["params"]
    plans = {}
    for ratio in RATIOS:
        for criterion, found in scores.items():
            plans[criterion, ratio] = [u.name for u in choose(found, PlanConfig(ratio=ratio))]
        plans["by hand", ratio] = by_hand(units, ratio, params)
        for seed in range(RANDOM_PLANS):
            plans[f"random {seed}", ratio] = random_plan(units, ratio, params, seed)
    return plans


def _share(scores: Mapping[str, Any], names: Sequence[str]) -> float:
    gone = sum(u["params"] for u in scores["units"] if u["name"] in set(names))
    return float(1 - gone / scores["base"]["params"])


def _additivity(study: Study, scores: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Random sets of layers: the sum of their own scores against the measured joint loss.

    Pearson's correlation and the slope are of logarithms, since losses span many decades; sums
    that are not positive have none and are left out.
    """
    one = scores["output-loss"]
    free = [u["name"] for u in one["units"] if not u["needs"]]
    rng = np.random.default_rng(0)
    sizes = rng.integers(2, len(free) * 3 // 4, RANDOM_SETS)
    sets = [sorted(rng.choice(free, size, replace=False).tolist()) for size in sizes]
    joint = [study.joint_loss(names) for names in track(sets, "sets", len(sets))]
    found = {}
    for criterion, document in scores.items():
        sums = [predicted_loss(document, names) for names in sets]
        x, y = np.log10([(s, j) for s, j in zip(sums, joint, strict=True) if s > 0]).T
        found[criterion] = {
            "pearson_log": float(pearsonr(x, y).statistic),
            "spearman": float(spearmanr(sums, joint).statistic),
            "slope_log": float(np.polyfit(x, y, 1)[0]),
            "sums": sums,
        }
    return {"sizes": sizes.tolist(), "joint": joint, "criteria": found}


def _races(folder: Path) -> list[dict[str, Any]]:
    """Races replayed on the rows of a whole scoring, in ten orders, beside the plan of all rows.

    Forwards are counted as `score` counts them: a walk of each batch for the units still running.
    """
    known = anatomy(models.empty_unet(MODEL), models.context_length(MODEL))
    values = load_file(folder / "values.safetensors")["values"]
    true, params = values.mean(1), [u.params for u in known.units]
    place = {u.name: i for i, u in enumerate(known.units)}
    implied = [(place[i], place[j]) for i, j in implications(known, "any")]
    batches = [slice(i, i + RACE_BATCH) for i in range(0, values.shape[1], RACE_BATCH)]
    full, races = forwards_in_all(known, values, batches), []
    for ratio in RATIOS:
        least = ratio * known.params
        wanted = solve(true.tolist(), [(params, least)], implied)
        for seed in range(10):
            order = np.random.default_rng(seed).permutation(values.shape[1])
            seen = replay(known.units, values[:, order], least, RACE_BATCH)
            found = solve(np.nanmean(seen, axis=1).tolist(), [(params, least)], implied)
            races.append(
                {
                    "ratio": ratio,
                    "seed": seed,
                    "spent": forwards_in_all(known, seen, batches) / full,
                    "same_plan": set(found) == set(wanted),
                    "excess_loss": float(true[found].sum() / true[wanted].sum() - 1),
                }
            )
    return races


def as_markdown(study: Mapping[str, Any]) -> str:
    """The tables of docs/results.md."""
    rows: dict[str, dict[float, list[Mapping[str, Any]]]] = {}
    for plan in study["plans"]:
        by = "random (10 seeds)" if plan["by"].startswith("random ") else plan["by"]
        rows.setdefault(by, {}).setdefault(plan["ratio"], []).append(plan)
    ratios = sorted({plan["ratio"] for plan in study["plans"]})
    lines = [
        "| layers chosen by | " + " | ".join(f"{r:.0%}: loss | accuracy" for r in ratios) + " |",
        "| --- |" + " --- |" * (2 * len(ratios)),
    ]
    for by, found in rows.items():
        cells = [cell for r in ratios for cell in _cells(found[r])]
        lines.append(f"| {by} | " + " | ".join(cells) + " |")
    lines += ["", "| sums of scores by | Pearson (logs) | Spearman | slope (logs) |"]
    lines.append("| --- | --- | --- | --- |")
    for criterion, c in study["additivity"]["criteria"].items():
        lines.append(
            f"| {criterion} | {c['pearson_log']:.2f} | {c['spearman']:.2f} | {c['slope_log']:.2f} |"
        )
    lines += ["", "| race for | forwards spent | same plan | most excess of the summed loss |"]
    lines.append("| --- | --- | --- | --- |")
    for ratio in ratios:
        races = [race for race in study["races"] if race["ratio"] == ratio]
        spent, excess = ([race[k] for race in races] for k in ("spent", "excess_loss"))
        same = sum(race["same_plan"] for race in races)
        lines.append(
            f"| {ratio:.0%} | {np.mean(spent):.0%} ({min(spent):.0%} to {max(spent):.0%}) | "
            f"{same} of {len(races)} | {max(excess):.1%} |"
        )
    return "\n".join(lines) + "\n"


def _cells(plans: Sequence[Mapping[str, Any]]) -> list[str]:
    losses = [plan["loss"] for plan in plans]
    spread = f" ({min(losses):.1e} to {max(losses):.1e})" if len(losses) > 1 else ""
    accuracy = plans[0]["accuracy"]
    return [
        f"{np.median(losses):.1e}{spread}",
        "—" if accuracy is None else f"{accuracy:.2f}",
    ]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder; goes on if it can")
    parser.add_argument("--prompts", type=int, default=200, help="pictures for each accuracy")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    study = compare(args.out, args.prompts)
    write_json(args.out / "rivals.json", study)
    (args.out / "rivals.md").write_text(as_markdown(study), encoding="utf-8")
    additivity_chart(study["additivity"], args.out / "additivity")
    print(as_markdown(study))


if __name__ == "__main__":
    main()
