"""What `laptop plan` makes, as a document and as text."""

import os
from pathlib import Path
from typing import Any

from laptop.errors import OutputExists
from laptop.files import has_schema, read_json
from laptop.pruning import plan as planning
from laptop.pruning.additivity import SCHEMA as ADDITIVITY_SCHEMA
from laptop.pruning.additivity import make_additivity
from laptop.pruning.presets import make_preset_plan
from laptop.pruning.settings import PlanConfig

Made = tuple[dict[str, Any], str]


def from_scores(scores: Path, config: PlanConfig, out: Path, *, overwrite: bool) -> Made:
    """The best plan under the budgets."""
    made = read_json(planning.make_plan(scores, out, config, overwrite=overwrite))
    loss = f"; predicted loss {made['predicted_loss']:.3e}, measured {made['measured_loss']:.3e}"
    if time := made.get("latency_ms"):
        loss += f"; predicted latency {time['before']:.2f} -> {time['after']:.2f} ms"
    text = _removal(made, "layers", loss)
    if "unrestricted_predicted_loss" in made:
        text += (
            f"\nWithout --expressible {made['budget']['expressible']}: predicted loss "
            f"{made['unrestricted_predicted_loss']:.3e}"
        )
    return made, text


def menu(scores: Path, config: PlanConfig, out: Path, *, overwrite: bool) -> Made:
    """The best plan of every ratio, with its picture beside it."""
    from laptop.benchmarks.report.figures import menu_chart  # matplotlib takes a second

    _need_charts(out, planning.MENU_SCHEMA)
    made = read_json(planning.make_menu(scores, out, config, overwrite=overwrite))
    menu_chart(made["points"], out.with_suffix(""))
    lines = [
        f"{p['ratio']:.3f}  {p['params']:>13,}  {p['predicted_loss']:.3e}" for p in made["points"]
    ]
    chart = f"Chart: {out.with_suffix('.svg')}"
    return made, "\n".join(["ratio     parameters  loss", *lines, chart])


def additivity(scores: Path, count: int, out: Path, seed: int, *, overwrite: bool) -> Made:
    """Whether the losses of random sets of layers are the sums of their own, with a picture."""
    from laptop.benchmarks.report.figures import additivity_chart

    _need_charts(out, ADDITIVITY_SCHEMA)
    made = read_json(make_additivity(scores, out, count, seed=seed, overwrite=overwrite))
    additivity_chart(made, out.with_suffix(""))
    rows = {"all": made["all"], **made["by_ratio"]}
    lines = [
        f"{name:>5}  " + "  ".join("    -" if v is None else f"{v:5.2f}" for v in row.values())
        for name, row in rows.items()
    ]
    chart = f"Chart: {out.with_suffix('.svg')}"
    return made, "\n".join(["ratio  Pearson (logs), Spearman, slope (logs)", *lines, chart])


def _need_charts(out: Path, schema: str) -> None:
    """Raise `OutputExists` where a chart would replace a file that `laptop plan` did not write."""
    from laptop.benchmarks.report.figures import THEMES

    for theme in THEMES:
        chart = out.with_name(f"{out.stem}{theme.suffix}.svg")
        if os.path.lexists(chart) and not has_schema(out, schema):
            raise OutputExists(f"{chart} exists, where the chart would lie. Choose another -o.")


def from_preset(model: str, preset: str, out: Path, *, overwrite: bool) -> Made:
    """The plan of a hand-made architecture."""
    made = read_json(make_preset_plan(model, preset, out, overwrite=overwrite))
    return made, _removal(made, "modules", "")


def _removal(made: dict[str, Any], what: str, loss: str) -> str:
    before, after = made["params"]["before"], made["params"]["after"]
    return (
        f"Remove {len(made['remove'])} {what}: {before:,} -> {after:,} parameters "
        f"(ratio {1 - after / before:.3f}){loss}\n" + "\n".join(f"  {n}" for n in made["remove"])
    )
