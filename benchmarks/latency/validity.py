"""When a measurement can be trusted: percentiles, the reasons against a row, and ratios.

A row that does not meet the protocol has `valid: false` and the reasons in `invalid_reasons`. The
ratio of two models is taken round by round, so that drift of the machine cancels.
"""

from collections.abc import Sequence

import numpy as np

from laptop.benchmarks.bench_report import BenchReport, BenchRow, Ratio, Spread
from laptop.benchmarks.devices.device import Round
from laptop.benchmarks.settings import NEEDED_S, NEEDED_SAMPLES
from laptop.errors import CheckFailed
from laptop.pruning.latency_table import LatencyTable

NEEDED_ROUNDS = 6  # for a drift to show, and for an interval that covers 95 %
SLOWER = 1.10  # the last third of the rounds over the first: heat, or a lower clock
OTHERS = 0.10  # of the processors' time; with more, the numbers include others' work
BOOTSTRAPS = 2000


def summary(samples_ms: Sequence[float]) -> Spread:
    """Percentiles, mean, standard deviation (n - 1) and coefficient of variation."""
    p50, p90, p95, p99 = np.percentile(samples_ms, [50, 90, 95, 99]).tolist()
    mean = float(np.mean(samples_ms))
    stdev = float(np.std(samples_ms, ddof=1)) if len(samples_ms) > 1 else 0.0
    return Spread(p50=p50, p90=p90, p95=p95, p99=p99, mean=mean, stdev=stdev, cv=stdev / mean)


def invalid_reasons(
    rounds: Sequence[Round], cv_bound: float, *, may_slow: bool = False
) -> list[str]:
    """The reasons why a row cannot be trusted; none if it can.

    With `may_slow`, for a sustained load, a throttled device is no reason: it is the result.
    """
    samples_ms = [sample for turn in rounds for sample in turn.samples_ms]
    reasons = []
    if len(rounds) < NEEDED_ROUNDS:
        reasons.append(f"{len(rounds)} rounds; {NEEDED_ROUNDS} are needed")
    if len(samples_ms) < NEEDED_SAMPLES:
        reasons.append(f"{len(samples_ms)} samples; {NEEDED_SAMPLES} are needed")
    if (total_s := sum(samples_ms) / 1000) < NEEDED_S:
        reasons.append(f"{total_s:.1f} s measured; {NEEDED_S:.0f} s are needed")
    return reasons + (busy(rounds) if may_slow else unsteady(rounds, cv_bound))


def unsteady(rounds: Sequence[Round], cv_bound: float) -> list[str]:
    """Signs that the device, or its load, changed while it was measured."""
    samples_ms = [sample for turn in rounds for sample in turn.samples_ms]
    reasons = []
    if (cv := summary(samples_ms).cv) > cv_bound:
        reasons.append(f"cv {cv:.2f} is above {cv_bound:.2f}: the machine was busy or hot")
    if (times := slowing(rounds)) > SLOWER:
        reasons.append(f"throttled: the last rounds took {times:.2f} × the first ones' time")
    if throttled := [turn.throttled for turn in rounds if turn.throttled]:
        reasons.append(f"throttled in {len(throttled)} of {len(rounds)} rounds: {throttled[0]}")
    return reasons + busy(rounds)


def busy(rounds: Sequence[Round]) -> list[str]:
    """Signs that other work ran at the same time."""
    loads = [turn.others for turn in rounds if turn.others is not None]
    if loads and (others := float(np.median(loads))) > OTHERS:
        return [f"device busy: {others:.0%} of its processors' time went to other work"]
    return []


def slowing(rounds: Sequence[Round]) -> float:
    """The median of the last third of the rounds over the first third's; 1 for few rounds."""
    medians = [float(np.median(turn.samples_ms)) for turn in rounds]
    third = len(medians) // 3
    return float(np.median(medians[-third:]) / np.median(medians[:third])) if third >= 2 else 1.0


def check_valid(report: BenchReport | LatencyTable) -> None:
    """Raise `CheckFailed` if a row of a report, or a table of layers, cannot be trusted."""
    rows: Sequence[BenchRow | LatencyTable]
    rows = report.results if isinstance(report, BenchReport) else (report,)
    if invalid := [row for row in rows if not row.valid]:
        lines = "; ".join(f"{_title(row)}: {', '.join(row.invalid_reasons)}" for row in invalid)
        raise CheckFailed(
            f"{len(invalid)} of {len(rows)} measurements are not valid ({lines}). They are written "
            "down as such. Measure again on a quiet, cool device, or pass --allow-invalid."
        )


def _title(row: BenchRow | LatencyTable) -> str:
    if isinstance(row, LatencyTable):
        return "layers"
    return f"{row.label} {row.component} {row.target} {row.runtime}"


def ratio(a: Sequence[Sequence[float]], b: Sequence[Sequence[float]], seed: int) -> Ratio:
    """Latency of b over that of a: median over rounds, and its 95 % interval by bootstrap.

    A round's ratio is that of its two medians, which were measured one after the other. With fewer
    than `NEEDED_ROUNDS` rounds the interval is too narrow, and the rows are not valid.
    """
    by_round = np.array([np.median(y) / np.median(x) for x, y in zip(a, b, strict=True)])
    rng = np.random.default_rng(seed)
    draws = rng.choice(by_round, (BOOTSTRAPS, len(by_round)))
    low, high = np.percentile(np.median(draws, axis=1), [2.5, 97.5]).tolist()
    return Ratio(median=float(np.median(by_round)), low=low, high=high)
