"""The state of a computer: name, runtimes, heat, load, power. Linux and macOS.

This file also runs on boards, where it is sent together with `worker.py`: Python 3.9 and its
standard library are enough. What a system does not report is None.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TypedDict

SYS = Path("/sys")
NO_LIMIT = 1 << 20
SLOWED = re.compile("cpu|gpu|processor|devfreq|soc", re.I)  # cooling by slowing down, not by a fan
PROVIDERS = {  # of ONNX Runtime, by the name that a runtime has after its colon
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "coreml": "CoreMLExecutionProvider",
    "xnnpack": "XnnpackExecutionProvider",
    "qnn": "QNNExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
    "directml": "DmlExecutionProvider",
}
TRTEXEC = ("/usr/src/tensorrt/bin", "/opt/tensorrt/bin")  # of JetPack, and of NVIDIA's containers
RAIL = re.compile(r"(\w+) (\d+)(?:mW)?/\d+(?:mW)?(?!\w)")  # of tegrastats: now/average, in mW
WHOLE = ("VDD_IN", "POM_5V_IN", "VIN")  # rails that hold the whole board


class HeatReading(TypedDict):
    """The values of `device.Heat`."""

    why: str | None
    temperature_c: float | None


class StateReading(TypedDict):
    """The values of `device.DeviceState`."""

    temperature_c: float | None
    throttled: str | None
    others: float | None
    power_w: float | None


def facts() -> dict[str, object]:
    """The values of `device.Facts` for this computer."""
    return {
        "name": name(),
        "os": f"{platform.system()} {platform.machine()}",
        "runtimes": runtimes(),
        "power_mode": power_mode(),
        "free_memory_bytes": free_memory_bytes(),
        "free_disk_bytes": shutil.disk_usage(Path.home()).free,
        "state": jetpack(),
        "cores": cores(),
        "accelerator": accelerator(),
    }


def name() -> str:
    """The board, or the processor as people name it."""
    board = Path("/proc/device-tree/model")
    if board.is_file():
        return board.read_text().strip("\0 \n")
    processor = None
    if sys.platform == "darwin":
        processor = _output("sysctl", "-n", "machdep.cpu.brand_string")
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = (line.partition(":") for line in cpuinfo.read_text().split("\n"))
        processor = next((value.strip() for key, _, value in lines if "model name" in key), None)
    return f"{processor or platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def accelerator() -> str | None:
    """The names of NVIDIA's GPUs."""
    names = _output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader")
    return ", ".join(names.split("\n")) if names else None


def cores(limit: Path = SYS / "fs/cgroup/cpu.max") -> int:
    """How many cores this process may use, by its affinity and its container's share of time."""
    quota, _, period = (_text(limit) or "").partition(" ")
    allowed = int(quota) // int(period) if quota.isdigit() and period.isdigit() else NO_LIMIT
    return max(1, min(allowed, all_cores()))


def all_cores() -> int:
    """How many cores this process may run on."""
    return len(usable()) or os.cpu_count() or 1


def usable() -> set[int]:
    """The numbers of those cores; empty if the system does not say."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()


def runtimes() -> dict[str, str]:
    """Versions of what can run artifacts here, by the runtime's name."""
    from importlib import metadata

    versions = onnxruntimes()
    with contextlib.suppress(metadata.PackageNotFoundError):
        versions["executorch"] = metadata.version("executorch")
    if path := trtexec():
        banner = re.search(r"TensorRT v\d[\d.]*", _output(path, "--help") or "")
        versions["tensorrt"] = banner[0] if banner else "unknown"
    return versions


def onnxruntimes() -> dict[str, str]:
    """Versions of ONNX Runtime by provider; it is imported, as its packages have many names."""
    no_telemetry()
    try:
        import onnxruntime
    except ImportError as e:  # not there; or of another numpy, or without its CUDA
        if e.name != "onnxruntime":
            print(f"onnxruntime does not load: {e}", file=sys.stderr)
        return {}
    if not hasattr(onnxruntime, "get_available_providers"):  # a folder that is called so
        return {}
    available = onnxruntime.get_available_providers()
    names = ["onnxruntime", *(f"onnxruntime:{k}" for k, v in PROVIDERS.items() if v in available)]
    return dict.fromkeys(names, onnxruntime.__version__)


def no_telemetry() -> None:
    """Switch off the telemetry of ONNX Runtime, which sends what it does to Microsoft.

    Must be called before it is imported.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


def trtexec() -> str | None:
    """The path of TensorRT's program: on the PATH, or where NVIDIA installs it."""
    return shutil.which("trtexec", path=os.pathsep.join([os.environ.get("PATH", ""), *TRTEXEC]))


def power_mode() -> str | None:
    """The power mode of a Jetson (`nvpmodel -q`), else how Linux chooses the frequency."""
    scaling = SYS / "devices/system/cpu/cpu0/cpufreq"
    output = _output("nvpmodel", "-q")
    mode = nvpmodel(output) if output else _text(scaling / "scaling_governor")
    return f"{mode}, fixed clocks" if mode and has_fixed_clocks(scaling) else mode


def has_fixed_clocks(scaling: Path) -> bool:
    """Whether the processor's frequency cannot change, as after `jetson_clocks`."""
    least, most = (_number(scaling / f"scaling_{limit}_freq") for limit in ("min", "max"))
    return least is not None and least == most


def nvpmodel(text: str) -> str | None:
    """Parse `MAXN` from `NV Power Mode: MAXN` and its number in the next line."""
    match = re.search(r"Power Mode: *(\S+)", text)
    return match[1] if match else None


def jetpack() -> str | None:
    """The versions of JetPack and its Linux on a Jetson."""
    release = Path("/etc/nv_tegra_release")
    if not release.is_file():
        return None
    version = _output("dpkg-query", "-W", "-f=${Version}", "nvidia-jetpack")
    return f"JetPack {version or 'unknown'}, {l4t(release.read_text())}"


def l4t(text: str) -> str:
    """Parse `L4T 36.3.0` from `# R36 (release), REVISION: 3.0, GCID: …`."""
    match = re.search(r"R(\d+) .*REVISION: *([\d.]+)", text)
    return f"L4T {match[1]}.{match[2]}" if match else "L4T unknown"


def free_memory_bytes() -> int | None:
    """Bytes of memory that programs may still take; None where the system does not say."""
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        match = re.search(r"MemAvailable: *(\d+) kB", meminfo.read_text())
        return int(match[1]) * 1024 if match else None
    output = _output("vm_stat") or ""  # macOS
    pages = re.findall(r"Pages (?:free|inactive|speculative): +(\d+)", output)
    size = re.search(r"page size of (\d+)", output)
    return sum(map(int, pages)) * int(size[1]) if size else None


def heat(root: Path = SYS) -> HeatReading:
    """The hottest sensor in °C, and `why` the computer is not ready: it has slowed down."""
    zones = [_number(path) for path in root.glob("class/thermal/thermal_zone*/temp")]
    celsius = [value / 1000 for value in zones if value is not None]
    return {"why": _slowed(root), "temperature_c": max(celsius, default=None)}


def _slowed(root: Path) -> str | None:
    for device in sorted(root.glob("class/thermal/cooling_device*")):
        kind, state = _text(device / "type"), _number(device / "cur_state")
        if kind and SLOWED.search(kind) and "fan" not in kind.lower() and (state or 0) > 0:
            return f"{kind} is slowed down, by {state:g} steps"
    if sys.platform == "darwin":
        return pmset(_output("pmset", "-g", "therm") or "")
    return None


def pmset(text: str) -> str | None:
    """Whether macOS says that it has limited the processor's speed."""
    match = re.search(r"CPU_Speed_Limit\s*=\s*(\d+)", text)
    percent = int(match[1]) if match else 100
    return f"the processor is limited to {percent} %" if percent < 100 else None


def throttles(root: Path = SYS) -> int:
    """How often the processors have slowed themselves down since the system began (Intel)."""
    pattern = "devices/system/cpu/cpu*/thermal_throttle/core_throttle_count"
    return int(sum(_number(path) or 0 for path in root.glob(pattern)))


class Monitor:
    """Observes the computer from its creation until `read`, while something is timed."""

    def __init__(self) -> None:
        self.throttles = throttles()
        self.power = _Power()
        self.busy, self.own, self.start = busy_s(), own_s(), time.perf_counter()

    def read(self) -> StateReading:
        """The heat at the end; load by others and power in between."""
        elapsed = time.perf_counter() - self.start
        own, busy = own_s() - self.own, busy_s()
        others = None
        if busy is not None and self.busy is not None and elapsed > 0.2:  # it counts 10 ms each
            others = max(0.0, busy - self.busy - own) / (elapsed * all_cores())
        now, times = heat(), throttles() - self.throttles
        slowed = f"the processor slowed down {times} times" if times else now["why"]
        return {
            "temperature_c": now["temperature_c"],
            "throttled": slowed,
            "others": others,
            "power_w": self.power.stop(),
        }


def busy_s(stat: Path = Path("/proc/stat")) -> float | None:
    """Seconds in which usable cores were not idle or were taken by other virtual machines."""
    if not stat.is_file():
        return None
    rows = (line.split() for line in stat.read_text().split("\n") if re.match(r"cpu\d", line))
    ticks = 0
    for core, user, nice, system, _, _, *more in rows:
        if int(core[3:]) in usable():
            ticks += int(user) + int(nice) + int(system) + sum(int(x) for x in more[:3])
    return ticks / os.sysconf("SC_CLK_TCK")


def own_s() -> float:
    """Processor seconds of this process, its threads and the children that have ended."""
    times = os.times()
    return sum(times[:4])


class _Power:
    """Runs Jetson's `tegrastats` meanwhile; does nothing where it is not installed."""

    def __init__(self) -> None:
        self.process = None
        if program := shutil.which("tegrastats"):
            self.file = tempfile.TemporaryFile("w+")  # noqa: SIM115, stop closes it
            command = [program, "--interval", "100"]
            self.process = subprocess.Popen(command, stdout=self.file, stderr=subprocess.DEVNULL)

    def stop(self) -> float | None:
        """End it; returns the mean power in watts."""
        if self.process is None:
            return None
        self.process.terminate()
        self.process.wait()
        self.file.seek(0)
        with self.file:
            return power_w(self.file.read())


def power_w(text: str) -> float | None:
    """The mean power that tegrastats printed: the rail of the whole board, else the sum of all."""
    sums = []
    for line in text.split("\n"):
        rails = {rail: int(mw) for rail, mw in RAIL.findall(line)}
        whole = [mw for rail, mw in rails.items() if rail in WHOLE]
        if rails:
            sums.append((whole or [sum(rails.values())])[0] / 1000)
    return sum(sums) / len(sums) if sums else None


def _output(*command: str) -> str | None:
    """The output of a program; None if it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _text(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None


def _number(path: Path) -> float | None:
    text = _text(path)
    try:
        return float(text) if text else None
    except ValueError:
        return None


if __name__ == "__main__":
    print(json.dumps(facts() if sys.argv[1] == "facts" else heat()))
