"""A budget of time beside one of parameters.

    python -m laptop.studies.latency_budget SCORES TABLE -o OUT

At each pruning ratio the plan by parameters is made, and the plan whose limit is the time that the
table predicts for the first. Both are timed beside the whole U-Net, interleaved, in the table's
runtime on this machine: at the same time, which loses less of the output?
"""

import argparse
import hashlib
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from laptop.benchmarks.bench_report import Ratio
from laptop.benchmarks.settings import BenchConfig
from laptop.console import say
from laptop.errors import BadInput
from laptop.fields import Share
from laptop.files import write_json
from laptop.machine import machine
from laptop.pruning.plan import make_plan
from laptop.pruning.plan_file import Plan
from laptop.pruning.scores import Scores
from laptop.pruning.settings import PlanConfig
from laptop.records import read_record
from laptop.studies.latency_prediction import conditions, read_table, time_plans

RATIOS = (0.2, 0.3, 0.4, 0.5, 0.6)
SCHEMA = "laptop.latency-budget/1"


class Row(TypedDict):
    """Both plans of one ratio."""

    ratio: Share


class Results(TypedDict):
    """A result of this module."""

    rows: list[Row]
    key: NotRequired[str]


def compare_at(
    ratio: float, scores: Path, table: Path, config: BenchConfig, work: Path
) -> dict[str, Any]:
    """Both plans of one ratio: parameters, MACs, losses, predicted and measured times."""
    limits = PlanConfig(ratio=ratio)
    by_params = Plan.read(make_plan(scores, work / f"params-{ratio:g}.json", limits))
    timed = read_table(table)
    times, whole_ms = timed.times_ms, timed.unet_ms.p50
    most_ms = whole_ms - sum(times[name] for name in by_params.remove)
    limits = replace(limits, ratio=None, max_latency_ms=most_ms, latency_table=str(table))
    by_time = Plan.read(make_plan(scores, work / f"time-{ratio:g}.json", limits))
    plans = {"params": by_params, "time": by_time}
    removed = {label: plan.remove for label, plan in plans.items()}
    model = Scores.read(scores).model
    report = time_plans(model, removed, timed, config, work)
    ratios = {(pair.a, pair.b): pair for pair in report.ratios}
    rows = {
        label: {
            "params": plan.params.after,
            "macs": plan.macs and plan.macs.after,
            "measured_loss": plan.measured_loss,
            "predicted_ms": whole_ms - sum(times[name] for name in plan.remove),
            "of_whole": _interval(ratios["whole", label]),
        }
        for label, plan in plans.items()
    }
    pair = _interval(ratios["params", "time"])
    return {"ratio": ratio, "plans": rows, "time_over_params": pair}


def _interval(pair: Ratio) -> dict[str, float]:
    return {"median": pair.median, "low": pair.low, "high": pair.high}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("scores", type=Path)
    parser.add_argument("table", type=Path)
    parser.add_argument("-o", "--out", type=Path, required=True, help="the result, a .json file")
    parser.add_argument("--ratios", type=float, nargs="+", default=RATIOS)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=10.0, help="a model, over all rounds")
    asked = parser.parse_args()
    table = read_table(asked.table)
    config = BenchConfig(
        threads=conditions(table).threads, rounds=asked.rounds, seconds=asked.seconds
    )
    work = asked.out.with_suffix(".work")
    work.mkdir(parents=True, exist_ok=True)
    key = hashlib.sha256(
        json.dumps([asdict(config), table.samples_ms, str(asked.scores)]).encode()
    ).hexdigest()
    before = read_record(asked.out, Results, SCHEMA) if asked.out.exists() else Results(rows=[])
    rows: list[Any] = [*before["rows"]]
    if rows and before.get("key") != key:
        raise BadInput(f"{asked.out} was made of another table or with other settings. Remove it.")
    done = [row["ratio"] for row in rows]
    for ratio in (ratio for ratio in asked.ratios if ratio not in done):
        rows.append(compare_at(ratio, asked.scores, asked.table, config, work))
        say(f"{ratio:.0%}: {rows[-1]}")
        kept = ("model", "runtime", "device", "conditions", "unet_ms")
        told = {key: value for key, value in table.as_json().items() if key in kept}
        write_json(
            asked.out,
            {"schema": SCHEMA, "key": key, **told, **machine(), "rows": rows},
        )
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
