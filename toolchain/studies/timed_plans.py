"""Time pruned U-Nets and the whole one as a latency table was measured, row by row."""

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TypeVar

from laptop.benchmarks.bench_report import BenchReport
from laptop.benchmarks.devices.computer import Computer, facts_here
from laptop.benchmarks.devices.device import Workload
from laptop.benchmarks.latency.bench import measure
from laptop.benchmarks.latency.graph_layers import timed_graph
from laptop.benchmarks.latency.unet_graph import make_graph
from laptop.benchmarks.latency.workloads import workloads
from laptop.benchmarks.settings import BenchConfig
from laptop.errors import BadInput
from laptop.fields import Count, Name
from laptop.hosts.host import Local
from laptop.machine import machine
from laptop.models import loading
from laptop.pruning.latency_table import ForwardTime, LatencyTable
from laptop.pruning.surgery import prune_unet, write_model
from laptop.records import Record, built

Row = TypeVar("Row", bound=Record)
Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True)
class TableConditions(Record):
    """The conditions of a table's measurement that its plans are timed under."""

    threads: Count
    shapes: Mapping[str, tuple[Count, ...]]  # of the U-Net's inputs


@dataclass(frozen=True, kw_only=True)
class TimedResults(Record):
    """Results of a study that times plans, with the facts of the table that it uses."""

    key: str | None = None  # of the table and the settings
    model: Name
    runtime: Name
    device: Name | None = None
    conditions: Mapping[str, object]
    unet_ms: ForwardTime

    def as_json(self) -> dict[str, object]:
        """The fields, and the machine's facts."""
        return machine() | super().as_json()


def read_table(path: Path) -> LatencyTable:
    """A latency table of `laptop bench MODEL --layers`; `BadInput` for anything else."""
    table = LatencyTable.read(path)
    needed = ("model", "granularity", "runtime")
    if missing := [name for name in needed if getattr(table, name) is None]:
        raise BadInput(f"{path} lacks {' and '.join(missing)}. Measure again.")
    if table.address != "local":
        raise BadInput(f"{path} was measured on {table.address}; plans are timed here.")
    table_conditions(table)
    return table


def table_conditions(table: LatencyTable) -> TableConditions:
    """The threads and shapes of a table's measurement; `BadInput` where it lacks them."""
    return built(table.conditions, TableConditions, "the table's conditions", "Measure again.")


def predicted_ms(table: LatencyTable, remove: Sequence[str]) -> float:
    """The latency without some layers that the table predicts."""
    return table.unet_ms.p50 - sum(table.times_ms[name] for name in remove)


def time_plans(
    model: str,
    plans: Mapping[str, Sequence[str]],
    table: LatencyTable,
    config: BenchConfig,
    work: Path,
) -> BenchReport:
    """Time the whole U-Net ("whole") and the one without each plan's layers, interleaved.

    In the table's runtime and shapes, on this machine; the whole U-Net's graph is kept in `work`.
    """
    conditions = table_conditions(table)
    (unet,) = workloads({"whole": model}, ("unet",), facts_here(), threads=conditions.threads)
    whole = replace(unet, shapes=dict(conditions.shapes), runtime=str(table.runtime))
    is_graph = table.runtime == "onnxruntime"
    timed = [_as_graph(whole, model, (), work / "whole") if is_graph else whole]
    with tempfile.TemporaryDirectory(dir=work) as scratch:
        for label, remove in plans.items():
            folder = Path(scratch) / label
            if is_graph:
                timed.append(replace(_as_graph(whole, model, remove, folder), label=label))
            else:
                folder.mkdir()
                write_model(folder, prune_unet(loading.load_unet(model), remove), model)
                timed.append(replace(whole, label=label, source=str(folder)))
        return measure(timed, config, Computer(Local()), facts_here())


def _as_graph(whole: Workload, model: str, remove: Sequence[str], folder: Path) -> Workload:
    graph = folder / "model.onnx"
    make_graph(model, whole.shapes, graph, remove)
    return timed_graph(whole, graph)


def work_folder(out: Path) -> Path:
    """Make the folder next to the result `out` in which a study works."""
    work = out.with_suffix(".work")
    work.mkdir(parents=True, exist_ok=True)
    return work


def settings_key(table: LatencyTable, config: BenchConfig, more: object) -> str:
    """A digest of everything that rows depend on; rows of another key are not continued."""
    identity = [table.samples_ms, asdict(config), more]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()


def check_key(out: Path, results: TimedResults, key: str) -> None:
    """Raise `BadInput` where earlier results were measured with other settings."""
    if results.key != key:
        raise BadInput(f"{out} was made of another table or with other settings. Remove it.")


def measure_rows(
    out: Path,
    finished: Sequence[Row],
    items: Iterable[Item],
    measure_row: Callable[[Item], Row],
    results: Callable[[tuple[Row, ...]], TimedResults],
) -> None:
    """Measure a row for each of `items`; write all rows to `out` after each.

    So a killed study continues after the rows that it has `finished`.
    """
    rows = tuple(finished)
    for item in items:
        rows = (*rows, measure_row(item))
        results(rows).write(out)
