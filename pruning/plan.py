"""Choose the layers to drop: exactly by their scores (`knapsack`), then refined by measured losses.

The solver adds scores; layers that make up for each other are worth more together than their sum.
So refinement measures neighbours of the plan (one layer put back, with or without another one
dropped for it), the most promising by their sums first. The best one that is better becomes the
plan. It cannot end worse than it began.
"""

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from laptop import processes
from laptop.console import progress
from laptop.errors import BadInput, Infeasible
from laptop.models import loading, locating
from laptop.pruning.budgets import Conditions, bytes_each, check_config, conditions, with_default
from laptop.pruning.latency_table import NS, with_latencies
from laptop.pruning.plan_file import CostChange, LatencyChange, Menu, MenuPoint, Plan
from laptop.pruning.scores import Anatomy, Scores, Unit, scores_file
from laptop.pruning.settings import PlanConfig
from laptop.run import Overwrite, run_stage
from laptop.unfinished import resume_folder

if TYPE_CHECKING:
    from laptop.pruning.calibration import Calibration
    from laptop.pruning.joint import JointLoss


def choose(scores: Scores, config: PlanConfig, bytes_each: int = 4) -> list[Unit]:
    """The layers to drop, in the order in which they run."""
    return _cheapest(scores, with_latencies(scores.anatomy, config), config, bytes_each)


def _cheapest(scores: Scores, anatomy: Anatomy, config: PlanConfig, bytes_each: int) -> list[Unit]:
    from laptop.pruning.knapsack import solve

    c = conditions(anatomy, config, bytes_each)
    chosen = solve([unit.score for unit in scores.units], c.savings, c.implied, c.stay)
    return [anatomy.units[i] for i in chosen]


def make_plan(
    scores_path: Path, out: Path, config: PlanConfig, *, overwrite: Overwrite = False
) -> Path:
    """Write plan.json from scores.json; the joint loss is measured on the scores' own samples."""
    scores_path, config = scores_file(scores_path), with_default(config)
    scores = Scores.read(scores_path)
    model, anatomy = scores.model, with_latencies(scores.anatomy, config)
    check_config(config, anatomy, model)
    check_race(scores.race, config, str(scores_path))
    from laptop.pruning.calibration import CALIBRATION  # imports torch: after what JSON decides

    check_network(scores, scores_path)
    each = bytes_each(config, model)
    samples = read_samples(scores, scores_path)

    def work(folder: Path) -> None:
        joint = joint_loss(scores, samples, folder, str(scores_path))
        names = [u.name for u in _cheapest(scores, anatomy, config, each)]
        measured, one_shot, unrestricted = joint([frozenset(names)])[frozenset(names)], None, None
        if config.refine:
            one_shot, rules = measured, conditions(anatomy, config, each)
            names, measured = refined(joint, scores, rules, names, config.refine)
        plan = as_plan(model, anatomy, names, asdict(config))
        if config.expressible != "any":
            if not plan.stock_config:
                raise RuntimeError(f"a plan for {config.expressible} that no stock config can say")
            free = _cheapest(scores, anatomy, replace(config, expressible="any"), each)
            unrestricted = scores.predicted_loss([u.name for u in free])
        replace(
            plan,
            sampling=scores.sampling,
            solver="scipy.optimize.milp (HiGHS), optimal",
            measured_loss=measured,
            one_shot_loss=one_shot,
            predicted_loss=scores.predicted_loss(names),
            unrestricted_predicted_loss=unrestricted,
        ).write(folder / out.name)

    inputs, identity = locating.identity("model", model)
    inputs |= {"scores": scores_path, "calibration": scores_path.parent / CALIBRATION}
    if config.latency_table is not None:
        inputs["latency_table"] = Path(config.latency_table)
    settings = asdict(config) | identity
    return run_stage("plan", out, settings, inputs, work, overwrite=overwrite)


def read_samples(scores: Scores, scores_path: Path) -> "Calibration":
    """The calibration next to scores.json, checked against the model by its shapes."""
    from laptop.pruning.calibration import CALIBRATION, Calibration

    path = scores_path.parent / CALIBRATION
    samples = Calibration.read(path, scores.batch_size)
    samples.check_shapes(loading.empty_unet(scores.model), str(path))
    return samples


def joint_loss(scores: Scores, samples: "Calibration", folder: Path, where: str) -> "JointLoss":
    """Joint losses of the scored model on its own samples, kept in the stage's `folder`.

    Raises `BadInput` when the model does not give the recorded output.
    """
    import torch
    from torch import nn

    from laptop.pruning.joint import JointLoss

    unet = loading.load_unet(scores.model, getattr(torch, scores.dtype))
    unet = nn.Module.to(unet, processes.device())
    samples.check_output(unet, where)
    return JointLoss(unet, samples, resume_folder(folder) / "joint.jsonl")


def read_checked(path: Path) -> Scores:
    """The scores in a scores.json, checked against the model that it names."""
    scores = Scores.read(path)
    check_network(scores, path)
    return scores


def check_network(scores: Scores, path: Path) -> None:
    """Raise `BadInput` unless the scores in `path` are of the model that they name."""
    from laptop.pruning.units import check_names, check_size

    unet = loading.empty_unet(scores.model)
    check_names(unet, [unit.name for unit in scores.units], str(path))
    check_size(unet, scores.base.params, str(path))


def check_race(raced: float | None, config: PlanConfig, where: str) -> None:
    """Raise `BadInput` for a plan from a race for another one: only that one's layers are exact."""
    if raced is not None and replace(config, refine=0) != PlanConfig(ratio=raced):
        raise BadInput(
            f"{where}: a race for --ratio {raced:g} gives the plan of this ratio and no other "
            "limit (layers that were certain to go or to stay are not scored on all samples). "
            "Score without --race for other plans."
        )


def as_plan(
    model: str, anatomy: Anatomy, names: Sequence[str], budget: Mapping[str, object]
) -> Plan:
    """A plan that removes the layers `names`, without its losses."""
    from laptop.pruning.expressible import stock_config

    gone = [unit for unit in anatomy.units if unit.name in set(names)]
    times = None
    if (before := anatomy.latency_ns) is not None:
        after = before - sum(anatomy.latencies_ns[unit.name] for unit in gone)
        times = LatencyChange(before=before / NS, after=after / NS)
    return Plan(
        model=model,
        budget=budget,
        remove=tuple(unit.name for unit in gone),
        params=_change(anatomy.params, sum(unit.params for unit in gone)),
        macs=_change(anatomy.macs, sum(unit.macs for unit in gone)),
        stock_config=stock_config(loading.empty_unet(model), names) is not None,
        latency_ms=times,
    )


def _change(before: int, less: int) -> CostChange:
    return CostChange(before=before, after=before - less)


def refined(
    joint: "JointLoss",
    scores: Scores,
    rules: Conditions,
    names: Sequence[str],
    evaluations: int,
) -> tuple[list[str], float]:
    """The best plan by measured joint loss, and this loss; `names` is the plan to begin with.

    At most `evaluations` more sets are measured.
    """
    from laptop.pruning.joint import AT_ONCE

    units = [unit.name for unit in scores.units]
    values = [unit.score for unit in scores.units]
    plan = frozenset(units.index(name) for name in names)

    def names_of(chosen: Set[int]) -> frozenset[str]:
        return frozenset(units[i] for i in chosen)

    loss = joint([names_of(plan)])[names_of(plan)]
    tried = {plan}
    with progress("refine", evaluations) as advance:
        while len(tried) <= evaluations:
            ranked = sorted(
                neighbours(plan, rules) - tried,
                key=lambda s: (sum(values[i] for i in s), sorted(s)),
            )
            some = ranked[: min(AT_ONCE, evaluations + 1 - len(tried))]
            if not some:
                break
            tried |= set(some)
            losses = joint(map(names_of, some), advance)
            best = min(some, key=lambda s: losses[names_of(s)])
            if losses[names_of(best)] < loss:
                plan, loss = best, losses[names_of(best)]
    return [units[i] for i in sorted(plan)], loss


def neighbours(plan: Set[int], rules: Conditions) -> set[frozenset[int]]:
    """Sets that keep to the rules, with a layer of `plan` put back or exchanged for another."""
    return {s for s in map(frozenset, _changed(plan, len(rules.stay))) if s and rules.hold(s)}


def _changed(plan: Set[int], count: int) -> Iterator[Set[int]]:
    others = [j for j in range(count) if j not in plan]
    for i in plan:
        yield plan - {i}
        for j in others:
            yield plan - {i} | {j}


def menu(scores: Scores, config: PlanConfig) -> list[MenuPoint]:
    """The best plan at every hundredth of pruning ratio that can be reached."""
    points = [_point(scores, [])]
    for hundredth in range(1, 100):
        try:
            chosen = choose(scores, replace(config, ratio=hundredth / 100))
        except Infeasible:
            break
        point = _point(scores, chosen)
        if point.params < points[-1].params:
            points.append(point)
    return points


def _point(scores: Scores, chosen: Sequence[Unit]) -> MenuPoint:
    params = scores.base.params - sum(unit.params for unit in chosen)
    names = tuple(unit.name for unit in chosen)
    return MenuPoint(
        ratio=1 - params / scores.base.params,
        params=params,
        macs=scores.base.macs - sum(unit.macs for unit in chosen),
        predicted_loss=scores.predicted_loss(names),
        remove=names,
    )


def make_menu(
    scores_path: Path, out: Path, config: PlanConfig, *, overwrite: Overwrite = False
) -> Path:
    """Write the Pareto curve of parameters against predicted loss as JSON.

    `config` sets the layers that stay and where the model must load; its budgets do not count.
    """
    scores_path = scores_file(scores_path)
    scores = Scores.read(scores_path)
    free = PlanConfig(ratio=0.0, keep=config.keep, expressible=config.expressible)
    check_config(free, scores.anatomy, scores.model)
    check_race(scores.race, free, str(scores_path))
    check_network(scores, scores_path)

    def work(folder: Path) -> None:
        Menu(model=scores.model, points=tuple(menu(scores, free))).write(folder / out.name)

    return run_stage("menu", out, free, {"scores": scores_path}, work, overwrite=overwrite)
