"""What the study `retraining` does: which layers go, how students are taught, how often (seeds).

    criterion     each way of choosing layers, all taught alike (`relative`)
    distillation  the layers that output loss chooses, taught in each way
    comparison    the whole method against hand-made plans taught without normalization

The three share many runs: a run is known by the layers that go, what it is taught by and its seed.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from laptop.distill.losses import WEIGHTINGS
from laptop.distill.settings import DistillConfig
from laptop.pruning.additivity import random_set
from laptop.pruning.plan import choose
from laptop.pruning.scores import Scores
from laptop.pruning.settings import PlanConfig
from laptop.studies.handmade import FAMILIES, handmade

METHOD = "output-loss"  # the paper's criterion, and
NORMALIZED = "relative"  # our form of its loss, see distill.losses
UNNORMALIZED = "none"  # BK-SDM's
SCORED = (METHOD, "magnitude", "taylor", "block-influence")
RANDOM = "random"
CRITERIA = (*SCORED, RANDOM, *FAMILIES)
GROUPS = ("criterion", "distillation", "comparison")
RATIOS = (0.3, 0.5, 0.7)
MAIN_RATIO = 0.5  # the ratio of the paper's claim; here the comparison has more seeds

LOSSES: dict[str, dict[str, Any]] = {
    "task": {"output_weight": 0.0, "feature_weight": 0.0},
    "task + output": {"feature_weight": 0.0},
    **{name: {"weighting": name} for name in WEIGHTINGS},  # all three terms
}


@dataclass(frozen=True)
class Arm:
    """One student to be: what chooses the layers, how many go, what teaches it."""

    plan: str  # of CRITERIA
    loss: str  # of LOSSES
    ratio: float
    seed: int  # of data order, noise and, where chance chooses, of the layers

    @property
    def by(self) -> tuple[str, str, float]:
        """The arm without its seed."""
        return self.plan, self.loss, self.ratio


@dataclass(frozen=True)
class Run:
    """A student to be trained, for one arm or for several that come to the same."""

    remove: tuple[str, ...]
    config: DistillConfig
    arms: tuple[Arm, ...]

    @cached_property
    def key(self) -> str:
        """A name for the run's file; runs of other settings have others."""
        identity = [sorted(self.remove), asdict(self.config)]
        return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]


def arms(
    seeds: int,
    main_seeds: int,
    ratios: Sequence[float] = RATIOS,
    groups: Sequence[str] = GROUPS,
) -> list[Arm]:
    """All arms of `groups`, each once; the comparison at `MAIN_RATIO` has `main_seeds` of them."""
    found: dict[Arm, None] = {}
    for ratio in sorted(ratios, key=lambda r: (r != MAIN_RATIO, r)):  # what matters most is first
        for seed in range(max(seeds, main_seeds if ratio == MAIN_RATIO else 0)):
            pairs = [*_comparison()] if "comparison" in groups else []
            if seed < seeds and "criterion" in groups:
                pairs += [(plan, NORMALIZED) for plan in CRITERIA]
            if seed < seeds and "distillation" in groups:
                pairs += [(METHOD, loss) for loss in LOSSES]
            found |= {Arm(plan, loss, ratio, seed): None for plan, loss in pairs}
    return list(found)


def _comparison() -> Iterator[tuple[str, str]]:
    yield METHOD, NORMALIZED
    for family in FAMILIES:
        yield family, UNNORMALIZED


def runs(wanted: Sequence[Arm], scores: Mapping[str, Scores], base: DistillConfig) -> list[Run]:
    """One run for all arms that drop the same layers, are taught alike and have the same seed."""
    found: dict[str, Run] = {}
    for arm in wanted:
        config = replace(base, seed=arm.seed, **LOSSES[arm.loss])
        run = Run(tuple(removed_by(arm, scores)), config, (arm,))
        same = found.get(run.key)
        found[run.key] = replace(same, arms=(*same.arms, arm)) if same else run
    return list(found.values())


def removed_by(arm: Arm, scores: Mapping[str, Scores]) -> list[str]:
    """Names of the layers that the arm's way of choosing drops at its ratio."""
    anatomy = scores[METHOD].anatomy
    if arm.plan in FAMILIES:
        return handmade(arm.plan, anatomy.units, arm.ratio, anatomy.params)
    if arm.plan == RANDOM:
        return random_set(
            anatomy.units, arm.ratio * anatomy.params, [arm.seed, round(1e3 * arm.ratio)]
        )
    return [unit.name for unit in choose(scores[arm.plan], PlanConfig(ratio=arm.ratio))]
