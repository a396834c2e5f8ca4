"""Latency on an iPhone or iPad, from the Mac that it is connected to: `ios://UDID`.

coremltools builds an app of Apple's, signs it with the user's team, starts it on the device, and
asks it to load packages and to predict (`ios_app.py`); the app reports how long each took. See
https://apple.github.io/coremltools/docs-guides/source/mlmodel-benchmarking.html (experimental).

It has never run on a Mac: tests run coremltools' own classes against a stand-in of `devicectl` and
of the app.
"""

import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from laptop.benchmarks.devices.device import Device, Facts, Workload
from laptop.benchmarks.devices.ios_app import (
    App,
    PackageMeter,
    RemotePhone,
    failures,
    inputs_of,
    remote_device,
)
from laptop.benchmarks.settings import DevicesConfig
from laptop.errors import BadInput, DeviceError, LaptopError, MissingExtra, Unsupported
from laptop.export.to_coreml.target import library

ADDRESS = re.compile(r"ios://([\w-]+)")
UNITS = {  # of a runtime, by the name after its colon: coremltools' ComputeUnit
    "": "ALL",
    "cpu": "CPU_ONLY",
    "gpu": "CPU_AND_GPU",
    "ane": "CPU_AND_NE",
}
PROGRAMS = {"xcrun": "Xcode", "devicectl": "devicectl on PATH", "xcodebuild": "xcodebuild"}
APP = App()  # one at a time: it is on the device's screen


def device(address: str, access: DevicesConfig, tries: int) -> "Apple":
    """The device with the address `ios://UDID`, not yet reached."""
    if not (match := ADDRESS.fullmatch(address)):
        raise BadInput(f"{address!r} is no device: use ios://UDID.")
    return Apple(match[1], access.team)


def addresses() -> list[str]:
    """The iPhones and iPads that this Mac knows; none on another computer."""
    with suppress(LaptopError):
        return [f"ios://{known.udid}" for known in listed()]
    return []


@dataclass(frozen=True)
class Apple(Device):
    """An iPhone or iPad."""

    udid: str
    team: str = ""  # Apple's development team that signs the app, such as A1B2C3D4E5

    @property
    def address(self) -> str:
        return f"ios://{self.udid}"

    def probe(self) -> Facts:
        phone = self._phone()
        version = f"Core ML of iOS {phone.os_version}"
        return Facts(
            phone.name,
            f"iOS {phone.os_version} ({phone.os_build_number})",
            {f"coreml:{unit}".rstrip(":"): version for unit in UNITS},
            state=f"{phone.state.value}; developer mode {phone.developer_mode_state or 'unknown'}",
            how_to="--to coreml exports what runs there",
        )

    def check_settings(self) -> None:
        if not self.team:
            raise BadInput(
                f"{self.address}: the app that measures there must be signed. Set "
                '[devices] team = "A1B2C3D4E5", your Apple development team, in a recipe.'
            )

    @contextmanager
    def meter(
        self, workload: Workload, warmup_iterations: int, warmup_s: float
    ) -> Iterator[PackageMeter]:
        self.check_settings()
        ct = library()
        units = ct.ComputeUnit[UNITS[workload.runtime.partition(":")[2]]]
        model = ct.models.MLModel(workload.source, compute_units=units, skip_model_load=True)
        inputs = inputs_of(model.get_spec().description, workload)
        with APP.running(self.address, self._phone(), self.team):
            meter = PackageMeter(APP, model, inputs, workload)
            try:
                meter.warm_up(warmup_iterations, warmup_s)
                yield meter
            finally:
                meter.stop()

    def _phone(self) -> RemotePhone:
        """The device as devicectl knows it, connected; `LaptopError` if it is not."""
        phones = {phone.udid: phone for phone in listed()}
        if (phone := phones.get(self.udid)) and not is_connected(phone):
            remote = remote_device()
            with suppress(*failures()):  # devicectl may open its tunnel when it is asked something
                command = f"xcrun devicectl device info details --device {phone.identifier}"
                remote._DeviceCtl._run_command(command)
            phones = {phone.udid: phone for phone in listed()}
        if self.udid not in phones or not is_connected(phones[self.udid]):
            others = [f"ios://{p.udid} ({p.name}, {p.state.value})" for p in phones.values()]
            raise DeviceError(
                f"{self.address} is not connected; there is {', '.join(others) or 'no device'}. "
                "Connect it by cable, unlock it, trust this Mac, and turn on developer mode in its "
                "settings."
            )
        return phones[self.udid]


def listed() -> list[RemotePhone]:
    """iPhones and iPads that devicectl knows.

    Raises `Unsupported` without Xcode on a Mac, `MissingExtra` without coremltools.
    """
    if missing := missing_programs():
        raise Unsupported(
            "an iPhone is measured from a Mac with Xcode, to which it is connected, by "
            f"coremltools' remote device; missing here: {', '.join(missing)}."
        )
    try:
        remote = remote_device()
    except ImportError as e:
        raise MissingExtra(
            "an iPhone is measured by coremltools: pip install 'laptop-diff[coreml]'"
        ) from e
    try:
        devices = remote.Device.get_devices()
    except failures() as e:
        raise DeviceError(f"`xcrun devicectl list devices` failed: {e}") from e
    return [d for d in devices if d.type in (remote.DeviceType.IPHONE, remote.DeviceType.IPAD)]


def is_connected(phone: RemotePhone) -> bool:
    """Whether devicectl reaches a device."""
    return bool(phone.state == remote_device().DeviceState.CONNECTED)


def missing_programs() -> list[str]:
    """What this computer lacks to measure on an iPhone."""
    missing = [what for program, what in PROGRAMS.items() if shutil.which(program) is None]
    return [*([] if sys.platform == "darwin" else ["a Mac (this is not one)"]), *missing]
