"""Latency that can be trusted: own processes, interleaved rounds, raw samples, stated conditions.

Models are timed in turn (A B A B ...), so that heat and other load meet all of them alike; the
ratio of two is taken round by round. A row that does not meet the protocol says so in `valid`.
"""

import contextlib
import itertools
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from laptop.benchmarks.runtimes import (
    CLIP_TOKENS,
    FIXED,
    RUNTIMES,
    Shapes,
    Workload,
    check_same_shapes,
    device_name,
    locate,
    read_tokens,
    runtime_version,
    shapes_of,
    usable_threads,
)
from laptop.benchmarks.worker import Worker, share
from laptop.errors import BadInput
from laptop.run import Overwrite, run_stage, say, sha256, track, write_json

SCHEMA = "laptop.bench/1"
COMPONENTS = ("unet",)
NEEDED_SAMPLES = 20  # fewer, or a shorter time, and a row is not valid, whatever the config asked
NEEDED_S = 10.0
BOOTSTRAPS = 2000
Places = str | Path | Sequence[str | Path]


@dataclass(frozen=True)
class BenchConfig:
    """How latency is measured."""

    components: tuple[str, ...] = COMPONENTS
    batch: int = 2  # guidance runs a conditional and an unconditional half
    threads: int | None = None  # None: as many as there are cores
    rounds: int = 10  # turns of each model
    iterations: int = NEEDED_SAMPLES  # at least, a component, over all rounds
    seconds: float = NEEDED_S  # at least, a component, over all rounds
    warmup_iterations: int = 3  # at least
    warmup_s: float = 2.0  # at least
    cv_bound: float = 0.10  # largest stdev / mean of a valid row
    seed: int = 0  # of the inputs and of the bootstrap


def bench(
    subjects: Mapping[str, Places], out: Path, config: BenchConfig, *, overwrite: Overwrite = False
) -> Path:
    """Time `subjects` on this machine and write the report to `out` (a .json path).

    `subjects` maps a label to a PyTorch model (name or folder), to an artifacts folder with
    `[onnx/]unet/model.onnx`, `executorch/unet.pte` or both, or to several of these that are the
    same model. Subjects are compared within a component and runtime. Raises `BadInput` when they
    cannot be, `LaptopError` when the process of one dies.
    """
    workloads = find_workloads(subjects, config)
    settings = asdict(config) | {
        "subjects": [f"{w.label}: {w.source}" for w in workloads],
        "device": device_name(),
    }
    inputs = {f"{w.label}.{w.runtime}": w.artifact for w in workloads if w.artifact}

    def work(folder: Path) -> None:
        write_json(folder / out.name, {"schema": SCHEMA, **measure(workloads, config)})

    return run_stage("bench", out, settings, inputs, work, overwrite=overwrite)


def find_workloads(subjects: Mapping[str, Places], config: BenchConfig) -> list[Workload]:
    """What is to be timed, checked before anything runs."""
    if unknown := set(config.components) - set(COMPONENTS):
        raise BadInput(f"cannot bench {sorted(unknown)}; known components: {COMPONENTS}.")
    found: dict[tuple[str, str], str] = {}
    for label, places in subjects.items():
        for place in [places] if isinstance(places, str | Path) else places:
            for runtime, source in locate(place).items():
                if (other := found.setdefault((label, runtime), source)) != source:
                    raise BadInput(
                        f"{label!r} names two models for {runtime}: {other} and {source}."
                    )
    shapes = {  # of programs they are fixed, and may be others
        is_fixed: _shapes({k: v for k, v in found.items() if (k[1] in FIXED) is is_fixed}, config)
        for is_fixed in (True, False)
    }
    return [
        Workload(
            label,
            component,
            runtime,
            source,
            RUNTIMES[runtime].load,
            shapes[runtime in FIXED],
            config.threads or usable_threads(),
            config.seed,
            RUNTIMES[runtime].imports,
        )
        for component in config.components
        for (label, runtime), source in found.items()
    ]


def _shapes(found: Mapping[tuple[str, str], str], config: BenchConfig) -> Shapes:
    """The input shapes that all of these subjects share."""
    if not found:
        return {}
    tokens = {name: read_tokens(source) for name, source in found.items()}
    known = next((t for t in tokens.values() if t), CLIP_TOKENS)
    by_subject = {
        f"{label} ({runtime})": shapes_of(source, config.batch, tokens[label, runtime] or known)
        for (label, runtime), source in found.items()
    }
    check_same_shapes(by_subject)
    return next(iter(by_subject.values()))


def measure(workloads: Sequence[Workload], config: BenchConfig) -> dict[str, Any]:
    """`{"results": [...], "ratios": [...]}`; the models of a component and runtime interleaved."""
    groups: dict[tuple[str, str], list[Workload]] = {}
    for workload in workloads:
        groups.setdefault((workload.component, workload.runtime), []).append(workload)
    results: list[dict[str, Any]] = []
    ratios: list[dict[str, Any]] = []
    for (component, runtime), group in groups.items():
        samples = []
        for worker, peak in _interleave(group, config):
            results.append(_row(worker, peak, config))
            samples.append((worker.workload.label, worker.samples))
        for (a, of_a), (b, of_b) in itertools.combinations(samples, 2):
            pair = {"component": component, "runtime": runtime, "a": a, "b": b}
            ratios.append(pair | ratio(of_a, of_b, config.seed))
    return {"results": results, "ratios": ratios}


def _interleave(group: Sequence[Workload], config: BenchConfig) -> list[tuple[Worker, int]]:
    """Each worker after its rounds, and its peak memory in bytes; one runs at a time."""
    workers: list[Worker] = []
    with contextlib.ExitStack() as stack:
        for workload in group:
            say(f"bench: loading {workload.label} ({workload.component}, {workload.runtime})")
            worker = Worker(workload, config.warmup_iterations, config.warmup_s)
            workers.append(stack.enter_context(worker))
        turns = [worker for _ in range(config.rounds) for worker in workers]
        for worker in track(turns, f"bench {group[0].runtime}", len(turns)):
            worker.run_round(
                share(config.iterations, config.rounds), config.seconds / config.rounds
            )
        return [(worker, worker.stop()) for worker in workers]


def _row(worker: Worker, peak: int, config: BenchConfig) -> dict[str, Any]:
    """One entry of `results`."""
    workload, ready, artifact = worker.workload, worker.ready, worker.workload.artifact
    samples = [sample for samples in worker.samples for sample in samples]
    reasons = invalid_reasons(samples, config.cv_bound)
    return {
        "label": workload.label,
        "component": workload.component,
        "artifact": str(artifact or workload.source),
        "sha256": sha256(artifact) if artifact else None,
        "size_bytes": size_bytes(artifact) if artifact else None,
        "params": ready.params,
        "runtime": workload.runtime,
        "precision": ready.precision,
        "device": device_name(),
        "conditions": conditions(workload, config),
        "n": len(samples),
        "latency_ms": summary(samples) | {"first": ready.first_ms},
        "load_s": {"cold": ready.cold_s, "warm": ready.warm_s},
        "peak_memory_bytes": peak,
        "valid": not reasons,
        "invalid_reasons": reasons,
        "samples_ms": [round(s, 4) for s in samples],
    }


def conditions(workload: Workload, config: BenchConfig) -> dict[str, Any]:
    """All that must be equal for two rows to be compared, but for device and precision."""
    return {
        "batch": workload.shapes["sample"][0] if "sample" in workload.shapes else config.batch,
        "shapes": {k: list(v) for k, v in workload.shapes.items()},
        "threads": workload.threads,
        "runtime_version": runtime_version(workload.runtime),
        "os": f"{platform.system()} {platform.machine()}",
    }


def size_bytes(artifact: Path) -> int:
    """The size of a component's float weights on disk (of an ONNX component with its graph)."""
    if artifact.is_file():
        return artifact.stat().st_size
    files = [p for p in artifact.iterdir() if p.is_file() and ".fp16." not in p.name]
    for kinds in ((".onnx", ".onnx_data", ".data"), (".safetensors",), (".bin",)):
        if found := [p.stat().st_size for p in files if p.suffix in kinds]:
            return sum(found)
    return 0


def summary(samples_ms: Sequence[float]) -> dict[str, float]:
    """Percentiles, mean, standard deviation (n - 1) and coefficient of variation."""
    p50, p90, p95, p99 = np.percentile(samples_ms, [50, 90, 95, 99]).tolist()
    mean = float(np.mean(samples_ms))
    stdev = float(np.std(samples_ms, ddof=1)) if len(samples_ms) > 1 else 0.0
    spread = {"mean": mean, "stdev": stdev, "cv": stdev / mean}
    return {"p50": p50, "p90": p90, "p95": p95, "p99": p99, **spread}


def invalid_reasons(samples_ms: Sequence[float], cv_bound: float) -> list[str]:
    """Why a row cannot be trusted; empty when it can."""
    reasons = []
    if len(samples_ms) < NEEDED_SAMPLES:
        reasons.append(f"{len(samples_ms)} samples; {NEEDED_SAMPLES} are needed")
    if (total_s := sum(samples_ms) / 1000) < NEEDED_S:
        reasons.append(f"{total_s:.1f} s measured; {NEEDED_S:.0f} s are needed")
    if (cv := summary(samples_ms)["cv"]) > cv_bound:
        reasons.append(f"cv {cv:.2f} is above {cv_bound:.2f}: the machine was busy or hot")
    return reasons


def ratio(
    a: Sequence[Sequence[float]], b: Sequence[Sequence[float]], seed: int
) -> dict[str, float]:
    """Latency of b over that of a: median over rounds, and its 95 % interval by bootstrap.

    A round's ratio is that of its two medians, which lie next to each other in time.
    """
    by_round = np.array([np.median(y) / np.median(x) for x, y in zip(a, b, strict=True)])
    rng = np.random.default_rng(seed)
    draws = rng.choice(by_round, (BOOTSTRAPS, len(by_round)))
    low, high = np.percentile(np.median(draws, axis=1), [2.5, 97.5]).tolist()
    return {"median": float(np.median(by_round)), "low": low, "high": high}
