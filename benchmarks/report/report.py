"""The report of a run: report.md, report.html (self-contained, the same text) and images/.

Numbers come from the run's files only; one that was not measured is a dash.
"""

from collections.abc import Mapping
from itertools import groupby
from pathlib import Path

from laptop.benchmarks.bench_report import RatioRow
from laptop.benchmarks.report import figures, page
from laptop.benchmarks.report.balance import balance_chart, largest_share
from laptop.benchmarks.report.latency_section import latency_section
from laptop.benchmarks.report.provenance import loading, making
from laptop.benchmarks.report.run_files import (
    TITLES,
    Measures,
    RunFiles,
    block_of,
    measures,
    network_order,
    ratio,
    read_run,
    setups,
)
from laptop.benchmarks.report.text import DASH, code, number, percent, scaled, table, words
from laptop.distill.log_lines import TERMS
from laptop.files import files_in, inside, write_text

DOUBT = "†"  # marks numbers from a bench row that is not valid


def write_report(run: Path) -> Path:
    """Write report.md, report.html and images/ into the run folder; returns the HTML's path.

    Sections whose stage has not run are left out. Raises `BadInput` for a folder without a plan.
    """
    files = read_run(run)
    inside(run, "images", "a report").mkdir(exist_ok=True)
    for path in (run / "images").iterdir():
        if path.is_symlink():
            path.unlink()  # or a figure would be written to the link's target
    markdown = "\n\n".join(part for part in _parts(files) if part) + "\n"
    for name, text in (("report.md", markdown), ("report.html", page.render(markdown, run))):
        write_text(run / name, text)
    return run / "report.html"


def _parts(run: RunFiles) -> list[str]:
    columns = {label: measures(run, label) for label in TITLES}
    return [
        f"# {words(run.model)}, pruned and distilled",
        f"> {headline(columns)}",
        result_table(run, columns),
        _pictures(run),
        _removed(run),
        _distillation(run),
        latency_section(run),
        _quality(run),
        _parity(run),
        loading(run),
        making(run),
    ]


def headline(columns: Mapping[str, Measures]) -> str:
    """The main numbers that were measured, in a sentence or two."""
    teacher, pruned, student = (columns[label] for label in TITLES)
    parts = []
    if teacher.params and student.params:
        gone = 1 - student.params / teacher.params
        parts.append(
            f"The U-Net went from {scaled(teacher.params)} to **{scaled(student.params)} "
            f"parameters** ({percent(gone)} removed)"
        )
    for setup, over_teacher in student.ratio.items():
        if over_teacher:
            doubt = "" if student.is_valid[setup] else " (measurement not valid, see Latency)"
            parts.append(
                f"a call takes **{over_teacher:.2f} × the teacher's time** in "
                f"{words(setup.title)}{doubt}"
            )
    text = ("; ".join(parts) or "Nothing was measured yet") + "."
    if student.prompt_accuracy is not None and teacher.prompt_accuracy:
        kept = student.prompt_accuracy / teacher.prompt_accuracy
        text += (
            f" The distilled student's prompt accuracy is **{percent(student.prompt_accuracy)}**, "
            f"{percent(kept)} of the teacher's {percent(teacher.prompt_accuracy)}"
        )
        if pruned.prompt_accuracy is not None:
            text += f"; without distillation it is {percent(pruned.prompt_accuracy)}"
        text += "."
    return text


def result_table(run: RunFiles, columns: Mapping[str, Measures]) -> str:
    """The three models, a column each."""
    models = list(columns.values())
    rows = [
        ["U-Net parameters", *(scaled(m.params) for m in models)],
        ["MACs of a U-Net call", *(scaled(m.macs) for m in models)],
        ["U-Net weights on disk", *(scaled(m.size_bytes, "B") for m in models)],
    ]
    for setup in setups(run):
        title = words(setup.title)
        rows.append([f"{title}, p50", *(number(m.p50_ms[setup], "ms") for m in models)])
        cells = [_cell(ratio(run, label, setup), m.is_valid[setup]) for label, m in columns.items()]
        rows.append([f"{title}, × teacher", *cells])
    rows += [
        ["Prompt accuracy", *(percent(m.prompt_accuracy) for m in models)],
        ["Fréchet distance", *(number(m.frechet) for m in models)],
        ["PSNR to the teacher's picture", *(number(m.psnr_to_teacher_db, "dB") for m in models)],
    ]
    notes = f"*{DASH} not measured in this run.*"
    if not all(all(m.is_valid.values()) for m in models):
        notes += f" *{DOUBT} not a valid measurement: the reason stands under Latency.*"
    return f"{table(['', *TITLES.values()], rows)}\n\n{notes}"


def _cell(row: RatioRow | None, is_valid: bool) -> str:
    if row is None:
        return DASH
    mark = "" if is_valid else f" {DOUBT}"
    return f"{row.median:.2f} ({row.low:.2f}–{row.high:.2f}){mark}"


def _pictures(run: RunFiles) -> str:
    columns = {
        title: files
        for label, title in TITLES.items()
        if (files := _drawn(run.folder / "eval" / "images" / label))
    }
    if not columns:
        return ""
    captions = run.evaluation.captions if run.evaluation else ()
    captions = captions or ("",) * len(next(iter(columns.values())))
    figures.image_grid(columns, captions, run.folder / "images" / "grid.png")
    return (
        "## Pictures\n\nThe same prompt and the same initial noise in each row.\n\n"
        f"![{words(', '.join(columns))}](images/grid.png)"
    )


def _drawn(folder: Path) -> list[Path]:
    return [path for path in files_in(folder) if path.suffix == ".png"]


def _removed(run: RunFiles) -> str:
    removed = sorted(run.plan.remove, key=network_order)
    units = run.scores.units if run.scores else ()
    of_all = f" of {len(units)}" if units else ""
    text = f"## What was removed\n\n{len(removed)}{of_all} layers."
    predicted, measured = run.plan.predicted_loss, run.plan.measured_loss
    if predicted is not None or measured is not None:
        text += (
            f" Output loss: {number(predicted)} predicted (the sum of the layers' own), "
            f"{number(measured)} measured (all of them gone)."
        )
    if units:
        figures.score_chart(units, removed, run.folder / "images" / "scores")
    if (run.folder / "images" / "scores.svg").exists() and units:
        text += "\n\n![Output loss of each layer, in network order](images/scores.svg)"
    rows = []
    for block, names in groupby(removed, block_of):
        inside = [code(name.removeprefix(f"{block}.")) for name in names]
        total = sum(block_of(unit.name) == block for unit in units)
        rows.append(
            [code(block), f"{len(inside)}{f' of {total}' if total else ''}", " ".join(inside)]
        )
    return f"{text}\n\n{table(['block', 'removed', 'layers'], rows)}" if rows else text


def _distillation(run: RunFiles) -> str:
    if not run.losses:
        return ""
    figures.loss_curves(run.losses, run.folder / "images" / "losses")
    first, last = run.losses[0], run.losses[-1]
    values = {term: (getattr(first, term), getattr(last, term)) for term in TERMS}
    rows = [[term, *map(number, pair)] for term, pair in values.items() if pair[1] is not None]
    header = ["term", f"step {first.step}", f"step {last.step}"]
    text = (
        "## Distillation\n\nThe terms of the loss; faint: single steps.\n\n"
        f"![Task, output and feature loss by step](images/losses.svg)\n\n{table(header, rows)}"
    )
    if not all(line.norms and line.features for line in run.losses):
        return text
    balance_chart({"this run": run.losses}, run.folder / "images" / "balance")
    module, most = largest_share(run.losses)
    return (
        f"{text}\n\nThe feature term by block: {code(module)} has the largest share, "
        f"{most:.0%} on average.\n\n"
        "![Feature norm and share of the feature loss by block](images/balance.svg)"
    )


def _quality(run: RunFiles) -> str:
    report = run.evaluation
    if report is None:
        return ""
    keys = list(dict.fromkeys(key for model in report.models for key in model.accuracy))
    rows = [
        [
            words(TITLES.get(model.label, model.label)),
            percent(model.prompt_accuracy),
            *(percent(model.accuracy.get(key)) for key in keys),
            str(model.black_or_nan),
        ]
        for model in report.models
    ]
    return (
        f"## Image quality\n\n{report.prompts} prompts, {report.steps} steps, "
        f"guidance {report.guidance}, seed {report.seed}. Fréchet distance in the space of "
        f"{words(report.feature_space)}; "
        f"reference: {words(report.reference)}.\n\n"
        f"{table(['model', 'whole prompt', *map(words, keys), 'black or NaN'], rows)}"
    )


def _parity(run: RunFiles) -> str:
    rows = [
        [
            words(r.target),
            words(r.component),
            words(r.precision),
            "identical" if r.identical else number(r.psnr_db, "dB", 4),
            number(r.floor_db, "dB"),
            f"**{words(r.state)}**" + (f": {words(r.reason)}" if r.reason else ""),
        ]
        for r in run.parity
    ]
    if not rows:
        return ""
    header = ["target", "component", "precision", "PSNR", "floor", "state"]
    return (
        "## Parity\n\nEach artifact against PyTorch on inputs of a real sampling run; the worst "
        f"output counts.\n\n{table(header, rows)}"
    )
