"""Latency that can be trusted: own processes, interleaved rounds, raw samples, stated conditions.

Models are timed in turn (A B A B ...), so that heat and other load meet all of them alike. What
makes a row valid stands in `validity.py`.
"""

import contextlib
import itertools
import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

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
from laptop.benchmarks.documents import Group
from laptop.benchmarks.latency import sustained, whole_image
from laptop.benchmarks.latency.image_sampling import STEPS, with_sampling
from laptop.benchmarks.latency.validity import invalid_reasons, ratio, summary
from laptop.benchmarks.latency.workloads import Places, workloads
from laptop.benchmarks.settings import IMAGE, BenchConfig
from laptop.console import say, track
from laptop.errors import BadInput, LaptopError
from laptop.files import read_json, sha256, write_json
from laptop.models.shapes import Size
from laptop.pruning.sampling_config import SamplingConfig
from laptop.records import UNFINISHED, built, read_record
from laptop.run import Overwrite, run_stage
from laptop.unfinished import resume_folder

SCHEMA = "laptop.bench/1"


@dataclass(frozen=True)
class Timed:
    """A workload and what its meter found."""

    workload: Workload
    ready: Ready
    rounds: list[Round]
    peak_memory_bytes: int | None

    @property
    def samples_ms(self) -> list[float]:
        return [sample for turn in self.rounds for sample in turn.samples_ms]


def bench(
    subjects: Mapping[str, Places],
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
    target; of labels in `unet_only` only the U-Net is timed. A killed call goes on with the first
    of these groups that it has not finished. Raises `BadInput` when subjects cannot be compared,
    `LaptopError` when the process of one dies or the device is gone.
    """
    config, size = with_sampling(subjects, config, sampling)
    find = partial(timed_things, subjects, config, device, size=size, unet_only=unet_only)
    facts = (None if overwrite else known_facts(out, device)) or device.probe()
    found = find(facts)
    need_fitting(found, facts, device)
    say_uncompared(found)
    identity = {k: v for k, v in asdict(config).items() if k not in ("devices", "team")} | {
        "subjects": [f"{w.label}: {w.component}: {w.source}" for w in found],
        **device_identity(device, facts),
        "versions": {w.runtime: facts.runtimes.get(w.runtime) for w in found},
        "threads": sorted({w.threads for w in found}),
        "size": size,
    }
    inputs = {
        f"{w.label}.{w.target}.{w.runtime}.{w.component}": w.artifact for w in found if w.artifact
    }

    def work(folder: Path) -> None:
        facts = device.probe()
        why = wait_until_cool(device, config.cool_down_s)
        document = {"schema": SCHEMA, "device": {"address": device.address, **asdict(facts)}}
        measured = measure(find(facts), config, device, facts, why, resume_folder(folder))
        write_json(folder / out.name, document | measured)

    return run_stage("bench", out, identity, inputs, work, overwrite=overwrite)


def timed_things(
    subjects: Mapping[str, Places],
    config: BenchConfig,
    device: Device,
    facts: Facts,
    *,
    size: Size | None = None,
    unet_only: Collection[str] = (),
) -> list[Workload]:
    """What `bench` times, checked; raises as it does."""
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
    subjects: Mapping[str, Places],
    config: BenchConfig,
    device: Device,
    sampling: SamplingConfig | None = None,
) -> dict[str, Any]:
    """What `bench` would time, and how long at least; nothing is loaded or sent."""
    config, size = with_sampling(subjects, config, sampling)
    found = timed_things(subjects, config, device, device.probe(), size=size)
    each_s = config.warmup_s + (config.sustained_s or config.seconds)
    return {
        "device": device.address,
        "timed": [f"{w.label}: {w.component}, {w.target} in {w.runtime}" for w in found],
        "artifact_bytes": _bytes(found),
        "least_seconds": round(len(found) * each_s, 1),
    }


def device_identity(device: Device, facts: Facts) -> dict[str, str]:
    """What must be the same for a finished measurement to be kept."""
    how = (facts.name, facts.os, facts.power_mode, facts.accelerator)
    return {"device": f"{device.address}: {', '.join(map(str, how))}"}


def known_facts(
    out: Path, device: Device, schema: str = SCHEMA, key: str = "device"
) -> Facts | None:
    """What an earlier result says of a board: a finished one needs no board to be kept."""
    if device.address == "local" or not out.is_file():
        return None
    try:
        facts = read_json(out, schema)[key]
        return built(facts, Facts, str(out)) if facts["address"] == device.address else None
    except (BadInput, KeyError, TypeError):  # of another version
        return None


def need_fitting(found: Sequence[Workload], facts: Facts, device: Device) -> None:
    """Raise `LaptopError` for a device on whose disk the artifacts have no place."""
    free = facts.free_disk_bytes
    if device.address == "local" or free is None or _bytes(found) <= free:
        return
    if (missing := _bytes([w for w in found if not device.has(w)])) > free:
        raise LaptopError(
            f"{device.address} has {free / 1e9:.2f} GB free; the artifacts that it lacks take "
            f"{missing / 1e9:.2f} GB. Free some space there, or bench fewer components."
        )


def _bytes(found: Sequence[Workload]) -> int:
    return sum(size_bytes(artifact) for artifact in {w.artifact for w in found} if artifact)


def say_uncompared(found: Sequence[Workload]) -> None:
    """Say of which subjects there will be no ratio, for want of a second one like them."""
    labels = {w.label for w in found}
    kinds = Counter((w.component, w.runtime, w.target) for w in found)
    paired = {w.label for w in found if kinds[w.component, w.runtime, w.target] > 1}
    if len(labels) > 1 and (alone := sorted(labels - paired)):
        say(
            f"bench: no ratio for {', '.join(alone)}: no other subject has a component in the same "
            "runtime and target. Export both alike, or bench two models."
        )


def measure(
    found: Sequence[Workload],
    config: BenchConfig,
    device: Device,
    facts: Facts,
    not_ready: str | None = None,
    kept: Path | None = None,
) -> dict[str, Any]:
    """`{"results": [...], "images": [...], "ratios": [...]}`; what is compared is interleaved.

    `not_ready` says why no row can be valid. In the folder `kept` lies what an earlier call has
    measured, and goes what this one does; what is not valid there is measured again.
    """
    groups = _groups(found, apart=config.sustained_s > 0)
    done: list[Mapping[str, Any]] = []
    for number, group in enumerate(groups):
        path = kept / f"group-{number}.json" if kept else None
        before = read_record(path, Group, None, UNFINISHED) if path and path.exists() else None
        if before and all(row["valid"] for row in before["results"]):
            say(f"bench: {group[0].component} {group[0].target} was measured by an earlier call")
            done.append(before)
            continue
        done.append(_measured(group, config, device, facts, not_ready))
        if path:
            write_json(path, done[-1])
    results, ratios = ([row for one in done for row in one[key]] for key in ("results", "ratios"))
    is_whole = set(IMAGE) <= set(config.components)
    images = whole_image.rows(results, config.steps or STEPS) if is_whole else []
    return {"results": results, "images": images, "ratios": ratios}


def _groups(found: Sequence[Workload], *, apart: bool) -> list[list[Workload]]:
    """Those that are compared, or each alone."""
    if apart:
        return [[workload] for workload in found]
    groups: dict[tuple[str, str, str], list[Workload]] = {}
    for workload in found:
        key = (workload.component, workload.runtime, workload.target)
        groups.setdefault(key, []).append(workload)
    return list(groups.values())


def _measured(
    group: Sequence[Workload],
    config: BenchConfig,
    device: Device,
    facts: Facts,
    not_ready: str | None,
) -> dict[str, Any]:
    """Rows of one group and the ratios of each two of them."""
    if config.sustained_s:
        return {"results": [_sustained(w, config, device, facts) for w in group], "ratios": []}
    timed = _interleave(group, config, device)
    rows = [_row(one, config, facts, not_ready) for one in timed]
    named = {key: getattr(group[0], key) for key in ("component", "runtime", "target")}
    ratios = []
    for (a, row_a), (b, row_b) in itertools.combinations(zip(timed, rows, strict=True), 2):
        pair = {"a": a.workload.label, "b": b.workload.label}
        of_a, of_b = ([turn.samples_ms for turn in one.rounds] for one in (a, b))
        found = ratio(of_a, of_b, config.seed)
        ratios.append({**named, **pair, **found, "valid": row_a["valid"] and row_b["valid"]})
    return {"results": rows, "ratios": ratios}


def _interleave(group: Sequence[Workload], config: BenchConfig, device: Device) -> list[Timed]:
    """Each workload after its rounds; one runs at a time."""
    meters: list[Meter] = []
    with contextlib.ExitStack() as stack:
        for workload in group:
            meters.append(stack.enter_context(_loaded(workload, config, device)))
        rounds: list[list[Round]] = [[] for _ in group]
        turns = [i for _ in range(config.rounds) for i in range(len(group))]
        what = f"{group[0].component} {group[0].target} {group[0].runtime.partition(':')[2]}"
        for i in track(turns, f"bench {what}", len(turns)):
            least = share(config.iterations, config.rounds)
            rounds[i].append(meters[i].run_round(least, config.seconds / config.rounds))
        return [
            Timed(workload, meter.ready, of, meter.stop())
            for workload, meter, of in zip(group, meters, rounds, strict=True)
        ]


def _loaded(
    workload: Workload, config: BenchConfig, device: Device
) -> contextlib.AbstractContextManager[Meter]:
    what = f"{workload.component}, {workload.target} in {workload.runtime}"
    say(f"bench: loading {workload.label} ({what})")
    return device.meter(workload, config.warmup_iterations, config.warmup_s)


def _sustained(
    workload: Workload, config: BenchConfig, device: Device, facts: Facts
) -> dict[str, Any]:
    """A row of one workload that runs for long, with its medians by the minute."""
    not_ready = wait_until_cool(device, config.cool_down_s)
    with _loaded(workload, config, device) as meter:
        rounds = sustained.run(meter, config.sustained_s, workload.label)
        timed = Timed(workload, meter.ready, rounds, meter.stop())
    return _row(timed, config, facts, not_ready) | {"sustained": sustained.summary(rounds)}


def _row(timed: Timed, config: BenchConfig, facts: Facts, not_ready: str | None) -> dict[str, Any]:
    """One entry of `results`."""
    workload, ready, artifact = timed.workload, timed.ready, timed.workload.artifact
    samples, may_slow = timed.samples_ms, config.sustained_s > 0
    reasons = invalid_reasons(timed.rounds, config.cv_bound, may_slow=may_slow)
    reasons += [f"began: {not_ready}"] if not_ready else []
    found = summary(samples)
    watts = [turn.power_w for turn in timed.rounds if turn.power_w is not None]
    power_w = float(np.mean(watts)) if watts else None
    return {
        "label": workload.label,
        "component": workload.component,
        "target": workload.target,
        "artifact": str(artifact or workload.source),
        "sha256": sha256(artifact) if artifact else None,
        "size_bytes": size_bytes(artifact) if artifact else None,
        "params": ready.params or workload.params,
        "runtime": workload.runtime,
        "precision": ready.precision or workload.precision,
        "device": facts.name,
        "conditions": conditions(workload, config, facts),
        "n": len(samples),
        "latency_ms": found | {"first": ready.first_ms},
        "load_s": {"cold": ready.cold_s, "warm": ready.warm_s},
        "peak_memory_bytes": timed.peak_memory_bytes,
        "power_w": power_w,
        "energy_j": power_w * found["mean"] / 1000 if power_w else None,
        "valid": not reasons,
        "invalid_reasons": reasons,
        "samples_ms": [round(s, 4) for s in samples],
        "rounds": [{"n": len(t.samples_ms), **_how(t)} for t in timed.rounds],
        **({"placement": ready.placement} if ready.placement else {}),
    }


def _how(turn: Round) -> dict[str, Any]:
    """How the device was in a round."""
    return {k: v for k, v in vars(turn).items() if k != "samples_ms"}


def conditions(workload: Workload, config: BenchConfig, facts: Facts) -> dict[str, Any]:
    """All that must be equal for two rows to be compared, but for device and precision."""
    batch = next((shape[0] for shape in workload.shapes.values() if shape), 1)
    return {
        "batch": batch,
        # a program of one shape runs the halves that it was made for
        "guidance": batch > 1 if workload.component == "unet" else config.guidance is not False,
        "steps": config.steps or STEPS,
        "resolution": workload.resolution,
        "shapes": {k: list(v) for k, v in workload.shapes.items()},
        "threads": workload.threads,
        "runtime_version": facts.runtimes.get(workload.runtime),
        "os": facts.os,
        "power_mode": facts.power_mode,
        "accelerator": facts.accelerator,
        "sustained_s": config.sustained_s,
        "cv_bound": config.cv_bound,
    }


def share(total: float, rounds: int) -> int:
    """How many of `total` iterations one of `rounds` must do."""
    return max(1, math.ceil(total / rounds))
