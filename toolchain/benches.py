"""The results of `laptop bench` as records and as text: latencies of models, or of layers."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from laptop.benchmarks.bench_report import BenchReport, BenchRow, ImageRow, Spread
from laptop.benchmarks.devices.addresses import (
    DeviceEntry,
    DeviceList,
    device,
    known_addresses,
    states,
)
from laptop.benchmarks.devices.computer import Computer
from laptop.benchmarks.settings import BenchConfig, DevicesConfig
from laptop.errors import BadInput, OutputExists
from laptop.pruning.latency_table import ForwardTime, LatencyTable
from laptop.pruning.sampling_config import SamplingConfig


def of_models(
    subjects: Mapping[str, str],
    out: Path,
    config: BenchConfig,
    address: str,
    *,
    devices: DevicesConfig,
    sampling: SamplingConfig,
    overwrite: bool,
) -> tuple[BenchReport, str]:
    """Latencies of models or artifacts on a device, of whole images, and their ratios."""
    from laptop.benchmarks.latency.bench import bench  # imports torch, which devices need not
    from laptop.benchmarks.latency.sustained import plot

    where, figure = device(address, devices), out.with_suffix(".svg")
    if config.sustained_s and figure.exists() and not _is_sustained(out):
        raise OutputExists(f"{figure} exists, where the plot would be written. Choose another -o.")
    path = bench(subjects, out, config, where, sampling=sampling, overwrite=overwrite)
    report = BenchReport.read(path)
    rows = report.results
    lines = [f"{_name(row, row.component)}{_quality(row, row.latency_ms)}" for row in rows]
    lines += [
        f"{_name(row, 'image')}    {row.latency_ms.p50:8.2f} ms  "
        f"{row.steps} steps{'' if row.valid else '; of a row that is not valid'}"
        for row in report.images
    ]
    lines += [
        f"{row.b} / {row.a}, {row.component}, {row.target} in {row.runtime}: {row.median:.3f} "
        f"({row.low:.3f} to {row.high:.3f}){'' if row.valid else '; of rows that are not valid'}"
        for row in report.ratios
    ]
    if config.sustained_s:
        plot(report.results, out.with_suffix(""))
        lines += [
            f"{_name(row, row.component)}last / first part: {row.sustained.last_over_first:.3f}"
            for row in report.results
            if row.sustained
        ]
        lines.append(f"Plot: {figure}")
    return report, "\n".join(lines)


def _is_sustained(out: Path) -> bool:
    """Whether a file is an earlier report that has a plot."""
    try:
        return any(row.sustained for row in BenchReport.read(out).results)
    except BadInput:  # no file, or not one of ours
        return False


def _name(row: BenchRow | ImageRow, part: str) -> str:
    return f"{row.label:<9}{part:<16}{row.target:<12}{row.runtime:<22}"


def estimate(
    subjects: Mapping[str, str],
    config: BenchConfig,
    address: str,
    granularity: str | None,
    *,
    devices: DevicesConfig,
    sampling: SamplingConfig,
) -> dict[str, object]:
    """The models or, with a granularity, the layers that would be timed, and the least time."""
    from laptop.benchmarks.latency import bench, layers

    if granularity:
        return layers.estimate(subjects["model"], config, _computer(address, devices), granularity)
    return bench.estimate(subjects, config, device(address, devices), sampling)


def _computer(address: str, devices: DevicesConfig) -> Computer:
    where = device(address, devices)
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
    devices: DevicesConfig,
    sampling: SamplingConfig,
    overwrite: bool,
) -> tuple[LatencyTable, str]:
    """The latency of each removable layer in a forward, for `laptop plan --latency-table`."""
    from laptop.benchmarks.latency.layers import bench_layers

    where = _computer(address, devices)
    path = bench_layers(
        model, out, config, where, granularity, resolution, sampling=sampling, overwrite=overwrite
    )
    table = LatencyTable.read(path)
    lines = [f"{ms:12.4f}  {name}" for name, ms in table.times_ms.items()]
    return table, "\n".join(
        [
            "          ms  layer",
            *lines,
            f"{sum(table.times_ms.values()):12.4f}  all of these",
            f"The whole U-Net: {_quality(table, table.unet_ms)}",
        ]
    )


def _quality(row: BenchRow | LatencyTable, times: Spread | ForwardTime) -> str:
    return f"p50 {times.p50:8.2f} ms  n {row.n:<5}cv {times.cv or 0:.3f}  " + (
        "valid" if row.valid else "; ".join(row.invalid_reasons)
    )


def of_devices(addresses: Sequence[str], devices: DevicesConfig) -> tuple[DeviceList, str]:
    """The states of the devices that are named, or of all that this machine knows."""
    report = states(addresses or known_addresses(), devices)
    return report, "\n".join(line for entry in report.devices for line in _lines(entry))


def _lines(entry: DeviceEntry) -> list[str]:
    facts, heat = entry.facts, entry.heat
    if facts is None or heat is None:
        return [entry.address, f"  not reached: {entry.error}"]
    runtimes = ", ".join(f"{k} {v}" for k, v in facts.runtimes.items()) or "none"
    memory, disk = map(_gigabytes, (facts.free_memory_bytes, facts.free_disk_bytes))
    warmth = heat.why or ("heat unknown" if heat.temperature_c is None else "cool")
    if heat.temperature_c is not None:
        warmth += f", {heat.temperature_c:.0f} °C"
    words = [facts.name, facts.os, facts.power_mode, facts.state]
    return [
        entry.address,
        f"  {', '.join(word for word in words if word)}",
        f"  {memory} memory and {disk} disk free; {warmth}",
        f"  runtimes: {runtimes}",
    ]


def _gigabytes(size_bytes: int | None) -> str:
    return "unknown" if size_bytes is None else f"{size_bytes / 1e9:.1f} GB"
