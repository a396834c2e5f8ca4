"""Latency of each removable layer in ONNX Runtime, on any computer that can be reached.

The U-Net is exported, and two kinds of inferences take turns: plain ones give its latency, profiled
ones the time of every operator. Operators have the names of the modules that they were traced from,
so each layer's share is that of its operators; one that ONNX Runtime has made itself, such as a
change of layout, goes with the operator before it.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from laptop import models
from laptop.benchmarks.computers import Computer
from laptop.benchmarks.graphs import export_unet, save_zeros
from laptop.benchmarks.latency import BenchConfig, invalid_reasons, share, summary
from laptop.benchmarks.metering import Round, Workload
from laptop.export.job import run_apart
from laptop.pruning.units import SUBLAYERS, Unit
from laptop.run import resume_folder, track

MODULE = re.compile(r"/unet/(\S+)")


def measure(
    workload: Workload, units: Sequence[Unit], config: BenchConfig, device: Computer, folder: Path
) -> dict[str, Any]:
    """The measured part of the table; `folder` is for the graph, which is made once."""
    graph = resume_folder(folder) / "graph" / "unet" / "model.onnx"
    if not graph.exists():
        beside = graph.with_name("partial") / graph.name
        beside.parent.mkdir(parents=True, exist_ok=True)
        given = graph.with_name("examples.safetensors")
        save_zeros(workload.shapes, given)
        what = "exporting the U-Net to ONNX"
        run_apart(what, export_unet, workload.source, given, beside, temporary=given.parent)
        for path in [*beside.parent.iterdir()]:
            path.replace(graph.with_name(path.name))
    unet = models.empty_unet(workload.source)
    signs = {unit.name: timed_modules(unet, unit.name, unit.needs) for unit in units}
    there = replace(
        workload, target="onnx", source=str(graph), settings={"imports": ("onnxruntime",)}
    )
    plain: list[Round] = []
    profiles: list[dict[str, float]] = []
    with device.meter(there, config.warmup_iterations, config.warmup_s) as meter:
        least = share(config.iterations, config.rounds)
        for _ in track(range(config.rounds), "bench layers", config.rounds):
            plain.append(meter.run_round(least, config.seconds / config.rounds))
            profiles.append(shares_of(signs, meter.profile(least)))
    shares = {name: _median([profile[name] for profile in profiles]) for name in signs}
    return measured(plain, shares, config)


def shares_of(
    signs: Mapping[str, Mapping[str, int]], operators: Iterable[tuple[str, float]]
) -> dict[str, float]:
    """Each layer's share of the time of all operators (name, ms), never below zero."""
    modules: dict[str, float] = {}
    place, total = "", 0.0
    for name, ms in operators:
        if found := MODULE.search(name):
            place = found[1].rpartition("/")[0].replace("/", ".")
        modules[place] = modules.get(place, 0.0) + ms
        total += ms
    return {
        unit: max(0.0, sum(sign * _within(modules, name) for name, sign in of_unit.items())) / total
        for unit, of_unit in signs.items()
    }


def _within(modules: Mapping[str, float], name: str) -> float:
    return sum(ms for path, ms in modules.items() if f"{path}.".startswith(f"{name}."))


def measured(
    plain: Sequence[Round], shares: Mapping[str, float], config: BenchConfig
) -> dict[str, Any]:
    """What a table holds of rounds of plain forwards, and of the layers' shares of a forward."""
    samples = [sample for turn in plain for sample in turn.samples_ms]
    whole, reasons = summary(samples), invalid_reasons(plain, config.cv_bound)
    return {
        "n": len(samples),
        "unet_ms": whole,
        "units": [{"name": u, "latency_ms": round(whole["p50"] * x, 6)} for u, x in shares.items()],
        "valid": not reasons,
        "invalid_reasons": reasons,
        "samples_ms": [round(s, 4) for s in samples],
    }


def timed_modules(unet: nn.Module, name: str, needs: Sequence[str] = ()) -> dict[str, int]:
    """Modules whose time goes (1) with a layer, and those inside of it whose time does not (-1).

    A resnet's shortcut stays, the norm before a sublayer goes with it, and what `needs` names has
    a time of its own.
    """
    signs = {name: 1}
    if getattr(unet.get_submodule(name), "conv_shortcut", None) is not None:
        signs[f"{name}.conv_shortcut"] = -1
    block, _, part = name.rpartition(".")
    if part in SUBLAYERS:
        signs[f"{block}.{SUBLAYERS[part]}"] = 1
    for inner in needs:
        signs |= {module: -sign for module, sign in timed_modules(unet, inner).items()}
    return signs


def _median(values: Sequence[float]) -> float:
    ordered = sorted(values)
    return ordered[len(ordered) // 2]
