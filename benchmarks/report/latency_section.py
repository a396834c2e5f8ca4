"""What a run's report says of latency: bars by device, whole images, every row, its conditions."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from laptop.benchmarks.report.figures import THEMES, new_figure, save_figure
from laptop.benchmarks.report.run_files import (
    RUNTIMES,
    TITLES,
    Findings,
    Json,
    benched,
    ratio,
    setup_of,
    setups,
)
from laptop.benchmarks.report.text import DASH, number, scaled, share, table, words

SHOWN = ("teacher", "student")
NUMBER = re.compile(r"\d+(?:\.\d+)?%?")


def latency_section(f: Findings) -> str:
    """Markdown; empty where nothing was measured. Writes images/latency.svg."""
    if not any(report["results"] for report in f.benches):
        return ""
    parts = [
        "## Latency",
        "Each model in a process of its own, in turns; a ratio is the median over the turns, "
        "with its 95 % interval. *First*: the first inference. *Load*: the first of a process, "
        "its files out of the page cache on Linux; *warm*: the second.",
    ]
    if setups(f):
        bar_chart(f, f.folder / "images" / "latency")
        parts.append("![Median latency of a U-Net call, by device](images/latency.svg)")
        parts.append(speed_ups(f))
    if images := [(report, row) for report in f.benches for row in report.get("images", [])]:
        parts.append(_images(images))
    parts += [_device(report) for report in f.benches]
    return "\n\n".join(part for part in parts if part)


def bar_chart(f: Findings, stem: Path) -> None:
    """Medians of a U-Net call by device, 5th to 95th percentile as a line; light and dark."""
    devices = list(dict.fromkeys(at.device for at in setups(f)))
    bars = {
        device: [
            (f"{at.title}: {TITLES[label]}", label, row)
            for at in setups(f)
            if at.device == device
            for label in SHOWN
            if (row := benched(f, label, at))
        ]
        for device in devices
    }
    for theme in THEMES:
        height = sum(0.7 + 0.27 * len(rows) for rows in bars.values())
        figure, panels = new_figure(theme, height, len(devices))
        for axes, (device, rows) in zip(panels, bars.items(), strict=True):
            for place, (_, label, row) in enumerate(rows):
                p50 = row["latency_ms"]["p50"]
                low, high = _spread(row)
                colour = theme.kept if label == "teacher" else theme.curves[0]
                axes.barh(place, p50, 0.7, color=colour)
                axes.plot([low, high], [place, place], color=theme.ink, linewidth=1)
            axes.set_yticks(range(len(rows)), [name for name, *_ in rows])
            axes.invert_yaxis()
            axes.set_xlabel(f"ms on {device}", color=theme.ink, fontsize=8)
        save_figure(figure, Path(f"{stem}{theme.suffix}.svg"))


def _spread(row: Json) -> tuple[float, float]:
    """The 5th and 95th percentile in ms; without raw samples the median stands for the first."""
    ms = row["latency_ms"]
    samples = sorted(row.get("samples_ms") or [ms["p50"]])
    return samples[len(samples) // 20], ms["p95"] if "p95" in ms else ms["p90"]


def speed_ups(f: Findings) -> str:
    """How much faster the student is, beside what its MACs would give; empty without a ratio."""
    macs = f.plan.macs
    limit = macs.before / macs.after if macs and macs.after else None
    rows = []
    for at in setups(f):
        if found := ratio(f, "student", at):
            speed = 1 / found["median"]
            share = f"{speed / limit:.2f}" if limit else DASH
            interval = f"{1 / found['high']:.2f}–{1 / found['low']:.2f}"
            valid = "yes" if found.get("valid", True) else "**no**"
            speeds = f"{speed:.2f} ({interval})"
            rows.append([words(at.title), speeds, number(limit), share, valid])
    header = ["U-Net call", "times as fast", "MACs: times fewer", "of what MACs promise", "valid"]
    return table(header, rows) if rows else ""


def _images(found: Sequence[tuple[Json, Json]]) -> str:
    rows = [
        [
            words(TITLES.get(row["label"], row["label"])),
            words(setup_of(report, row).title),
            str(row["steps"]),
            number(row["latency_ms"]["p50"], "ms"),
            number(row.get("energy_j"), "J"),
            "yes" if row["valid"] else "**no**",
        ]
        for report, row in found
    ]
    header = ["model", "whole image in", "steps", "time", "energy", "valid"]
    return (
        "A whole image: text encoders + steps × U-Net + VAE decoder, from their medians; what "
        "pruning does not change was timed once, for the student.\n\n"
        f"{table(header, rows)}"
    )


def _device(report: Json) -> str:
    """All rows of one device."""
    if not (results := report["results"]):
        return ""
    device = report.get("device", {})
    title = f"### {words(device.get('address', 'local'))}: {words(results[0]['device'])}"
    facts = [device.get("state"), device.get("power_mode")]
    known = ", ".join(words(fact) for fact in facts if fact)
    header = [
        "model", "runtime", "part", "valid", "p50 ms", "p90", "p99", "cv", "n", "first", "load s",
        "warm s", "peak memory",
    ]  # fmt: skip
    rows = table(header, [_row(r) for r in results])
    notes = "\n".join([*_reasons(results), *_placements(results), *_conditions(results)])
    return "\n\n".join(part for part in (title, known, rows, notes) if part)


def _row(r: Mapping[str, Any]) -> list[str]:
    ms, load = r["latency_ms"], r["load_s"]
    return [
        words(TITLES.get(r["label"], r["label"])),
        words(f"{RUNTIMES.get(r['runtime'], r['runtime'])} {r['precision']}"),
        words(r["component"]),
        "yes" if r["valid"] else "**no**",
        *(number(ms[k]) for k in ("p50", "p90", "p99")),
        f"{ms['cv']:.2f}",
        str(r["n"]),
        number(ms["first"]),
        number(load["cold"]),
        number(load["warm"]),
        scaled(r["peak_memory_bytes"], "B"),
    ]


def _subject(r: Mapping[str, Any]) -> str:
    runtime = RUNTIMES.get(r["runtime"], r["runtime"])
    part = "" if r["component"] == "unet" else f"'s {r['component']}"
    return f"{TITLES.get(r['label'], r['label'])}{part} in {runtime}"


def _reasons(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Why rows are not valid, once for those that share it but for its first number."""
    found: dict[str, list[tuple[str, str]]] = {}
    for r in results:
        for reason in r["invalid_reasons"]:
            first = NUMBER.search(reason)
            text = NUMBER.sub("…", reason, 1)
            found.setdefault(text, []).append((_subject(r), first[0] if first else ""))
    lines = []
    for text, of in found.items():
        if len({value for _, value in of}) == 1:
            names = "every row" if len(of) == len(results) else ", ".join(name for name, _ in of)
            lines.append(f"- Not valid: {words(text.replace('…', of[0][1]))}: {words(names)}.")
        else:
            names = ", ".join(f"{name} ({value})" for name, value in of)
            lines.append(f"- Not valid: {words(text)}: {words(names)}.")
    return lines


def _placements(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Where the operations of a row run, for those that tell."""
    return [
        f"- {words(_subject(r))} runs on: "
        + "; ".join(
            f"{words(where.replace('_', ' '))} {share(part['operations'])} of the operations, "
            f"{share(part['cost'])} of their estimated cost"
            for where, part in r["placement"].items()
        )
        + "."
        for r in results
        if r.get("placement")
    ]


def _conditions(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Device and conditions, once for the rows that share them."""
    lines: dict[str, list[str]] = {}
    for r in results:
        facts = {"device": r["device"], **r["conditions"]}
        text = ", ".join(f"{k} {_plain(v)}" for k, v in facts.items() if v is not None)
        lines.setdefault(text, []).append(_subject(r))
    if len(lines) == 1:
        return [f"- Conditions of every row: {words(next(iter(lines)))}."]
    return [f"- Conditions, {words(', '.join(of))}: {words(t)}." for t, of in lines.items()]


def _plain(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {_plain(v)}" for k, v in value.items())
    return ("×".join(map(str, value)) or "scalar") if isinstance(value, list) else str(value)
