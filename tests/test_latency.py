"""The instrument itself, on stand-ins of known duration, and then on small real models."""

import json
import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from laptop.benchmarks.latency import BenchConfig, bench, invalid_reasons, measure, ratio, summary
from laptop.benchmarks.runtimes import Loaded, Workload
from laptop.benchmarks.worker import Worker
from laptop.errors import BadInput, LaptopError, UnknownModel

QUICK = BenchConfig(rounds=3, iterations=6, seconds=0.3, warmup_s=0.1, cv_bound=10, threads=1)


def load_sleeper(workload: Workload) -> Loaded:
    """A stand-in that takes as many ms as `source` says."""
    return Loaded(lambda: time.sleep(float(workload.source) / 1000), "fp32", 7)


def load_logging_sleeper(workload: Workload) -> Loaded:
    """Sleeps 40 ms and writes how many ms each call really took: more on a busy machine."""

    def run() -> None:
        start = time.monotonic()
        time.sleep(0.040)
        took_ms = 1000 * (time.monotonic() - start)
        with Path(workload.source).open("a") as file:
            file.write(f"{took_ms}\n")

    return Loaded(run, "fp32", None)


def load_and_die(_: Workload) -> Loaded:
    os._exit(9)


def load_then_die(_: Workload) -> Loaded:
    calls = iter(range(5))  # dies in the first round, after first inference, 3 warm-ups, 1 untimed
    return Loaded(lambda: os._exit(9) if next(calls, None) is None else None, "fp32", None)


def stand_in(label: str, ms: float) -> Workload:
    return Workload(label, "unet", "stand-in", str(ms), load_sleeper, {})


def onnx_folder(folder: Path, config: Path) -> Path:
    """An artifacts folder whose U-Net is a real ONNX graph, though one that only doubles."""
    import onnx

    names = ("sample", "encoder_hidden_states", "text_embeds", "time_ids")
    value = onnx.helper.make_tensor_value_info
    inputs = [value(n, 1, [None] * (4 if n == "sample" else 2)) for n in names if n[0] != "e"]
    inputs += [value("encoder_hidden_states", 1, [None] * 3), value("timestep", 7, [])]
    node = onnx.helper.make_node("Add", ["sample", "sample"], ["out_sample"])
    graph = onnx.helper.make_graph([node], "g", inputs, [value("out_sample", 1, [None] * 4)])
    opset = [onnx.helper.make_opsetid("", 17)]
    unet = folder / "onnx" / "unet"
    unet.mkdir(parents=True)
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=8), unet / "model.onnx")
    (unet / "config.json").write_text(config.read_text())
    return folder


def test_a_known_duration_is_measured_within_2_percent_and_1_ms(tmp_path: Path) -> None:
    log = tmp_path / "log"
    workload = Workload("a", "unet", "stand-in", str(log), load_logging_sleeper, {})
    with Worker(workload, 3, 0) as worker:
        for _ in range(2):
            worker.run_round(10, 0)
        worker.stop()
    known = [float(line) for line in log.read_text().split()]
    assert len(known) == 1 + 3 + 2 * (1 + 10), "first, warm-up, and an untimed one each round"
    timed = np.array([known[5:15], known[16:26]])
    measured = np.array(worker.samples)
    assert measured.min() >= 40
    error = abs(np.median(measured) - np.median(timed))
    assert error <= min(1, 0.02 * np.median(timed))


def test_a_planted_slow_down_shows_in_the_ratio() -> None:
    found = measure([stand_in("a", 40), stand_in("b", 60)], replace(QUICK, seconds=1.2))
    (pair,) = found["ratios"]
    assert (pair["a"], pair["b"]) == ("a", "b")
    assert 1.3 < pair["low"] <= pair["median"] <= pair["high"] < 1.7
    a, _ = found["results"]
    assert len(a["samples_ms"]) == a["n"] >= 6
    assert sum(a["samples_ms"]) >= 1199
    assert a["params"] == 7
    assert a["peak_memory_bytes"] > 1e6


def test_a_row_with_too_few_samples_is_not_valid_and_says_why() -> None:
    (row,) = measure([stand_in("a", 1)], replace(QUICK, seconds=0, iterations=6))["results"]
    assert row["n"] == 6
    assert not row["valid"]
    assert "6 samples; 20 are needed" in row["invalid_reasons"]


def test_a_full_and_steady_measurement_is_valid_and_a_spread_one_is_not() -> None:
    assert invalid_reasons([500.0] * 20, 0.1) == []
    (reason,) = invalid_reasons([500.0, 900.0] * 10, 0.1)
    assert "cv 0.29 is above 0.10" in reason


def test_the_summary_is_the_textbook_one() -> None:
    found = summary([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (found["p50"], found["mean"]) == (3, 3)
    assert found["stdev"] == pytest.approx(2.5**0.5)
    assert found["p90"] == pytest.approx(4.6)


def test_drift_that_both_models_share_cancels_in_the_ratio() -> None:
    drift = np.linspace(1, 2, 10)
    found = ratio([[10 * d] for d in drift], [[5 * d] for d in drift], 0)
    assert found == {"median": 0.5, "low": 0.5, "high": 0.5}


@pytest.mark.parametrize("load", [load_and_die, load_then_die])
def test_a_worker_that_dies_is_named(load) -> None:
    victim = Workload("student", "unet", "stand-in", "model/", load, {})
    with pytest.raises(LaptopError, match=r"'student' \(unet in stand-in, model/\).*exit code 9"):
        measure([stand_in("a", 1), victim], replace(QUICK, warmup_s=0))


def test_bench_times_pytorch_and_onnx_of_two_models_and_states_the_conditions(
    tiny_folder: Path, pruned_folder: Path, tmp_path: Path
) -> None:
    config = tiny_folder / "unet" / "config.json"
    subjects = {
        "teacher": (tiny_folder, onnx_folder(tmp_path / "base", config)),
        "student": (str(pruned_folder), onnx_folder(tmp_path / "artifacts", config)),
    }
    out = tmp_path / "bench" / "local.json"
    bench(subjects, out, QUICK)
    found = json.loads(out.read_text())
    assert found["schema"] == "laptop.bench/1"
    rows = {(r["label"], r["runtime"]): r for r in found["results"]}
    assert len(rows) == 4
    assert [(p["runtime"], p["a"], p["b"]) for p in found["ratios"]] == [
        ("pytorch", "teacher", "student"),
        ("onnxruntime", "teacher", "student"),
    ]
    row = rows["student", "pytorch"]
    assert row["params"] < rows["teacher", "pytorch"]["params"]
    assert row["size_bytes"] > row["params"]
    assert row["load_s"]["cold"] > 0
    assert row["latency_ms"]["first"] > 0
    shapes = row["conditions"]["shapes"]
    assert shapes["encoder_hidden_states"] == [2, 16, 128]
    assert shapes["text_embeds"] == [2, 64]
    assert len(row["sha256"]) == 64
    before = out.stat().st_mtime_ns
    bench(subjects, out, QUICK)
    assert out.stat().st_mtime_ns == before, "a finished bench is not done again"


def test_subjects_that_take_different_inputs_are_refused(tiny_folder: Path, tmp_path: Path) -> None:
    config = json.loads((tiny_folder / "unet" / "config.json").read_text())
    other = tmp_path / "other.json"
    other.write_text(json.dumps(config | {"sample_size": 16}))
    subjects = {"a": tiny_folder, "b": onnx_folder(tmp_path / "b", other)}
    with pytest.raises(BadInput, match="cannot be compared"):
        bench(subjects, tmp_path / "x.json", QUICK)


def test_a_subject_that_is_nothing_we_know_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(UnknownModel):
        bench({"a": tmp_path}, tmp_path / "x.json", QUICK)
