"""What a training step costs: `python -m laptop.studies.step_cost --model sd15 --width 0.25`.

Our step, the floor and BK-SDM's loop (`loops`) in turns, in one process, on the same weights and
batch: a known U-Net architecture with seeded random weights, of reduced width if asked, and a
student without half of its parameters. A round's ratios compare steps that lie next to each other
in time, by the clock and by the processor's time, which other programs disturb less.

Peak memory is of each way alone, over some steps, models and optimizer included: on the CPU the
largest resident size of a process of its own, less its size before the models were made; on a GPU
torch's own count. Without options it measures SDXL at full size where there is a GPU, in less than
ten minutes.
"""

import argparse
import copy
import gc
import itertools
import json
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any

import psutil
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from laptop.benchmarks.latency.validity import ratio
from laptop.console import say
from laptop.distill.batches import Batch
from laptop.distill.forecast import of_unets
from laptop.distill.session import HALVES
from laptop.distill.settings import TrainConfig
from laptop.machine import machine, peak_memory_bytes
from laptop.models.architectures import UNETS
from laptop.pruning.additivity import random_set
from laptop.pruning.surgery import prune_unet
from laptop.pruning.units import anatomy_of
from laptop.studies.prefix_reuse import random_rows
from laptop.studies.step_variants import CONFIG, WAYS, Pair

TOKENS = 77
RATIO = 0.5  # of the teacher's parameters that the student lacks
STEPS_ALONE = 3  # of which the peak is taken: states exist from the first on, old maps too
WARM_UP = 2  # steps
KINDS = ("eager", "checkpointing", "compile", "both")
# Timed together, the first against each of the others; not all at once, for SDXL's states.
GROUPS = (("ours", "floor", "plain"), ("ours", "plain-2023"), ("ours", "plain-autograd"))
RETURNING = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # so that glibc gives back what is freed
Times = tuple[float, float]  # seconds of a step, and of the processor in it


@dataclass(frozen=True)
class Case:
    """What is measured."""

    model: str
    width: float  # of the published channels
    latents: int  # height and width
    batch: int
    precision: str  # no | bf16 | fp16
    kind: str = "eager"  # KINDS

    @property
    def how(self) -> TrainConfig:
        """The trainer's settings."""
        return TrainConfig(
            mixed_precision=self.precision,
            gradient_checkpointing=self.kind in ("checkpointing", "both"),
            compile=self.kind in ("compile", "both"),
            shares_every=0,
        )

    @property
    def groups(self) -> list[tuple[str, ...]]:
        """What is compared: BK-SDM's script compiles nothing."""
        return [("ours", "floor")] if self.how.compile else list(GROUPS)

    @property
    def ways(self) -> list[str]:
        """Each once."""
        return list(dict.fromkeys(itertools.chain(*self.groups)))


def unet_config(model: str, width: float, latents: int) -> dict[str, Any]:
    """A published architecture, narrower and for another size of picture."""
    with torch.device("meta"):
        published = UNet2DConditionModel(**UNETS[model]).config
    channels = [int(width * c) for c in published["block_out_channels"]]
    return UNETS[model] | {
        "sample_size": latents,
        "block_out_channels": tuple(channels),
        "norm_num_groups": math.gcd(published["norm_num_groups"], *channels),
    }


def half_of(unet: Any) -> list[str]:
    """Layers by chance that hold half of the parameters together."""
    anatomy = anatomy_of(unet, TOKENS)
    return random_set(anatomy.units, RATIO * anatomy.params, seed=0)


def make_pair(case: Case) -> Pair:
    """Models on the device, and a batch."""
    torch.manual_seed(0)
    with torch.accelerator.current_accelerator() or torch.device("cpu"):
        teacher = UNet2DConditionModel(**unet_config(case.model, case.width, case.latents))
    student = copy.deepcopy(prune_unet(teacher, half_of(teacher)))
    nn.Module.to(teacher, HALVES.get(case.precision, torch.float32))
    rows = random_rows(teacher, case.batch, case.latents)
    latents, level = rows.pop("sample"), rows.pop("timestep")
    ids = [str(i) for i in range(case.batch)]
    batch = Batch(latents, torch.randn_like(latents), level, rows, ids)
    return Pair(teacher, student, batch, case.how)


def in_turns(pair: Pair, ways: Sequence[str], rounds: int) -> dict[str, list[Times]]:
    """What a step takes in each round, by way."""
    steps = {way: WAYS[way](pair) for way in ways}
    found: dict[str, list[Times]] = {way: [] for way in ways}
    for turn in range(-WARM_UP, rounds):
        for way, step in steps.items():
            start = time.perf_counter(), time.process_time()
            step(turn + WARM_UP)
            if torch.accelerator.is_available():
                torch.accelerator.synchronize()
            if turn >= 0:
                found[way].append((time.perf_counter() - start[0], time.process_time() - start[1]))
    return found


def alone(case: Case, way: str) -> int | None:
    """The most memory that some steps take, in bytes; None where it does not fit."""
    _clear()
    has_gpu = torch.cuda.is_available()
    before = torch.cuda.memory_allocated() if has_gpu else psutil.Process().memory_info().rss
    try:
        step = WAYS[way](make_pair(case))
        for number in range(STEPS_ALONE):
            step(number)
    except torch.OutOfMemoryError:
        return None
    peak = torch.cuda.max_memory_allocated() if has_gpu else peak_memory_bytes()
    return int(peak - before)


def peaks(case: Case) -> dict[str, int | None]:
    """Of each way in turn; on the CPU each in a process of its own."""
    if torch.cuda.is_available():
        return {way: alone(case, way) for way in case.ways}
    os.environ.update(RETURNING)  # of the processes to come
    found = {}
    for way in case.ways:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            found[way] = pool.submit(alone, case, way).result()
    return found


def _clear() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def measure(case: Case, rounds: int) -> dict[str, Any]:
    """One case's document."""
    say(f"{case}: memory")
    rows: dict[str, dict[str, Any]] = {
        way: {"peak_memory_bytes": size} for way, size in peaks(case).items()
    }
    ratios: dict[str, Any] = {}
    for group in case.groups:
        say(f"{case}: {', '.join(group)}")
        _clear()
        try:
            times = in_turns(make_pair(case), group, rounds)
        except torch.OutOfMemoryError:
            continue  # its rows have no times
        ratios |= _ratios(times, group)
        for way, values in times.items():
            rows[way] |= {} if "median_s" in rows[way] else _row(values, case.batch)
    return asdict(case) | facts(case) | {"ways": rows, "ratios": ratios}


def _row(times: list[Times], batch: int) -> dict[str, Any]:
    middle = statistics.median(t[0] for t in times)
    return {
        "seconds": [round(t[0], 4) for t in times],
        "cpu_seconds": [round(t[1], 4) for t in times],
        "median_s": round(middle, 4),
        "images_per_second": round(batch / middle, 3),
    }


def _ratios(times: Mapping[str, list[Times]], group: Sequence[str]) -> dict[str, Any]:
    """Of the first to the floor, and of others to the first."""
    first, *others = group
    found = {}
    for other in others:
        over, under = (first, other) if other == "floor" else (other, first)
        by_clock, by_cpu = (
            ratio([[t[clock]] for t in times[under]], [[t[clock]] for t in times[over]], 0)
            for clock in (0, 1)
        )
        found[f"{over} / {under}"] = by_clock.as_json() | {"cpu": by_cpu.as_json()}
    return found


def facts(case: Case) -> dict[str, Any]:
    """The student's share of the work, and the trainer's forecast of our step's memory."""
    with torch.device("meta"):
        teacher = UNet2DConditionModel(**unet_config(case.model, case.width, case.latents))
    names, anatomy = half_of(teacher), anatomy_of(teacher, TOKENS)
    saved = sum(u.macs for u in anatomy.units if u.name in names)
    config = replace(CONFIG, batch_size=case.batch)
    expected = of_unets(teacher, prune_unet(teacher, names), TOKENS, config, case.how)
    return {
        "student_macs_share": round(1 - saved / anatomy.macs, 3),
        "forecast": expected.as_dict(),
    }


def run(cases: Sequence[Case], rounds: int, seconds: float) -> dict[str, Any]:
    """Measure the cases in order; those that would begin after `seconds` are named only."""
    start, found = time.perf_counter(), []
    for case in cases:
        if time.perf_counter() - start < seconds:
            found.append(measure(case, rounds))
        else:
            found.append(asdict(case) | {"left_out": f"{seconds:.0f} s are over"})
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cases": found, "gpu": gpu, "threads": torch.get_num_threads(), **machine()}


def text(document: Mapping[str, Any]) -> str:
    """For people."""
    lines = []
    for case in document["cases"]:
        lines.append(" ".join(f"{name} {case[name]}" for name in Case.__dataclass_fields__))
        lines += [f"  left out: {case['left_out']}"] if "left_out" in case else []
        for way, row in case.get("ways", {}).items():
            size = row["peak_memory_bytes"]
            memory = "does not fit" if size is None else f"{size / 1e9:8.3f} GB"
            speed = "{median_s:9.3f} s {images_per_second:8.2f} images/s".format_map(
                {"median_s": math.nan, "images_per_second": math.nan} | row
            )
            lines.append(f"  {way:<16}{speed} {memory}")
        for name, r in case.get("ratios", {}).items():
            spread = "{median:.3f} ({low:.3f} to {high:.3f})"
            cpu = spread.format_map(r["cpu"])
            lines.append(f"  {name:<24}{spread.format_map(r)}, of the processor {cpu}")
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--model", choices=("sd15", "sd21", "sdxl"), default="sdxl" if gpu else "sd15")
    add("--width", type=float, default=1.0 if gpu else 0.25, help="share of the channels")
    add("--latents", type=int, default=128 if gpu else 32, help="height and width")
    add("--batch", type=int, nargs="+", default=[2, 1, 4] if gpu else [2])
    add("--precision", choices=("no", "bf16", "fp16"), default="bf16" if gpu else "no")
    add("--kinds", choices=KINDS, nargs="+", default=KINDS if gpu else KINDS[:1])
    add("--rounds", type=int, default=10)
    add("--seconds", type=float, default=400, help="begin no other case after these")
    add("--json", action="store_true")
    args = parser.parse_args()
    sizes = args.model, args.width, args.latents
    cases = [Case(*sizes, b, args.precision, k) for b in args.batch for k in args.kinds]
    found = run(cases, args.rounds, args.seconds)
    print(json.dumps(found, indent=1) if args.json else text(found))


if __name__ == "__main__":
    main()
