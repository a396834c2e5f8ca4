"""Whether losses add up: choosing layers by a sum of scores assumes it (paper, section 3.2).

Random sets of layers at several pruning ratios: the sum of the layers' own scores against the
output loss of removing them together. It serves for sums of any criterion; the joint loss is the
same.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy.stats import pearsonr, spearmanr

from laptop.console import progress
from laptop.errors import BadInput
from laptop.models import locating
from laptop.pruning.calibration import CALIBRATION
from laptop.pruning.plan import joint_loss, read_checked, read_samples
from laptop.pruning.scores import Additivity, Agreement, LayerSet, Scores, Unit, scores_file
from laptop.run import Overwrite, run_stage

RATIOS = (0.1, 0.3, 0.5, 0.7)


def make_additivity(
    scores_path: Path, out: Path, count: int, *, seed: int = 0, overwrite: Overwrite = False
) -> Path:
    """Write the report for `count` sets at each of `RATIOS` that can be reached, as JSON."""
    scores_path = scores_file(scores_path)
    scores = read_checked(scores_path)
    if scores.race is not None:
        raise BadInput(
            f"{scores_path} is of a race, which does not score all layers on all samples. Score "
            "without --race to see whether losses add up."
        )
    samples = read_samples(scores, scores_path)

    def work(folder: Path) -> None:
        joint = joint_loss(scores, samples, folder, str(scores_path))
        sets = random_sets(scores, count, seed)
        with progress("additivity", len(sets)) as advance:
            losses = joint([frozenset(names) for _, names in sets], advance)
        measured = [losses[frozenset(names)] for _, names in sets]
        report(scores, sets, measured).write(folder / out.name)

    inputs, identity = locating.identity("model", scores.model)
    inputs |= {"scores": scores_path, "calibration": scores_path.parent / CALIBRATION}
    settings = {"count": count, "seed": seed} | identity
    return run_stage("additivity", out, settings, inputs, work, overwrite=overwrite)


def random_sets(scores: Scores, count: int, seed: int = 0) -> list[tuple[float, list[str]]]:
    """(ratio, names): `count` random sets that reach each ratio that can be reached."""
    anatomy = scores.anatomy
    return [
        (ratio, random_set(anatomy.units, ratio * anatomy.params, [seed, i, round(1000 * ratio)]))
        for ratio in RATIOS
        if ratio * anatomy.params <= sum(u.params for u in anatomy.units if not u.needs)
        for i in range(count)
    ]


def random_set(
    units: Sequence[Unit], least: float, seed: int | Sequence[int], *, with_shells: bool = False
) -> list[str]:
    """Layers in random order until `least` parameters are gone; a shell goes with its content."""
    by_name = {unit.name: unit for unit in units}
    gone: dict[str, Unit] = {}
    for i in np.random.default_rng(seed).permutation(len(units)):
        if sum(unit.params for unit in gone.values()) >= least:
            break
        if with_shells or not units[i].needs:
            gone |= {name: by_name[name] for name in (units[i].name, *units[i].needs)}
    return list(gone)


def report(
    scores: Scores, sets: Sequence[tuple[float, list[str]]], joint: Sequence[float]
) -> Additivity:
    """Every set with its summed scores and joint loss, and how these agree."""
    rows = tuple(
        LayerSet(ratio=ratio, remove=tuple(names), sum=scores.predicted_loss(names), joint=loss)
        for (ratio, names), loss in zip(sets, joint, strict=True)
    )
    of_ratio = {r: [row for row in rows if row.ratio == r] for r in RATIOS}
    return Additivity(
        model=scores.model,
        criterion=scores.criterion,
        all=agreement(rows),
        by_ratio={str(ratio): agreement(some) for ratio, some in of_ratio.items() if some},
        sets=rows,
    )


def agreement(sets: Sequence[LayerSet]) -> Agreement:
    """Pearson's correlation and the slope, of logarithms since losses span many decades; Spearman.

    Sums that are not positive have no logarithm and are left out. None where there are fewer than
    three sets, or all sums are equal.
    """
    positive = [(s.sum, s.joint) for s in sets if s.sum > 0 and s.joint > 0]
    if len(positive) < 3 or len({total for total, _ in positive}) == 1:
        return Agreement()
    x, y = np.log10(positive).T
    return Agreement(
        pearson_log=float(pearsonr(x, y).statistic),
        spearman=float(spearmanr([s.sum for s in sets], [s.joint for s in sets]).statistic),
        slope_log=float(np.polyfit(x, y, 1)[0]),
    )
