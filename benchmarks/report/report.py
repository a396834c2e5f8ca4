"""The report of a run: report.md, the same as one self-contained report.html, and images/.

Numbers come from the run's files only; one that was not measured is a dash.
"""

from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from laptop.benchmarks.report import figures, page
from laptop.benchmarks.report.balance import balance_chart, largest_share
from laptop.benchmarks.report.latency_section import latency_section
from laptop.benchmarks.report.provenance import loading, making
from laptop.benchmarks.report.run_files import (
    TITLES,
    Findings,
    Measures,
    block_of,
    measures,
    network_order,
    ratio,
    read_run,
    setups,
)
from laptop.benchmarks.report.text import DASH, code, number, scaled, share, table, words
from laptop.files import files_in, inside, write_text

DOUBT = "†"  # marks what rests on a bench row that is not valid


def write_report(run: Path) -> Path:
    """Write report.md, report.html and images/ into the run folder; returns the HTML's path.

    Parts whose stage has not run are left out. Raises `BadInput` for a folder without a plan.
    """
    findings = read_run(run)
    inside(run, "images", "a report").mkdir(exist_ok=True)
    for path in (run / "images").iterdir():
        if path.is_symlink():
            path.unlink()  # or a figure would be written to where it leads
    markdown = "\n\n".join(part for part in _parts(findings) if part) + "\n"
    for name, text in (("report.md", markdown), ("report.html", page.render(markdown, run))):
        write_text(run / name, text)
    return run / "report.html"


def _parts(f: Findings) -> list[str]:
    of = {label: measures(f, label) for label in TITLES}
    return [
        f"# {words(f.model)}, pruned and distilled",
        f"> {headline(of)}",
        result_table(f, of),
        _pictures(f),
        _removed(f),
        _distillation(f),
        latency_section(f),
        _quality(f),
        _parity(f),
        loading(f),
        making(f),
    ]


def headline(of: Mapping[str, Measures]) -> str:
    """The main numbers in a sentence or two, of those that were measured."""
    teacher, pruned, student = (of[label] for label in TITLES)
    said = []
    if teacher.params and student.params:
        gone = 1 - student.params / teacher.params
        said.append(
            f"The U-Net went from {scaled(teacher.params)} to **{scaled(student.params)} "
            f"parameters** ({share(gone)} removed)"
        )
    for at, r in student.ratio.items():
        if r:
            doubt = "" if student.is_valid[at] else " (measurement not valid, see Latency)"
            said.append(
                f"a call takes **{r:.2f} × the teacher's time** in {words(at.title)}{doubt}"
            )
    text = ("; ".join(said) or "Nothing was measured yet") + "."
    if student.prompt_accuracy is not None and teacher.prompt_accuracy:
        kept = student.prompt_accuracy / teacher.prompt_accuracy
        text += (
            f" The distilled student's prompt accuracy is **{share(student.prompt_accuracy)}**, "
            f"{share(kept)} of the teacher's {share(teacher.prompt_accuracy)}"
        )
        if pruned.prompt_accuracy is not None:
            text += f"; without distillation it is {share(pruned.prompt_accuracy)}"
        text += "."
    return text


def result_table(f: Findings, of: Mapping[str, Measures]) -> str:
    """The three models beside each other."""
    columns = list(of.values())
    rows = [
        ["U-Net parameters", *(scaled(m.params) for m in columns)],
        ["MACs of a U-Net call", *(scaled(m.macs) for m in columns)],
        ["U-Net weights on disk", *(scaled(m.size_bytes, "B") for m in columns)],
    ]
    for at in setups(f):
        title = words(at.title)
        rows.append([f"{title}, p50", *(number(m.p50_ms[at], "ms") for m in columns)])
        cells = [_ratio_cell(ratio(f, label, at), m.is_valid[at]) for label, m in of.items()]
        rows.append([f"{title}, × teacher", *cells])
    rows += [
        ["Prompt accuracy", *(share(m.prompt_accuracy) for m in columns)],
        ["Fréchet distance", *(number(m.frechet) for m in columns)],
        ["PSNR to the teacher's picture", *(number(m.psnr_to_teacher_db, "dB") for m in columns)],
    ]
    notes = f"*{DASH} not measured in this run.*"
    if not all(all(m.is_valid.values()) for m in columns):
        notes += f" *{DOUBT} not a valid measurement: the reason stands under Latency.*"
    return f"{table(['', *TITLES.values()], rows)}\n\n{notes}"


def _ratio_cell(found: Mapping[str, Any], is_valid: bool) -> str:
    if not found:
        return DASH
    mark = "" if is_valid else f" {DOUBT}"
    return f"{found['median']:.2f} ({found['low']:.2f}–{found['high']:.2f}){mark}"


def _pictures(f: Findings) -> str:
    columns = {
        title: files
        for label, title in TITLES.items()
        if (files := _drawn(f.folder / "eval" / "images" / label))
    }
    if not columns:
        return ""
    captions = f.evaluation.get("captions") or ["" for _ in next(iter(columns.values()))]
    figures.image_grid(columns, captions, f.folder / "images" / "grid.png")
    return (
        "## Pictures\n\nThe same prompt and the same initial noise in each row.\n\n"
        f"![{words(', '.join(columns))}](images/grid.png)"
    )


def _drawn(folder: Path) -> list[Path]:
    return [path for path in files_in(folder) if path.suffix == ".png"]


def _removed(f: Findings) -> str:
    removed = sorted(f.plan.remove, key=network_order)
    units = [unit.name for unit in f.scores.units] if f.scores else []
    of_all = f" of {len(units)}" if units else ""
    text = f"## What was removed\n\n{len(removed)}{of_all} layers."
    predicted, measured = f.plan.predicted_loss, f.plan.measured_loss
    if predicted is not None or measured is not None:
        text += (
            f" Output loss: {number(predicted)} predicted (the sum of the layers' own), "
            f"{number(measured)} measured (all of them gone)."
        )
    if f.scores:
        figures.score_chart(f.scores.units, removed, f.folder / "images" / "scores")
    if (f.folder / "images" / "scores.svg").exists() and units:
        text += "\n\n![Output loss of each layer, in network order](images/scores.svg)"
    rows = []
    for block, names in groupby(removed, block_of):
        inside = [code(name.removeprefix(f"{block}.")) for name in names]
        total = sum(block_of(u) == block for u in units)
        rows.append(
            [code(block), f"{len(inside)}{f' of {total}' if total else ''}", " ".join(inside)]
        )
    return f"{text}\n\n{table(['block', 'removed', 'layers'], rows)}" if rows else text


def _distillation(f: Findings) -> str:
    if not f.losses:
        return ""
    figures.loss_curves(f.losses, f.folder / "images" / "losses")
    first, last = f.losses[0], f.losses[-1]
    terms = [t for t in ("loss", "task", "output", "feature") if last.get(t) is not None]
    rows = [[t, number(first.get(t)), number(last[t])] for t in terms]
    header = ["term", f"step {first['step']}", f"step {last['step']}"]
    text = (
        "## Distillation\n\nThe terms of the loss; faint: single steps.\n\n"
        f"![Task, output and feature loss by step](images/losses.svg)\n\n{table(header, rows)}"
    )
    if not all("norms" in row and row["features"] for row in f.losses):
        return text
    balance_chart({"this run": f.losses}, f.folder / "images" / "balance")
    place, most = largest_share(f.losses)
    return (
        f"{text}\n\nThe feature term by block: {code(place)} has the largest share, "
        f"{most:.0%} on average.\n\n"
        "![Feature norm and share of the feature loss by block](images/balance.svg)"
    )


def _quality(f: Findings) -> str:
    e = f.evaluation
    if not e:
        return ""
    keys = list(dict.fromkeys(k for row in e["models"] for k in row["accuracy"]))
    rows = [
        [
            words(TITLES.get(row["label"], row["label"])),
            share(row["prompt_accuracy"]),
            *(share(row["accuracy"].get(k)) for k in keys),
            str(row["black_or_nan"]),
        ]
        for row in e["models"]
    ]
    return (
        f"## Image quality\n\n{e['prompts']} prompts, {e['steps']} steps, "
        f"guidance {e['guidance']}, seed {e['seed']}. Fréchet distance in the space of "
        f"{words(e['feature_space'])}; "
        f"reference: {words(e['reference'])}.\n\n"
        f"{table(['model', 'whole prompt', *map(words, keys), 'black or NaN'], rows)}"
    )


def _parity(f: Findings) -> str:
    rows = [
        [
            words(r["target"]),
            words(r["component"]),
            words(r["precision"]),
            "identical" if r.get("identical") else number(r["psnr_db"], "dB", 4),
            number(r["floor_db"], "dB"),
            f"**{words(r['state'])}**" + (f": {words(r['reason'])}" if r.get("reason") else ""),
        ]
        for r in f.parity.get("results", [])
    ]
    if not rows:
        return ""
    header = ["target", "component", "precision", "PSNR", "floor", "state"]
    return (
        "## Parity\n\nEach artifact against PyTorch on inputs of a real sampling run; the worst "
        f"output counts.\n\n{table(header, rows)}"
    )
