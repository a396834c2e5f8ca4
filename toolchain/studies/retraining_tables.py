"""Tables and intervals of `laptop.studies.retraining`.

Intervals are bootstrap percentiles (95 %, 4,000 draws) over seeds and prompts at once: each draw
takes as many seeds and as many prompts as there are, with replacement, the same for the teacher and
for all students, so that a difference is one of pairs. Drawing both ways counts what is particular
to one picture more than once, so intervals are rather too wide for it (Owen 2007, the pigeonhole
bootstrap); of three seeds, on the other hand, no method learns well how much seeds differ.

Decline is 1 - accuracy / the teacher's accuracy.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from laptop.benchmarks.report.text import DASH, table
from laptop.errors import BadInput
from laptop.machine import machine
from laptop.records import Record
from laptop.studies.design import (
    CRITERIA,
    LOSSES,
    MAIN_RATIO,
    NORMALIZED,
    OUTPUT_LOSS,
    RANDOM,
    UNNORMALIZED,
    WHOLE_METHOD,
    Method,
    Run,
)
from laptop.studies.handmade import FAMILIES
from laptop.studies.trial import Judgement, RunResult, StudyConfig

DRAWS = 4000
BOUNDS = (2.5, 97.5)  # percent
NAMES = {RANDOM: "random, another plan a seed"} | {f: f"by hand: {f}" for f in FAMILIES}
BY_CRITERION = {NAMES.get(plan, plan): Method(plan, NORMALIZED) for plan in CRITERIA}
BY_LOSS = {
    loss if "task" in loss else f"all terms, {loss}": Method(OUTPUT_LOSS, loss) for loss in LOSSES
}
COMPARED = {
    "the whole method": WHOLE_METHOD,
    **{f"{NAMES[f]}, unnormalized": Method(f, UNNORMALIZED) for f in FAMILIES},
}
Values = NDArray[np.float64]
Cell = Callable[[Method, float], str]  # of a table: the text for a method at a ratio
AnyJudgement = TypeVar("AnyJudgement", bound=Judgement)


@dataclass(frozen=True, kw_only=True)
class StudyRun(Judgement):
    """A row of study.json: one training, with all plans that drop what it drops."""

    run: str  # its key
    plans: tuple[str, ...]
    loss: str
    ratio: float
    seed: int
    removed: int  # layers
    task: float
    output: float
    feature: float
    seconds: float


@dataclass(frozen=True, kw_only=True)
class StudyDocument(Record):
    """A study.json: everything that the study measured."""

    SCHEMA = "laptop.study/1"

    model: str
    settings: StudyConfig
    teacher: Judgement
    runs: tuple[StudyRun, ...]

    def text(self) -> str:
        """The document as JSON with each run on a line of its own."""
        document = self.as_json() | machine()
        document.pop("runs")
        head = json.dumps(document, indent=1)  # ends in "\n}"
        runs = ",\n".join(json.dumps(run.as_json()) for run in self.runs)
        return f'{head[:-2]},\n "runs": [\n{runs}\n ]\n}}\n'


def study_run(run: Run, result: RunResult) -> StudyRun:
    """The row of a finished run, its numbers rounded to four digits."""
    student = run.students[0]
    values = {f.name: getattr(result, f.name) for f in fields(Judgement)}
    return rounded(
        StudyRun(
            **values,
            run=run.key,
            plans=tuple(student.method.plan for student in run.students),
            loss=student.method.loss,
            ratio=student.ratio,
            seed=student.seed,
            removed=len(run.remove),
            task=result.task,
            output=result.output,
            feature=result.feature,
            seconds=result.seconds,
        )
    )


def rounded(judgement: AnyJudgement) -> AnyJudgement:
    """The judgement with four significant digits of every number."""
    return type(judgement)(**{k: _short(v) for k, v in vars(judgement).items()})


def _short(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value


class Estimate(NamedTuple):
    """A mean over seeds and prompts, and its bootstrap draws (`DRAWS`,)."""

    mean: float
    draws: Values

    def interval(self) -> tuple[float, float]:
        """The bounds of the middle 95 %."""
        low, high = np.percentile(self.draws, BOUNDS)
        return float(low), float(high)

    def text(self) -> str:
        """The mean and its interval in percent."""
        low, high = self.interval()
        return f"{100 * self.mean:.1f} ({100 * low:.1f} to {100 * high:.1f})"


class Bootstrap:
    """The accuracies of a study, resampled alike for all methods."""

    def __init__(self, study: StudyDocument, seed: int = 0):
        self.prompts, self.seeds = study.settings.prompts, study.settings.seeds
        rng = np.random.default_rng(seed)
        chances = np.full(self.prompts, 1 / self.prompts)
        counts = rng.multinomial(self.prompts, chances, DRAWS)
        self.weights = counts.T / self.prompts  # (prompts, draws)
        self.teacher = self._bits(study.teacher.right)
        if not (self.teacher @ self.weights).all():
            raise BadInput(
                f"the teacher draws {self.teacher.sum():.0f} of {self.prompts} prompts right: too "
                "few to say what a student loses. Judge by more --prompts or --drawing-steps."
            )
        self.runs: dict[tuple[Method, float], list[StudyRun]] = {}
        for run in study.runs:
            for plan in run.plans:
                self.runs.setdefault((Method(plan, run.loss), run.ratio), []).append(run)
        self.ratios = sorted({ratio for _, ratio in self.runs})

    def _bits(self, digits: str) -> Values:
        bits = np.unpackbits(np.frombuffer(bytes.fromhex(digits), np.uint8), count=self.prompts)
        return bits.astype(np.float64)

    def has(self, method: Method, ratio: float) -> bool:
        """Whether any run of a method at a ratio is finished."""
        return (method, ratio) in self.runs

    def accuracy(self, method: Method, ratio: float) -> Estimate:
        """The prompt accuracy of a method's students."""
        right = np.stack([self._bits(run.right) for run in self.runs[method, ratio]])
        seeds = len(right)  # right is (seeds, prompts)
        picked = np.random.default_rng(seeds).integers(seeds, size=(seeds, DRAWS))
        draws = np.take_along_axis(right @ self.weights, picked, axis=0)  # (seeds, draws)
        return Estimate(float(right.mean()), draws.mean(axis=0))

    def decline(self, method: Method, ratio: float) -> Estimate:
        """The share of the teacher's accuracy that a method's students lose."""
        mean, draws = self.accuracy(method, ratio)
        return Estimate(
            1 - mean / float(self.teacher.mean()), 1 - draws / (self.teacher @ self.weights)
        )

    def mean(self, method: Method, ratio: float, key: str) -> float:
        """The mean over seeds of another number of `StudyRun`."""
        return float(np.mean([getattr(run, key) for run in self.runs[method, ratio]]))

    def finished(self, methods: Mapping[str, Method]) -> dict[str, Method]:
        """The methods with at least one finished run."""
        return {
            name: method
            for name, method in methods.items()
            if any(self.has(method, ratio) for ratio in self.ratios)
        }

    def best_by_hand(self, ratio: float) -> Method:
        """The hand-made plans with the best mean accuracy, taught without normalization."""
        methods = [Method(family, UNNORMALIZED) for family in FAMILIES]
        return max(
            (method for method in methods if self.has(method, ratio)),
            key=lambda method: self.accuracy(method, ratio).mean,
        )


def as_markdown(study: StudyDocument) -> str:
    """The tables of docs/explanation/appendix.md."""
    bootstrap = Bootstrap(study)
    parts = [
        _settings(study),
        f"The teacher draws {bootstrap.teacher.mean():.1%} of the {bootstrap.prompts} prompts "
        "right.",
        _accuracies(bootstrap, "layers chosen by", BY_CRITERION),
        _accuracies(bootstrap, "taught by", BY_LOSS),
        _accuracies(bootstrap, "layers and loss", COMPARED),
        _comparison(bootstrap),
        _other_measures(bootstrap),
        _loss_terms(bootstrap),
    ]
    return "\n\n".join(parts) + "\n"


def _settings(study: StudyDocument) -> str:
    c, hours = study.settings, sum(run.seconds for run in study.runs) / 3600
    return (
        f"{len(study.runs)} students of {study.model}, {c.steps} steps of {c.batch_size} each "
        f"(learning rate {c.learning_rate:g}, cosine), {c.seeds} seeds, {c.main_seeds} in the "
        f"comparison at {MAIN_RATIO:.0%}; {c.prompts} unseen prompts, drawn in {c.drawing_steps} "
        f"steps; {hours:.1f} hours of processor time. In brackets 95 % intervals by bootstrap over "
        "seeds and prompts."
    )


def _accuracies(bootstrap: Bootstrap, title: str, methods: Mapping[str, Method]) -> str:
    """Accuracies with their intervals, a row for each method and a column for each ratio."""

    def cell(method: Method, ratio: float) -> str:
        if not bootstrap.has(method, ratio):
            return DASH
        count = len(bootstrap.runs[method, ratio])
        seeds = f", {count} seed{'s' * (count > 1)}" if count < bootstrap.seeds else ""
        return bootstrap.accuracy(method, ratio).text() + seeds

    return _by_method(bootstrap, title, methods, {"": cell})


def _by_method(
    bootstrap: Bootstrap,
    title: str,
    methods: Mapping[str, Method],
    columns: Mapping[str, Cell],
) -> str:
    """A table of methods: for each ratio the `columns`, by their heads."""
    ratios = bootstrap.ratios
    heads = [f"{ratio:.0%}: {head}".removesuffix(": ") for ratio in ratios for head in columns]
    rows = [
        [name, *(cell(method, ratio) for ratio in ratios for cell in columns.values())]
        for name, method in bootstrap.finished(methods).items()
    ]
    return table([title, *heads], rows)


def _comparison(bootstrap: Bootstrap) -> str:
    """The declines of the whole method and of the best hand-made plans."""
    header = [
        *("ratio", "seeds", f"decline of {OUTPUT_LOSS} with {NORMALIZED}"),
        *("best by hand, unnormalized", "its decline", "difference, points"),
        "at least twice as much",
    ]
    rows = []
    for ratio in bootstrap.ratios:
        if not all(bootstrap.has(method, ratio) for method in COMPARED.values()):
            continue
        best = bootstrap.best_by_hand(ratio)
        ours, rival = bootstrap.decline(WHOLE_METHOD, ratio), bootstrap.decline(best, ratio)
        difference = Estimate(rival.mean - ours.mean, rival.draws - ours.draws)
        rows.append(
            [
                f"{ratio:.0%}",
                str(len(bootstrap.runs[WHOLE_METHOD, ratio])),
                f"{ours.text()} %",
                best.plan,
                f"{rival.text()} %",
                difference.text(),
                f"in {np.mean(rival.draws >= 2 * ours.draws):.1%} of the draws",
            ]
        )
    return table(header, rows)


def _mean_cell(bootstrap: Bootstrap, key: str, form: str, factor: float = 1) -> Cell:
    def cell(method: Method, ratio: float) -> str:
        if not bootstrap.has(method, ratio):
            return DASH
        return format(factor * bootstrap.mean(method, ratio, key), form)

    return cell


def _other_measures(bootstrap: Bootstrap) -> str:
    """What accuracy at its bounds does not show: attributes, and output loss on held-out inputs."""
    columns = {
        "attributes": _mean_cell(bootstrap, "attributes", ".1f", 100),
        "output loss": _mean_cell(bootstrap, "held_out_loss", ".2g"),
    }
    methods = BY_CRITERION | BY_LOSS | COMPARED
    return _by_method(bootstrap, "layers and loss", methods, columns)


def _loss_terms(bootstrap: Bootstrap) -> str:
    """Losses at the end of training; not the feature term, which methods weigh differently."""
    columns = {key: _mean_cell(bootstrap, key, ".3g") for key in ("task", "output")}
    return _by_method(bootstrap, "taught by", BY_LOSS, columns)


class Chart(NamedTuple):
    """A figure of the study: its file's name, its points for `interval_chart`, its axis label."""

    name: str
    points: list[dict[str, float | str]]
    label: str


def charts(study: StudyDocument) -> list[Chart]:
    """The figures of the study; without points where no run is finished."""
    bootstrap = Bootstrap(study)
    accuracy, decline = bootstrap.accuracy, bootstrap.decline
    label = "prompt accuracy after retraining, %"
    of_teacher = "decline of prompt accuracy, % of the teacher's"
    return [
        Chart("study-criteria", _points(bootstrap, BY_CRITERION, accuracy), label),
        Chart("study-losses", _points(bootstrap, BY_LOSS, accuracy), label),
        Chart("study-comparison", _points(bootstrap, COMPARED, decline), of_teacher),
    ]


def _points(
    bootstrap: Bootstrap,
    methods: Mapping[str, Method],
    measure: Callable[[Method, float], Estimate],
) -> list[dict[str, float | str]]:
    points: list[dict[str, float | str]] = []
    for name, method in methods.items():
        for ratio in bootstrap.ratios:
            if bootstrap.has(method, ratio):
                estimate = measure(method, ratio)
                low, high = estimate.interval()
                values = {"mean": 100 * estimate.mean, "low": 100 * low, "high": 100 * high}
                points.append({"by": name, "ratio": ratio, **values})
    return points
