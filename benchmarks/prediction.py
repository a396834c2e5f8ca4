"""Whether a latency table predicts: `python -m laptop.benchmarks.prediction MODEL TABLE -o OUT`.

Random plans, of ratios spread evenly over what can be removed: each pruned U-Net is timed beside
the whole one, interleaved, in the table's runtime on this machine. What the table predicts is its
latency less the removed layers'; what is measured is the table's latency times the ratio of both,
so that a day on which the machine is slower does not count. A killed call goes on.
"""

import argparse
import json
import random
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from laptop import models
from laptop.benchmarks.computers import Computer, facts_here
from laptop.benchmarks.graph_layers import timed_graph
from laptop.benchmarks.graphs import make_graph
from laptop.benchmarks.latency import BenchConfig, measure
from laptop.benchmarks.metering import Workload
from laptop.benchmarks.subjects import workloads
from laptop.export.places import Local
from laptop.machine import machine
from laptop.pruning.latency_table import SCHEMA
from laptop.pruning.surgery import prune_unet, write_model
from laptop.pruning.units import Unit, anatomy
from laptop.run import read_json, say, write_json


def random_plan(units: list[Unit], ratio: float, total: int, seed: int) -> list[str]:
    """Units in random order until a share `ratio` of `total` parameters is gone."""
    order = random.Random(seed).sample(units, len(units))
    gone: dict[str, Unit] = {}
    for unit in order:
        if sum(u.params for u in gone.values()) >= ratio * total:
            break
        for name in (unit.name, *unit.needs):
            gone[name] = next(u for u in units if u.name == name)
    return list(gone)


def time_plan(
    model: str, remove: list[str], table: dict[str, Any], config: BenchConfig, work: Path
) -> dict[str, Any]:
    """One random plan, predicted and measured; the whole U-Net's graph is kept in `work`."""
    whole_unet = _workload(model, table)
    runtime, saves = table["runtime"], {u["name"]: u["latency_ms"] for u in table["units"]}
    whole = table["unet_ms"]["p50"]
    with tempfile.TemporaryDirectory(dir=work) as folder:
        if runtime == "onnxruntime":
            found = [timed_graph(whole_unet, work / "whole" / "model.onnx")]
            graph = Path(folder) / "pruned" / "model.onnx"
            make_graph(model, whole_unet.shapes, graph, remove)
            found.append(replace(timed_graph(whole_unet, graph), label="pruned"))
        else:
            write_model(Path(folder), prune_unet(models.load_unet(model), remove), model)
            found = [whole_unet, replace(whole_unet, label="pruned", source=folder)]
        report = measure(found, config, Computer(Local()), facts_here())
    (ratio,) = report["ratios"]
    predicted = whole - sum(saves[name] for name in remove)
    measured = whole * ratio["median"]
    return {
        "remove": remove,
        "predicted_ms": predicted,
        "measured_ms": measured,
        "low_ms": whole * ratio["low"],
        "high_ms": whole * ratio["high"],
        "error": predicted / measured - 1,
        "valid": all(row["valid"] for row in report["results"]),
    }


def _workload(model: str, table: dict[str, Any]) -> Workload:
    """The whole U-Net, with the table's shapes and threads."""
    conditions = table["conditions"]
    (found,) = workloads({"whole": model}, ("unet",), facts_here(), threads=conditions["threads"])
    shapes = {name: tuple(shape) for name, shape in conditions["shapes"].items()}
    return replace(found, shapes=shapes, runtime=table["runtime"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("model")
    parser.add_argument("table", type=Path)
    parser.add_argument("-o", "--out", type=Path, required=True, help="the result, a .json file")
    parser.add_argument("--plans", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=4.0, help="a model, over all rounds")
    asked = parser.parse_args()
    table = read_json(asked.table, SCHEMA)
    threads = table["conditions"]["threads"]
    config = BenchConfig(
        threads=threads, rounds=asked.rounds, iterations=asked.rounds, seconds=asked.seconds
    )
    known = anatomy(models.empty_unet(asked.model), granularity=table["granularity"])
    work = asked.out.with_suffix(".work")
    work.mkdir(parents=True, exist_ok=True)
    if table["runtime"] == "onnxruntime":
        whole = work / "whole" / "model.onnx"
        make_graph(asked.model, _workload(asked.model, table).shapes, whole)
    rows = read_json(asked.out)["plans"] if asked.out.exists() else []
    for number in range(len(rows), asked.plans):
        ratio = known.largest_ratio * (number + 0.5) / asked.plans
        remove = random_plan(list(known.units), ratio, known.params, number)
        rows.append(time_plan(asked.model, remove, table, config, work))
        errors = [abs(row["error"]) for row in rows]
        say(f"plan {number + 1}: {rows[-1]['error']:+.1%}; median {statistics.median(errors):.1%}")
        facts = {k: table[k] for k in ("model", "runtime", "device", "conditions", "granularity")}
        found = {"median_error": statistics.median(errors), "worst_error": max(errors)}
        write_json(
            asked.out,
            {"schema": "laptop.prediction/1"} | facts | found | machine() | {"plans": rows},
        )
    print(json.dumps({k: v for k, v in read_json(asked.out).items() if k != "plans"}, indent=1))


if __name__ == "__main__":
    main()
