"""Latency on an Android device that adb reaches: `adb://SERIAL`.

`docs/guides/android.md` says what the device and this machine need, and what is measured.
Heat is what Android's thermal service reports, whose status 0 is cool. Before Android 10 there is
no such service, and only the battery has a temperature.
"""

import re
import shutil
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from laptop.benchmarks.devices.android_meter import FILES, free_bytes, measured
from laptop.benchmarks.devices.android_runners import PAGE, RUNNERS, runner_of, runtimes_of
from laptop.benchmarks.devices.device import Device, Facts, Heat, Meter, Workload
from laptop.benchmarks.settings import DevicesConfig
from laptop.errors import BadInput, DeviceError
from laptop.files import lines, sha256
from laptop.hosts import adb
from laptop.hosts.adb import TMP, Adb
from laptop.hosts.commands import checked, has_files
from laptop.hosts.host import Host

ADDRESS = re.compile(r"adb://([\w.:() -]*)")
STATUSES = ("none", "light", "moderate", "severe", "critical", "emergency", "shutdown")
HOT = (0, 1, 3, 9)  # of android.os.Temperature's types: processor, GPU, skin, NPU
SANE_C = (0.0, 150.0)  # missing sensors report 0, NaN or worse
LOW_BATTERY = 20  # percent; about where phones begin to save power
SENSOR = re.compile(r"Temperature\{mValue=([^,]+), mType=(-?\d+), mName=([^,]*), mStatus=\d+\}")
HAL = "Current temperatures from HAL:"
PROPERTY = re.compile(r"^\[(.+?)\]: \[(.*)\]$", re.MULTILINE)


@dataclass(frozen=True)
class Thermal:
    """A report of the thermal service; None: it says nothing."""

    status: int | None = None  # 0 (none) to 6 (shutdown)
    temperature_c: float | None = None  # the hottest of processor, GPU, NPU and skin

    @property
    def throttled(self) -> str | None:
        if not self.status:
            return None
        name = f" ({STATUSES[self.status]})" if self.status < len(STATUSES) else ""
        return f"thermal status {self.status}{name}"


@dataclass(frozen=True)
class Battery:
    level: float | None = None  # percent
    is_powered: bool = False
    temperature_c: float | None = None

    def __str__(self) -> str:
        level = "?" if self.level is None else f"{self.level:.0f}"
        heat = "" if self.temperature_c is None else f", {self.temperature_c:.1f} °C"
        return f"battery {level} %, {'charging' if self.is_powered else 'not charging'}{heat}"


@dataclass(frozen=True)
class Android(Device):
    """A phone, and the folder on this machine with the programs built for it."""

    # in ONNX Runtime's own format, its runner takes each free dimension for 1
    refused: ClassVar[tuple[str, ...]] = ("coreml", "ort")
    host: Host
    runners: Path | None = None  # None: ~/.cache/laptop/android/ABI

    @property
    def address(self) -> str:
        return self.host.name

    def probe(self) -> Facts:
        properties = self._properties()
        battery, saves = self._battery()
        has_service = self._thermal().status is not None
        return Facts(
            name=phone_name(properties),
            os=f"Android {properties.get('ro.build.version.release', '?')} "
            f"(API {properties.get('ro.build.version.sdk', '?')})",
            runtimes=self._runtimes(self._folder(properties)),
            power_mode="battery saver" if saves else "normal",
            free_memory_bytes=read_memory(checked(self.host, "cat /proc/meminfo")),
            free_disk_bytes=free_bytes(self.host.run(f"df -k {TMP}").out),
            state=f"{battery}{'' if has_service else '; no thermal service'}",
            cores=int(cores) if (cores := self.host.run("nproc").out.strip()).isdigit() else None,
            how_to=f"{PAGE} says how to build it",
        )

    def heat(self) -> Heat:
        thermal, (battery, saves) = self._thermal(), self._battery()
        if thermal.temperature_c is not None:
            return Heat(not_ready(thermal, battery, saves), thermal.temperature_c)
        return Heat(not_ready(thermal, battery, saves), battery.temperature_c)

    def has(self, workload: Workload) -> bool:
        return has_files(self.host, runner_of(workload).files(workload), FILES)

    def meter(
        self, workload: Workload, warmup_iterations: int, warmup_s: float
    ) -> AbstractContextManager[Meter]:
        runner = runner_of(workload)
        program = self._program(runner.program)
        warmup = (warmup_iterations, warmup_s)
        return measured(self.host, workload, runner, program, warmup, self._warmth)

    def _program(self, name: str) -> list[Path]:
        """A runner on this machine, and the libraries in its folder."""
        folder = self._folder(self._properties())
        if not (folder / name).is_file():
            raise DeviceError(
                f"{self.address} needs {name}, built for it, which is not in {folder}. "
                f"{PAGE} says how to build it."
            )
        return [folder / name, *sorted(folder.glob("*.so"))]

    def _properties(self) -> dict[str, str]:
        return read_properties(checked(self.host, "getprop"))

    def _folder(self, properties: Mapping[str, str]) -> Path:
        return self.runners or folder_of(properties.get("ro.product.cpu.abi", ""))

    def _runtimes(self, folder: Path) -> dict[str, str]:
        """The runners for this device by runtime, each with its hash: they report no version."""
        return {
            name: f"{path.name} sha256:{sha256(path)[:12]}"
            for runtime, runner in RUNNERS.items()
            if (path := folder / runner.program).is_file()
            for name in runtimes_of(runtime)
        }

    def _thermal(self) -> Thermal:
        return read_thermal(self.host.run("dumpsys thermalservice").out)

    def _battery(self) -> tuple[Battery, bool]:
        """The battery, and whether the device saves power."""
        battery = read_battery(self.host.run("dumpsys battery").out)
        return battery, self.host.run("settings get global low_power").out.strip() == "1"

    def _warmth(self) -> tuple[float | None, str | None]:
        thermal = self._thermal()
        return thermal.temperature_c, thermal.throttled


def device(address: str, access: DevicesConfig, tries: int) -> Android:
    """The device with the address `adb://SERIAL`, not yet reached; `adb://` is the only one."""
    if not (match := ADDRESS.fullmatch(address)):
        raise BadInput(f"{address!r} is no device: use adb://SERIAL.")
    return Android(Adb(match[1], tries=tries))


def addresses() -> list[str]:
    """The devices that adb knows, in any state; none without adb."""
    if shutil.which("adb") is None:
        return []
    return [f"adb://{serial}" for serial, _ in adb.devices()]


def folder_of(abi: str) -> Path:
    """The folder of the runners that were built for an ABI, such as arm64-v8a."""
    return Path.home() / ".cache/laptop/android" / abi


def runners_here(folder: Path | None = None) -> dict[str, tuple[str, ...]]:
    """The ABIs for which this machine has each runner, by program."""
    root = folder or folder_of("")
    return {
        runner.program: tuple(sorted(p.parent.name for p in root.glob(f"*/{runner.program}")))
        for runner in RUNNERS.values()
    }


def not_ready(thermal: Thermal, battery: Battery, saves_power: bool) -> str | None:
    """Why a device should not be measured now; None if it can be."""
    reasons = [thermal.throttled] if thermal.throttled else []
    if saves_power:
        reasons.append("battery saver is on")
    if battery.level is not None and battery.level < LOW_BATTERY and not battery.is_powered:
        reasons.append(
            f"the battery is at {battery.level:.0f} % and not charging; {LOW_BATTERY} % are needed"
        )
    return "; ".join(reasons) or None


def read_properties(text: str) -> dict[str, str]:
    """Parse the output of `getprop`."""
    return dict(PROPERTY.findall(text))


def phone_name(properties: Mapping[str, str]) -> str:
    """The name of a phone, such as `Google Pixel 8 (Tensor G3)`."""
    names = [properties.get(f"ro.product.{key}", "") for key in ("manufacturer", "model")]
    chip = properties.get("ro.soc.model", "")  # since Android 12
    return " ".join([*filter(None, names), *([f"({chip})"] if chip else [])]) or "unknown device"


def read_memory(meminfo: str) -> int | None:
    """The available bytes in `/proc/meminfo`."""
    match = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo, re.MULTILINE)
    return 1024 * int(match[1]) if match else None


def read_thermal(text: str) -> Thermal:
    """Parse `dumpsys thermalservice`; cached temperatures count only if the HAL gives none."""
    status = re.search(r"^\s*Thermal Status: (\d+)", text, re.MULTILINE)
    before, _, current = text.partition(HAL)
    temperature_c = _hottest(current)
    return Thermal(
        int(status[1]) if status else None,
        _hottest(before) if temperature_c is None else temperature_c,
    )


def _hottest(text: str) -> float | None:
    celsius = (float(value) for value, kind, _ in SENSOR.findall(text) if int(kind) in HOT)
    return max((value for value in celsius if SANE_C[0] < value < SANE_C[1]), default=None)


def read_battery(text: str) -> Battery:
    """Parse `dumpsys battery`; makers append lines of their own, so the first of a key counts."""
    values: dict[str, str] = {}
    for line in lines(text):
        key, _, value = line.strip().partition(": ")
        values.setdefault(key, value)
    level, scale = (_number(values.get(key)) for key in ("level", "scale"))
    tenths = _number(values.get("temperature"))
    return Battery(
        None if level is None else 100 * level / (scale or 100),
        any(value == "true" for key, value in values.items() if key.endswith(" powered")),
        None if tenths is None else tenths / 10,
    )


def _number(text: str | None) -> float | None:
    return float(text) if text is not None and re.fullmatch(r"-?\d+", text) else None
