"""Latency of each removable layer inside the U-Net's forward, as latency budgets need it.

Three kinds of forwards take turns: plain ones, ones without any removable layer, and ones with a
clock at every layer, which gives the layers' shares of the difference (`layer_table.py`). A layer
timed alone would have other caches than between its neighbours. In PyTorch here;
`graph_layers.py` does the same in ONNX Runtime, on any computer.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from laptop.benchmarks.bench_report import ProbedDevice
from laptop.benchmarks.devices import eager, sensors
from laptop.benchmarks.devices.computer import Computer, facts_here
from laptop.benchmarks.devices.device import Facts, Round, Workload, wait_until_cool
from laptop.benchmarks.devices.worker import repeat
from laptop.benchmarks.latency import graph_layers
from laptop.benchmarks.latency.bench import (
    conditions,
    device_identity,
    iterations_per_round,
    known_facts,
)
from laptop.benchmarks.latency.image_sampling import with_sampling
from laptop.benchmarks.latency.layer_table import layer_table, timed_modules
from laptop.benchmarks.latency.workloads import workloads
from laptop.benchmarks.settings import BenchConfig
from laptop.console import track
from laptop.errors import BadInput, Unsupported
from laptop.models import loading, locating
from laptop.models.description import describe
from laptop.models.shapes import Size
from laptop.pruning.latency_table import LatencyTable
from laptop.pruning.sampling_choice import picture_size
from laptop.pruning.sampling_config import SamplingConfig
from laptop.pruning.scores import Anatomy, Unit
from laptop.pruning.units import anatomy_of, removed
from laptop.records import built
from laptop.run import Overwrite, run_stage

Clocks = dict[str, list[float]]  # ms of each call, by module


def bench_layers(
    model: str,
    out: Path,
    config: BenchConfig,
    device: Computer,
    granularity: str = "fine",
    resolution: int | None = None,
    *,
    sampling: SamplingConfig | None = None,
    overwrite: Overwrite = False,
) -> Path:
    """Time the layers of `model` on a device; write the table to `out` (.json).

    The runtime is PyTorch on this machine unless the config names ONNX Runtime, which is the one
    on others. `resolution` is in pixels; None for the model's own.
    """
    config, size = with_sampling({"model": model}, config, sampling)
    earlier = None if overwrite else known_facts(out, device, _probed)
    facts = earlier or device.probe()
    runtime = _checked_runtime(config, device, facts)
    size = (resolution, resolution) if resolution else size
    workload = _workload(model, config, size, facts)
    anatomy = _anatomy(model, granularity)
    inputs, identity = locating.identity("model", model)

    def work(folder: Path) -> None:
        facts = device.probe()
        not_ready = wait_until_cool(device, config.cool_down_s)
        timed = replace(workload, runtime=runtime)
        if runtime == "pytorch":
            table = measure(workload, anatomy.units, config)
        else:
            table = graph_layers.measure(timed, anatomy.units, config, device, folder)
        reasons = table.invalid_reasons + ((f"began: {not_ready}",) if not_ready else ())
        replace(
            table,
            model=model,
            granularity=granularity,
            params=anatomy.params,
            runtime=runtime,
            precision="fp32",
            device=facts.name,
            address=device.address,
            probe=ProbedDevice(**vars(facts) | {"address": device.address}).as_json(),
            conditions=conditions(timed, config, facts).as_json(),
            valid=not reasons,
            invalid_reasons=reasons,
        ).write(folder / out.name)

    settings = {k: v for k, v in asdict(config).items() if k != "components"}
    settings |= {"granularity": granularity, "size": size, "runtime": runtime} | identity
    settings |= device_identity(device, facts) | {"version": facts.runtimes[runtime]}
    settings |= {"team": ""}  # tables of 0.1.0 have it, and are kept
    return run_stage("layers", out, settings, inputs, work, overwrite=overwrite)


def _probed(table: Path) -> ProbedDevice:
    return built(LatencyTable.read(table).probe, ProbedDevice, str(table))


def estimate(
    model: str, config: BenchConfig, device: Computer, granularity: str = "fine"
) -> dict[str, object]:
    """The layers that `bench_layers` would time, and the least time that takes."""
    runtime = _checked_runtime(config, device, device.probe())
    # rounds with all layers, and a third as long without; in PyTorch also with clocks
    rounds_s = config.seconds * (1 + 1 / 3 + (runtime == "pytorch"))
    least_s = config.warmup_s + rounds_s
    return {
        "device": device.address,
        "runtime": runtime,
        "layers": len(_anatomy(model, granularity).units),
        "least_seconds": round(least_s, 1),
    }


def _checked_runtime(config: BenchConfig, device: Computer, facts: Facts) -> str:
    """The runtime in which layers are timed; `BadInput` if the config names another."""
    if len(config.runtimes) > 1:
        raise BadInput(f"a table of layers is of one runtime, not of {config.runtimes}.")
    runtime = (config.runtimes or ("pytorch" if device.address == "local" else "onnxruntime",))[0]
    if runtime not in facts.runtimes or not (
        runtime == "pytorch" or runtime.startswith("onnxruntime")
    ):
        raise BadInput(
            f"layers are timed in pytorch or onnxruntime, not in {runtime} on {device.address}; "
            f"there are {', '.join(facts.runtimes)}."
        )
    return runtime


def _anatomy(model: str, granularity: str) -> Anatomy:
    """The U-Net's layers; `Unsupported` if none can be removed."""
    anatomy = anatomy_of(loading.empty_unet(model), granularity=granularity)
    if not anatomy.units:
        raise Unsupported(f"the U-Net of {model} has no layer left that can be removed.")
    return anatomy


def _workload(model: str, config: BenchConfig, size: Size | None, facts: Facts) -> Workload:
    """The U-Net in PyTorch, with the shapes of its inputs."""
    (workload, *_) = workloads(
        {"model": model},
        ("unet",),
        facts_here(),
        guidance=config.guidance is not False,
        threads=config.threads or facts.cores,
        seed=config.seed,
    )
    if workload.runtime != "pytorch":
        raise BadInput(
            f"{model} holds artifacts, whose layers cannot be timed one by one. Pass the model "
            "that they were made from."
        )
    if size is None:
        return workload
    description = describe(model)
    scale = description.latents.pixels
    height, width = (side // scale for side in picture_size(description, *size))
    batch, channels, _, _ = workload.shapes["sample"]
    return replace(workload, shapes={**workload.shapes, "sample": (batch, channels, height, width)})


def measure(workload: Workload, units: Sequence[Unit], config: BenchConfig) -> LatencyTable:
    """Latencies of the whole U-Net and its layers, by the protocol of `latency`, here."""
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(workload.threads)
        unet, run = eager.unet(workload.source, workload.shapes, workload.seed)
        signs = {u.name: timed_modules(unet, u.name, u.needs) for u in units}
        clocks: Clocks = {module: [] for modules in signs.values() for module in modules}
        names = [u.name for u in units]
        plain, bare, clocked = _rounds(unet, run, names, clocks, config)
    finally:
        torch.set_num_threads(threads)
    return layer_table(plain, bare, shares_of(signs, clocks, clocked), config)


def _rounds(
    unet: nn.Module,
    run: Callable[[], object],
    names: Sequence[str],
    clocks: Clocks,
    config: BenchConfig,
) -> tuple[list[Round], list[Round], list[float]]:
    """Rounds of plain forwards and of ones without any layer; ms of those that filled `clocks`."""
    plain: list[Round] = []
    bare: list[Round] = []
    clocked: list[float] = []
    least, seconds = iterations_per_round(config), config.seconds / config.rounds
    repeat(run, config.warmup_iterations, config.warmup_s)
    for _ in track(range(config.rounds), "bench layers", config.rounds):
        monitor = sensors.Monitor()
        plain.append(Round(tuple(repeat(run, least, seconds)), **monitor.read()))
        with removed(unet, names):
            run()
            bare.append(Round(tuple(repeat(run, 1, seconds / 3))))
        with running(unet, clocks):
            clocked += repeat(run, least, seconds)
    return plain, bare, clocked


@contextlib.contextmanager
def running(unet: nn.Module, clocks: Clocks) -> Iterator[None]:
    """Append to `clocks` the time in ms of each call of the modules that it names."""
    started: dict[str, int] = {}
    hooks = []

    def start(name: str) -> None:
        started[name] = time.perf_counter_ns()

    def stop(name: str) -> None:
        clocks[name].append((time.perf_counter_ns() - started[name]) / 1e6)

    for name in clocks:
        module = unet.get_submodule(name)
        hooks += [
            module.register_forward_pre_hook(lambda *_, name=name: start(name)),
            module.register_forward_hook(lambda *_, name=name: stop(name)),
        ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def shares_of(
    signs: Mapping[str, Mapping[str, int]], clocks: Clocks, samples: Sequence[float]
) -> dict[str, float]:
    """Each layer's share of a forward: its median time over the medians of all layers and the rest.

    `samples` are the times of the forwards in which the clocks ran. Shares, because medians of
    parts do not add up to that of the whole: these never have more than 1 together.
    """
    times = {
        name: np.sum([sign * np.array(clocks[module]) for module, sign in of_layer.items()], axis=0)
        for name, of_layer in signs.items()
    }
    rest = np.array(samples) - sum(times.values())
    total = np.median(rest) + sum(np.median(ms) for ms in times.values())
    return {name: max(0.0, float(np.median(ms) / total)) for name, ms in times.items()}
