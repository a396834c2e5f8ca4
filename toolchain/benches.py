"""What `laptop bench` makes, as a document and as text: latencies of models, or of one's layers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from laptop.benchmarks.latency import BenchConfig, bench
from laptop.benchmarks.layers import bench_layers
from laptop.run import read_json

Made = tuple[dict[str, Any], str]


def of_models(
    subjects: Mapping[str, str], out: Path, config: BenchConfig, *, overwrite: bool
) -> Made:
    """Latencies of models or artifacts, and their ratios."""
    report = read_json(bench(subjects, out, config, overwrite=overwrite))
    lines = [
        f"{r['label']:<10}{r['runtime']:<14}{_quality(r, r['latency_ms'])}"
        for r in report["results"]
    ]
    lines += [
        f"{r['a']} / {r['b']}: {r['median']:.3f} ({r['low']:.3f} to {r['high']:.3f})"
        for r in report["ratios"]
    ]
    return report, "\n".join(lines)


def of_layers(
    model: str,
    out: Path,
    config: BenchConfig,
    granularity: str,
    resolution: int | None,
    *,
    overwrite: bool,
) -> Made:
    """What each removable layer takes of a forward, for `laptop plan --latency-table`."""
    path = bench_layers(model, out, config, granularity, resolution, overwrite=overwrite)
    table = read_json(path)
    lines = [f"{u['latency_ms']:12.4f}  {u['name']}" for u in table["units"]]
    total = sum(u["latency_ms"] for u in table["units"])
    return table, "\n".join(
        [
            "          ms  layer",
            *lines,
            f"{total:12.4f}  all of these",
            f"The whole U-Net: {_quality(table, table['unet_ms'])}",
        ]
    )


def _quality(row: Mapping[str, Any], times: Mapping[str, float]) -> str:
    return f"p50 {times['p50']:8.2f} ms  n {row['n']:<5}cv {times['cv']:.3f}  " + (
        "valid" if row["valid"] else "; ".join(row["invalid_reasons"])
    )
