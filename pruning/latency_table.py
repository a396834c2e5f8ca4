"""The latency table: what removing each layer saves of a forward, measured on one machine.

Parameters and multiply-accumulates are poor guides to speed; `laptop bench MODEL --layers` measures
it (`laptop.benchmarks.latency.layers`), and the planner takes the times as one more cost. They are
whole nanoseconds, so that the solver adds integers as it does for every other cost.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from laptop.console import say
from laptop.errors import BadInput
from laptop.files import shown
from laptop.pruning.plan_file import LatencyTable
from laptop.pruning.settings import PlanConfig
from laptop.pruning.units import Anatomy
from laptop.records import read_record

SCHEMA = "laptop.latency-table/1"
NS = 1e6  # in a millisecond


def with_latencies(known: Anatomy, config: PlanConfig) -> Anatomy:
    """`known` with the times of the config's latency table; as it is where none is asked for.

    Raises `BadInput` for a limit without a table or the reverse, and for a table that is broken or
    was made for other layers.
    """
    limit, table = config.max_latency_ms, config.latency_table
    if table is None:
        if limit is None:
            return known
        raise BadInput(
            f"--max-latency-ms {limit:g} needs the time of each layer: pass --latency-table T, "
            "which `laptop bench MODEL --layers -o T` makes."
        )
    if limit is None:
        raise BadInput(
            f"--latency-table {table} is there without a limit: pass --max-latency-ms X too, or "
            "leave the table out."
        )
    return read_table(Path(table), known)


def read_table(path: Path, known: Anatomy) -> Anatomy:
    """`known` with the times that stand in `path`."""
    table = read_record(path, LatencyTable, SCHEMA, "Measure again.")
    whole = table["unet_ms"]["p50"]
    times = {unit["name"]: unit["latency_ms"] for unit in table["units"]}
    if len(times) != len(table["units"]):
        raise BadInput(f"{path} names a layer twice. Measure again.")
    _check_layers(path, table, times, known)
    _check_times(path, whole, times)
    if reasons := table.get("invalid_reasons"):
        say(f"the times in {path} cannot be trusted: {shown(reasons)}. Measure again.")
    # rounded down: what layers save must not add up to more than there is
    ns = {name: math.floor(time * NS) for name, time in times.items()}
    return replace(known, latency_ns=round(whole * NS), latencies_ns=ns)


def _check_layers(
    path: Path, table: LatencyTable, times: Mapping[str, float], known: Anatomy
) -> None:
    names = {u.name for u in known.units}
    model, granularity = shown(table.get("model")), shown(table.get("granularity"))
    what = f"{path} is of {model} with granularity {granularity}"
    advice = "Make it from the scored model: laptop bench MODEL --layers --granularity G."
    if strange := sorted(names ^ times.keys()):
        raise BadInput(
            f"{what}, {len(times)} layers; here are {len(names)}, and {len(strange)} are only in "
            f"one of both, such as {shown(strange[0])}. {advice}"
        )
    if (params := table.get("params", known.params)) != known.params:
        raise BadInput(
            f"{what}, a U-Net of {params} parameters; this one has {known.params}. {advice}"
        )


def _check_times(path: Path, whole: float, times: Mapping[str, float]) -> None:
    if (total := math.fsum(times.values())) > whole:
        raise BadInput(
            f"{path}: the layers take {total:.3f} ms together, the whole U-Net only {whole:.3f} ms."
            " What removing each layer saves must not add up to more. Measure again."
        )
