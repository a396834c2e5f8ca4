"""Sustained load: phones halve their speed in half an hour, and rankings swap.

One component runs without a pause for some minutes. The median of each minute is kept with the
temperature at its end; the last median over the first is what heat costs.
"""

import time
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

import numpy as np

from laptop.benchmarks.bench_report import BenchRow, Sustained
from laptop.benchmarks.devices.device import Meter, Round
from laptop.benchmarks.report.figures import THEMES, new_figure, save_figure
from laptop.console import track

PARTS = 10  # at least; more if each would be longer than a minute


def run(meter: Meter, seconds: float, label: str) -> list[Round]:
    """Rounds of a minute each, or of a tenth of a shorter time, without a pause between them."""
    parts = max(PARTS, round(seconds / 60))
    start = time.monotonic()
    rounds = []
    for i in track(range(parts), f"sustained {label}", parts):
        left = seconds * (i + 1) / parts - (time.monotonic() - start)
        rounds.append(meter.run_round(1, max(left, 0)))
    return rounds


def summary(rounds: Sequence[Round]) -> Sustained:
    """The median of each part, and the last over the first."""
    medians = tuple(float(np.median(turn.samples_ms)) for turn in rounds)
    return Sustained(
        p50_ms=medians,
        seconds=tuple(sum(turn.samples_ms) / 1000 for turn in rounds),
        temperature_c=tuple(turn.temperature_c for turn in rounds),
        throttled=tuple(turn.throttled for turn in rounds),
        last_over_first=medians[-1] / medians[0],
    )


def plot(results: Sequence[BenchRow], stem: Path) -> None:
    """Plot latency by time, a line for each row, and dotted the temperature; writes `stem`.svg."""
    figure, (axes,) = new_figure(THEMES[0], 3.2, 1)
    hot = axes.twinx()
    for row, color in zip(results, cycle(THEMES[0].curves)):
        if (load := row.sustained) is None:
            continue
        minutes = np.cumsum(load.seconds) / 60
        name = f"{row.label}: {row.component}, {row.target}"
        axes.plot(minutes, load.p50_ms, marker="o", label=name, color=color)
        temperatures = [celsius for celsius in load.temperature_c if celsius is not None]
        if len(temperatures) == len(minutes):
            hot.plot(minutes, temperatures, ":", color=color)
    axes.set(xlabel="minutes", ylabel="median, ms")
    axes.set_ylim(bottom=0)
    axes.legend(loc="lower right", frameon=False, fontsize=8)
    if hot.lines:
        hot.set_ylabel("°C, dotted")
    else:
        hot.set_axis_off()
    save_figure(figure, stem.with_suffix(".svg"))
