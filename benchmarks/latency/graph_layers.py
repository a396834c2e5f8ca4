"""Latency of each removable layer in ONNX Runtime, on any computer that can be reached.

The U-Net is exported, whole and without any removable layer. Inferences of both take turns with
profiled inferences of the whole, which give the time of every operator. Operators have the names of
the modules that they were traced from, so a layer's share is that of its operators. An operator
that ONNX Runtime adds itself, such as a change of layout, counts to the one before it.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

from laptop.benchmarks.devices.computer import Computer
from laptop.benchmarks.devices.device import Round, Workload
from laptop.benchmarks.latency.bench import iterations_per_round
from laptop.benchmarks.latency.layer_table import layer_table, timed_modules
from laptop.benchmarks.latency.unet_graph import make_graph
from laptop.benchmarks.settings import BenchConfig
from laptop.console import track
from laptop.models import loading
from laptop.pruning.latency_table import LatencyTable
from laptop.pruning.scores import Unit
from laptop.unfinished import resume_folder

MODULE = re.compile(r"/unet/(\S+)")


def measure(
    workload: Workload, units: Sequence[Unit], config: BenchConfig, device: Computer, folder: Path
) -> LatencyTable:
    """Latencies of the whole U-Net and its layers; `folder` keeps the graphs, made once."""
    graphs = resume_folder(folder) / "graphs"
    names = [unit.name for unit in units]
    whole, bare = (graphs / name / "model.onnx" for name in ("whole", "bare"))
    for path, remove in ((whole, []), (bare, names)):
        make_graph(workload.source, workload.shapes, path, remove)
    unet = loading.empty_unet(workload.source)
    signs = {unit.name: timed_modules(unet, unit.name, unit.needs) for unit in units}
    least = iterations_per_round(config)
    seconds = config.seconds / config.rounds
    plain: list[Round] = []
    without: list[Round] = []
    profiles: list[dict[str, float]] = []
    with (
        device.meter(
            timed_graph(workload, whole), config.warmup_iterations, config.warmup_s
        ) as meter,
        device.meter(
            timed_graph(workload, bare), config.warmup_iterations, config.warmup_s
        ) as other,
    ):
        for _ in track(range(config.rounds), "bench layers", config.rounds):
            plain.append(meter.run_round(least, seconds))
            without.append(other.run_round(1, seconds / 3))
            profiles.append(shares_of(signs, meter.profile(least)))
    shares = {name: median(profile[name] for profile in profiles) for name in names}
    return layer_table(plain, without, shares, config)


def timed_graph(workload: Workload, graph: Path) -> Workload:
    """The workload of a U-Net, as a graph in ONNX Runtime."""
    return replace(workload, target="onnx", source=str(graph))


def shares_of(
    signs: Mapping[str, Mapping[str, int]], operators: Iterable[tuple[str, float]]
) -> dict[str, float]:
    """Each layer's share of the time of all operators (name, ms), never below zero."""
    modules: dict[str, float] = {}
    module, total = "", 0.0
    for name, ms in operators:
        if match := MODULE.search(name):
            module = match[1].rpartition("/")[0].replace("/", ".")
        modules[module] = modules.get(module, 0.0) + ms
        total += ms
    return {
        unit: max(0.0, sum(sign * _within(modules, name) for name, sign in of_unit.items())) / total
        for unit, of_unit in signs.items()
    }


def _within(modules: Mapping[str, float], name: str) -> float:
    return sum(ms for path, ms in modules.items() if f"{path}.".startswith(f"{name}."))
