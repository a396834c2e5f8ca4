"""Measuring on Android: documented outputs, decisions, and whole measurements on a stand-in."""

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from laptop.benchmarks.devices import addresses, android, android_meter, android_runners
from laptop.benchmarks.devices.android import Android, Battery, Thermal, not_ready
from laptop.benchmarks.devices.device import Device, Heat
from laptop.benchmarks.latency.bench import need_fitting
from laptop.cli import main
from laptop.errors import LaptopError
from laptop.hosts import adb
from laptop.hosts.adb import Adb
from support import standin_android
from support.device_daemon import Phone, connect, needs_adb, phone_at, private_server
from support.phone_workloads import graph, of_executorch, of_onnx

# https://android.stackexchange.com/questions/246774, a Samsung A52 with Android 12
THERMAL = """IsStatusOverride: false
ThermalEventListeners:
        callbacks: 1
        killed: false
        broadcasts count: -1
ThermalStatusListeners:
        callbacks: 4
        killed: false
        broadcasts count: -1
Thermal Status: 0
Cached temperatures:
        Temperature{mValue=0.0, mType=2, mName=SUBBAT, mStatus=0}
        Temperature{mValue=95.6, mType=0, mName=AP, mStatus=0}
        Temperature{mValue=0.0, mType=4, mName=USB, mStatus=0}
HAL Ready: true
HAL connection:
        ThermalHAL 2.0 connected: yes
Current temperatures from HAL:
        Temperature{mValue=25.6, mType=0, mName=AP, mStatus=0}
        Temperature{mValue=33.8, mType=2, mName=BAT, mStatus=0}
        Temperature{mValue=26.7, mType=3, mName=LRB, mStatus=0}
        Temperature{mValue=NaN, mType=3, mName=LRF, mStatus=0}
        Temperature{mValue=35.7, mType=5, mName=PA, mStatus=0}
        Temperature{mValue=0.0, mType=4, mName=USB, mStatus=0}
Current cooling devices from HAL:
Temperature static thresholds from HAL:
        TemperatureThreshold{mType=3, mName=LRB, mHotThrottlingThresholds=[NaN, 61.0]}
"""
HOT = THERMAL.replace("Thermal Status: 0", "Thermal Status: 2")
# https://gh0st.tistory.com/6, a Samsung phone on a cable; shortened
BATTERY = """Current Battery Service state:
  mBootCompleted: true
  AC powered: false
  USB powered: true
  Wireless powered: false
  Max charging current: 0
  status: 2
  health: 2
  present: true
  level: 84
  scale: 100
  voltage: 4063
  temperature: 326
  technology: Li-ion
  LED Low Battery: true
  temperature: 999
  mSavedBatteryAsoc: 77
"""
PROPERTIES = """[ro.build.version.release]: [14]
[ro.build.version.sdk]: [34]
[ro.product.cpu.abi]: [arm64-v8a]
[ro.product.manufacturer]: [Google]
[ro.product.model]: [Pixel 8]
[ro.soc.model]: [Tensor G3]
[ro.empty]: []
"""


def test_heat_is_read_from_the_thermal_service() -> None:
    thermal = android.read_thermal(THERMAL)
    assert thermal == Thermal(0, 26.7), "of the current ones: not the battery, not the radio"
    assert thermal.throttled is None
    assert android.read_thermal(HOT).throttled == "thermal status 2 (moderate)"


def test_cached_temperatures_count_where_there_are_no_current_ones() -> None:
    assert android.read_thermal(THERMAL.partition("Current temp")[0]).temperature_c == 95.6


def test_a_device_without_thermal_service_tells_no_status() -> None:
    assert android.read_thermal("Can't find service: thermalservice\n") == Thermal(None, None)


def test_the_battery_is_read_without_what_makers_append() -> None:
    battery = android.read_battery(BATTERY)
    assert battery == Battery(84, True, 32.6)
    assert str(battery) == "battery 84 %, charging, 32.6 °C"
    assert android.read_battery("Can't find service: battery\n") == Battery()


@pytest.mark.parametrize(
    ("thermal", "battery", "saves", "why"),
    [
        (Thermal(0), Battery(84, False), False, None),
        (Thermal(None), Battery(), False, None),
        (Thermal(0), Battery(3, True), False, None),
        (Thermal(1), Battery(84, True), False, "thermal status 1 (light)"),
        (Thermal(9), Battery(84, True), False, "thermal status 9"),
        (Thermal(0), Battery(84, True), True, "battery saver is on"),
        (
            Thermal(6),
            Battery(19, False),
            False,
            "thermal status 6 (shutdown); the battery is at 19 % and not charging; 20 % are needed",
        ),
    ],
)
def test_a_device_says_why_it_should_not_be_measured_now(
    thermal: Thermal, battery: Battery, saves: bool, why: str | None
) -> None:
    assert not_ready(thermal, battery, saves) == why


def test_a_phone_is_named_by_maker_model_and_chip() -> None:
    properties = android.read_properties(PROPERTIES)
    assert android.phone_name(properties) == "Google Pixel 8 (Tensor G3)"
    assert android.phone_name({"ro.product.model": "X"}) == "X"
    assert properties["ro.empty"] == ""


def test_free_space_is_read_from_df() -> None:
    text = (
        "Filesystem       1K-blocks     Used Available Use% Mounted on\n"
        "/dev/block/dm-43 112345678 50000000  62345678  45% /data/user/0\n"
    )
    assert android_meter.free_bytes(text) == 62345678 * 1024
    assert android_meter.free_bytes("df: /data/local/tmp: No such file or directory\n") is None


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with private_server(tmp_path_factory.mktemp("home")):
        yield


@pytest.fixture
def phone(server: None, tmp_path: Path) -> Iterator[Phone]:
    with phone_at(tmp_path / "phone") as phone:
        for name, text in {"getprop": PROPERTIES, "settings": "0\n"}.items():
            phone.says(name, text)
        warm(phone, THERMAL)
        yield phone
        adb.call(["disconnect"], 10, "adb")


def warm(phone: Phone, thermal: str) -> None:
    for name, text in {"thermalservice": thermal, "battery": BATTERY}.items():
        (phone.bin / f"{name}.txt").write_text(text)
    phone.install("dumpsys", f"cat {phone.bin}/$1.txt")


@pytest.fixture
def device(phone: Phone, tmp_path: Path) -> Android:
    """A phone, and stand-ins of both runners that go to it."""
    runners = tmp_path / "runners"
    runners.mkdir()
    standin = Path(standin_android.__file__).read_text()
    for runner in android_runners.RUNNERS.values():
        (runners / runner.program).write_text(f"#!{sys.executable}\n{standin}")
    (runners / "libonnxruntime.so").write_bytes(b"library")
    return Android(Adb(connect(phone.port), pause_s=0.05), runners)


def calls(phone: Phone) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (phone.tmp / "calls").read_text().splitlines()]


def left(phone: Phone) -> set[str]:
    """What lies in the phone's temporary folder; the stand-in's ONNX Runtime puts `.ses` there."""
    return {path.name for path in phone.tmp.iterdir()} - {".ses"}


@needs_adb
def test_a_probe_tells_what_the_phone_is_and_has(device: Device, phone: Phone) -> None:
    facts = device.probe()
    assert facts.name == "Google Pixel 8 (Tensor G3)"
    assert facts.os == "Android 14 (API 34)"
    assert facts.state == "battery 84 %, charging, 32.6 °C"
    assert facts.power_mode == "normal"
    assert {"onnxruntime", "onnxruntime:xnnpack", "executorch"} <= facts.runtimes.keys()
    assert facts.runtimes["onnxruntime"].startswith("onnxruntime_perf_test sha256:")
    for number in (facts.free_memory_bytes, facts.free_disk_bytes, facts.cores):
        assert number
        assert number > 0


@needs_adb
def test_bench_measures_on_a_phone_by_its_address(
    device: Android, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert device.runners is not None
    shutil.copytree(device.runners, tmp_path / ".cache/laptop/android/arm64-v8a")
    model = graph(tmp_path / "onnx").parent.parent
    (tmp_path / "r.toml").write_text(
        "[bench]\nrounds = 2\niterations = 4\nseconds = 0.0\nwarmup_s = 0.0\nthreads = 1\n"
    )
    config = '{"sample_size": 8, "in_channels": 4, "cross_attention_dim": 8}'
    (model / "unet" / "config.json").write_text(config)
    done = CliRunner().invoke(
        main,
        [
            *("bench", str(model), "--component", "unet", "--allow-invalid"),
            *("--runtime", "onnxruntime:xnnpack", "--device", device.address),
            *("-c", str(tmp_path / "r.toml"), "-o", str(tmp_path / "phone.json")),
        ],
    )
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "phone.json").read_text())
    (row,) = report["results"]
    assert row["n"] == 4
    assert row["runtime"] == "onnxruntime:xnnpack"
    assert report["device"]["name"] == "Google Pixel 8 (Tensor G3)"
    listed = CliRunner().invoke(main, ["devices"])
    assert device.address in listed.output
    assert "Android 14 (API 34)" in listed.output


@needs_adb
def test_heat_says_why_not_to_begin(device: Android, phone: Phone) -> None:
    assert device.heat() == Heat(None, 26.7)
    warm(phone, HOT)
    phone.says("settings", "1\n")
    assert device.heat() == Heat("thermal status 2 (moderate); battery saver is on", 26.7)
    warm(phone, "Can't find service: thermalservice\n")
    assert device.heat().temperature_c == 32.6, "the battery's"
    assert device.probe().state == "battery 84 %, charging, 32.6 °C; no thermal service"


@needs_adb
def test_a_graph_is_timed_in_the_wanted_shapes(
    device: Device, phone: Phone, tmp_path: Path
) -> None:
    with device.meter(of_onnx(graph(tmp_path / "onnx")), 3, 0.0) as meter:
        ready = meter.ready
        first = meter.run_round(4, 0.0)
        warm(phone, HOT)
        second = meter.run_round(1, 0.002)
        peak = meter.stop()
    assert len(first.samples_ms) == 4
    assert (first.temperature_c, first.throttled) == (26.7, None)
    assert sum(second.samples_ms) >= 2
    assert second.throttled == "thermal status 2 (moderate)"
    assert ready.cold_s
    assert ready.warm_s
    assert ready.first_ms is not None
    assert peak
    assert peak > 10e6
    done = calls(phone)
    assert [call["given"]["-r"][0] for call in done[:3]] == ["1", "3", "4"]
    assert all(call["shapes"]["sample"] == [2, 4, 16, 24] for call in done)
    assert all(call["shapes"]["encoder_hidden_states"] == [2, 7, 8] for call in done)
    assert done[0]["given"]["-x"] == ["2"]
    assert Path(done[0]["libraries"], "libonnxruntime.so").is_file()
    assert left(phone) == {"laptop", "calls"}


@needs_adb
def test_files_are_sent_once_unless_they_were_damaged(
    device: Android, phone: Phone, tmp_path: Path
) -> None:
    files = of_onnx(graph(tmp_path / "onnx")).artifact
    assert files is not None
    both = [files / "model.onnx", files / "model.onnx_data"]
    folder = android_meter.send(device.host, both)
    assert android_meter.send(device.host, both) == folder
    assert phone.received == ["model.onnx", "model.onnx_data"]
    assert Path(phone.mapped(folder), "model.onnx_data").read_bytes() == b"weights"
    Path(phone.mapped(folder), "model.onnx_data").write_bytes(b"weightz")
    android_meter.send(device.host, both)
    assert phone.received == ["model.onnx", "model.onnx_data", "model.onnx_data"]
    assert Path(phone.mapped(folder), "model.onnx_data").read_bytes() == b"weights"


@needs_adb
def test_files_that_do_not_arrive_whole_are_an_error(
    device: Android, phone: Phone, tmp_path: Path
) -> None:
    phone.install("sha256sum", 'echo "0000  $1"')
    (tmp_path / "model").write_text("x")
    with pytest.raises(LaptopError, match="model arrived damaged"):
        android_meter.send(device.host, [tmp_path / "model"])


@needs_adb
def test_a_full_phone_is_an_error_before_anything_is_sent(
    device: Android, phone: Phone, tmp_path: Path
) -> None:
    phone.says("df", "Filesystem 1K-blocks Used Available Use% Mounted on\nx 9 9 0 100% /data\n")
    with pytest.raises(LaptopError, match=r"has 0\.00 GB free"):
        need_fitting([of_onnx(graph(tmp_path / "onnx"))], device.probe(), device)
    assert not phone.received


@needs_adb
def test_a_program_is_timed_without_its_first_inference(
    device: Device, phone: Phone, tmp_path: Path
) -> None:
    with device.meter(of_executorch(tmp_path, "20 new"), 2, 0.0) as meter:
        assert meter.ready.cold_s == 0.04463
        assert meter.ready.first_ms == 120
        assert meter.run_round(2, 0.1).samples_ms == (20,) * 5
        assert meter.stop()
    assert [call["flags"]["num_executions"] for call in calls(phone)] == ["1", "3", "6"]
    assert calls(phone)[0]["flags"]["cpu_threads"] == "3"


@needs_adb
def test_a_runner_that_tells_sums_only_gives_one_sample_a_round(
    device: Device, phone: Phone, tmp_path: Path
) -> None:
    with device.meter(of_executorch(tmp_path, "10 old"), 1, 0.0) as meter:
        assert meter.ready.cold_s is None
        assert meter.ready.first_ms == 110
        assert meter.run_round(9, 0.0).samples_ms == (20,), "100 ms more for 10 inferences"


@needs_adb
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("1 silent", "gave no times: .*EXECUTORCH_ENABLE_LOGGING=ON"),
        ("1 short", "exit code 134: .*Memory allocation failed"),
    ],
)
def test_a_runner_that_fails_is_quoted(
    device: Device, phone: Phone, tmp_path: Path, text: str, said: str
) -> None:
    with (
        pytest.raises(LaptopError, match=f"executor_runner .*{said}"),
        device.meter(of_executorch(tmp_path, text), 1, 0.0),
    ):
        pass
    assert left(phone) == {"laptop", "calls"}


@needs_adb
def test_a_runner_that_runs_less_than_it_was_told_is_an_error(
    device: Device, phone: Phone, tmp_path: Path
) -> None:
    with (
        pytest.raises(LaptopError, match="was to run 1 times after the first and reported no time"),
        device.meter(of_executorch(tmp_path, "1 once"), 1, 0.0),
    ):
        pass


@needs_adb
def test_a_phone_that_vanishes_while_it_is_measured_is_an_error(
    device: Device, phone: Phone, tmp_path: Path
) -> None:
    with device.meter(of_executorch(tmp_path, "1 new"), 1, 0.0) as meter:
        phone.vanish()
        with pytest.raises(LaptopError, match=r"could not run a command: .*4 tries"):
            meter.run_round(1, 0.0)


@needs_adb
def test_a_missing_runner_is_an_error_that_names_folder_and_page(
    device: Android, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    plain = Android(device.host)
    needed = (
        r"needs executor_runner, .* in .*/\.cache/laptop/android/arm64-v8a.*docs/guides/android\.md"
    )
    with pytest.raises(LaptopError, match=needed):
        plain.meter(of_executorch(tmp_path, "1 new"), 1, 0.0)
    assert device.runners is not None
    shutil.copytree(device.runners, tmp_path / ".cache/laptop/android/arm64-v8a")
    assert plain.probe().runtimes == device.probe().runtimes


def test_the_runners_on_this_machine_are_known_by_abi(tmp_path: Path) -> None:
    (tmp_path / "arm64-v8a").mkdir()
    (tmp_path / "arm64-v8a/executor_runner").write_text("")
    found = {"onnxruntime_perf_test": (), "executor_runner": ("arm64-v8a",)}
    assert android.runners_here(tmp_path) == found
    assert android.runners_here(tmp_path / "nowhere") == dict.fromkeys(found, ())


def test_a_serial_names_a_device() -> None:
    assert addresses.device("adb://0123").address == "adb://0123"
