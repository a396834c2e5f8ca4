"""Files for CI systems, read back as those systems do."""

import json
import math
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from click.testing import CliRunner

from laptop.benchmarks import gate_files
from laptop.benchmarks.compare import Change
from laptop.cli import main

FINE = Change("results: student unet", "params", 100, 90, ())
SLOW = Change("results: student unet", "latency_ms.p50", 10, 12, ("latency_ms.p50>+10%",))
GONE = Change("", "a|b", 5, None, ("a|b<1",))


def test_junit_has_a_case_for_each_number_and_a_failure_for_each_breach() -> None:
    suite = ET.fromstring(gate_files.junit([FINE, SLOW, GONE]))
    assert (suite.get("tests"), suite.get("failures")) == ("3", "2")
    cases = {case.get("name"): case.find("failure") for case in suite}
    assert cases["params"] is None
    failure = cases["latency_ms.p50"]
    assert failure is not None
    assert failure.get("message") == "10 -> 12 (+20.0 %)"
    assert failure.text == "breach of latency_ms.p50>+10%"


def test_the_table_begins_with_the_verdict_and_the_breaches() -> None:
    lines = gate_files.markdown([FINE, SLOW, GONE]).splitlines()
    assert lines[0] == "**2 of 3 numbers breach a gate.**"
    assert lines[4].startswith(
        "| results: student unet | `latency_ms.p50` | 10 | 12 | +20.0 % | ❌"
    )
    assert "| document | `a\\|b` | 5 | gone |" in lines[5]
    assert lines[6] == "| results: student unet | `params` | 100 | 90 | -10.0 % |  |"
    assert gate_files.markdown([FINE]).startswith("No breach.")


def test_a_benchmark_has_new_numbers_with_units_that_should_be_small() -> None:
    psnr = Change("results: onnx", "psnr_db", 80, 70, ())
    found = json.loads(gate_files.benchmark([FINE, SLOW, GONE, psnr]))
    assert found == [
        {"name": "results: student unet params", "unit": "parameters", "value": 90},
        {"name": "results: student unet latency_ms.p50", "unit": "ms", "value": 12},
    ]


def test_what_json_and_xml_cannot_hold_is_left_out() -> None:
    strange = Change("results: a\x01b", "params", 1, math.nan, ("params>+0%",))
    (case,) = ET.fromstring(gate_files.junit([strange]))
    assert case.get("classname") == "results: a\N{REPLACEMENT CHARACTER}b"
    assert json.loads(gate_files.benchmark([strange])) == []


@pytest.mark.parametrize(("new", "code"), [(6.0, 0), (9.0, 1)])
def test_the_command_writes_them_also_when_a_gate_is_breached(
    tmp_path: Path, new: float, code: int
) -> None:
    for name, ms in (("base", 6.0), ("new", new)):
        row = {"label": "student", "latency_ms": {"p50": ms}}
        document = {"schema": "laptop.bench/1", "results": [row]}
        (tmp_path / f"{name}.json").write_text(json.dumps(document))
    files = [str(tmp_path / name) for name in ("base.json", "new.json", "a.xml", "b.md", "c.json")]
    given = ["--junit", files[2], "--markdown", files[3], "--benchmark", files[4]]
    gate = ["--fail-on", "latency_ms.p50>+10%"]
    assert CliRunner().invoke(main, ["compare", *files[:2], *gate, *given]).exit_code == code
    nowhere = ["--junit", str(tmp_path / "nowhere" / "a.xml")]
    refused = CliRunner().invoke(main, ["compare", *files[:2], *nowhere])
    assert "No such file or directory" in refused.output
    assert ET.parse(files[2]).getroot().get("failures") == str(code)
    assert json.loads(Path(files[4]).read_text())[0]["value"] == new
    assert "latency_ms.p50" in Path(files[3]).read_text()


def test_nothing_is_written_over_what_is_compared_or_over_a_users_file(tmp_path: Path) -> None:
    result = {"schema": "laptop.plan/1", "params": {"after": 5}}
    for name in ("base.json", "new.json"):
        (tmp_path / name).write_text(json.dumps(result))
    (tmp_path / "notes.md").write_text("# mine\n")
    base, new = tmp_path / "base.json", tmp_path / "new.json"
    for flags, said in (
        (["--junit", base], "is one of the compared results"),
        (["--benchmark", tmp_path / "x", "--markdown", tmp_path / "x"], "name one file twice"),
        (["--markdown", tmp_path / "notes.md"], "holds something other than --markdown writes"),
    ):
        done = CliRunner().invoke(main, ["compare", *map(str, (base, new, *flags))])
        assert done.exit_code == 1
        assert said in done.stderr
    assert (tmp_path / "notes.md").read_text() == "# mine\n"
    for _ in range(2):  # its own file is written again
        done = CliRunner().invoke(
            main, ["compare", str(base), str(new), "--markdown", str(tmp_path / "table.md")]
        )
        assert done.exit_code == 0, done.output
