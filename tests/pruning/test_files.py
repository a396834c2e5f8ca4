"""Files that version 0.1.0 wrote are read, and are written again as they were."""

import json
from pathlib import Path

import pytest

from laptop.pruning.latency_table import LatencyTable
from laptop.pruning.plan_file import Menu, Plan
from laptop.pruning.scores import Additivity, Scores
from laptop.records import Record

DATA = Path(__file__).parent.parent / "data" / "0.1.0"


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (Scores, "scores.json"),
        (Plan, "plan.json"),
        (Plan, "preset_plan.json"),
        (LatencyTable, "latency_table.json"),
        (Menu, "menu.json"),
        (Additivity, "additivity.json"),
    ],
)
def test_a_file_of_version_0_1_is_read_and_written_as_it_was(kind: type[Record], name: str) -> None:
    content = json.loads((DATA / name).read_text(encoding="utf-8"))
    assert content.items() <= kind.read(DATA / name).as_json().items()


def test_scores_without_the_keys_of_later_versions_have_their_defaults(tmp_path: Path) -> None:
    content = json.loads((DATA / "scores.json").read_text(encoding="utf-8"))
    kept = {key: content[key] for key in ("schema", "model", "units", "base")}
    (tmp_path / "scores.json").write_text(json.dumps(kept))
    scores = Scores.read(tmp_path)
    assert (scores.dtype, scores.batch_size, scores.race) == ("float32", 1, None)
    assert scores.anatomy.units[2].needs == (scores.units[1].name,)
