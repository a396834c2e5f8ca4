"""The design of the study `retraining`: which students are trained, and how.

    criterion     each way of choosing layers, all taught alike (`relative`)
    distillation  the layers that output loss chooses, taught in each way
    comparison    the whole method against hand-made plans taught without normalization

The three groups share many students; students that lose the same layers, are taught alike and have
the same seed share one training.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property

from laptop.distill.losses import WEIGHTINGS
from laptop.distill.settings import DistillConfig
from laptop.pruning.additivity import random_set
from laptop.pruning.plan import choose
from laptop.pruning.scores import Scores
from laptop.pruning.settings import PlanConfig
from laptop.studies.handmade import FAMILIES, handmade

OUTPUT_LOSS = "output-loss"  # the paper's criterion
NORMALIZED = "relative"  # our form of the paper's loss, see distill.losses
UNNORMALIZED = "none"  # BK-SDM's
SCORED = (OUTPUT_LOSS, "magnitude", "taylor", "block-influence")
RANDOM = "random"
CRITERIA = (*SCORED, RANDOM, *FAMILIES)
GROUPS = ("criterion", "distillation", "comparison")
RATIOS = (0.3, 0.5, 0.7)
MAIN_RATIO = 0.5  # the ratio of the paper's claim; here the comparison has more seeds

# Ways to teach, as changes of a DistillConfig.
LOSSES: dict[str, Mapping[str, float | str]] = {
    "task": {"output_weight": 0.0, "feature_weight": 0.0},
    "task + output": {"feature_weight": 0.0},
    **{name: {"weighting": name} for name in WEIGHTINGS},  # all three terms
}


@dataclass(frozen=True)
class Method:
    """A way to make a student: what chooses the layers that go, and the loss that teaches it."""

    plan: str  # of CRITERIA
    loss: str  # of LOSSES


WHOLE_METHOD = Method(OUTPUT_LOSS, NORMALIZED)  # the paper's


@dataclass(frozen=True)
class Student:
    """A student to be made: a method at a pruning ratio, with a seed."""

    method: Method
    ratio: float
    seed: int  # of data order, noise and, where chance chooses, of the layers


@dataclass(frozen=True)
class Run:
    """One training, for one student or for several that come to the same."""

    remove: tuple[str, ...]
    config: DistillConfig
    students: tuple[Student, ...]

    @cached_property
    def key(self) -> str:
        """The name of the run's file, which follows from its layers and settings."""
        identity = [sorted(self.remove), asdict(self.config)]
        return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]


def all_students(
    seeds: int,
    main_seeds: int,
    ratios: Sequence[float] = RATIOS,
    groups: Sequence[str] = GROUPS,
) -> list[Student]:
    """The students of `groups`, each once; the comparison at `MAIN_RATIO` has `main_seeds`."""
    students: dict[Student, None] = {}
    for ratio in sorted(ratios, key=lambda r: (r != MAIN_RATIO, r)):  # what matters most is first
        for seed in range(max(seeds, main_seeds if ratio == MAIN_RATIO else 0)):
            methods = [*_compared()] if "comparison" in groups else []
            if seed < seeds and "criterion" in groups:
                methods += [Method(plan, NORMALIZED) for plan in CRITERIA]
            if seed < seeds and "distillation" in groups:
                methods += [Method(OUTPUT_LOSS, loss) for loss in LOSSES]
            students |= {Student(method, ratio, seed): None for method in methods}
    return list(students)


def _compared() -> Iterator[Method]:
    yield WHOLE_METHOD
    for family in FAMILIES:
        yield Method(family, UNNORMALIZED)


def plan_runs(
    students: Sequence[Student], scores: Mapping[str, Scores], base: DistillConfig
) -> list[Run]:
    """The trainings that make all students; `scores` are by criterion, `base` is the common config.

    Students that lose the same layers, are taught alike and have the same seed share a run.
    """
    runs: dict[str, Run] = {}
    for student in students:
        config = replace(base, seed=student.seed, **LOSSES[student.method.loss])  # type: ignore[arg-type]
        run = Run(tuple(layers_to_remove(student, scores)), config, (student,))
        same = runs.get(run.key)
        runs[run.key] = replace(same, students=(*same.students, student)) if same else run
    return list(runs.values())


def layers_to_remove(student: Student, scores: Mapping[str, Scores]) -> list[str]:
    """Names of the layers that the student's method drops at its ratio."""
    plan, ratio = student.method.plan, student.ratio
    anatomy = scores[OUTPUT_LOSS].anatomy
    if plan in FAMILIES:
        return handmade(plan, anatomy.units, ratio, anatomy.params)
    if plan == RANDOM:
        seed = [student.seed, round(1e3 * ratio)]
        return random_set(anatomy.units, ratio * anatomy.params, seed)
    return [unit.name for unit in choose(scores[plan], PlanConfig(ratio=ratio))]
