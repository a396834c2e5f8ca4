"""Whether a latency table predicts the latency of plans.

    python -m laptop.studies.latency_prediction MODEL TABLE -o OUT

Random plans, of ratios spread evenly over what can be removed: each pruned U-Net is timed beside
the whole one, interleaved, in the table's runtime on this machine. What the table predicts is its
latency less the removed layers'; what is measured is the table's latency times the ratio of both,
so that a day on which the machine is slower does not count. A killed call goes on.
"""

import argparse
import hashlib
import json
import shutil
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict

from laptop.benchmarks.bench_report import BenchReport
from laptop.benchmarks.devices.computer import Computer, facts_here
from laptop.benchmarks.devices.device import Workload
from laptop.benchmarks.latency.bench import measure
from laptop.benchmarks.latency.graph_layers import timed_graph
from laptop.benchmarks.latency.unet_graph import make_graph
from laptop.benchmarks.latency.workloads import workloads
from laptop.benchmarks.report.figures import THEMES, new_figure, save_figure
from laptop.benchmarks.report.run_files import RUNTIMES
from laptop.benchmarks.settings import BenchConfig
from laptop.console import say
from laptop.errors import BadInput
from laptop.fields import Count, Name, Range
from laptop.files import write_json
from laptop.hosts.host import Local
from laptop.machine import machine
from laptop.models import loading
from laptop.pruning.additivity import random_set
from laptop.pruning.latency_table import LatencyTable
from laptop.pruning.plan_file import Milliseconds
from laptop.pruning.surgery import prune_unet, write_model
from laptop.pruning.units import anatomy_of
from laptop.records import Record, built, read_record

KIND = "laptop.prediction/1"
KEPT = ("model", "runtime", "device", "conditions", "granularity", "unet_ms")  # of a table
Json = dict[str, Any]


def time_plan(
    model: str, remove: list[str], table: LatencyTable, config: BenchConfig, work: Path
) -> Json:
    """One random plan, predicted and measured."""
    saves, whole = table.times_ms, table.unet_ms.p50
    report = time_plans(model, {"pruned": remove}, table, config, work)
    (ratio,) = report.ratios
    predicted = whole - sum(saves[name] for name in remove)
    measured = whole * ratio.median
    return {
        "remove": remove,
        "predicted_ms": predicted,
        "measured_ms": measured,
        "low_ms": whole * ratio.low,
        "high_ms": whole * ratio.high,
        "error": predicted / measured - 1,
        "valid": all(row.valid for row in report.results),
    }


def time_plans(
    model: str,
    plans: Mapping[str, Sequence[str]],
    table: LatencyTable,
    config: BenchConfig,
    work: Path,
) -> BenchReport:
    """The report of the whole U-Net and of it without each plan's layers, interleaved.

    In the table's runtime and shapes, on this machine; the whole one's graph is kept in `work`.
    """
    whole = _workload(model, table)
    found = [whole]
    with tempfile.TemporaryDirectory(dir=work) as scratch:
        if table.runtime == "onnxruntime":
            graph = work / "whole" / "model.onnx"
            make_graph(model, whole.shapes, graph)
            found = [timed_graph(whole, graph)]
        for label, remove in plans.items():
            folder = Path(scratch) / label
            if table.runtime == "onnxruntime":
                graph = folder / "model.onnx"
                make_graph(model, whole.shapes, graph, remove)
                found.append(replace(timed_graph(whole, graph), label=label))
            else:
                folder.mkdir()
                write_model(folder, prune_unet(loading.load_unet(model), remove), model)
                found.append(replace(whole, label=label, source=str(folder)))
        return measure(found, config, Computer(Local()), facts_here())


def _workload(model: str, table: LatencyTable) -> Workload:
    """The whole U-Net, with the table's shapes and threads."""
    if table.address != "local":
        raise BadInput(f"the table was measured on {table.address}; plans are timed here.")
    measured = conditions(table)
    (found,) = workloads({"whole": model}, ("unet",), facts_here(), threads=measured.threads)
    return replace(found, shapes=dict(measured.shapes), runtime=str(table.runtime))


@dataclass(frozen=True, kw_only=True)
class TableConditions(Record):
    """What a table was measured with, as far as plans are timed by it."""

    threads: Count
    shapes: Mapping[str, tuple[Count, ...]]


def conditions(table: LatencyTable) -> TableConditions:
    """Threads and shapes of a table's measurement; `BadInput` where it lacks them."""
    return built(table.conditions, TableConditions, "the table's conditions", "Measure again.")


class Median(TypedDict):
    """The latency of the whole U-Net."""

    p50: Annotated[float, Range(above=0, below=86_400_000)]


class Predicted(TypedDict):
    """A random plan: what its table says, and what was measured."""

    predicted_ms: Milliseconds
    measured_ms: Annotated[float, Range(above=0, below=86_400_000)]
    low_ms: Milliseconds
    high_ms: Milliseconds
    error: float
    valid: bool


class Predictions(TypedDict):
    """A result of this module."""

    key: NotRequired[str]
    model: Name
    runtime: Name
    unet_ms: Median
    median_error: float
    rows: list[Predicted]


def read_table(path: Path) -> LatencyTable:
    """A latency table with all that a plan is timed by; `BadInput` for anything else."""
    table = LatencyTable.read(path)
    needed = ("granularity", "model", "runtime", "samples_ms")
    if missing := [key for key in needed if not getattr(table, key)]:
        raise BadInput(f"{path} lacks {' and '.join(missing)}. Measure again.")
    conditions(table)
    return table


def read_predictions(path: Path) -> Json:
    """A result of this module; `BadInput` for anything else."""
    return {**read_record(path, Predictions, KIND)}


def predict(model: str, table: LatencyTable, out: Path, plans: int, config: BenchConfig) -> Json:
    """Predict and measure random plans, those that `out` has not yet; write it after each."""
    anatomy = anatomy_of(loading.empty_unet(model), granularity=str(table.granularity))
    work = out.with_suffix(".work")
    work.mkdir(parents=True, exist_ok=True)
    asked = {"plans": plans, "table": table.samples_ms, **asdict(config)}
    key = hashlib.sha256(json.dumps(asked).encode()).hexdigest()
    before = read_predictions(out) if out.exists() else {"rows": []}
    rows = before["rows"]
    if rows and before.get("key") != key:
        raise BadInput(f"{out} was made of another table or with other settings. Remove it.")
    for number in range(len(rows), plans):
        ratio = anatomy.largest_ratio * (number + 0.5) / plans
        least = ratio * anatomy.params
        remove = random_set(anatomy.units, least, number, with_shells=True)
        rows.append(time_plan(model, remove, table, config, work))
        errors = [abs(row["error"]) for row in rows]
        say(f"plan {number + 1}: {rows[-1]['error']:+.1%}; median {statistics.median(errors):.1%}")
        summary = {
            "median_error": statistics.median(errors),
            "worst_error": max(errors),
            "valid": sum(row["valid"] for row in rows),
        }
        document = {
            "schema": KIND,
            "key": key,
            **{k: v for k, v in table.as_json().items() if k in KEPT},
            **summary,
            **machine(),
        }
        write_json(out, document | {"rows": rows})
    shutil.rmtree(work)
    return read_predictions(out)


def prediction_chart(reports: Sequence[Json], stem: Path) -> None:
    """Predicted against measured latency as shares of the whole U-Net's; light and dark."""
    for theme in THEMES:
        figure, (axes,) = new_figure(theme, 3.6, 1)
        axes.plot([0, 1], [0, 1], color=theme.grid, linewidth=1.2, zorder=0)
        for report, colour in zip(reports, theme.curves, strict=False):
            whole = report["unet_ms"]["p50"]
            predicted = [row["predicted_ms"] / whole for row in report["rows"]]
            measured = [row["measured_ms"] / whole for row in report["rows"]]
            arms = [
                [(row["measured_ms"] - row["low_ms"]) / whole for row in report["rows"]],
                [(row["high_ms"] - row["measured_ms"]) / whole for row in report["rows"]],
            ]
            title = f"{Path(report['model']).name}, {RUNTIMES[report['runtime']]}"
            axes.errorbar(
                predicted, measured, yerr=arms, fmt="o", markersize=4, linewidth=1, color=colour,
                label=f"{title}: median error {report['median_error']:.1%}",
            )  # fmt: skip
        axes.set_xlabel("predicted, share of the whole U-Net's", color=theme.ink, fontsize=8)
        axes.set_ylabel("measured", color=theme.ink, fontsize=8)
        axes.legend(loc="upper left", frameon=False, fontsize=8, labelcolor=theme.ink)
        save_figure(figure, stem.with_name(f"{stem.name}{theme.suffix}.svg"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("model", nargs="?", help="leave it and the table out for a figure only")
    parser.add_argument("table", type=Path, nargs="?")
    parser.add_argument("-o", "--out", type=Path, help="the result, a .json file")
    parser.add_argument("--plans", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=10.0, help="a model, over all rounds")
    parser.add_argument("--figure", type=Path, help="FIGURE.svg of the results in --of")
    parser.add_argument("--of", type=Path, nargs="+", default=[])
    asked = parser.parse_args()
    if asked.figure:
        prediction_chart(
            [read_predictions(path) for path in asked.of], asked.figure.with_suffix("")
        )
        return
    if not (asked.model and asked.table and asked.out):
        parser.error("MODEL, TABLE and -o, or --figure and --of")
    table = read_table(asked.table)
    config = BenchConfig(
        threads=conditions(table).threads,
        rounds=asked.rounds,
        seconds=asked.seconds,
    )
    found = predict(asked.model, table, asked.out, asked.plans, config)
    print(json.dumps({k: v for k, v in found.items() if k != "rows"}, indent=1))


if __name__ == "__main__":
    main()
