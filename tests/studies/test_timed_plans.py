"""Plans timed as a latency table was: predictions of it, and budgets of time, on a tiny model."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from laptop.benchmarks.settings import BenchConfig
from laptop.cli import main
from laptop.errors import BadInput
from laptop.models import loading
from laptop.pruning.additivity import random_set
from laptop.pruning.units import anatomy_of
from laptop.studies import latency_budget
from laptop.studies import latency_prediction as prediction
from laptop.studies.timed_plans import read_table

FEW = BenchConfig(threads=1, rounds=2, iterations=2, seconds=0.0, warmup_s=0.0)


@pytest.fixture(scope="module")
def scored(small_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with scores and a table of the tiny model, both of few samples."""
    folder = tmp_path_factory.mktemp("scored")
    (folder / "few.toml").write_text(
        "[score]\nsamples = 2\nsteps = 2\n[prompts]\ncalibration = 1\n"
        "[bench]\nrounds = 2\niterations = 2\nseconds = 0.0\nwarmup_s = 0.0\nthreads = 1\n"
    )
    for command in (
        ["score", "--model", str(small_folder), "-o", str(folder / "scores")],
        ["bench", str(small_folder), "--layers", "--allow-invalid", "-o", str(folder / "t.json")],
    ):
        done = CliRunner().invoke(main, [*command, "-c", str(folder / "few.toml")])
        assert done.exit_code == 0, done.output
    return folder


def test_a_random_plan_reaches_its_ratio_and_takes_along_what_a_layer_needs() -> None:
    anatomy = anatomy_of(loading.empty_unet("tiny-sdxl"), granularity="fine")
    units = {unit.name: unit for unit in anatomy.units}
    for seed in range(5):
        gone = random_set(anatomy.units, 0.4 * anatomy.params, seed, with_shells=True)
        assert sum(units[name].params for name in gone) >= 0.4 * anatomy.params
        assert all(set(units[name].needs) <= set(gone) for name in gone)


@pytest.mark.long
def test_plans_are_predicted_and_measured_and_a_killed_call_goes_on(
    scored: Path, small_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table, out = read_table(scored / "t.json"), tmp_path / "prediction.json"
    results = prediction.predict(str(small_folder), table, out, 2, FEW)
    for row in results.rows:
        left = table.unet_ms.p50 - sum(table.times_ms[name] for name in row.remove)
        assert row.predicted_ms == pytest.approx(left)
        assert row.error == pytest.approx(row.predicted_ms / row.measured_ms - 1)
    assert results.valid == 0, "two samples are too few"
    replace(results, rows=results.rows[:1]).write(out)
    timed: list[Sequence[str]] = []

    def second(_model: str, remove: Sequence[str], *_: object) -> prediction.PredictedPlan:
        timed.append(tuple(remove))
        return results.rows[1]

    monkeypatch.setattr(prediction, "time_plan", second)
    assert prediction.predict(str(small_folder), table, out, 2, FEW).rows == results.rows
    assert timed == [results.rows[1].remove], "the first one is not timed again"
    with pytest.raises(BadInput, match="another table or with other settings"):
        prediction.predict(str(small_folder), table, out, 3, FEW)
    prediction.prediction_chart([results], tmp_path / "figure")
    assert "<svg" in (tmp_path / "figure.svg").read_text()


@pytest.mark.long
def test_budgets_of_time_and_parameters_are_measured_beside_each_other(
    scored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "budget.json"
    command = ["x", str(scored / "scores"), str(scored / "t.json"), "-o", str(out)]
    few = ["--ratios", "0.3", "--rounds", "1", "--seconds", "0"]
    monkeypatch.setattr(sys, "argv", [*command, *few])
    latency_budget.main()
    (row,) = latency_budget.BudgetResults.read(out).rows
    assert row.plans["time"].predicted_ms <= row.plans["params"].predicted_ms + 1e-6
    assert row.time_over_params.median > 0
    monkeypatch.setattr(sys, "argv", [*command, *few, "--rounds", "2"])
    with pytest.raises(BadInput, match="Remove it"):
        latency_budget.main()
