"""The balance of feature distillation: the share of each block in the loss (paper, 3.3)."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from numpy.typing import NDArray

from laptop.benchmarks.report.figures import THEMES, Theme, new_figure, save_figure, short_block
from laptop.distill.log_lines import LogLine

MOST_STEPS = 300  # of an area, so that the file stays small


def loss_shares(lines: Sequence[LogLine]) -> dict[str, list[float]]:
    """Each module's share of the feature loss, by logged step."""
    features = [line.features or {} for line in lines]
    totals = [sum(values.values()) or 1.0 for values in features]
    return {
        module: [values[module] / total for values, total in zip(features, totals, strict=True)]
        for module in features[0]
    }


def largest_share(lines: Sequence[LogLine]) -> tuple[str, float]:
    """The module with the largest mean share of the feature loss, and that share."""
    means = {module: float(np.mean(values)) for module, values in loss_shares(lines).items()}
    module = max(means, key=means.__getitem__)
    return module, means[module]


def balance_chart(runs: Mapping[str, Sequence[LogLine]], stem: Path) -> None:
    """The teacher's feature norm by block; below, each block's share of the loss over training.

    `runs` maps a title, such as "alpha = 1", to the metrics of a run. Writes `stem`.svg and
    `stem`-dark.svg.
    """
    runs = {k: lines[:: max(1, len(lines) // MOST_STEPS)] for k, lines in runs.items()}
    by_line = [line.norms or {} for line in next(iter(runs.values()))]
    modules = list(by_line[0])
    norms = [float(np.mean([values[module] for values in by_line])) for module in modules]
    for theme in THEMES:
        figure, axes = new_figure(theme, 1.6 + 1.8 * len(runs), 1 + len(runs))
        colours = colormaps["viridis"](np.linspace(0.05, 0.95, len(modules)))
        axes[0].bar([short_block(module) for module in modules], norms, color=colours, width=0.7)
        axes[0].grid(visible=False, axis="x")
        axes[0].set_title(
            "root mean square of the teacher's features", color=theme.ink, fontsize=9, loc="left"
        )
        for ax, (title, lines) in zip(axes[1:], runs.items(), strict=True):
            _areas(ax, lines, title, colours, theme)
        axes[-1].set_xlabel("step", color=theme.ink, fontsize=8)
        save_figure(figure, stem.with_name(f"{stem.name}{theme.suffix}.svg"))


def _areas(
    axes: Axes, lines: Sequence[LogLine], title: str, colours: NDArray[np.float64], theme: Theme
) -> None:
    steps = [line.step for line in lines]
    axes.stackplot(steps, *loss_shares(lines).values(), colors=colours, linewidth=0)
    axes.set_xlim(steps[0], steps[-1])
    axes.set_ylim(0, 1)
    axes.set_title(
        f"share of the feature loss by block: {title}", color=theme.ink, fontsize=9, loc="left"
    )
