"""The latency section of a report: bars by device, whole images, every row, its conditions."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from laptop.benchmarks.bench_report import BenchReport, BenchRow, ImageRow
from laptop.benchmarks.report.figures import THEMES, new_figure, save_figure
from laptop.benchmarks.report.run_files import (
    RUNTIMES,
    TITLES,
    RunFiles,
    benched,
    ratio,
    setup_of,
    setups,
)
from laptop.benchmarks.report.text import DASH, number, percent, scaled, table, words

SHOWN = ("teacher", "student")
NUMBER = re.compile(r"\d+(?:\.\d+)?%?")


def latency_section(run: RunFiles) -> str:
    """The section in Markdown, empty if nothing was measured; writes images/latency.svg."""
    if not any(report.results for report in run.benches):
        return ""
    parts = [
        "## Latency",
        "Each model in a process of its own, in turns; a ratio is the median over the turns, "
        "with its 95 % interval. *First*: the first inference. *Load*: the first of a process, "
        "its files out of the page cache on Linux; *warm*: the second.",
    ]
    if setups(run):
        bar_chart(run, run.folder / "images" / "latency")
        parts.append("![Median latency of a U-Net call, by device](images/latency.svg)")
        parts.append(speed_ups(run))
    if images := [(report, row) for report in run.benches for row in report.images]:
        parts.append(_images(images))
    parts += [_device(report) for report in run.benches]
    return "\n\n".join(part for part in parts if part)


def bar_chart(run: RunFiles, stem: Path) -> None:
    """Medians of a U-Net call by device, 5th to 95th percentile as a line; light and dark."""
    devices = list(dict.fromkeys(setup.device for setup in setups(run)))
    bars = {
        device: [
            (f"{setup.title}: {TITLES[label]}", label, row)
            for setup in setups(run)
            if setup.device == device
            for label in SHOWN
            if (row := benched(run, label, setup))
        ]
        for device in devices
    }
    for theme in THEMES:
        height = sum(0.7 + 0.27 * len(rows) for rows in bars.values())
        figure, panels = new_figure(theme, height, len(devices))
        for axes, (device, rows) in zip(panels, bars.items(), strict=True):
            for y, (_, label, row) in enumerate(rows):
                low, high = _spread(row)
                colour = theme.kept if label == "teacher" else theme.curves[0]
                axes.barh(y, row.latency_ms.p50, 0.7, color=colour)
                axes.plot([low, high], [y, y], color=theme.ink, linewidth=1)
            axes.set_yticks(range(len(rows)), [name for name, *_ in rows])
            axes.invert_yaxis()
            axes.set_xlabel(f"ms on {device}", color=theme.ink, fontsize=8)
        save_figure(figure, Path(f"{stem}{theme.suffix}.svg"))


def _spread(row: BenchRow) -> tuple[float, float]:
    """The 5th and 95th percentile in ms; without raw samples the median stands for the first."""
    ms = row.latency_ms
    samples = sorted(row.samples_ms or [ms.p50])
    return samples[len(samples) // 20], ms.p90 if ms.p95 is None else ms.p95


def speed_ups(run: RunFiles) -> str:
    """A table of the student's speed and what its MACs promise; empty without a ratio."""
    macs = run.plan.macs
    limit = macs.before / macs.after if macs and macs.after else None
    rows = []
    for setup in setups(run):
        if pair := ratio(run, "student", setup):
            speed = 1 / pair.median
            part = f"{speed / limit:.2f}" if limit else DASH
            speeds = f"{speed:.2f} ({1 / pair.high:.2f}–{1 / pair.low:.2f})"
            rows.append([words(setup.title), speeds, number(limit), part, _valid(pair.valid)])
    header = ["U-Net call", "times as fast", "MACs: times fewer", "of what MACs promise", "valid"]
    return table(header, rows) if rows else ""


def _valid(is_valid: bool) -> str:
    return "yes" if is_valid else "**no**"


def _images(images: Sequence[tuple[BenchReport, ImageRow]]) -> str:
    rows = [
        [
            words(TITLES.get(row.label, row.label)),
            words(setup_of(report, row).title),
            str(row.steps),
            number(row.latency_ms.p50, "ms"),
            number(row.energy_j, "J"),
            _valid(row.valid),
        ]
        for report, row in images
    ]
    header = ["model", "whole image in", "steps", "time", "energy", "valid"]
    return (
        "A whole image: text encoders + steps × U-Net + VAE decoder, from their medians; what "
        "pruning does not change was timed once, for the student.\n\n"
        f"{table(header, rows)}"
    )


def _device(report: BenchReport) -> str:
    """All rows of one device."""
    if not (results := report.results):
        return ""
    title = f"### {words(report.address)}: {words(results[0].device)}"
    facts = [report.device.state, report.device.power_mode] if report.device else []
    state = ", ".join(words(fact) for fact in facts if fact)
    header = [
        "model", "runtime", "part", "valid", "p50 ms", "p90", "p99", "cv", "n", "first", "load s",
        "warm s", "peak memory",
    ]  # fmt: skip
    rows = table(header, [_cells(row) for row in results])
    notes = "\n".join([*_reasons(results), *_placements(results), *_conditions(results)])
    return "\n\n".join(part for part in (title, state, rows, notes) if part)


def _cells(row: BenchRow) -> list[str]:
    ms = row.latency_ms
    return [
        words(TITLES.get(row.label, row.label)),
        words(f"{RUNTIMES.get(row.runtime, row.runtime)} {row.precision}"),
        words(row.component),
        _valid(row.valid),
        *(number(value) for value in (ms.p50, ms.p90, ms.p99)),
        f"{ms.cv:.2f}",
        str(row.n),
        number(ms.first),
        number(row.load_s.cold),
        number(row.load_s.warm),
        scaled(row.peak_memory_bytes, "B"),
    ]


def _title(row: BenchRow) -> str:
    """The name of a row in a note, such as `distilled's vae_decoder in ONNX Runtime`."""
    runtime = RUNTIMES.get(row.runtime, row.runtime)
    part = "" if row.component == "unet" else f"'s {row.component}"
    return f"{TITLES.get(row.label, row.label)}{part} in {runtime}"


def _reasons(results: Sequence[BenchRow]) -> list[str]:
    """Why rows are not valid, once for those that share it but for its first number."""
    reasons: dict[str, list[tuple[str, str]]] = {}
    for row in results:
        for reason in row.invalid_reasons:
            first = NUMBER.search(reason)
            text = NUMBER.sub("…", reason, 1)
            reasons.setdefault(text, []).append((_title(row), first[0] if first else ""))
    lines = []
    for text, rows in reasons.items():
        if len({value for _, value in rows}) == 1:
            names = (
                "every row" if len(rows) == len(results) else ", ".join(name for name, _ in rows)
            )
            lines.append(f"- Not valid: {words(text.replace('…', rows[0][1]))}: {words(names)}.")
        else:
            names = ", ".join(f"{name} ({value})" for name, value in rows)
            lines.append(f"- Not valid: {words(text)}: {words(names)}.")
    return lines


def _placements(results: Sequence[BenchRow]) -> list[str]:
    """Notes on the processors that run the operations of a row, if the row says it."""
    return [
        f"- {words(_title(row))} runs on: "
        + "; ".join(
            f"{words(processor.replace('_', ' '))} {percent(part.operations)} of the operations, "
            f"{percent(part.cost)} of their estimated cost"
            for processor, part in row.placement.items()
        )
        + "."
        for row in results
        if row.placement
    ]


def _conditions(results: Sequence[BenchRow]) -> list[str]:
    """Device and conditions, once for the rows that share them."""
    lines: dict[str, list[str]] = {}
    for row in results:
        facts = {"device": row.device, **vars(row.conditions)}
        text = ", ".join(f"{k} {_plain(v)}" for k, v in facts.items() if v not in (None, {}))
        lines.setdefault(text, []).append(_title(row))
    if len(lines) == 1:
        return [f"- Conditions of every row: {words(next(iter(lines)))}."]
    return [f"- Conditions, {words(', '.join(rows))}: {words(t)}." for t, rows in lines.items()]


def _plain(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {_plain(v)}" for k, v in value.items())
    return ("×".join(map(str, value)) or "scalar") if isinstance(value, tuple) else str(value)
