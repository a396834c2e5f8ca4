"""The workflows for GitHub: their commands are the CLI's, and no input can become a script."""

import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from laptop import cli

ROOT = Path(__file__).parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
NASTY = """a b'"; touch run-by-a-shell; $(touch run-by-a-shell) """
GIVEN = {
    "MODEL": "tiny-sdxl",
    "RATIO": "0.5",
    "TARGETS": "onnx,coreml:palette6",
    "RECIPE": "recipe.toml",
    "SMOKE": "yes",
    "BASELINE": "baseline.json",
    "FAIL_ON": "params>+2%",
}
OPTIONAL = {"RATIO", "TARGETS", "RECIPE", "SMOKE", "FAIL_ON"}
RESULTS = {  # what a baseline can be, and the result of a run that is of its kind
    "laptop.plan/1": "plan.json",
    "laptop.artifacts/1": "artifacts/artifacts.json",
    "laptop.parity/1": "parity/report.json",
    "laptop.bench/1": "bench/local.json",
}
STUB = """#!{python}
import json, os, sys
with open(os.environ["CALLS"], "a") as file:
    print(json.dumps(sys.argv[1:]), file=file)
"""


def read(name: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / ".github" / "workflows" / name).read_text(encoding="utf-8"))


def triggers(workflow: dict[Any, Any]) -> dict[str, Any]:
    return workflow[True]  # YAML 1.1 reads the key `on` so


def steps(workflow: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for job in workflow["jobs"].values():
        yield from job.get("steps", [])


@pytest.fixture
def calls(tmp_path: Path):
    """Run the steps of compress.yml that call `laptop`, by bash as a runner does; what it got."""
    programs, runner = tmp_path / "bin", tmp_path / "runner"
    programs.mkdir()
    runner.mkdir()
    stub = programs / "laptop"
    stub.write_text(STUB.format(python=sys.executable))
    stub.chmod(0o755)

    def run(schema: str = "laptop.plan/1", **changes: str) -> list[list[str]]:
        values = GIVEN | changes
        (tmp_path / values["BASELINE"]).write_text(json.dumps({"schema": schema}))
        environment = os.environ | values
        environment |= {
            "PATH": f"{programs}:{os.environ['PATH']}",
            "CALLS": str(tmp_path / "calls"),
        }
        environment |= {"RUNNER_TEMP": str(runner), "GITHUB_STEP_SUMMARY": str(runner / "summary")}
        for step in steps(read("compress.yml")):
            if re.search(r"^\s*laptop ", step.get("run", ""), re.MULTILINE):
                bash = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]]
                subprocess.run(bash, env=environment, cwd=tmp_path, check=True)
        return [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]

    return run


def parsed(call: list[str]) -> dict[str, Any]:
    """What the real command makes of these arguments; raises for what it does not know."""
    command = cli.main.get_command(click.Context(cli.main), call[0])
    assert command is not None, call
    return command.make_context(call[0], call[1:]).params


@pytest.mark.parametrize("left_out", [set(), OPTIONAL], ids=["all inputs", "only the needed"])
def test_the_commands_of_the_reusable_workflow_are_those_of_the_cli(calls, left_out) -> None:
    made = calls(**dict.fromkeys(left_out, ""))
    assert [c[0] for c in made] == ["doctor", "compare", "compress", "export", "compare"]
    compress, export = parsed(made[2]), parsed(made[3])
    assert compress["model"] == "tiny-sdxl"
    assert compress["ratio"] == (None if left_out else 0.5)
    assert not compress["no_verify"]
    assert export["bundle"]
    for same in ("targets", "config"):
        assert compress[same] == export[same], "else the artifacts would be exported again"
    assert Path(export["model"]).parent == export["out"].parent == compress["out"]
    for compare in (made[1], made[4]):
        assert parsed(compare)["fail_on"] == ("params>+1%,macs>+1%" if left_out else "params>+2%")


@pytest.mark.parametrize(("schema", "result"), RESULTS.items())
def test_a_baseline_is_compared_with_the_result_of_its_kind(calls, schema, result) -> None:
    first, *_, last = [parsed(c) for c in calls(schema, FAIL_ON="") if c[0] == "compare"]
    assert first["base"] == first["new"] == last["base"] == Path("baseline.json")
    assert last["new"] == Path("laptop-run") / result
    assert "latency" not in last["fail_on"], "runners are shared"


def test_a_baseline_of_another_kind_is_refused_before_the_work(calls, tmp_path) -> None:
    with pytest.raises(subprocess.CalledProcessError):
        calls("laptop.scores/1")
    assert (tmp_path / "calls").read_text().splitlines() == ['["doctor"]']


@pytest.mark.parametrize("name", sorted(set(GIVEN) - {"SMOKE"}))
def test_an_input_is_one_argument_whatever_it_holds(calls, tmp_path, name) -> None:
    assert any(NASTY in call for call in calls(**{name: NASTY}))
    assert not list(tmp_path.rglob("run-by-a-shell"))


def test_the_variables_of_the_reusable_workflow_are_those_tried_here() -> None:
    assert set(read("compress.yml")["jobs"]["compress"]["env"]) == set(GIVEN)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_no_script_holds_an_expression(path: Path) -> None:
    for step in steps(read(path.name)):
        assert "${{" not in step.get("run", ""), step


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_may_only_read_and_end_in_time(path: Path) -> None:
    workflow = read(path.name)
    assert workflow["permissions"] == {"contents": "read"}
    for job in workflow["jobs"].values():
        assert "timeout-minutes" in job or "uses" in job


def test_the_tests_workflow_runs_what_is_run_here() -> None:
    workflow = read("tests.yml")
    assert {"push", "pull_request"} <= set(triggers(workflow))
    assert ".ci/run" in [step.get("run") for step in steps(workflow)]
    assert workflow["env"]["TORCH_INDEX"].endswith("/cpu"), "the Makefile takes it from there"


def test_the_newest_libraries_are_tried_with_all_extras_but_optimum() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (everything,) = project["optional-dependencies"]["all"]
    extras = set(re.findall(r"[\w-]+", everything.partition("[")[2])) - {"optimum"} | {"dev"}
    scripts = " ".join(step.get("run", "") for step in read("tests.yml")["jobs"]["newest"]["steps"])
    named = re.search(r"-e '\.\[([\w,-]+)\]'", scripts)
    assert named
    assert set(named[1].split(",")) == extras


def test_torch_is_the_one_of_the_makefile() -> None:
    pinned = re.search(r"^TORCH \?= (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert pinned
    inputs = triggers(read("compress.yml"))["workflow_call"]["inputs"]
    assert inputs["torch"]["default"] == pinned[1]
    assert f"ARG TORCH={pinned[1]}\n" in (ROOT / "Dockerfile").read_text()


def test_all_inputs_are_described_and_typed() -> None:
    asked = (
        triggers(read("compress.yml"))["workflow_call"],
        triggers(read("try.yml"))["workflow_dispatch"],
    )
    for trigger in asked:
        for name, value in trigger["inputs"].items():
            assert {"description", "type"} <= set(value), name


def test_callers_give_inputs_that_the_reusable_workflow_has() -> None:
    known = triggers(read("compress.yml"))["workflow_call"]["inputs"]
    needed = {name for name, value in known.items() if value.get("required")}
    page = (ROOT / "docs" / "guides" / "ci.md").read_text(encoding="utf-8")
    written = [yaml.safe_load(text) for text in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)]
    callers = [
        job
        for workflow in [*map(read, ("tests.yml", "try.yml")), *written]
        for job in workflow["jobs"].values()
        if "compress.yml" in job.get("uses", "")
    ]
    assert len(callers) >= 3
    for job in callers:
        assert needed <= set(job["with"]) <= set(known)
