"""What `laptop bench` makes, as a document and as text: latencies of models, or of one's layers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from laptop.benchmarks.devices.addresses import device, known, states
from laptop.benchmarks.devices.computer import Computer
from laptop.benchmarks.latency import bench as latency
from laptop.benchmarks.latency import layers
from laptop.benchmarks.latency.bench import SCHEMA, bench
from laptop.benchmarks.latency.layers import bench_layers
from laptop.benchmarks.latency.sustained import plot
from laptop.benchmarks.settings import BenchConfig
from laptop.errors import BadInput, OutputExists
from laptop.files import read_json
from laptop.pruning.latency_table import LatencyTable
from laptop.pruning.sampling_config import SamplingConfig

Made = tuple[dict[str, Any], str]


def of_models(
    subjects: Mapping[str, str],
    out: Path,
    config: BenchConfig,
    address: str,
    *,
    sampling: SamplingConfig,
    overwrite: bool,
) -> Made:
    """Latencies of models or artifacts on a device, of whole images, and their ratios."""
    where, figure = device(address, config), out.with_suffix(".svg")
    if config.sustained_s and figure.exists() and not _is_sustained(out):
        raise OutputExists(f"{figure} exists, where the plot would lie. Choose another -o.")
    report = read_json(bench(subjects, out, config, where, sampling=sampling, overwrite=overwrite))
    lines = [f"{_name(r)}{_quality(r, r['latency_ms'])}" for r in report["results"]]
    lines += [
        f"{_name({**r, 'component': 'image'})}    {r['latency_ms']['p50']:8.2f} ms  "
        f"{r['steps']} steps{'' if r['valid'] else '; of a row that is not valid'}"
        for r in report["images"]
    ]
    lines += [
        f"{r['b']} / {r['a']}, {r['component']}, {r['target']} in {r['runtime']}: "
        f"{r['median']:.3f} "
        f"({r['low']:.3f} to {r['high']:.3f}){'' if r['valid'] else '; of rows that are not valid'}"
        for r in report["ratios"]
    ]
    if config.sustained_s:
        plot(report["results"], out.with_suffix(""))
        lines += [
            f"{_name(r)}last / first part: {r['sustained']['last_over_first']:.3f}"
            for r in report["results"]
        ]
        lines.append(f"Plot: {figure}")
    return report, "\n".join(lines)


def _is_sustained(out: Path) -> bool:
    """Whether a report lies there that has a plot."""
    try:
        return any("sustained" in row for row in read_json(out, SCHEMA)["results"])
    except (BadInput, KeyError, TypeError):  # none, or nothing of ours
        return False


def _name(row: Mapping[str, Any]) -> str:
    return f"{row['label']:<9}{row['component']:<16}{row['target']:<12}{row['runtime']:<22}"


def estimate(
    subjects: Mapping[str, str],
    config: BenchConfig,
    address: str,
    granularity: str | None,
    sampling: SamplingConfig,
) -> dict[str, Any]:
    """What would be timed, of models or, with a granularity, of one's layers; how long at least."""
    if granularity:
        return layers.estimate(subjects["model"], config, _computer(address, config), granularity)
    return latency.estimate(subjects, config, device(address, config), sampling)


def _computer(address: str, config: BenchConfig) -> Computer:
    where = device(address, config)
    if not isinstance(where, Computer):
        raise BadInput(f"--layers with --device {address}: layers are timed on local and ssh://.")
    return where


def of_layers(
    model: str,
    out: Path,
    config: BenchConfig,
    granularity: str,
    resolution: int | None,
    address: str,
    *,
    sampling: SamplingConfig,
    overwrite: bool,
) -> Made:
    """What each removable layer takes of a forward, for `laptop plan --latency-table`."""
    where = _computer(address, config)
    path = bench_layers(
        model, out, config, where, granularity, resolution, sampling=sampling, overwrite=overwrite
    )
    table = LatencyTable.read(path)
    lines = [f"{unit.latency_ms:12.4f}  {unit.name}" for unit in table.units]
    total, document = sum(table.times_ms.values()), table.as_json()
    return document, "\n".join(
        [
            "          ms  layer",
            *lines,
            f"{total:12.4f}  all of these",
            f"The whole U-Net: {_quality(document, vars(table.unet_ms))}",
        ]
    )


def _quality(row: Mapping[str, Any], times: Mapping[str, float]) -> str:
    return f"p50 {times['p50']:8.2f} ms  n {row['n']:<5}cv {times['cv']:.3f}  " + (
        "valid" if row["valid"] else "; ".join(row["invalid_reasons"])
    )


def of_devices(addresses: Sequence[str], config: BenchConfig) -> Made:
    """What is known of devices: of those named, or of all that this machine knows."""
    found = states(addresses or known(), config)
    document = {"schema": "laptop.devices/1", "devices": found}
    return document, "\n".join(line for one in found for line in _state(one))


def _state(one: Mapping[str, Any]) -> list[str]:
    if "error" in one:
        return [one["address"], f"  not reached: {one['error']}"]
    facts, heat = one["facts"], one["heat"]
    runtimes = ", ".join(f"{k} {v}" for k, v in facts["runtimes"].items()) or "none"
    memory, disk = (_gigabytes(facts[f"free_{k}_bytes"]) for k in ("memory", "disk"))
    warmth = heat["why"] or ("heat not told" if heat["temperature_c"] is None else "cool")
    if heat["temperature_c"] is not None:
        warmth += f", {heat['temperature_c']:.0f} °C"
    words = [facts["name"], facts["os"], facts["power_mode"], facts["state"]]
    return [
        one["address"],
        f"  {', '.join(word for word in words if word)}",
        f"  {memory} memory and {disk} disk free; {warmth}",
        f"  runtimes: {runtimes}",
    ]


def _gigabytes(size_bytes: int | None) -> str:
    return "unknown" if size_bytes is None else f"{size_bytes / 1e9:.1f} GB"
