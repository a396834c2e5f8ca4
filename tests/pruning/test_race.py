"""Racing: fewer samples, the same plan."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from laptop.errors import BadInput
from laptop.pruning.knapsack import solve
from laptop.pruning.ledger import replay, undecided
from laptop.pruning.plan import make_plan
from laptop.pruning.score import score
from laptop.pruning.scores import Unit
from laptop.pruning.settings import PlanConfig, ScoreConfig

PROMPTS = ["a large red circle on white", "a small blue cross on black"]


def drawn(seed: int, rows: int = 128) -> tuple[list[Unit], np.ndarray]:
    """Units with losses over many decades; rows have common factors and long tails."""
    rng = np.random.default_rng(seed)
    units = [Unit(f"u{i}", "resnet", int(p), 1) for i, p in enumerate(rng.integers(20, 130, 40))]
    level = 10 ** rng.uniform(-6, -1, (40, 1))
    return units, level * rng.lognormal(0, 1, (1, rows)) * rng.lognormal(0, 0.5, (40, rows))


def plan(units: list[Unit], means: np.ndarray, least: float) -> set[int]:
    return set(solve(means.tolist(), [([u.params for u in units], least)]))


def test_a_race_spends_less_and_finds_nearly_the_same_plan() -> None:
    same, spent = 0, []
    for seed in range(10):
        units, values = drawn(seed)
        least = 0.5 * sum(u.params for u in units)
        seen = replay(units, values, least, 8)
        wanted = plan(units, values.mean(1), least)
        found = plan(units, np.nanmean(seen, axis=1), least)
        same += found == wanted
        spent.append(1 - np.isnan(seen).mean())
        true = values.mean(1)
        assert true[list(found)].sum() <= 1.1 * true[list(wanted)].sum()
    assert same >= 8
    assert np.mean(spent) < 1 / 3


def test_nobody_is_decided_on_a_few_rows_or_when_it_is_close() -> None:
    units, values = drawn(0)
    assert undecided(units, values[:, :4], 100.0).all()
    twins = [Unit("a", "resnet", 10, 1), Unit("b", "resnet", 10, 1), Unit("c", "resnet", 10, 1)]
    rng = np.random.default_rng(0)
    close = np.stack([rng.lognormal(0, 1, 16), rng.lognormal(0, 1, 16), np.full(16, 1e3)])
    assert undecided(twins, close, 10.0).tolist() == [True, True, False]
    assert not undecided(twins, np.stack([close[0], 1e3 * close[1], close[2]]), 8.0).any()


def test_a_raced_score_plans_its_own_ratio_only(tiny_folder, tmp_path) -> None:
    config = ScoreConfig(samples=48, steps=12, batch_size=48, race=0.5)
    out = score(str(tiny_folder), tmp_path / "raced", config, PROMPTS)
    document = json.loads((out / "scores.json").read_text())
    spared = np.isnan(load_file(out / "values.safetensors")["values"])
    assert spared.any()
    assert not spared[:, :8].any()
    assert (np.diff(spared.astype(int), axis=1) >= 0).all(), "who is decided stays so"
    assert document["forwards"]["spent"] < document["forwards"]["naive"] / 2
    make_plan(out, tmp_path / "plan.json", PlanConfig(ratio=0.5))
    with pytest.raises(BadInput, match=r"race for --ratio 0\.5"):
        make_plan(out, tmp_path / "other.json", PlanConfig(ratio=0.3))
