"""Measure the cost of a training step.

    python -m laptop.studies.step_cost --model sd15 --width 0.25

Our step, the floor and BK-SDM's loop (`step_variants`) in turns, in one process, on the same
weights and batch: a known U-Net architecture with seeded random weights, of reduced width if asked,
and a student without half of its parameters. A round's ratios compare steps that follow each other
in time, by the clock and by the processor's time, which other programs disturb less.

Peak memory is of each variant alone, over some steps, models and optimizer included: on the CPU the
largest resident size of a process of its own, less its size before the models were made; on a GPU
torch's own count. Without options it measures SDXL at full size on a GPU, in less than ten minutes.
"""

import argparse
import copy
import gc
import itertools
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from math import gcd
from typing import NamedTuple

import psutil
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from laptop.benchmarks.bench_report import Ratio
from laptop.benchmarks.latency.validity import ratio
from laptop.benchmarks.report.text import number
from laptop.console import say
from laptop.distill.batches import Batch
from laptop.distill.forecast import Forecast, forecast_unets
from laptop.distill.session import HALVES
from laptop.distill.settings import TrainConfig
from laptop.machine import machine, peak_memory_bytes
from laptop.models.architectures import UNETS
from laptop.pruning.additivity import random_set
from laptop.pruning.surgery import prune_unet
from laptop.pruning.units import anatomy_of
from laptop.records import Record
from laptop.studies.prefix_reuse import random_rows
from laptop.studies.step_variants import CONFIG, VARIANTS, Pair

TOKENS = 77
RATIO = 0.5  # of the teacher's parameters that the student lacks
STEPS_ALONE = 3  # whose peak is measured: states exist from the first on, old maps too
WARM_UP = 2  # steps
KINDS = ("eager", "checkpointing", "compile", "both")
# Timed together, the first against each of the others; not all at once, for SDXL's states.
GROUPS = (("ours", "floor", "plain"), ("ours", "plain-2023"), ("ours", "plain-autograd"))
RETURNING = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # so that glibc gives back what is freed


class StepTime(NamedTuple):
    """The time of a step in seconds."""

    clock: float
    cpu: float  # of the processor


@dataclass(frozen=True)
class Case(Record):
    """What is measured."""

    model: str
    width: float  # share of the published channels
    latents: int  # height and width
    batch: int
    precision: str  # no | bf16 | fp16
    kind: str = "eager"  # KINDS

    @property
    def train_config(self) -> TrainConfig:
        """The trainer's settings."""
        return TrainConfig(
            mixed_precision=self.precision,
            gradient_checkpointing=self.kind in ("checkpointing", "both"),
            compile=self.kind in ("compile", "both"),
            shares_every=0,
        )

    @property
    def groups(self) -> list[tuple[str, ...]]:
        """The variants that are compared; BK-SDM's script compiles nothing."""
        return [("ours", "floor")] if self.train_config.compile else list(GROUPS)

    @property
    def variants(self) -> list[str]:
        """All variants, each once."""
        return list(dict.fromkeys(itertools.chain(*self.groups)))


@dataclass(frozen=True, kw_only=True)
class VariantCost(Record):
    """The measured steps of one variant; without times where two variants do not fit at once."""

    LEFT_OUT = frozenset({"seconds", "cpu_seconds", "median_s", "images_per_second"})

    peak_memory_bytes: int | None = None  # None: it does not fit
    seconds: tuple[float, ...] | None = None
    cpu_seconds: tuple[float, ...] | None = None
    median_s: float | None = None
    images_per_second: float | None = None


@dataclass(frozen=True, kw_only=True)
class StepRatio(Ratio):
    """A step's time over another's, by the clock, and by the processor."""

    cpu: Ratio

    def text(self) -> str:
        """Both medians with their intervals."""
        clock, cpu = (f"{r.median:.3f} ({r.low:.3f} to {r.high:.3f})" for r in (self, self.cpu))
        return f"{clock}, of the processor {cpu}"


@dataclass(frozen=True)
class MeasuredCase(Case):
    """A case with its measurements, or the reason why it was left out."""

    LEFT_OUT = frozenset({"student_macs_share", "forecast", "ways", "ratios", "left_out"})

    student_macs_share: float | None = None
    forecast: Forecast | None = None  # of our step's memory
    ways: Mapping[str, VariantCost] | None = None
    ratios: Mapping[str, StepRatio] | None = None
    left_out: str | None = None


@dataclass(frozen=True, kw_only=True)
class StepCosts(Record):
    """All measured cases."""

    cases: tuple[MeasuredCase, ...]
    gpu: str | None
    threads: int

    def as_json(self) -> dict[str, object]:
        """The fields, and the machine's facts."""
        return super().as_json() | machine()

    def text(self) -> str:
        """A summary for the terminal."""
        return "\n".join(line for case in self.cases for line in _lines(case))


def unet_config(model: str, width: float, latents: int) -> dict[str, object]:
    """A published architecture, narrower and for another size of picture."""
    with torch.device("meta"):
        published = UNet2DConditionModel(**UNETS[model]).config
    channels = [int(width * c) for c in published["block_out_channels"]]
    return UNETS[model] | {
        "sample_size": latents,
        "block_out_channels": tuple(channels),
        "norm_num_groups": gcd(published["norm_num_groups"], *channels),
    }


def half_of(unet: UNet2DConditionModel) -> list[str]:
    """Random layers that hold half of the parameters together."""
    anatomy = anatomy_of(unet, TOKENS)
    return random_set(anatomy.units, RATIO * anatomy.params, seed=0)


def make_pair(case: Case) -> Pair:
    """Make the models on the device, and a batch."""
    torch.manual_seed(0)
    with torch.accelerator.current_accelerator() or torch.device("cpu"):
        teacher = UNet2DConditionModel(**unet_config(case.model, case.width, case.latents))
    student = copy.deepcopy(prune_unet(teacher, half_of(teacher)))
    nn.Module.to(teacher, HALVES.get(case.precision, torch.float32))
    conditions = random_rows(teacher, case.batch, case.latents)
    latents, level = conditions.pop("sample"), conditions.pop("timestep")
    ids = [str(i) for i in range(case.batch)]
    batch = Batch(latents, torch.randn_like(latents), level, conditions, ids)
    return Pair(teacher, student, batch, case.train_config)


def in_turns(pair: Pair, variants: Sequence[str], rounds: int) -> dict[str, list[StepTime]]:
    """The time of a step in each round, by variant."""
    steps = {variant: VARIANTS[variant](pair) for variant in variants}
    times: dict[str, list[StepTime]] = {variant: [] for variant in variants}
    for turn in range(-WARM_UP, rounds):
        for variant, step in steps.items():
            start = time.perf_counter(), time.process_time()
            step(turn + WARM_UP)
            if torch.accelerator.is_available():
                torch.accelerator.synchronize()
            end = time.perf_counter(), time.process_time()
            if turn >= 0:
                times[variant].append(StepTime(end[0] - start[0], end[1] - start[1]))
    return times


def peak_alone(case: Case, variant: str) -> int | None:
    """The most memory that some steps take, in bytes; None where it does not fit."""
    _clear()
    has_gpu = torch.cuda.is_available()
    before = torch.cuda.memory_allocated() if has_gpu else psutil.Process().memory_info().rss
    try:
        step = VARIANTS[variant](make_pair(case))
        for turn in range(STEPS_ALONE):
            step(turn)
    except torch.OutOfMemoryError:
        return None
    peak = torch.cuda.max_memory_allocated() if has_gpu else peak_memory_bytes()
    return int(peak - before)


def peaks(case: Case) -> dict[str, int | None]:
    """The peak memory of each variant in turn; on the CPU each in a process of its own."""
    if torch.cuda.is_available():
        return {variant: peak_alone(case, variant) for variant in case.variants}
    os.environ.update(RETURNING)  # of the processes to come
    sizes = {}
    for variant in case.variants:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            sizes[variant] = pool.submit(peak_alone, case, variant).result()
    return sizes


def _clear() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def measure(case: Case, rounds: int) -> MeasuredCase:
    """Measure one case."""
    say(f"{case}: memory")
    costs = {name: VariantCost(peak_memory_bytes=size) for name, size in peaks(case).items()}
    ratios: dict[str, StepRatio] = {}
    for group in case.groups:
        say(f"{case}: {', '.join(group)}")
        _clear()
        try:
            times = in_turns(make_pair(case), group, rounds)
        except torch.OutOfMemoryError:
            continue  # these variants have no times
        ratios |= _ratios(times, group)
        for variant, values in times.items():
            if costs[variant].seconds is None:
                costs[variant] = _with_times(costs[variant], values, case.batch)
    share, forecast = _expected(case)
    return MeasuredCase(
        **vars(case), student_macs_share=share, forecast=forecast, ways=costs, ratios=ratios
    )


def _with_times(cost: VariantCost, times: Sequence[StepTime], batch: int) -> VariantCost:
    median = statistics.median(t.clock for t in times)
    return replace(
        cost,
        seconds=tuple(round(t.clock, 4) for t in times),
        cpu_seconds=tuple(round(t.cpu, 4) for t in times),
        median_s=round(median, 4),
        images_per_second=round(batch / median, 3),
    )


def _ratios(times: Mapping[str, list[StepTime]], group: Sequence[str]) -> dict[str, StepRatio]:
    """The ratio of the first variant to the floor, and of others to the first."""
    first, *others = group
    ratios = {}
    for other in others:
        over, under = (first, other) if other == "floor" else (other, first)
        clock, cpu = (
            ratio([[t[i]] for t in times[under]], [[t[i]] for t in times[over]], 0) for i in (0, 1)
        )
        ratios[f"{over} / {under}"] = StepRatio(**vars(clock), cpu=cpu)
    return ratios


def _expected(case: Case) -> tuple[float, Forecast]:
    """The student's share of the multiply-accumulates, and the trainer's forecast of our step."""
    with torch.device("meta"):
        teacher = UNet2DConditionModel(**unet_config(case.model, case.width, case.latents))
    names, anatomy = half_of(teacher), anatomy_of(teacher, TOKENS)
    saved = sum(u.macs for u in anatomy.units if u.name in names)
    config = replace(CONFIG, batch_size=case.batch)
    student = prune_unet(teacher, names)
    forecast = forecast_unets(teacher, student, TOKENS, config, case.train_config)
    return round(1 - saved / anatomy.macs, 3), forecast


def run(cases: Sequence[Case], rounds: int, seconds: float) -> StepCosts:
    """Measure the cases in order; a case that would begin after `seconds` is left out."""
    start, measured = time.perf_counter(), []
    for case in cases:
        if time.perf_counter() - start < seconds:
            measured.append(measure(case, rounds))
        else:
            measured.append(MeasuredCase(**vars(case), left_out=f"{seconds:.0f} s are over"))
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return StepCosts(cases=tuple(measured), gpu=gpu, threads=torch.get_num_threads())


def _lines(case: MeasuredCase) -> list[str]:
    lines = [" ".join(f"{name} {getattr(case, name)}" for name in Case.__dataclass_fields__)]
    lines += [f"  left out: {case.left_out}"] if case.left_out else []
    for variant, cost in (case.ways or {}).items():
        size = cost.peak_memory_bytes
        memory = "does not fit" if size is None else f"{size / 1e9:8.3f} GB"
        speed = f"{number(cost.median_s, 's'):>11}{number(cost.images_per_second, 'images/s'):>20}"
        lines.append(f"  {variant:<16}{speed} {memory}")
    for name, step_ratio in (case.ratios or {}).items():
        lines.append(f"  {name:<24}{step_ratio.text()}")
    return lines


def main() -> None:
    """Measure the cases of the command line and print the result."""
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
    arguments = parser.parse_args()
    sizes = arguments.model, arguments.width, arguments.latents
    precision = arguments.precision
    cases = [Case(*sizes, b, precision, k) for b in arguments.batch for k in arguments.kinds]
    costs = run(cases, arguments.rounds, arguments.seconds)
    print(json.dumps(costs.as_json(), indent=1) if arguments.json else costs.text())


if __name__ == "__main__":
    main()
