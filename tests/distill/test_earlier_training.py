"""Files that version 0.1.0 wrote are read, and written again with the same content."""

import json
from pathlib import Path

import pytest

from laptop.distill.cache import CacheInfo
from laptop.distill.checkpoint import TrainingState
from laptop.distill.log_lines import LogLine
from laptop.distill.trainer import BackOffs
from laptop.records import Record, read_lines

DATA = Path(__file__).parent.parent / "data" / "0.1.0"


@pytest.mark.parametrize(
    ("name", "kind"),
    [("cache.json", CacheInfo), ("state.json", TrainingState), ("back-offs.json", BackOffs)],
)
def test_a_file_of_an_earlier_version_is_read_and_written_alike(
    name: str, kind: type[Record], tmp_path: Path
) -> None:
    kind.read(DATA / name).write(tmp_path / name)
    assert json.loads((tmp_path / name).read_text()) == json.loads((DATA / name).read_text())


def test_lines_of_an_earlier_log_are_read_and_written_alike() -> None:
    path = DATA / "metrics.jsonl"
    lines = read_lines(path, LogLine)
    assert [json.dumps(line.as_json()) for line in lines] == path.read_text().splitlines()
    assert lines[0].features == {"down_blocks.0": 1.0, "mid_block": 0.5}
