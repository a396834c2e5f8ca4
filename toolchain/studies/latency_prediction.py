"""Check whether a latency table predicts the latency of plans.

    python -m laptop.studies.latency_prediction MODEL TABLE -o OUT

Random plans, of ratios spread evenly over what can be removed: each pruned U-Net is timed with
the whole one, interleaved, in the table's runtime on this machine. The prediction is the table's
latency less the removed layers'; the measurement is the table's latency times the ratio of both
medians, so that a day on which the machine is slower does not count. If the study is interrupted,
the same command continues it.
"""

import argparse
import json
import shutil
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

from laptop.benchmarks.report.figures import THEMES, new_figure, save_figure
from laptop.benchmarks.report.run_files import RUNTIMES
from laptop.benchmarks.settings import BenchConfig
from laptop.console import say
from laptop.fields import Name, Range
from laptop.models import loading
from laptop.pruning.additivity import random_set
from laptop.pruning.latency_table import LatencyTable
from laptop.pruning.plan_file import Milliseconds
from laptop.pruning.units import anatomy_of
from laptop.records import Record
from laptop.studies.timed_plans import (
    TimedResults,
    check_key,
    measure_rows,
    predicted_ms,
    read_table,
    settings_key,
    table_conditions,
    time_plans,
    work_folder,
)


@dataclass(frozen=True, kw_only=True)
class PredictedPlan(Record):
    """A random plan: the latency that its table predicts, and the measured one."""

    remove: tuple[Name, ...] = ()
    predicted_ms: Milliseconds
    measured_ms: Annotated[float, Range(above=0, below=86_400_000)]
    low_ms: Milliseconds
    high_ms: Milliseconds
    error: float  # predicted / measured - 1
    valid: bool


@dataclass(frozen=True, kw_only=True)
class Predictions(TimedResults):
    """The result of the study."""

    SCHEMA = "laptop.prediction/1"

    granularity: Name | None = None
    median_error: float
    worst_error: float | None = None
    valid: int | None = None  # rows
    rows: tuple[PredictedPlan, ...]


def time_plan(
    model: str, remove: Sequence[str], table: LatencyTable, config: BenchConfig, work: Path
) -> PredictedPlan:
    """Predict and measure the latency of one plan."""
    report = time_plans(model, {"pruned": remove}, table, config, work)
    (ratio,) = report.ratios
    whole, predicted = table.unet_ms.p50, predicted_ms(table, remove)
    return PredictedPlan(
        remove=tuple(remove),
        predicted_ms=predicted,
        measured_ms=whole * ratio.median,
        low_ms=whole * ratio.low,
        high_ms=whole * ratio.high,
        error=predicted / (whole * ratio.median) - 1,
        valid=all(row.valid for row in report.results),
    )


def predict(
    model: str, table: LatencyTable, out: Path, plans: int, config: BenchConfig
) -> Predictions:
    """Predict and measure random plans that `out` does not hold yet."""
    anatomy = anatomy_of(loading.empty_unet(model), granularity=str(table.granularity))
    work, key = work_folder(out), settings_key(table, config, plans)
    finished: tuple[PredictedPlan, ...] = ()
    if out.exists():
        earlier = Predictions.read(out)
        check_key(out, earlier, key)
        finished = earlier.rows

    def measure_row(number: int) -> PredictedPlan:
        least = anatomy.largest_ratio * (number + 0.5) / plans * anatomy.params
        remove = random_set(anatomy.units, least, number, with_shells=True)
        row = time_plan(model, remove, table, config, work)
        say(f"plan {number + 1}: {row.error:+.1%}")
        return row

    numbers = range(len(finished), plans)
    measure_rows(out, finished, numbers, measure_row, partial(_results, table, key))
    shutil.rmtree(work)
    return Predictions.read(out)


def _results(table: LatencyTable, key: str, rows: tuple[PredictedPlan, ...]) -> Predictions:
    errors = [abs(row.error) for row in rows]
    return Predictions(
        key=key,
        model=str(table.model),
        runtime=str(table.runtime),
        device=table.device,
        conditions=table.conditions,
        granularity=table.granularity,
        unet_ms=table.unet_ms,
        median_error=statistics.median(errors),
        worst_error=max(errors),
        valid=sum(row.valid for row in rows),
        rows=rows,
    )


def prediction_chart(results: Sequence[Predictions], stem: Path) -> None:
    """Plot predicted against measured latency as shares of the whole U-Net's; light and dark."""
    for theme in THEMES:
        figure, (axes,) = new_figure(theme, 3.6, 1)
        axes.plot([0, 1], [0, 1], color=theme.grid, linewidth=1.2, zorder=0)
        for result, colour in zip(results, theme.curves, strict=False):
            whole = result.unet_ms.p50
            predicted = [row.predicted_ms / whole for row in result.rows]
            measured = [row.measured_ms / whole for row in result.rows]
            errors = [
                [(row.measured_ms - row.low_ms) / whole for row in result.rows],
                [(row.high_ms - row.measured_ms) / whole for row in result.rows],
            ]
            title = f"{Path(result.model).name}, {RUNTIMES[result.runtime]}"
            axes.errorbar(
                predicted, measured, yerr=errors, fmt="o", markersize=4, linewidth=1, color=colour,
                label=f"{title}: median error {result.median_error:.1%}",
            )  # fmt: skip
        axes.set_xlabel("predicted, share of the whole U-Net's", color=theme.ink, fontsize=8)
        axes.set_ylabel("measured", color=theme.ink, fontsize=8)
        axes.legend(loc="upper left", frameon=False, fontsize=8, labelcolor=theme.ink)
        save_figure(figure, stem.with_name(f"{stem.name}{theme.suffix}.svg"))


def main() -> None:
    """Run the study, or plot results of earlier ones."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("model", nargs="?", help="leave it and the table out for a figure only")
    parser.add_argument("table", type=Path, nargs="?")
    parser.add_argument("-o", "--out", type=Path, help="the result, a .json file")
    parser.add_argument("--plans", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=10.0, help="of a model, over all rounds")
    parser.add_argument("--figure", type=Path, help="FIGURE.svg of the results in --of")
    parser.add_argument("--of", type=Path, nargs="+", default=[])
    arguments = parser.parse_args()
    if arguments.figure:
        results = [Predictions.read(path) for path in arguments.of]
        prediction_chart(results, arguments.figure.with_suffix(""))
        return
    if not (arguments.model and arguments.table and arguments.out):
        parser.error("MODEL, TABLE and -o, or --figure and --of")
    table = read_table(arguments.table)
    threads = table_conditions(table).threads
    config = BenchConfig(threads=threads, rounds=arguments.rounds, seconds=arguments.seconds)
    result = predict(arguments.model, table, arguments.out, arguments.plans, config).as_json()
    print(json.dumps({key: value for key, value in result.items() if key != "rows"}, indent=1))


if __name__ == "__main__":
    main()
