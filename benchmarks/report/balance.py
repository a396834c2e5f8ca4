"""The imbalance of feature distillation, and its cure: which block rules the loss (paper, 3.3)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes

from laptop.benchmarks.report.figures import THEMES, Theme, new_figure, save_figure, short_block

MOST_STEPS = 300  # of an area, so that the file stays small
Rows = Sequence[Mapping[str, Any]]  # lines of a metrics.jsonl


def shares(rows: Rows) -> dict[str, list[float]]:
    """Each place's share of the feature loss, by logged step."""
    totals = [sum(row["features"].values()) or 1.0 for row in rows]
    return {
        place: [row["features"][place] / total for row, total in zip(rows, totals, strict=True)]
        for place in rows[0]["features"]
    }


def largest_share(rows: Rows) -> tuple[str, float]:
    """The place with the largest mean share of the feature loss, and that share."""
    means = {place: float(np.mean(values)) for place, values in shares(rows).items()}
    place = max(means, key=means.__getitem__)
    return place, means[place]


def balance_chart(runs: Mapping[str, Rows], stem: Path) -> None:
    """The teacher's feature norm by block; below, each block's share of the loss over training.

    `runs` maps a title, such as "alpha = 1", to the metrics of a run. Writes `stem`.svg and
    `stem`-dark.svg.
    """
    runs = {k: rows[:: max(1, len(rows) // MOST_STEPS)] for k, rows in runs.items()}
    first = next(iter(runs.values()))
    places = list(first[0]["norms"])
    norms = [float(np.mean([row["norms"][place] for row in first])) for place in places]
    for theme in THEMES:
        figure, axes = new_figure(theme, 1.6 + 1.8 * len(runs), 1 + len(runs))
        colours = colormaps["viridis"](np.linspace(0.05, 0.95, len(places)))
        axes[0].bar([short_block(p) for p in places], norms, color=colours, width=0.7)
        axes[0].grid(visible=False, axis="x")
        axes[0].set_title(
            "root mean square of the teacher's features", color=theme.ink, fontsize=9, loc="left"
        )
        for ax, (title, rows) in zip(axes[1:], runs.items(), strict=True):
            _areas(ax, rows, title, colours, theme)
        axes[-1].set_xlabel("step", color=theme.ink, fontsize=8)
        save_figure(figure, stem.with_name(f"{stem.name}{theme.suffix}.svg"))


def _areas(axes: Axes, rows: Rows, title: str, colours: Any, theme: Theme) -> None:
    steps = [row["step"] for row in rows]
    axes.stackplot(steps, *shares(rows).values(), colors=colours, linewidth=0)
    axes.set_xlim(steps[0], steps[-1])
    axes.set_ylim(0, 1)
    axes.set_title(
        f"share of the feature loss by block: {title}", color=theme.ink, fontsize=9, loc="left"
    )
