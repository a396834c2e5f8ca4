"""Files that laptop 0.1.0 wrote are read by this version, and hold the same when written again."""

import json
from pathlib import Path

import pytest

from laptop.export.artifact_list import Artifacts
from laptop.export.parity_report import ParityReport
from laptop.export.to_tensorrt.plan import EnginePlan
from laptop.records import Record

DATA = Path(__file__).parent.parent / "data" / "0.1.0"


@pytest.mark.parametrize(
    ("name", "kind"),
    [("artifacts.json", Artifacts), ("parity.json", ParityReport), ("engine.json", EnginePlan)],
)
def test_a_file_of_the_first_version_reads_and_is_written_alike(
    tmp_path: Path, name: str, kind: type[Record]
) -> None:
    kind.read(DATA / name).write(tmp_path / name)
    assert json.loads((tmp_path / name).read_text()) == json.loads((DATA / name).read_text())
