"""The report's figures: each in a light and a dark version, and the grid of pictures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from laptop.benchmarks.report.run_files import block_of, network_order
from laptop.distill.log_lines import LogLine
from laptop.pruning.plan_file import MenuPoint
from laptop.pruning.scores import Additivity, ScoredUnit

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
CELL = 256  # pixels: pictures of the grid are brought near this width
GAP = 12
GREY = (118, 128, 138)  # reads on white and on black
MOST_POINTS = 400  # of a curve, so that the file stays small
SMOOTHING = 0.03  # a curve is averaged over about this share of all steps


@dataclass(frozen=True)
class Theme:
    suffix: str
    ink: str
    grid: str
    kept: str
    removed: str
    curves: tuple[str, ...]


THEMES = (
    Theme("", "#3d444d", "#d8dee4", "#8aa9cf", "#d1495b", ("#1f6feb", "#d1495b", "#2a8a57")),
    Theme("-dark", "#c9d1d9", "#343b44", "#4a6a94", "#f0788a", ("#6cb0ff", "#f0788a", "#5cc98d")),
)


def _figure(theme: Theme, height: float) -> tuple[Figure, Axes]:
    figure, (axes,) = new_figure(theme, height, 1)
    return figure, axes


def new_figure(theme: Theme, height: float, rows: int) -> tuple[Figure, list[Axes]]:
    """A figure with `rows` plain axes, one below the other; `height` in inches."""
    figure = Figure(figsize=(7.2, height), layout="constrained")
    figure.patch.set_alpha(0)
    panels = [figure.add_subplot(rows, 1, i + 1) for i in range(rows)]
    for axes in panels:
        axes.patch.set_alpha(0)
        axes.tick_params(which="both", colors=theme.ink, labelsize=8, length=0)
        axes.grid(color=theme.grid, linewidth=0.6)
        axes.set_axisbelow(True)
        for spine in axes.spines.values():
            spine.set_visible(False)
    return figure, panels


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure; the same figure gives the same bytes."""
    with rc_context({"svg.hashsalt": "laptop"}):
        figure.savefig(path, metadata={"Date": None})


def short_block(name: str) -> str:
    """The block of a layer: `down_blocks.1` -> `down 1`."""
    return block_of(name).replace("_blocks.", " ").replace("_block", "")


def short_name(name: str) -> str:
    """`down_blocks.1.attentions.0.transformer_blocks.2.ff` -> `down 1 · attn 0.2 ff`."""
    section = short_block(name)
    parts = name.removeprefix(block_of(name)).split(".")
    numbers = [p for p in parts if p.isdigit()]
    kind = "attn" if "attentions" in name else "resnet"
    sublayer = "" if parts[-1].isdigit() else f" {parts[-1]}"
    return f"{section} · {kind} {'.'.join(numbers)}{sublayer}"


def menu_chart(points: Sequence[MenuPoint], stem: Path) -> None:
    """Parameters against predicted loss, log scale; writes `stem`.svg and `stem`-dark.svg."""
    shown = [p for p in points if p.predicted_loss > 0]
    for theme in THEMES:
        figure, axes = _figure(theme, 3.2)
        params = [p.params / 1e6 for p in shown]
        losses = [p.predicted_loss for p in shown]
        axes.plot(params, losses, color=theme.curves[0], linewidth=1.6, marker=".", markersize=4)
        axes.set_yscale("log")
        axes.invert_xaxis()
        axes.set_xlabel("U-Net parameters, million", color=theme.ink, fontsize=8)
        axes.set_ylabel("predicted output loss", color=theme.ink, fontsize=8)
        save_figure(figure, stem.with_name(f"{stem.name}{theme.suffix}.svg"))


def additivity_chart(report: Additivity, stem: Path) -> None:
    """Summed scores against joint output losses, a dot for each set of layers; light and dark."""
    ratios = sorted({row.ratio for row in report.sets})
    for theme in THEMES:
        figure, axes = _figure(theme, 3.6)
        for ratio, colour in zip(ratios, (*theme.curves, theme.kept), strict=False):
            rows = [row for row in report.sets if row.ratio == ratio and row.sum > 0]
            sums, joint = [row.sum for row in rows], [row.joint for row in rows]
            axes.scatter(sums, joint, s=14, color=colour, label=f"{ratio:.0%} removed")
        if report.criterion == "output-loss":  # in the same unit: they should be on this line
            ends = sorted(axes.get_xlim())
            axes.plot(ends, ends, color=theme.grid, linewidth=1.2, zorder=0)
        axes.set_xscale("log")
        axes.set_yscale("log")
        label = f"sum of the layers' own scores by {report.criterion}"
        axes.set_xlabel(label, color=theme.ink, fontsize=8)
        axes.set_ylabel("joint output loss", color=theme.ink, fontsize=8)
        _legend(axes, theme)
        save_figure(figure, stem.with_name(f"{stem.name}{theme.suffix}.svg"))


def rivals_chart(plans: Sequence[Mapping[str, Any]], stem: Path) -> None:
    """Joint output loss (log) by what chose the layers, a colour for each ratio; light and dark.

    A plan is {"by", "ratio", "loss"}; several plans by the same are all drawn.
    """
    ways = list(dict.fromkeys(plan["by"] for plan in plans))
    for theme in THEMES:
        figure, axes = _figure(theme, 0.9 + 0.24 * len(ways))
        for ratio, colour in zip(sorted({p["ratio"] for p in plans}), theme.curves, strict=False):
            shown = [p for p in plans if p["ratio"] == ratio]
            lines = [ways.index(p["by"]) for p in shown]
            losses = [p["loss"] for p in shown]
            axes.scatter(losses, lines, s=18, color=colour, label=f"{ratio:.0%} removed")
        axes.set_xscale("log")
        axes.set_yticks(range(len(ways)), ways)
        axes.invert_yaxis()
        axes.set_xlabel("joint output loss before retraining", color=theme.ink, fontsize=8)
        _legend(axes, theme)
        save_figure(figure, stem.with_name(f"{stem.name}{theme.suffix}.svg"))


def interval_chart(rows: Sequence[Mapping[str, Any]], stem: Path, label: str) -> None:
    """Means with their intervals, a line for each `by`, a colour for each ratio; light and dark.

    A row is {"by", "ratio", "mean", "low", "high"}.
    """
    ways, ratios = list(dict.fromkeys(r["by"] for r in rows)), sorted({r["ratio"] for r in rows})
    for theme in THEMES:
        figure, axes = _figure(theme, 0.9 + 0.36 * len(ways))
        for i, (ratio, colour) in enumerate(zip(ratios, theme.curves, strict=False)):
            shown = [r for r in rows if r["ratio"] == ratio]
            means = np.array([r["mean"] for r in shown])
            arms = np.abs(np.array([[r["low"], r["high"]] for r in shown]).T - means)
            apart = 0.22 * (i - (len(ratios) - 1) / 2)  # of a row, so that none hides another
            lines = [ways.index(r["by"]) + apart for r in shown]
            axes.errorbar(
                means, lines, xerr=arms, fmt="o", markersize=4, linewidth=1.4, color=colour,
                label=f"{ratio:.0%} removed",
            )  # fmt: skip
        axes.set_yticks(range(len(ways)), ways)
        axes.invert_yaxis()
        axes.set_xlabel(label, color=theme.ink, fontsize=8)
        _legend(axes, theme)
        save_figure(figure, stem.with_name(f"{stem.name}{theme.suffix}.svg"))


def score_chart(units: Sequence[ScoredUnit], removed: Sequence[str], stem: Path) -> None:
    """A bar for each unit in network order, log scale; writes `stem`.svg and `stem`-dark.svg."""
    ordered = sorted(units, key=lambda u: network_order(u.name))
    positive = [u.score for u in ordered if u.score > 0]
    if not positive:
        return
    floor = min(positive) / 2  # where bars start; a score of zero has no logarithm
    for theme in THEMES:
        figure, axes = _figure(theme, 0.9 + 0.17 * len(ordered))
        widths = [max(u.score, floor) - floor for u in ordered]
        colours = [theme.removed if u.name in removed else theme.kept for u in ordered]
        axes.barh(range(len(ordered)), widths, left=floor, color=colours, height=0.72)
        axes.set_xscale("log")
        axes.set_yticks(range(len(ordered)), [short_name(u.name) for u in ordered])
        axes.tick_params(axis="y", labelsize=7)
        axes.set_ylim(len(ordered) - 0.4, -0.6)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("output loss when this layer alone is removed", color=theme.ink, fontsize=8)
        _part_blocks(axes, [u.name for u in ordered], theme)
        kinds = {"removed": theme.removed, "kept": theme.kept}
        _legend(axes, theme, handles=[Patch(color=c, label=k) for k, c in kinds.items()])
        save_figure(figure, Path(f"{stem}{theme.suffix}.svg"))


def _part_blocks(axes: Axes, names: Sequence[str], theme: Theme) -> None:
    for i in range(1, len(names)):
        if block_of(names[i]) != block_of(names[i - 1]):
            axes.axhline(i - 0.5, color=theme.grid, linewidth=0.9)


def _legend(axes: Axes, theme: Theme, handles: Sequence[Patch] | None = None) -> None:
    axes.legend(
        loc="lower right", bbox_to_anchor=(1, 1), ncols=3, frameon=False, fontsize=8,
        labelcolor=theme.ink, handles=handles,
    )  # fmt: skip


def loss_curves(lines: Sequence[LogLine], stem: Path) -> None:
    """The terms of the distillation loss by step, log y; raw values faint behind their average."""
    values_of = {
        "task": [(line.step, line.task or 0) for line in lines],
        "output": [(line.step, line.output or 0) for line in lines],
        "feature": [(line.step, line.feature or 0) for line in lines],
    }
    curves = {term: [p for p in points if p[1] > 0] for term, points in values_of.items()}
    curves = {term: points for term, points in curves.items() if points}
    if not curves:
        return
    for theme in THEMES:
        figure, axes = _figure(theme, 3.4)
        for (term, points), colour in zip(curves.items(), theme.curves, strict=False):
            steps, values = np.array(points).T
            every = max(1, len(values) // MOST_POINTS)
            axes.plot(steps[::every], values[::every], color=colour, alpha=0.22, linewidth=0.7)
            smooth = _smooth(values)
            axes.plot(steps[::every], smooth[::every], color=colour, linewidth=1.6, label=term)
        axes.set_yscale("log")
        axes.set_xlabel("step", color=theme.ink, fontsize=8)
        _legend(axes, theme)
        save_figure(figure, Path(f"{stem}{theme.suffix}.svg"))


def _smooth(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """A running mean of the logarithms, over fewer values at the ends."""
    width = max(1, round(SMOOTHING * len(values)))
    ones = np.convolve(np.ones(len(values)), np.ones(width), "same")
    mean = np.convolve(np.log(values), np.ones(width), "same") / ones
    return np.asarray(np.exp(mean))


def image_grid(columns: Mapping[str, Sequence[Path]], captions: Sequence[str], path: Path) -> None:
    """Pictures of the same noise side by side, a row for each prompt, whose text is above it.

    `columns` maps a title to that model's pictures. Small pictures are enlarged without smoothing,
    so that every pixel is seen as it is. The background is transparent.
    """
    count = min(len(files) for files in columns.values())
    font = ImageFont.load_default(17)
    line = 30
    width = len(columns) * (CELL + GAP) - GAP + 1  # the last edge
    grid = Image.new("RGBA", (width, line + count * (CELL + line + GAP)))
    pen = ImageDraw.Draw(grid)
    for x, (title, files) in enumerate(columns.items()):
        left = x * (CELL + GAP)
        pen.text((left, 4), title, GREY, font)
        for y, file in enumerate(files[:count]):
            with Image.open(file) as picture:
                cell = _fit(picture.convert("RGB"))
            top = line + y * (CELL + line + GAP) + line
            grid.paste(cell, (left, top))
            edge = (left - 1, top - 1, left + cell.width, top + cell.height)
            pen.rectangle(edge, outline=(*GREY, 90))  # or a white picture has no edge on white
    for y, caption in enumerate(captions[:count]):
        pen.text((0, line + y * (CELL + line + GAP) + 4), _cut(caption, font, width), GREY, font)
    grid.save(path, optimize=True)


def _fit(picture: Image.Image) -> Image.Image:
    """Fit a picture into CELL x CELL: enlarged by a whole factor, or reduced with smoothing."""
    side = max(picture.size)
    if side <= CELL:
        factor = CELL // side
        size = (picture.width * factor, picture.height * factor)
        return picture.resize(size, Image.Resampling.NEAREST)
    size = (picture.width * CELL // side, picture.height * CELL // side)
    return picture.resize(size, Image.Resampling.LANCZOS)


def _cut(text: str, font: Font, width: int) -> str:
    while font.getlength(text) > width:
        text = text[:-2].rstrip() + "…"
    return text
