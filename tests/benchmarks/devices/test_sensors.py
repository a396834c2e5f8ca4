"""How a computer is: what its files and programs say, as they are documented."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from laptop.benchmarks.devices import sensors


def write(root: Path, name: str, text: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_the_hottest_zone_counts_and_a_processor_that_is_slowed_down(tmp_path: Path) -> None:
    assert sensors.heat(tmp_path) == {"why": None, "temperature_c": None}
    write(tmp_path, "class/thermal/thermal_zone0/temp", "41500\n")
    write(tmp_path, "class/thermal/thermal_zone1/temp", "63250\n")
    write(tmp_path, "class/thermal/thermal_zone2/temp", "broken")
    for i, (kind, state) in enumerate((("pwm-fan", 3), ("LCD", 7), ("cpufreq-cpu0", 0))):
        write(tmp_path, f"class/thermal/cooling_device{i}/type", kind)
        write(tmp_path, f"class/thermal/cooling_device{i}/cur_state", str(state))
    assert sensors.heat(tmp_path) == {"why": None, "temperature_c": 63.25}
    write(tmp_path, "class/thermal/cooling_device2/cur_state", "2")
    assert sensors.heat(tmp_path)["why"] == "cpufreq-cpu0 is slowed down, by 2 steps"


def test_onnx_runtime_is_known_whatever_its_package_is_called(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["OpenVINOExecutionProvider", "CPUExecutionProvider"]
    openvino = SimpleNamespace(__version__="1.24.1", get_available_providers=lambda: names)
    monkeypatch.setitem(sys.modules, "onnxruntime", openvino)
    assert sensors.onnxruntimes() == {"onnxruntime": "1.24.1", "onnxruntime:openvino": "1.24.1"}
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert sensors.onnxruntimes() == {}
    assert not capsys.readouterr().err


def test_nothing_is_told_to_others_and_nothing_kept_for_it(tmp_path: Path) -> None:
    telling = ("ORT_DISABLE_TELEMETRY", "HF_HUB_DISABLE_TELEMETRY")
    bare = {k: v for k, v in os.environ.items() if k not in telling} | {"HOME": str(tmp_path)}
    for script in (
        "import laptop, onnxruntime, os; assert os.environ['HF_HUB_DISABLE_TELEMETRY']",
        f"import sys; sys.path.insert(0, {str(Path(sensors.__file__).parent)!r})\n"
        "import sensors; assert sensors.onnxruntimes()",  # as on a board
    ):
        subprocess.run([sys.executable, "-c", script], check=True, env=bare)
        assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_cores_are_those_that_a_container_may_use(tmp_path: Path) -> None:
    limit = tmp_path / "cpu.max"
    everything = sensors.cores(limit)
    limit.write_text("max 100000\n")
    assert sensors.cores(limit) == everything
    limit.write_text("50000 100000\n")
    assert sensors.cores(limit) == 1
    limit.write_text("100000 100000\n")
    assert sensors.cores(limit) == 1


def test_clocks_that_cannot_change_are_told(tmp_path: Path) -> None:
    write(tmp_path, "scaling_min_freq", "2000")
    write(tmp_path, "scaling_max_freq", "2000")
    assert sensors.has_fixed_clocks(tmp_path)
    write(tmp_path, "scaling_min_freq", "800")
    assert not sensors.has_fixed_clocks(tmp_path)
    assert not sensors.has_fixed_clocks(tmp_path / "none")


def test_throttles_of_all_processors_add_up(tmp_path: Path) -> None:
    for cpu, count in ((0, 3), (1, 4)):
        name = f"devices/system/cpu/cpu{cpu}/thermal_throttle/core_throttle_count"
        write(tmp_path, name, f"{count}\n")
    assert sensors.throttles(tmp_path) == 7


@pytest.mark.parametrize(
    ("line", "watts"),
    [
        ("GR3D_FREQ 0% VDD_IN 4825mW/4700mW VDD_CPU_GPU_CV 1108mW/1100mW", 4.825),
        ("GR3D_FREQ 0% POM_5V_IN 3216/3216 POM_5V_GPU 0/0 POM_5V_CPU 402/402", 3.216),
        ("VDD_GPU_SOC 3190mW/3190mW VDD_CPU_CV 798mW/798mW VIN_SYS_5V0 4434mW/4434mW", 8.422),
        ("RAM 2448/7852MB (lfb 1x4MB) SWAP 0/3926MB", None),
    ],
)
def test_power_is_that_of_the_board_or_of_all_its_rails(line: str, watts: float | None) -> None:
    assert sensors.power_w(f"{line}\n{line}\n") == (pytest.approx(watts) if watts else None)


def test_what_a_jetson_says_of_itself() -> None:
    assert sensors.nvpmodel("NV Power Mode: MAXN\n0") == "MAXN"
    assert sensors.nvpmodel("NVPM WARN: fan mode is not set") is None
    release = "# R36 (release), REVISION: 3.0, GCID: 36923193, BOARD: generic"
    assert sensors.l4t(release) == "L4T 36.3.0"


def test_a_mac_that_limits_its_processor_says_so() -> None:
    assert sensors.pmset("CPU_Scheduler_Limit \t= 100\n\tCPU_Speed_Limit \t= 100\n") is None
    limited = "CPU_Available_CPUs \t= 8\n\tCPU_Speed_Limit \t= 62\n"
    assert sensors.pmset(limited) == "the processor is limited to 62 %"


def test_time_of_processors_that_are_not_idle_includes_what_others_took(tmp_path: Path) -> None:
    stat = tmp_path / "stat"
    mine, other = min(sensors.usable()), max(sensors.usable()) + 1
    row = "100 20 30 9000 50 1 2 40 0 0"
    stat.write_text(f"cpu  900 0 0 0 0 0 0 0 0 0\ncpu{mine} {row}\ncpu{other} {row}\n")
    assert sensors.busy_s(stat) == pytest.approx((100 + 20 + 30 + 1 + 2 + 40) / 100)
    assert sensors.busy_s(tmp_path / "none") is None
