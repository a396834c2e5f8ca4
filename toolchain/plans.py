"""The results of `laptop plan` as a JSON document and as text."""

import os
from pathlib import Path

from laptop.errors import OutputExists
from laptop.files import has_schema
from laptop.pruning import plan as planning
from laptop.pruning.plan_file import Menu, Plan
from laptop.pruning.scores import Additivity
from laptop.pruning.settings import PlanConfig
from laptop.records import Record

Printed = tuple[dict[str, object], str]  # what --json prints, and the text


def of_plan(path: Path, config: PlanConfig) -> Printed:
    """Describe a plan that was made from scores with these budgets."""
    plan = Plan.read(path)
    loss = f"; predicted loss {plan.predicted_loss:.3e}, measured {plan.measured_loss:.3e}"
    if ms := plan.latency_ms:
        loss += f"; predicted latency {ms.before:.2f} -> {ms.after:.2f} ms"
    text = _removal(plan, "layers", loss)
    if plan.unrestricted_predicted_loss is not None:
        text += (
            f"\nWithout --expressible {config.expressible}: predicted loss "
            f"{plan.unrestricted_predicted_loss:.3e}"
        )
    return plan.as_json(), text


def menu(scores: Path, config: PlanConfig, out: Path, *, overwrite: bool) -> Printed:
    """Make the best plan of every ratio, and a picture of them."""
    from laptop.benchmarks.report.figures import menu_chart  # matplotlib takes a second

    _need_charts(out, Menu)
    plans = Menu.read(planning.make_menu(scores, out, config, overwrite=overwrite))
    menu_chart(plans.points, out.with_suffix(""))
    lines = [f"{p.ratio:.3f}  {p.params:>13,}  {p.predicted_loss:.3e}" for p in plans.points]
    chart = f"Chart: {out.with_suffix('.svg')}"
    return plans.as_json(), "\n".join(["ratio     parameters  loss", *lines, chart])


def additivity(scores: Path, count: int, out: Path, seed: int, *, overwrite: bool) -> Printed:
    """Whether the losses of random sets of layers are the sums of their own, with a picture."""
    from laptop.benchmarks.report.figures import additivity_chart
    from laptop.pruning.additivity import make_additivity

    _need_charts(out, Additivity)
    report = Additivity.read(make_additivity(scores, out, count, seed=seed, overwrite=overwrite))
    additivity_chart(report, out.with_suffix(""))
    lines = []
    for name, row in {"all": report.all, **report.by_ratio}.items():
        values = (row.pearson_log, row.spearman, row.slope_log)
        cells = ("    -" if value is None else f"{value:5.2f}" for value in values)
        lines.append(f"{name:>5}  {'  '.join(cells)}")
    chart = f"Chart: {out.with_suffix('.svg')}"
    return report.as_json(), "\n".join(
        ["ratio  Pearson (logs), Spearman, slope (logs)", *lines, chart]
    )


def _need_charts(out: Path, kind: type[Record]) -> None:
    """Raise `OutputExists` where a chart would replace a file that `laptop plan` did not write."""
    from laptop.benchmarks.report.figures import THEMES

    for theme in THEMES:
        chart = out.with_name(f"{out.stem}{theme.suffix}.svg")
        if os.path.lexists(chart) and not has_schema(out, kind.SCHEMA):
            raise OutputExists(
                f"{chart} exists, where the chart would be written. Choose another -o."
            )


def from_preset(model: str, preset: str, out: Path, *, overwrite: bool) -> Printed:
    """Make the plan of a hand-made architecture."""
    from laptop.pruning.presets import make_preset_plan

    plan = Plan.read(make_preset_plan(model, preset, out, overwrite=overwrite))
    return plan.as_json(), _removal(plan, "modules", "")


def _removal(plan: Plan, what: str, loss: str) -> str:
    before, after = plan.params.before, plan.params.after
    return (
        f"Remove {len(plan.remove)} {what}: {before:,} -> {after:,} parameters "
        f"(ratio {1 - after / before:.3f}){loss}\n" + "\n".join(f"  {n}" for n in plan.remove)
    )
