"""Two processes score what one scores."""

import json
import subprocess
import sys

import pytest
from click.testing import CliRunner

from laptop import processes
from laptop.cli import main
from laptop.errors import BadInput
from laptop.pruning.score import score
from laptop.pruning.settings import ScoreConfig

LAUNCH = [
    sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
]  # fmt: skip
PROMPTS = ["a large red circle on white", "a small blue cross on black"]


def test_two_processes_split_the_units_and_give_the_same_scores(small_folder, tmp_path) -> None:
    prompts, recipe = tmp_path / "prompts.txt", tmp_path / "r.toml"
    prompts.write_text("\n".join(PROMPTS))
    recipe.write_text("[score]\nsamples = 4\nsteps = 2\n[prompts]\ncalibration = 2\n")
    command = [*LAUNCH, "-m", "laptop", "score", "--model", str(small_folder), "--json"]
    command += ["--prompts", str(prompts), "-c", str(recipe), "-o", str(tmp_path / "two")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)  # the main process alone prints

    alone = score(str(small_folder), tmp_path / "one", ScoreConfig(samples=4, steps=2), PROMPTS)
    wanted = json.loads((alone / "scores.json").read_text())
    assert [u["name"] for u in found["units"]] == [u["name"] for u in wanted["units"]]
    for a, b in zip(found["units"], wanted["units"], strict=True):
        assert a["score"] == pytest.approx(b["score"], rel=1e-4, abs=1e-12), a["name"]

    again = CliRunner().invoke(main, command[command.index("score") :])
    assert again.exit_code == 0, again.output
    assert "up to date" in again.stderr


def test_a_race_of_several_processes_is_refused(small_folder, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(processes, "count", lambda: 2)
    config = ScoreConfig(samples=4, steps=2, race=0.5)
    with pytest.raises(BadInput, match="a race runs in one process"):
        score(str(small_folder), tmp_path / "s", config, PROMPTS)


def test_every_item_is_one_process_to_do(monkeypatch) -> None:
    shares = []
    monkeypatch.setattr(processes, "count", lambda: 3)
    for number in range(3):
        monkeypatch.setattr(processes, "rank", lambda number=number: number)
        shares += processes.own_items(range(10))
    assert sorted(shares) == list(range(10))
