"""Gates between two results: what is read, what is refused, what is breached."""

import copy
import json
import math
from pathlib import Path

import pytest

from laptop.benchmarks.compare import compare, parse_gates
from laptop.errors import BadInput

BENCH = {
    "schema": "laptop.bench/1",
    "device": {"address": "local", "free_memory_bytes": 5},
    "results": [
        {
            "label": label,
            "artifact": "runs/a/onnx/unet",
            "component": "unet",
            "runtime": "pytorch",
            "precision": "fp32",
            "device": "cpu",
            "conditions": {"batch": 2, "threads": 2},
            "params": 100,
            "latency_ms": {"p50": ms, "p90": ms + 1},
        }
        for label, ms in (("teacher", 10.0), ("student", 6.0))
    ],
    "ratios": [
        {"component": "unet", "runtime": "pytorch", "a": "teacher", "b": "student", "median": 0.6}
    ],
}  # fmt: skip
PLAN = {
    "schema": "laptop.plan/1",
    "remove": ["x"],
    "params": {"before": 10, "after": 5},
    "predicted_loss": 0.5,
}
PARITY = {
    "schema": "laptop.parity/1",
    "results": [
        {"target": "onnx", "component": "unet", "artifact": f"{folder}/unet", "psnr_db": db}
        for folder, db in (("onnx", 80.0), ("onnx-int8", 60.0))
    ],
}
EVAL = {"schema": "laptop.eval/1", "steps": 25, "models": [{"label": "t", "frechet": 1.0}]}
SCORES = {"schema": "laptop.scores/1", "units": [{"name": "a", "kind": "resnet", "score": 0.0}]}


@pytest.fixture
def files(tmp_path: Path):
    def write(base: dict, new: dict) -> tuple[Path, Path]:
        for name, value in (("base.json", base), ("new.json", new)):
            (tmp_path / name).write_text(json.dumps(value))
        return tmp_path / "base.json", tmp_path / "new.json"

    return write


def student_at(ms: float) -> dict:
    new = copy.deepcopy(BENCH)
    new["results"][1]["latency_ms"]["p50"] = ms
    return new


def test_the_expression_of_the_contract_is_understood() -> None:
    a, b, c = parse_gates("latency_ms.p50>+10%, params>+0% ,psnr_db<40")
    assert (a.path, a.op, a.limit, a.is_relative) == ("latency_ms.p50", ">", 10, True)
    assert (b.path, b.limit, b.is_relative) == ("params", 0, True)
    assert (c.path, c.op, c.limit, c.is_relative) == ("psnr_db", "<", 40, False)


@pytest.mark.parametrize("text", ["latency", "p50=10", "p50>ten", ">10%", "p50>+10%,,a<1", "a<1%b"])
def test_bad_syntax_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(BadInput, match=r"is no gate.*latency_ms\.p50>\+10%"):
        parse_gates(text)


@pytest.mark.parametrize(("ms", "is_breach"), [(6.5, False), (6.7, True), (3.0, False)])
def test_a_relative_gate_limits_the_change(files, ms: float, is_breach: bool) -> None:
    changes, breaches = compare(*files(BENCH, student_at(ms)), "latency_ms.p50>+10%,params>+0%")
    assert len(changes) == 4, "two numbers of two rows"
    assert [b.new for b in breaches] == ([ms] if is_breach else [])
    for breach in breaches:
        assert "label=student" in breach.row
        assert breach.breached == ("latency_ms.p50>+10%",)


def test_an_absolute_gate_limits_the_new_value_and_a_short_path_finds_it(files) -> None:
    new = copy.deepcopy(PARITY)
    assert compare(*files(PARITY, new), "psnr_db<40")[1] == []
    new["results"][0]["psnr_db"] = 39.9
    (breach,) = compare(*files(PARITY, new), "psnr<40")[1]
    assert breach.row == "results: component=unet target=onnx artifact=onnx/unet"
    assert breach.path == "psnr_db"


def test_a_plan_has_one_row_and_a_prefix_means_all_below_it(files) -> None:
    new = PLAN | {"params": {"before": 10, "after": 6}}
    changes, breaches = compare(*files(PLAN, new), "params>+0%")
    assert [c.path for c in changes] == ["params.before", "params.after"]
    assert [b.path for b in breaches] == ["params.after"]


def test_from_zero_any_growth_is_infinite(files) -> None:
    new = copy.deepcopy(SCORES)
    assert compare(*files(SCORES, new), "score>+5%")[1] == []
    new["units"][0]["score"] = 1e-9
    assert len(compare(*files(SCORES, new), "score>+5%")[1]) == 1


@pytest.mark.parametrize("value", [None, math.nan])
def test_a_number_that_got_lost_breaches_its_gate(files, value: float | None) -> None:
    new = copy.deepcopy(EVAL)
    new["models"][0]["frechet"] = value
    assert len(compare(*files(EVAL, new), "frechet>+5%")[1]) == 1


def test_a_row_that_got_lost_breaches_its_gate(files) -> None:
    new = copy.deepcopy(BENCH)
    del new["results"][1]
    (breach,) = compare(*files(BENCH, new), "latency_ms.p50>+10%")[1]
    assert breach.new is None


@pytest.mark.parametrize(
    ("key", "value"),
    [("conditions", {"batch": 1, "threads": 2}), ("device", "gpu"), ("precision", "fp16")],
)
def test_other_conditions_are_refused(files, key: str, value: object) -> None:
    new = copy.deepcopy(BENCH)
    new["results"][0][key] = value
    with pytest.raises(BadInput, match=f"other conditions: {key} is"):
        compare(*files(BENCH, new), "latency_ms.p50>+10%")


def test_another_runtime_kind_of_file_or_number_of_steps_is_refused(files) -> None:
    new = copy.deepcopy(BENCH)
    for row in [*new["results"], *new["ratios"]]:
        row["runtime"] = "onnxruntime"
    with pytest.raises(BadInput, match="no row in common"):
        compare(*files(BENCH, new))
    with pytest.raises(BadInput, match=r"laptop\.plan/1"):
        compare(*files(BENCH, PLAN))
    with pytest.raises(BadInput, match="steps is 25 in BASE, 10 in NEW"):
        compare(*files(EVAL, EVAL | {"steps": 10}))


def test_a_resolution_that_is_not_known_is_no_other_condition(files) -> None:
    new = copy.deepcopy(BENCH)
    for row in new["results"]:
        row["conditions"] |= {"resolution": [64, 64]}
    assert compare(*files(BENCH, new), "params>+0%")[1] == []


def test_a_gate_that_concerns_nothing_is_refused(files) -> None:
    with pytest.raises(BadInput, match=r"'watts>1' concerns no number.*latency_ms\.p50"):
        compare(*files(BENCH, BENCH), "watts>1")


def test_without_gates_every_number_is_compared(files) -> None:
    changes, breaches = compare(*files(BENCH, BENCH))
    assert len(changes) == 7
    assert breaches == []


def run_folder(folder: Path, **documents: dict) -> Path:
    files = {"plan": "plan.json", "parity": "parity/report.json", "bench": "bench/local.json"}
    for name, document in documents.items():
        path = folder / files[name]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document))
    return folder


def test_runs_are_compared_by_all_their_results(tmp_path: Path) -> None:
    gates = "latency_ms.p50>+10%,params>+0%,parity.psnr<70"
    base = run_folder(tmp_path / "a", plan=PLAN, parity=PARITY, bench=BENCH)
    new = run_folder(tmp_path / "b", plan=PLAN, parity=PARITY, bench=student_at(7.0))
    changes, breaches = compare(base, new, gates)
    assert {c.row.partition(":")[0] for c in changes} == {
        "plan.json",
        "parity/report.json",
        "bench/local.json",
    }
    assert [(b.path, b.breached) for b in breaches] == [
        ("psnr_db", ("parity.psnr<70",)),
        ("latency_ms.p50", ("latency_ms.p50>+10%",)),
    ]


def test_a_run_that_lost_a_result_breaches_its_gates(tmp_path: Path) -> None:
    base = run_folder(tmp_path / "a", plan=PLAN, parity=PARITY)
    new = run_folder(tmp_path / "b", plan=PLAN)
    breaches = compare(base, new, "psnr<40")[1]
    assert [breach.new for breach in breaches] == [None, None]


def test_conditions_matter_where_a_gate_does(tmp_path: Path) -> None:
    elsewhere = copy.deepcopy(BENCH)
    for row in elsewhere["results"]:
        row["device"] = "another"
    base = run_folder(tmp_path / "a", plan=PLAN, bench=BENCH)
    new = run_folder(tmp_path / "b", plan=PLAN, bench=elsewhere)
    assert compare(base, new, "plan.params>+0%")[1] == []
    with pytest.raises(BadInput, match="device is 'cpu' in BASE, 'another' in NEW"):
        compare(base, new, "p50>+10%")


def test_a_run_and_a_file_are_not_compared(tmp_path: Path) -> None:
    base = run_folder(tmp_path / "a", plan=PLAN)
    with pytest.raises(BadInput, match="two files, or two folders"):
        compare(base, base / "plan.json")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match="needed is a run folder"):
        compare(tmp_path / "empty", base)


@pytest.mark.parametrize("side", ["base", "new"])
def test_what_was_not_measured_validly_breaches_a_gate_on_time_only(files, side: str) -> None:
    documents = {"base": copy.deepcopy(BENCH), "new": copy.deepcopy(BENCH)}
    documents[side]["results"][0]["valid"] = False
    breaches = compare(*files(**documents), "latency_ms.p50>+10%,params>+0%")[1]
    assert [b.breached for b in breaches] == [("latency_ms.p50>+10% (measurement not valid)",)]


def test_a_row_that_only_the_new_one_has_is_held_to_limits_on_values(files) -> None:
    new = copy.deepcopy(PARITY)
    new["results"].append(new["results"][0] | {"component": "vae_decoder", "psnr_db": 3.0})
    changes, (breach,) = compare(*files(PARITY, new), "psnr_db<40,psnr_db<-5%")
    assert (len(changes), breach.base, breach.new) == (3, None, 3.0)


def test_where_a_model_lay_and_what_was_free_are_no_conditions(files) -> None:
    new = copy.deepcopy(BENCH)
    new["device"]["free_memory_bytes"] = 4
    new["results"][0]["artifact"] = "runs/b/onnx/unet"
    assert compare(*files(BENCH, new), "latency_ms.p50>+0%")[1] == []


@pytest.mark.parametrize("gate", ["latency.p50>+0%", "bench.latency_ms>+0%", "p50>+0%"])
def test_units_and_the_kind_of_file_may_be_left_out(files, gate: str) -> None:
    assert {b.path for b in compare(*files(BENCH, student_at(7.0)), gate)[1]} == {"latency_ms.p50"}


@pytest.mark.parametrize(
    ("document", "gate"),
    [
        ({**BENCH, "ratios": [{**BENCH["ratios"][0], "valid": False}]}, "median>+5%"),
        (
            {
                "schema": "laptop.latency-table/1",
                "valid": False,
                "unet_ms": {"p50": 5.0},
                "units": [{"name": "a", "latency_ms": 1.0}],
            },
            "latency_ms>+10%",
        ),
        ({"schema": "laptop.latency-table/1", "valid": False, "unet_ms": {"p50": 5.0}}, "p50>1000"),
    ],
)
def test_ratios_and_tables_that_are_not_valid_breach_too(files, document: dict, gate: str) -> None:
    (change,) = compare(*files(document, document), gate)[1]
    assert "measurement not valid" in change.breached[0]
