"""The instrument itself, on stand-ins of known duration, and then on small real models."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from laptop.benchmarks.bench_report import BenchRow, Ratio
from laptop.benchmarks.devices import computer as computers
from laptop.benchmarks.devices.device import Facts, Heat, Round, wait_until_cool
from laptop.benchmarks.devices.worker import GRACE_S, LAST_GRACE_S, Loaded
from laptop.benchmarks.latency.bench import measure
from laptop.benchmarks.latency.validity import check_valid, invalid_reasons, ratio, slowing, summary
from laptop.benchmarks.latency.whole_image import image_rows
from laptop.errors import CheckFailed, LaptopError
from laptop.records import built
from support.run_folder import bench_row
from support.sleepers import HERE, QUICK, Order, stand_in

FACTS = Facts("a stand-in", "Linux", {"stand-in": "1"})


def load_logging_sleeper(order: Order) -> Loaded:
    """Sleeps 40 ms and writes how many ms each call really took: more on a busy machine."""

    def run() -> None:
        start = time.monotonic()
        time.sleep(0.040)
        took_ms = 1000 * (time.monotonic() - start)
        with Path(order["source"]).open("a") as file:
            file.write(f"{took_ms}\n")

    return Loaded(run)


def load_hot_sleeper(order: Order) -> Loaded:
    """Half as fast after 20 calls, as a phone is that got hot."""
    calls = iter(range(20))
    ms = float(order["source"])
    return Loaded(lambda: time.sleep((ms if next(calls, None) is not None else 2 * ms) / 1000))


def load_beside_others(_: Order) -> Loaded:
    """Sleeps, while another process keeps a core busy for a second."""
    import subprocess
    import sys

    command = [sys.executable, "-c", "import time; t = time.time()\nwhile time.time() < t + 2: 0"]
    others = [subprocess.Popen(command) for _ in range(os.cpu_count() or 1)]
    return Loaded(lambda: (time.sleep(0.05), len(others)))


def load_and_die(_: Order) -> Loaded:
    os._exit(9)


def load_then_die(_: Order) -> Loaded:
    calls = iter(range(5))  # dies in the first round, after first inference, 3 warm-ups, 1 untimed
    return Loaded(lambda: os._exit(9) if next(calls, None) is None else None)


def rounds(*samples_ms: float, others: float | None = None) -> list[Round]:
    return [Round((ms,), others=others) for ms in samples_ms]


def test_a_known_duration_is_measured_within_2_percent_and_1_ms(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with HERE.meter(stand_in("a", log, load_logging_sleeper), 3, 0) as meter:
        turns = [meter.run_round(10, 0) for _ in range(2)]
        assert meter.stop() > 1e6
    known = [float(line) for line in log.read_text().split()]
    assert len(known) == 1 + 3 + 2 * (1 + 10), "first, warm-up, and an untimed one each round"
    timed = np.array([known[5:15], known[16:26]])
    measured = np.array([turn.samples_ms for turn in turns])
    assert measured.min() >= 40
    error = abs(np.median(measured) - np.median(timed))
    assert error <= min(1, 0.02 * np.median(timed))


def test_a_planted_slow_down_shows_in_the_ratio() -> None:
    config = replace(QUICK, seconds=1.2)
    found = measure([stand_in("a", 40), stand_in("b", 60)], config, HERE, FACTS)
    (pair,) = found.ratios
    assert (pair.a, pair.b) == ("a", "b")
    assert not pair.valid, "three rounds are too few"
    assert 1.3 < pair.low <= pair.median <= pair.high < 1.7
    a, _ = found.results
    assert len(a.samples_ms) == a.n >= 6
    assert sum(a.samples_ms) >= 1199
    assert a.params == 7
    assert a.peak_memory_bytes > 1e6
    assert [turn.n for turn in a.rounds] == [10, 10, 10]


def test_a_planted_throttle_is_flagged() -> None:
    config = replace(QUICK, rounds=6, iterations=48, seconds=0, warmup_s=0, warmup_iterations=0)
    (row,) = measure([stand_in("a", 20, load_hot_sleeper)], config, HERE, FACTS).results
    assert not row.valid
    (reason,) = [reason for reason in row.invalid_reasons if "throttled" in reason]
    assert reason.startswith(
        ("throttled: the last rounds took 1.9", "throttled: the last rounds took 2")
    )
    (steady,) = measure([stand_in("a", 20)], config, HERE, FACTS).results
    assert not [reason for reason in steady.invalid_reasons if "throttled" in reason]


def test_work_of_other_processes_is_flagged() -> None:
    config = replace(QUICK, rounds=1, seconds=0.5, warmup_s=0, warmup_iterations=0)
    (row,) = measure([stand_in("a", 0, load_beside_others)], config, HERE, FACTS).results
    assert any("device busy" in reason for reason in row.invalid_reasons), row.rounds


def test_reasons_name_what_the_device_says() -> None:
    steady = [500.0] * 20
    assert invalid_reasons(rounds(*steady, others=0.02), 0.1) == []
    (busy,) = invalid_reasons(rounds(*steady, others=0.31), 0.1)
    assert busy == "device busy: 31% of its processors' time went to other work"
    hot = [Round((500.0,), throttled="thermal status 2") for _ in range(20)]
    assert invalid_reasons(hot, 0.1) == ["throttled in 20 of 20 rounds: thermal status 2"]


def test_drift_is_that_of_thirds_of_the_rounds() -> None:
    assert slowing(rounds(1, 1, 1, 5, 2, 2, 2)) == 2
    assert slowing(rounds(1, 2, 3, 4, 5)) == 1, "too few to tell"


def test_a_row_with_too_few_samples_is_not_valid_and_says_why() -> None:
    config = replace(QUICK, seconds=0, iterations=6)
    report = measure([stand_in("a", 1)], config, HERE, FACTS)
    (row,) = report.results
    assert row.n == 6
    assert not row.valid
    assert "6 samples; 20 are needed" in row.invalid_reasons
    with pytest.raises(
        CheckFailed, match=r"1 of 1 measurements are not valid \(a unet x stand-in: 3 rounds; 6"
    ):
        check_valid(report)


def test_a_spread_measurement_is_not_valid() -> None:
    (reason,) = invalid_reasons(rounds(*[500.0, 900.0] * 10), 0.1)
    assert "cv 0.29 is above 0.10" in reason


def test_sustained_load_is_told_by_parts_and_by_the_last_over_the_first() -> None:
    config = replace(QUICK, sustained_s=1, warmup_s=0, warmup_iterations=0)
    (row,) = measure([stand_in("a", 20, load_hot_sleeper)], config, HERE, FACTS).results
    found = row.sustained
    assert not [x for x in row.invalid_reasons if "throttled" in x or "cv" in x], "the finding"
    assert row.conditions.sustained_s == 1
    assert len(found.p50_ms) == len(found.temperature_c) == 10
    assert 0.6 < sum(found.seconds) < 1.3
    assert 1.8 < found.last_over_first < 2.2


class Hot:
    """A device that cools down at the third look."""

    address = "hot"

    def __init__(self) -> None:
        self.looks = 0

    def heat(self) -> Heat:
        self.looks += 1
        return Heat("thermal status 1" if self.looks < 3 else None)


def test_a_hot_device_is_waited_for_within_bounds() -> None:
    device = Hot()
    assert wait_until_cool(device, 60, pause_s=0.01) is None
    assert device.looks == 3
    device = Hot()
    assert wait_until_cool(device, 0)
    assert device.looks == 1


def test_the_summary_is_the_textbook_one() -> None:
    found = summary([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (found.p50, found.mean) == (3, 3)
    assert found.stdev == pytest.approx(2.5**0.5)
    assert found.p90 == pytest.approx(4.6)


def test_drift_that_both_models_share_cancels_in_the_ratio() -> None:
    drift = np.linspace(1, 2, 10)
    found = ratio([[10 * d] for d in drift], [[5 * d] for d in drift], 0)
    assert found == Ratio(median=0.5, low=0.5, high=0.5)


@pytest.mark.parametrize("load", [load_and_die, load_then_die])
def test_a_worker_that_dies_is_named(load: Callable[[Order], Loaded]) -> None:
    victim = stand_in("student", "model/", load)
    with pytest.raises(LaptopError, match=r"'student' \(unet in stand-in, model/\).*exit code 9"):
        measure([stand_in("a", 1), victim], replace(QUICK, warmup_s=0), HERE, FACTS)


def test_what_a_worker_says_as_it_dies_is_in_the_message() -> None:
    nowhere = replace(stand_in("a", 1), loader="nowhere:load")
    with pytest.raises(LaptopError, match="ModuleNotFoundError: No module named 'nowhere'"):
        measure([nowhere], QUICK, HERE, FACTS)


def test_a_device_that_is_not_ready_makes_no_valid_row() -> None:
    found = measure([stand_in("a", 1)], QUICK, HERE, FACTS, "thermal status 2")
    assert "began: thermal status 2" in found.results[0].invalid_reasons
    assert not found.results[0].valid


def test_a_worker_ends_in_its_round_when_the_one_who_asked_is_gone() -> None:
    with HERE.meter(stand_in("a", 20), 1, 0) as meter:
        worker = meter._process
        worker.stdin.write('{"iterations": 1, "seconds": 1000}\n')
        worker.stdin.close()
        assert worker.wait(10) != 0
        worker.stdin = Path(os.devnull).open("w")  # noqa: SIM115, for the meter to close


def load_deaf(order: Order) -> Loaded:
    """One inference takes minutes, in a call that Python cannot interrupt."""
    import hashlib

    def run() -> None:
        Path(order["source"]).touch()
        hashlib.pbkdf2_hmac("sha256", b"", b"", 2_000_000_000)

    return Loaded(run)


def test_a_worker_ends_in_a_call_that_cannot_be_interrupted(tmp_path: Path) -> None:
    began = tmp_path / "began"
    worker = subprocess.Popen(
        HERE.command(), stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    settings = {"loader": f"{__name__}:load_deaf", "imports": [], "files": [], "path": sys.path}
    worker.stdin.write(json.dumps({**settings, "source": str(began)}) + "\n")
    worker.stdin.flush()
    while not began.exists():
        time.sleep(0.1)
        assert worker.poll() is None
    begin = time.monotonic()
    worker.stdin.close()
    assert worker.wait(60) == 1
    assert time.monotonic() - begin >= GRACE_S + LAST_GRACE_S, "it did not end by itself"


def test_a_worker_that_does_nothing_any_more_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(computers, "ENDS_S", 0.2)
    with HERE.meter(stand_in("a", 1), 1, 0) as meter:
        meter._process.send_signal(signal.SIGSTOP)
    assert meter._process.returncode == -signal.SIGKILL


def test_an_image_needs_every_text_encoder_that_the_model_has() -> None:
    def row(component: str, runtime: str) -> BenchRow:
        shapes = {"sample": [2, 4, 8, 8], "text_embeds": [2, 64]} if component == "unet" else {}
        document = bench_row("a", runtime, 10.0, valid=True)
        document |= {"component": component, "target": "x"}
        document["conditions"] = {"shapes": shapes, "guidance": True}
        return built(document, BenchRow, "row")

    parts = ["text_encoder", "text_encoder_2", "unet", "vae_decoder"]
    whole = [row(part, "pytorch") for part in parts]
    (image,) = image_rows(whole, 20)
    assert image.latency_ms.p50 == 10 * (2 + 2 + 20 + 1)
    assert image_rows([r for r in whole if r.component != "text_encoder_2"], 20) == ()
    other = [row(part, "onnxruntime") for part in parts if part != "text_encoder"]
    assert [r.runtime for r in image_rows(whole + other, 20)] == ["pytorch"]
