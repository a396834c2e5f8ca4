"""Reports that version 0.1.0 wrote are read, and are written again as they were."""

import json
from pathlib import Path

import pytest

from laptop.benchmarks.bench_report import BenchReport
from laptop.benchmarks.eval_report import EvalReport
from laptop.records import Record

DATA = Path(__file__).parent.parent / "data" / "0.1.0"


@pytest.mark.parametrize(("kind", "name"), [(BenchReport, "bench.json"), (EvalReport, "eval.json")])
def test_a_report_of_version_0_1_is_read_and_written_as_it_was(
    kind: type[Record], name: str, tmp_path: Path
) -> None:
    kind.read(DATA / name).write(tmp_path / name)
    content = json.loads((DATA / name).read_text(encoding="utf-8"))
    assert json.loads((tmp_path / name).read_text(encoding="utf-8")) == content
