"""Latency that can be trusted: own processes, interleaved rounds, raw samples, stated conditions.

Models are timed in turn (A B A B ...), so that heat and other load affect all of them alike.
`validity.py` says when a row is valid.
"""

import contextlib
import itertools
import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from laptop.benchmarks.bench_report import (
    BenchConditions,
    BenchGroup,
    BenchReport,
    BenchRow,
    LoadSeconds,
    ProbedDevice,
    RatioRow,
    RoundRow,
    RowLatency,
)
from laptop.benchmarks.devices.computer import Computer
from laptop.benchmarks.devices.device import (
    Device,
    Facts,
    Meter,
    Ready,
    Round,
    Workload,
    size_bytes,
    wait_until_cool,
)
from laptop.benchmarks.latency import sustained, whole_image
from laptop.benchmarks.latency.image_sampling import STEPS, with_sampling
from laptop.benchmarks.latency.validity import invalid_reasons, ratio, summary
from laptop.benchmarks.latency.workloads import Sources, workloads
from laptop.benchmarks.settings import IMAGE, BenchConfig, DevicesConfig
from laptop.console import say, track
from laptop.errors import BadInput, DeviceError
from laptop.files import sha256
from laptop.models.shapes import Size
from laptop.pruning.sampling_config import SamplingConfig
from laptop.run import Overwrite, run_stage
from laptop.unfinished import resume_folder


@dataclass(frozen=True)
class Timed:
    """A workload and its measurement."""

    workload: Workload
    ready: Ready
    rounds: list[Round]
    peak_memory_bytes: int | None

    @property
    def samples_ms(self) -> list[float]:
        return [sample for turn in self.rounds for sample in turn.samples_ms]


def bench(
    subjects: Mapping[str, Sources],
    out: Path,
    config: BenchConfig,
    device: Device,
    *,
    sampling: SamplingConfig | None = None,
    unet_only: Collection[str] = (),
    overwrite: Overwrite = False,
) -> Path:
    """Time `subjects` on a device and write the report to `out` (a .json path).

    `subjects` maps a label to a PyTorch model (name or folder), to an artifacts folder, or to
    several of these that are the same model. Subjects are compared within a component, runtime and
    target; only the U-Net of labels in `unet_only` is timed. If a call is killed, the next one
    keeps the groups that were finished. Raises `BadInput` when subjects cannot be compared,
    `LaptopError` when the process of one dies or the device is gone.
    """
    config, size = with_sampling(subjects, config, sampling)
    find = partial(find_workloads, subjects, config, device, size=size, unet_only=unet_only)
    earlier = None if overwrite else known_facts(out, device, lambda p: BenchReport.read(p).device)
    facts = earlier or device.probe()
    timed = find(facts)
    need_fitting(timed, facts, device)
    say_uncompared(timed)
    identity = asdict(config) | {
        "subjects": [f"{w.label}: {w.component}: {w.source}" for w in timed],
        **device_identity(device, facts),
        "versions": {w.runtime: facts.runtimes.get(w.runtime) for w in timed},
        "threads": sorted({w.threads for w in timed}),
        "size": size,
    }
    inputs = {
        f"{w.label}.{w.target}.{w.runtime}.{w.component}": w.artifact for w in timed if w.artifact
    }

    def work(folder: Path) -> None:
        facts = device.probe()
        not_ready = wait_until_cool(device, config.cool_down_s)
        report = measure(find(facts), config, device, facts, not_ready, resume_folder(folder))
        report.write(folder / out.name)

    return run_stage("bench", out, identity, inputs, work, overwrite=overwrite)


def find_workloads(
    subjects: Mapping[str, Sources],
    config: BenchConfig,
    device: Device,
    facts: Facts,
    *,
    size: Size | None = None,
    unet_only: Collection[str] = (),
) -> list[Workload]:
    """The workloads that `bench` times; raises the same errors."""
    return workloads(
        subjects,
        config.components,
        facts,
        unet_only=unet_only,
        refused=device.refused,
        runtimes=config.runtimes,
        guidance=config.guidance is not False,
        size=size,
        threads=config.threads,
        seed=config.seed,
    )


def estimate(
    subjects: Mapping[str, Sources],
    config: BenchConfig,
    device: Device,
    sampling: SamplingConfig | None = None,
) -> dict[str, object]:
    """The workloads that `bench` would time, and the least time; loads and sends nothing."""
    config, size = with_sampling(subjects, config, sampling)
    timed = find_workloads(subjects, config, device, device.probe(), size=size)
    each_s = config.warmup_s + (config.sustained_s or config.seconds)
    return {
        "device": device.address,
        "timed": [f"{w.label}: {w.component}, {w.target} in {w.runtime}" for w in timed],
        "artifact_bytes": _bytes(timed),
        "least_seconds": round(len(timed) * each_s, 1),
    }


def device_identity(device: Device, facts: Facts) -> dict[str, str]:
    """The part of a measurement's identity about the device: if it changes, measure again."""
    state = (facts.name, facts.os, facts.power_mode, facts.accelerator)
    python = device.python if isinstance(device, Computer) else DevicesConfig.python
    return {"device": f"{device.address}: {', '.join(map(str, state))}", "python": python}


def known_facts(
    out: Path, device: Device, read: Callable[[Path], ProbedDevice | None]
) -> Facts | None:
    """The facts of a board in an earlier result: a finished one is kept without the board."""
    if device.address == "local" or not out.is_file():
        return None
    try:
        probed = read(out)
    except BadInput:  # of another version
        return None
    return probed if probed and probed.address == device.address else None


def need_fitting(timed: Sequence[Workload], facts: Facts, device: Device) -> None:
    """Raise `LaptopError` if the device's disk has no space for the artifacts."""
    free = facts.free_disk_bytes
    if device.address == "local" or free is None or _bytes(timed) <= free:
        return
    if (missing := _bytes([w for w in timed if not device.has(w)])) > free:
        raise DeviceError(
            f"{device.address} has {free / 1e9:.2f} GB free; the artifacts that it lacks take "
            f"{missing / 1e9:.2f} GB. Free some space there, or bench fewer components."
        )


def _bytes(timed: Sequence[Workload]) -> int:
    return sum(size_bytes(artifact) for artifact in {w.artifact for w in timed} if artifact)


def say_uncompared(timed: Sequence[Workload]) -> None:
    """Print which subjects get no ratio, because no other one has the same kind of component."""
    labels = {w.label for w in timed}
    kinds = Counter((w.component, w.runtime, w.target) for w in timed)
    paired = {w.label for w in timed if kinds[w.component, w.runtime, w.target] > 1}
    if len(labels) > 1 and (alone := sorted(labels - paired)):
        say(
            f"bench: no ratio for {', '.join(alone)}: no other subject has a component in the same "
            "runtime and target. Export both alike, or bench two models."
        )


def measure(
    timed: Sequence[Workload],
    config: BenchConfig,
    device: Device,
    facts: Facts,
    not_ready: str | None = None,
    kept: Path | None = None,
) -> BenchReport:
    """Time all workloads; those that are compared take turns.

    `not_ready` says why no row can be valid. The folder `kept` has the groups that an interrupted
    call measured, and gets those of this one; a group that is not valid is measured again.
    """
    done: list[BenchGroup] = []
    for number, group in enumerate(_groups(timed, apart=config.sustained_s > 0)):
        path = kept / f"group-{number}.json" if kept else None
        before = BenchGroup.read(path) if path and path.exists() else None
        if before and all(row.valid for row in before.results):
            say(f"bench: {group[0].component} {group[0].target} was measured by an earlier call")
            done.append(before)
            continue
        done.append(_measured(group, config, device, facts, not_ready))
        if path:
            done[-1].write(path)
    results = tuple(row for group in done for row in group.results)
    is_whole = set(IMAGE) <= set(config.components)
    return BenchReport(
        device=ProbedDevice(**vars(facts) | {"address": device.address}),
        results=results,
        images=whole_image.image_rows(results, config.steps or STEPS) if is_whole else (),
        ratios=tuple(row for group in done for row in group.ratios),
    )


def _groups(timed: Sequence[Workload], *, apart: bool) -> list[list[Workload]]:
    """The workloads that are compared in a list each; with `apart`, each workload alone."""
    if apart:
        return [[workload] for workload in timed]
    groups: dict[tuple[str, str, str], list[Workload]] = {}
    for workload in timed:
        key = (workload.component, workload.runtime, workload.target)
        groups.setdefault(key, []).append(workload)
    return list(groups.values())


def _measured(
    group: Sequence[Workload],
    config: BenchConfig,
    device: Device,
    facts: Facts,
    not_ready: str | None,
) -> BenchGroup:
    """Rows of one group and the ratios of each two of them."""
    if config.sustained_s:
        rows = tuple(_sustained(workload, config, device, facts) for workload in group)
        return BenchGroup(results=rows, ratios=())
    timed = _interleave(group, config, device)
    rows = tuple(_row(each, config, facts, not_ready) for each in timed)
    pairs = itertools.combinations(zip(timed, rows, strict=True), 2)
    return BenchGroup(results=rows, ratios=tuple(_ratio(*a, *b, config.seed) for a, b in pairs))


def _ratio(timed_a: Timed, a: BenchRow, timed_b: Timed, b: BenchRow, seed: int) -> RatioRow:
    samples_a, samples_b = ([t.samples_ms for t in timed.rounds] for timed in (timed_a, timed_b))
    return RatioRow(
        **vars(ratio(samples_a, samples_b, seed)),
        component=a.component,
        runtime=a.runtime,
        target=a.target,
        a=a.label,
        b=b.label,
        valid=a.valid and b.valid,
    )


def _interleave(group: Sequence[Workload], config: BenchConfig, device: Device) -> list[Timed]:
    """Run rounds of the workloads in turn, one at a time."""
    meters: list[Meter] = []
    with contextlib.ExitStack() as stack:
        for workload in group:
            meters.append(stack.enter_context(_loaded(workload, config, device)))
        rounds: list[list[Round]] = [[] for _ in group]
        turns = [i for _ in range(config.rounds) for i in range(len(group))]
        title = f"{group[0].component} {group[0].target} {group[0].runtime.partition(':')[2]}"
        for i in track(turns, f"bench {title}", len(turns)):
            least = iterations_per_round(config)
            rounds[i].append(meters[i].run_round(least, config.seconds / config.rounds))
        return [
            Timed(workload, meter.ready, of, meter.stop())
            for workload, meter, of in zip(group, meters, rounds, strict=True)
        ]


def _loaded(
    workload: Workload, config: BenchConfig, device: Device
) -> contextlib.AbstractContextManager[Meter]:
    kind = f"{workload.component}, {workload.target} in {workload.runtime}"
    say(f"bench: loading {workload.label} ({kind})")
    return device.meter(workload, config.warmup_iterations, config.warmup_s)


def _sustained(workload: Workload, config: BenchConfig, device: Device, facts: Facts) -> BenchRow:
    """The row of one workload that runs for long, with its medians by the minute."""
    not_ready = wait_until_cool(device, config.cool_down_s)
    with _loaded(workload, config, device) as meter:
        rounds = sustained.run(meter, config.sustained_s, workload.label)
        timed = Timed(workload, meter.ready, rounds, meter.stop())
    return replace(_row(timed, config, facts, not_ready), sustained=sustained.summary(rounds))


def _row(timed: Timed, config: BenchConfig, facts: Facts, not_ready: str | None) -> BenchRow:
    """One entry of `results`."""
    workload, ready, artifact = timed.workload, timed.ready, timed.workload.artifact
    samples = timed.samples_ms
    reasons = invalid_reasons(timed.rounds, config.cv_bound, may_slow=config.sustained_s > 0)
    reasons += [f"began: {not_ready}"] if not_ready else []
    spread = summary(samples)
    watts = [turn.power_w for turn in timed.rounds if turn.power_w is not None]
    power_w = float(np.mean(watts)) if watts else None
    return BenchRow(
        label=workload.label,
        component=workload.component,
        target=workload.target,
        artifact=str(artifact or workload.source),
        sha256=sha256(artifact) if artifact else None,
        size_bytes=size_bytes(artifact) if artifact else None,
        params=ready.params or workload.params,
        runtime=workload.runtime,
        precision=ready.precision or workload.precision,
        device=facts.name,
        conditions=conditions(workload, config, facts),
        n=len(samples),
        latency_ms=RowLatency(**vars(spread), first=ready.first_ms),
        load_s=LoadSeconds(cold=ready.cold_s, warm=ready.warm_s),
        peak_memory_bytes=timed.peak_memory_bytes,
        power_w=power_w,
        energy_j=power_w * spread.mean / 1000 if power_w else None,
        valid=not reasons,
        invalid_reasons=tuple(reasons),
        samples_ms=tuple(round(s, 4) for s in samples),
        rounds=tuple(_round_row(turn) for turn in timed.rounds),
        placement=ready.placement or None,
    )


def _round_row(turn: Round) -> RoundRow:
    state = {k: v for k, v in vars(turn).items() if k != "samples_ms"}
    return RoundRow(**state, n=len(turn.samples_ms))


def conditions(workload: Workload, config: BenchConfig, facts: Facts) -> BenchConditions:
    """Everything that must be equal for two rows to be compared, but for device and precision."""
    batch = next((shape[0] for shape in workload.shapes.values() if shape), 1)
    return BenchConditions(
        batch=batch,
        # a program of one shape runs the halves that it was made for
        guidance=batch > 1 if workload.component == "unet" else config.guidance is not False,
        steps=config.steps or STEPS,
        resolution=workload.resolution,
        shapes=workload.shapes,
        threads=workload.threads,
        runtime_version=facts.runtimes.get(workload.runtime),
        os=facts.os,
        power_mode=facts.power_mode,
        accelerator=facts.accelerator,
        sustained_s=config.sustained_s,
        cv_bound=config.cv_bound,
    )


def iterations_per_round(config: BenchConfig) -> int:
    """How many inferences a round must run, at least."""
    return max(1, math.ceil(config.iterations / config.rounds))
