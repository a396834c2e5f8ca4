"""Tables and intervals of `laptop.studies.retraining`.

Intervals are bootstrap percentiles (95 %, 4,000 draws) over seeds and prompts at once: each draw
takes as many seeds and as many prompts as there are, with replacement, the same for the teacher and
for all students, so that a difference is one of pairs. Drawing both ways counts what is particular
to one picture more than once, so intervals are rather too wide for it (Owen 2007, the pigeonhole
bootstrap); of three seeds, on the other hand, no method learns well how much seeds differ.

Decline is 1 - accuracy / the teacher's accuracy.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from laptop.benchmarks.report.text import DASH
from laptop.errors import BadInput
from laptop.studies.design import (
    CRITERIA,
    LOSSES,
    MAIN_RATIO,
    METHOD,
    NORMALIZED,
    RANDOM,
    UNNORMALIZED,
    Run,
)
from laptop.studies.handmade import FAMILIES

SCHEMA = "laptop.study/1"
DRAWS = 4000
BOUNDS = (2.5, 97.5)  # percent
NAMES = {RANDOM: "random, another plan a seed"} | {f: f"by hand: {f}" for f in FAMILIES}
BY_CRITERION = {NAMES.get(plan, plan): (plan, NORMALIZED) for plan in CRITERIA}
BY_LOSS = {loss if "task" in loss else f"all terms, {loss}": (METHOD, loss) for loss in LOSSES}
COMPARED = {
    "the whole method": (METHOD, NORMALIZED),
    **{f"{NAMES[f]}, unnormalized": (f, UNNORMALIZED) for f in FAMILIES},
}
JUDGED = ("accuracy", "right", "attributes", "held_out_loss", "frechet", "params")
TERMS = ("task", "output", "feature")
Values = NDArray[np.float64]


def document(
    model: str,
    settings: Mapping[str, Any],
    teacher: Mapping[str, Any],
    rows: Sequence[tuple[Run, Mapping[str, Any]]],
) -> dict[str, Any]:
    """Everything as JSON: one row for each run, with all plans that drop what it drops."""
    return {
        "schema": SCHEMA,
        "model": model,
        "settings": dict(settings),
        "teacher": {k: _short(teacher[k]) for k in JUDGED},
        "runs": [
            {
                "run": run.key,
                "plans": [arm.plan for arm in run.arms],
                **{k: getattr(run.arms[0], k) for k in ("loss", "ratio", "seed")},
                "removed": len(run.remove),
                **{k: _short(found[k]) for k in (*JUDGED, *TERMS)},
                "seconds": found["seconds"],
            }
            for run, found in rows
        ],
    }


def _short(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def as_json(found: Mapping[str, Any]) -> str:
    """The document as JSON with each run on a line of its own."""
    head = json.dumps({k: v for k, v in found.items() if k != "runs"}, indent=1)  # ends in "\n}"
    runs = ",\n".join(json.dumps(row) for row in found["runs"])
    return f'{head[:-2]},\n "runs": [\n{runs}\n ]\n}}\n'


class Measured:
    """The document's accuracies, resampled alike for all arms."""

    def __init__(self, found: Mapping[str, Any], seed: int = 0):
        self.prompts: int = found["settings"]["prompts"]
        self.seeds: int = found["settings"]["seeds"]
        rng = np.random.default_rng(seed)
        share = np.full(self.prompts, 1 / self.prompts)
        self.counts = rng.multinomial(self.prompts, share, DRAWS).T / self.prompts  # (P, draws)
        self.teacher = self._bits(found["teacher"]["right"])
        if not (self.teacher @ self.counts).all():
            raise BadInput(
                f"the teacher draws {self.teacher.sum():.0f} of {self.prompts} prompts right: too "
                "few to say what a student loses. Judge by more --prompts or --drawing-steps."
            )
        self.rows: dict[tuple[str, str, float], list[Mapping[str, Any]]] = {}
        for row in found["runs"]:
            for plan in row["plans"]:
                self.rows.setdefault((plan, row["loss"], row["ratio"]), []).append(row)

    def _bits(self, digits: str) -> Values:
        bits = np.unpackbits(np.frombuffer(bytes.fromhex(digits), np.uint8), count=self.prompts)
        return bits.astype(np.float64)

    def accuracies(self, by: tuple[str, str, float]) -> tuple[float, Values]:
        """The mean over seeds and prompts, and its bootstrap draws (`DRAWS`,)."""
        right = np.stack([self._bits(row["right"]) for row in self.rows[by]])  # (seeds, prompts)
        picked = np.random.default_rng(len(right)).integers(len(right), size=(len(right), DRAWS))
        each = np.take_along_axis(right @ self.counts, picked, axis=0)  # (seeds, draws)
        return float(right.mean()), each.mean(axis=0)

    def declines(self, by: tuple[str, str, float]) -> tuple[float, Values]:
        """The same, of 1 - accuracy / the teacher's."""
        mean, draws = self.accuracies(by)
        return 1 - mean / float(self.teacher.mean()), 1 - draws / (self.teacher @ self.counts)

    def mean(self, by: tuple[str, str, float], key: str) -> float:
        """The mean over seeds of something else that was measured."""
        return float(np.mean([row[key] for row in self.rows[by]]))

    def has(self, plan: str, loss: str, ratio: float) -> bool:
        """Whether an arm has any run."""
        return (plan, loss, ratio) in self.rows

    def ratios(self) -> list[float]:
        """All pruning ratios."""
        return sorted({ratio for _, _, ratio in self.rows})

    def rival(self, ratio: float) -> str:
        """The hand-made family with the best mean accuracy, taught without normalization."""
        there = [f for f in FAMILIES if self.has(f, UNNORMALIZED, ratio)]
        return max(there, key=lambda f: self.accuracies((f, UNNORMALIZED, ratio))[0])


def interval(draws: Values) -> tuple[float, float]:
    """The bounds of the middle 95 %."""
    low, high = np.percentile(draws, BOUNDS)
    return float(low), float(high)


def as_markdown(found: Mapping[str, Any]) -> str:
    """The tables of docs/explanation/appendix.md."""
    m = Measured(found)
    parts = [
        _settings(found),
        f"The teacher draws {m.teacher.mean():.1%} of the {m.prompts} prompts right.",
        _table(m, "layers chosen by", BY_CRITERION),
        _table(m, "taught by", BY_LOSS),
        _table(m, "layers and loss", COMPARED),
        "\n".join(_comparison(m)),
        "\n".join(_others(m)),
        "\n".join(_terms(m)),
    ]
    return "\n\n".join(parts) + "\n"


def _settings(found: Mapping[str, Any]) -> str:
    c, hours = found["settings"], sum(row["seconds"] for row in found["runs"]) / 3600
    return (
        f"{len(found['runs'])} students of {found['model']}, {c['steps']} steps of "
        f"{c['batch_size']} each (learning rate {c['learning_rate']:g}, cosine), {c['seeds']} "
        f"seeds, {c['main_seeds']} in the comparison at {MAIN_RATIO:.0%}; {c['prompts']} unseen "
        f"prompts, drawn in {c['drawing_steps']} steps; {hours:.1f} hours of processor time. "
        "In brackets 95 % intervals by bootstrap over seeds and prompts."
    )


def _table(m: Measured, title: str, arms: Mapping[str, tuple[str, str]]) -> str:
    """Accuracy with its interval, a row for each arm and a column for each ratio."""
    lines = [
        f"| {title} | " + " | ".join(f"{ratio:.0%}" for ratio in m.ratios()) + " |",
        "| --- |" + " --- |" * len(m.ratios()),
    ]
    for name, by in _there(m, arms).items():
        cells = [
            _cell(*m.accuracies((*by, r))) + _seeds(m, (*by, r)) if m.has(*by, r) else DASH
            for r in m.ratios()
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _there(m: Measured, arms: Mapping[str, tuple[str, str]]) -> dict[str, tuple[str, str]]:
    """Those of the arms that have runs at all."""
    return {name: by for name, by in arms.items() if any(m.has(*by, r) for r in m.ratios())}


def _seeds(m: Measured, by: tuple[str, str, float]) -> str:
    """How many runs a number is of, where they are fewer than they should be."""
    count = len(m.rows[by])
    return f", {count} seed{'s' * (count > 1)}" if count < m.seeds else ""


def _cell(mean: float, draws: Values) -> str:
    low, high = interval(draws)
    return f"{100 * mean:.1f} ({100 * low:.1f} to {100 * high:.1f})"


def _comparison(m: Measured) -> Iterator[str]:
    yield (
        f"| ratio | seeds | decline of {METHOD} with {NORMALIZED} | best by hand, unnormalized "
        "| its decline | difference, points | at least twice as much |"
    )
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for ratio in m.ratios():
        if not all(m.has(*by, ratio) for by in COMPARED.values()):
            continue
        ours, rival = (METHOD, NORMALIZED, ratio), (m.rival(ratio), UNNORMALIZED, ratio)
        (mean, draws), (its_mean, its_draws) = m.declines(ours), m.declines(rival)
        cells = [
            f"{ratio:.0%}",
            str(len(m.rows[ours])),
            f"{_cell(mean, draws)} %",
            rival[0],
            f"{_cell(its_mean, its_draws)} %",
            _cell(its_mean - mean, its_draws - draws),
            f"in {np.mean(its_draws >= 2 * draws):.1%} of the draws",
        ]
        yield "| " + " | ".join(cells) + " |"


def _others(m: Measured) -> Iterator[str]:
    """What accuracy at its bounds does not show: attributes, and output loss on held-out inputs."""
    heads = [f"{ratio:.0%}: attributes | output loss" for ratio in m.ratios()]
    yield "| layers and loss | " + " | ".join(heads) + " |"
    yield "| --- |" + " --- |" * (2 * len(heads))
    for name, by in _there(m, BY_CRITERION | BY_LOSS | COMPARED).items():
        cells = [
            f"{100 * m.mean((*by, ratio), 'attributes'):.1f} | "
            f"{m.mean((*by, ratio), 'held_out_loss'):.2g}"
            if m.has(*by, ratio)
            else f"{DASH} | {DASH}"
            for ratio in m.ratios()
        ]
        yield f"| {name} | " + " | ".join(cells) + " |"


def _terms(m: Measured) -> Iterator[str]:
    """What the terms have come to; the feature term is not shown, for arms weigh it differently."""
    yield "| taught by | " + " | ".join(f"{r:.0%}: task | output" for r in m.ratios()) + " |"
    yield "| --- |" + " --- |" * (2 * len(m.ratios()))
    for name, by in _there(m, BY_LOSS).items():
        cells = [
            f"{m.mean((*by, r), k):.3g}" if m.has(*by, r) else DASH
            for r in m.ratios()
            for k in ("task", "output")
        ]
        yield f"| {name} | " + " | ".join(cells) + " |"


def charts(found: Mapping[str, Any]) -> list[tuple[str, list[dict[str, Any]], str]]:
    """Name, rows and axis label of each figure; a row has `by`, `ratio`, `mean`, `low`, `high`."""
    m = Measured(found)
    label = "prompt accuracy after retraining, %"
    return [
        ("study-criteria", _points(m, BY_CRITERION, m.accuracies), label),
        ("study-losses", _points(m, BY_LOSS, m.accuracies), label),
        (
            "study-comparison",
            _points(m, COMPARED, m.declines),
            "decline of prompt accuracy, % of the teacher's",
        ),
    ]


def _points(
    m: Measured,
    arms: Mapping[str, tuple[str, str]],
    measure: Callable[[tuple[str, str, float]], tuple[float, Values]],
) -> list[dict[str, Any]]:
    rows = []
    for name, by in arms.items():
        for ratio in m.ratios():
            if not m.has(*by, ratio):
                continue
            mean, draws = measure((*by, ratio))
            low, high = interval(draws)
            values = {"mean": 100 * mean, "low": 100 * low, "high": 100 * high}
            rows.append({"by": name, "ratio": ratio, **values})
    return rows
