"""Devices by their address, and which of them can be reached.

    local                        this computer
    ssh://[user@]host[:port]     a Linux board or a Mac, by OpenSSH
    adb://SERIAL                 an Android phone, by adb
    ios://UDID                   an iPhone or iPad, from a Mac

The module of a device is imported on demand. It has

    device(address, access, tries) -> Device     the device, not yet reached; `BadInput` for an
                                                 address that is none
    addresses() -> list[str]                     the devices of its kind that this computer knows
"""

import importlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from laptop.benchmarks.devices.device import Device, Facts, Heat
from laptop.benchmarks.settings import DevicesConfig
from laptop.errors import BadInput, LaptopError
from laptop.records import Record

DEVICES = {  # modules in this folder by the form of their addresses
    "local": "computer",
    "ssh://[user@]host[:port]": "computer",
    "adb://SERIAL": "android",
    "ios://UDID": "ios",
}
DEFAULTS = DevicesConfig()
TRIES = 4  # calls before a connection that drops is an error


class DeviceModule(Protocol):
    """A module of devices."""

    def device(self, address: str, access: DevicesConfig, tries: int) -> Device:
        """The device with an address, not yet reached."""

    def addresses(self) -> list[str]:
        """The devices of this kind that this computer knows."""


@dataclass(frozen=True, kw_only=True)
class DeviceEntry(Record):
    """A device with its facts and heat, or the error of reaching it."""

    LEFT_OUT = frozenset({"facts", "heat", "error"})

    address: str
    facts: Facts | None = None
    heat: Heat | None = None
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class DeviceList(Record):
    """The report of `laptop devices`."""

    SCHEMA = "laptop.devices/1"

    devices: tuple[DeviceEntry, ...]


def device(address: str, access: DevicesConfig = DEFAULTS, tries: int = TRIES) -> Device:
    """The device with an address, not yet reached; `BadInput` for an address that is none."""
    kind = address.partition("://")[:2]
    for form, name in DEVICES.items():
        if form.partition("://")[:2] == kind:
            return _module(name).device(address, access, tries)
    *forms, last = DEVICES
    raise BadInput(f"{address!r} is no device: use {', '.join(forms)} or {last}.")


def _module(name: str) -> DeviceModule:
    module: DeviceModule = importlib.import_module(f"laptop.benchmarks.devices.{name}")
    return module


def known_addresses() -> list[str]:
    """This computer, hosts of the user's ssh configuration, phones that are connected."""
    names = dict.fromkeys(DEVICES.values())
    return [address for name in names for address in _module(name).addresses()]


def states(addresses: Sequence[str], access: DevicesConfig = DEFAULTS) -> DeviceList:
    """The states of devices, all of which are asked at once."""
    with ThreadPoolExecutor(max_workers=16) as pool:
        return DeviceList(devices=tuple(pool.map(partial(state, access=access), addresses)))


def state(address: str, access: DevicesConfig = DEFAULTS) -> DeviceEntry:
    """The state of one device, which is asked once: no second try after a lost connection."""
    try:
        target = device(address, access, tries=1)
        return DeviceEntry(address=address, facts=target.probe(), heat=target.heat())
    except LaptopError as e:
        return DeviceEntry(address=address, error=str(e))
