"""Whether losses add up: the claim on which choosing layers by a sum rests (paper, section 3.2).

Random sets of layers at several pruning ratios: the sum of the layers' own scores beside the output
loss of removing them together. Sums of any criterion can be judged so; the joint loss is the same.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import pearsonr, spearmanr

from laptop.console import progress
from laptop.errors import BadInput
from laptop.files import write_json
from laptop.models import locating
from laptop.pruning.plan import (
    as_anatomy,
    joint_loss,
    predicted_loss,
    read_checked,
    read_samples,
    scores_file,
)
from laptop.pruning.score import CALIBRATION
from laptop.pruning.units import Unit
from laptop.run import Overwrite, run_stage

SCHEMA = "laptop.additivity/1"
RATIOS = (0.1, 0.3, 0.5, 0.7)


def make_additivity(
    scores_path: Path, out: Path, count: int, *, seed: int = 0, overwrite: Overwrite = False
) -> Path:
    """Write the report for `count` sets at each of `RATIOS` that can be reached, as JSON."""
    scores_path = scores_file(scores_path)
    scores = read_checked(scores_path)
    if scores.get("race") is not None:
        raise BadInput(
            f"{scores_path} is of a race, which does not score all layers on all samples. Score "
            "without --race to see whether losses add up."
        )
    samples = read_samples(scores_path, scores["model"])

    def work(folder: Path) -> None:
        joint = joint_loss(scores, samples, folder, str(scores_path))
        sets = random_sets(scores, count, seed)
        with progress("additivity", len(sets)) as advance:
            losses = joint([frozenset(names) for _, names in sets], advance)
        measured = [losses[frozenset(names)] for _, names in sets]
        write_json(folder / out.name, report(scores, sets, measured))

    inputs, which = locating.identity("model", scores["model"])
    inputs |= {"scores": scores_path, "calibration": scores_path.parent / CALIBRATION}
    settings = {"count": count, "seed": seed} | which
    return run_stage("additivity", out, settings, inputs, work, overwrite=overwrite)


def random_sets(
    scores: Mapping[str, Any], count: int, seed: int = 0
) -> list[tuple[float, list[str]]]:
    """(ratio, names): `count` random sets that reach each ratio that can be reached."""
    known = as_anatomy(scores)
    return [
        (ratio, random_set(known.units, ratio * known.params, [seed, i, round(1000 * ratio)]))
        for ratio in RATIOS
        if ratio * known.params <= sum(u.params for u in known.units if not u.needs)
        for i in range(count)
    ]


def random_set(units: Sequence[Unit], least: float, seed: int | Sequence[int]) -> list[str]:
    """Layers in random order until `least` parameters are gone; no shells."""
    gone: list[Unit] = []
    for i in np.random.default_rng(seed).permutation(len(units)):
        if sum(u.params for u in gone) >= least:
            break
        if not units[i].needs:
            gone.append(units[i])
    return [u.name for u in gone]


def report(
    scores: Mapping[str, Any], sets: Sequence[tuple[float, list[str]]], joint: Sequence[float]
) -> dict[str, Any]:
    """The document: every set with its summed scores and joint loss, and how these agree."""
    sums = [predicted_loss(scores, names) for _, names in sets]
    rows = [
        {"ratio": ratio, "remove": names, "sum": s, "joint": j}
        for (ratio, names), s, j in zip(sets, sums, joint, strict=True)
    ]
    by_ratio = {
        str(ratio): agreement(*_columns([row for row in rows if row["ratio"] == ratio]))
        for ratio in RATIOS
        if any(row["ratio"] == ratio for row in rows)
    }
    return {
        "schema": SCHEMA,
        "model": scores["model"],
        "criterion": scores.get("criterion", "output-loss"),
        "all": agreement(sums, joint),
        "by_ratio": by_ratio,
        "sets": rows,
    }


def _columns(rows: Sequence[Mapping[str, Any]]) -> tuple[list[float], list[float]]:
    return [row["sum"] for row in rows], [row["joint"] for row in rows]


def agreement(sums: Sequence[float], joint: Sequence[float]) -> dict[str, float | None]:
    """Pearson's correlation and the slope, of logarithms since losses span many decades; Spearman.

    Sums that are not positive have no logarithm and are left out. None where there are fewer than
    three sets, or all sums are equal.
    """
    positive = [(s, j) for s, j in zip(sums, joint, strict=True) if s > 0 and j > 0]
    if len(positive) < 3 or len({s for s, _ in positive}) == 1:
        return {"pearson_log": None, "spearman": None, "slope_log": None}
    x, y = np.log10(positive).T
    return {
        "pearson_log": float(pearsonr(x, y).statistic),
        "spearman": float(spearmanr(sums, joint).statistic),
        "slope_log": float(np.polyfit(x, y, 1)[0]),
    }
