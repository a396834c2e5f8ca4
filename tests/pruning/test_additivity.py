"""The additivity report: joint losses are those of plain removal, and agreement is what it says."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from laptop.cli import main
from laptop.errors import BadInput
from laptop.models import loading
from laptop.pruning.additivity import RATIOS, agreement, make_additivity, random_sets
from laptop.pruning.calibration import Calibration
from laptop.pruning.plan import make_plan
from laptop.pruning.score import score
from laptop.pruning.scores import Additivity, Agreement, LayerSet, Scores
from laptop.pruning.settings import PlanConfig, ScoreConfig
from support.unets import output_loss

CONFIG = ScoreConfig(granularity="coarse", samples=4, steps=2, batch_size=3)
PROMPTS = ["a large red circle on white", "a small blue cross on black"]


@pytest.fixture(scope="module")
def scores(tiny_folder, tmp_path_factory):
    return score(str(tiny_folder), tmp_path_factory.mktemp("scores") / "s", CONFIG, PROMPTS)


def sets(sums: list[float], joint: list[float]) -> list[LayerSet]:
    pairs = zip(sums, joint, strict=True)
    return [LayerSet(ratio=0.5, remove=(), sum=s, joint=j) for s, j in pairs]


def test_sums_that_are_the_joint_losses_agree_wholly() -> None:
    joint = np.geomspace(1e-6, 1e-1, 9).tolist()
    perfect = {"pearson_log": 1, "spearman": 1, "slope_log": 1}
    assert vars(agreement(sets(joint, joint))) == pytest.approx(perfect)
    assert agreement(sets([j**0.5 for j in joint], joint)).slope_log == pytest.approx(2)
    assert agreement(sets(joint[::-1], joint)).spearman == pytest.approx(-1)


def test_there_is_no_agreement_where_nothing_can_be_said() -> None:
    assert agreement(sets([1.0, 2.0], [1.0, 2.0])) == Agreement()
    assert agreement(sets([1.0] * 5, [1.0, 2.0, 3.0, 4.0, 5.0])) == Agreement()
    assert agreement(sets([-1.0, -2.0, 0.0], [1.0, 2.0, 3.0])) == Agreement()


def test_random_sets_reach_their_ratio_and_are_not_alike(scores) -> None:
    scored = Scores.read(scores)
    chosen = random_sets(scored, 5)
    assert {ratio for ratio, _ in chosen} == set(RATIOS)
    params = {unit.name: unit.params for unit in scored.units}
    for ratio, names in chosen:
        gone = sum(params[n] for n in names)
        assert gone >= ratio * scored.base.params > gone - params[names[-1]]
    assert len({frozenset(names) for _, names in chosen}) > 15


def test_a_report_holds_every_set_with_its_sum_and_its_joint_loss(
    scores, tiny_folder, tmp_path
) -> None:
    report = Additivity.read(make_additivity(scores, tmp_path / "a.json", 3))
    unet, scored = loading.load_unet(str(tiny_folder)), Scores.read(scores)
    samples = Calibration.read(scores / "calibration.safetensors")
    for row in report.sets[::4]:
        assert row.sum == pytest.approx(scored.predicted_loss(row.remove))
        plain = output_loss(unet, row.remove, samples)
        assert row.joint == pytest.approx(plain, rel=1e-4)
    assert set(report.by_ratio) == {str(r) for r in RATIOS}


def test_the_command_writes_report_and_picture(scores, tmp_path) -> None:
    out = tmp_path / "a.json"
    args = ["plan", str(scores), "--additivity", "3", "-o", str(out)]
    result = CliRunner().invoke(main, args)
    assert result.exit_code == 0, result.output
    assert "Pearson" in result.stdout
    assert out.with_suffix(".svg").read_text().startswith("<?xml")
    wrong = CliRunner().invoke(main, [*args, "--ratio", "0.5"])
    assert wrong.exit_code == 2
    assert "--ratio with --additivity" in wrong.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update(output=t["output"] + 1), "another model: the output"),
        (lambda t: t.update(output=t["output"] * float("nan")), "finite"),
        (lambda t: t.update(sample=t["sample"][:, :3]), "another model: channels"),
        (lambda t: t.pop("timestep"), "timestep"),
        (lambda t: t.update(sample=t["sample"][:2]), "rows by tensor"),
        (lambda t: t.update({k: v[:0] for k, v in t.items()}), "rows by tensor"),
    ],
)
def test_losses_are_measured_on_the_scored_models_own_samples_only(
    scores, tmp_path, change, message
) -> None:
    folder = Path(shutil.copytree(scores, tmp_path / "s"))
    tensors = load_file(folder / "calibration.safetensors")
    change(tensors)
    whole = {k: v.contiguous() for k, v in tensors.items()}
    save_file(whole, folder / "calibration.safetensors")
    with pytest.raises(BadInput, match=message):
        make_additivity(folder, tmp_path / "a.json", 3)
    with pytest.raises(BadInput, match=message):
        make_plan(folder, tmp_path / "p.json", PlanConfig(ratio=0.3))


@pytest.mark.parametrize(
    ("key", "value"),
    [("dtype", "foo"), ("batch_size", 0), ("batch_size", "a"), ("model", 3), ("race", "x"),
     ("base", {"params": 1.5, "macs": 1})],
)  # fmt: skip
def test_scores_with_values_of_the_wrong_kind_are_broken(scores, tmp_path, key, value) -> None:
    folder = Path(shutil.copytree(scores, tmp_path / "s"))
    document = json.loads((folder / "scores.json").read_text())
    (folder / "scores.json").write_text(json.dumps(document | {key: value}))
    with pytest.raises(BadInput, match=rf"scores.json: {key}\b"):
        make_plan(folder, tmp_path / "p.json", PlanConfig(ratio=0.3))


def test_scores_of_a_race_do_not_show_whether_losses_add_up(scores, tmp_path) -> None:
    folder = Path(shutil.copytree(scores, tmp_path / "s"))
    document = json.loads((folder / "scores.json").read_text())
    (folder / "scores.json").write_text(json.dumps(document | {"race": 0.5}))
    with pytest.raises(BadInput, match="of a race"):
        make_additivity(folder, tmp_path / "a.json", 3)
