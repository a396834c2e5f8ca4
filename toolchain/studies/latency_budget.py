"""Compare a budget of time with one of parameters.

    python -m laptop.studies.latency_budget SCORES TABLE -o OUT

At each pruning ratio a plan by parameters is made, and a plan whose limit is the latency that the
table predicts for the first. Both are timed with the whole U-Net, interleaved, in the table's
runtime on this machine: at the same latency, which plan loses less of the output? If the study is
interrupted, the same command continues it.
"""

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from laptop.benchmarks.bench_report import Ratio, RatioRow
from laptop.benchmarks.settings import BenchConfig
from laptop.console import say
from laptop.fields import Share
from laptop.pruning.latency_table import LatencyTable
from laptop.pruning.plan import make_plan
from laptop.pruning.plan_file import Milliseconds, Plan
from laptop.pruning.scores import Cost, Loss, Scores
from laptop.pruning.settings import PlanConfig
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

RATIOS = (0.2, 0.3, 0.4, 0.5, 0.6)


@dataclass(frozen=True, kw_only=True)
class BudgetedPlan(Record):
    """A plan under one kind of budget."""

    params: Cost
    macs: Cost | None
    measured_loss: Loss | None
    predicted_ms: Milliseconds
    of_whole: Ratio  # measured, over the whole U-Net's latency


@dataclass(frozen=True, kw_only=True)
class BudgetRow(Record):
    """Both plans of one pruning ratio."""

    ratio: Share
    plans: Mapping[str, BudgetedPlan]  # by "params" and "time"
    time_over_params: Ratio


@dataclass(frozen=True, kw_only=True)
class BudgetResults(TimedResults):
    """The result of the study."""

    SCHEMA = "laptop.latency-budget/1"

    rows: tuple[BudgetRow, ...]


def compare_at(
    scores: Path, table_path: Path, config: BenchConfig, work: Path, ratio: float
) -> BudgetRow:
    """Make and time both plans of one ratio."""
    table, limits = read_table(table_path), PlanConfig(ratio=ratio)
    by_params = Plan.read(make_plan(scores, work / f"params-{ratio:g}.json", limits))
    most_ms = predicted_ms(table, by_params.remove)
    limits = replace(limits, ratio=None, max_latency_ms=most_ms, latency_table=str(table_path))
    by_time = Plan.read(make_plan(scores, work / f"time-{ratio:g}.json", limits))
    plans = {"params": by_params, "time": by_time}
    removed = {label: plan.remove for label, plan in plans.items()}
    report = time_plans(Scores.read(scores).model, removed, table, config, work)
    ratios = {(pair.a, pair.b): _interval(pair) for pair in report.ratios}
    row = BudgetRow(
        ratio=ratio,
        plans={
            label: BudgetedPlan(
                params=plan.params.after,
                macs=plan.macs.after if plan.macs else None,
                measured_loss=plan.measured_loss,
                predicted_ms=predicted_ms(table, plan.remove),
                of_whole=ratios["whole", label],
            )
            for label, plan in plans.items()
        },
        time_over_params=ratios["params", "time"],
    )
    say(f"{ratio:.0%}: latency by time over that by parameters {row.time_over_params.median:.3f}")
    return row


def _interval(pair: RatioRow) -> Ratio:
    return Ratio(median=pair.median, low=pair.low, high=pair.high)


def _results(table: LatencyTable, key: str, rows: tuple[BudgetRow, ...]) -> BudgetResults:
    return BudgetResults(
        key=key,
        model=str(table.model),
        runtime=str(table.runtime),
        device=table.device,
        conditions=table.conditions,
        unet_ms=table.unet_ms,
        rows=rows,
    )


def main() -> None:
    """Run the study for the ratios that its result does not hold yet."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("scores", type=Path)
    parser.add_argument("table", type=Path)
    parser.add_argument("-o", "--out", type=Path, required=True, help="the result, a .json file")
    parser.add_argument("--ratios", type=float, nargs="+", default=RATIOS)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=10.0, help="of a model, over all rounds")
    arguments = parser.parse_args()
    scores, out = arguments.scores, arguments.out
    table = read_table(arguments.table)
    threads = table_conditions(table).threads
    config = BenchConfig(threads=threads, rounds=arguments.rounds, seconds=arguments.seconds)
    work, key = work_folder(out), settings_key(table, config, str(scores))
    finished: tuple[BudgetRow, ...] = ()
    if out.exists():
        earlier = BudgetResults.read(out)
        check_key(out, earlier, key)
        finished = earlier.rows
    done = {row.ratio for row in finished}
    measure_rows(
        out,
        finished,
        [ratio for ratio in arguments.ratios if ratio not in done],
        partial(compare_at, scores, arguments.table, config, work),
        partial(_results, table, key),
    )
    rows = [row.as_json() for row in BudgetResults.read(out).rows]
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
