"""Devices by their address, and which of them can be reached.

local                        this computer
ssh://[user@]host[:port]     a Linux board or a Mac, by OpenSSH
adb://SERIAL                 an Android phone, by adb
ios://UDID                   an iPhone or iPad, from a Mac
"""

import os
import re
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from laptop.benchmarks.devices import android, ios
from laptop.benchmarks.devices.computer import Computer
from laptop.benchmarks.devices.device import Device, Facts, Heat
from laptop.benchmarks.settings import DevicesConfig
from laptop.errors import BadInput, LaptopError
from laptop.hosts import adb, ssh
from laptop.hosts.place import Local
from laptop.hosts.ssh import Ssh
from laptop.records import Record

FORMS = "local, ssh://[user@]host[:port], adb://SERIAL or ios://UDID"
SSH_CONFIG = Path("~/.ssh/config")
ADB = re.compile(r"adb://([\w.:() -]*)")
IOS = re.compile(r"ios://([\w-]+)")
DEFAULTS = DevicesConfig()
HOST, INCLUDE = (re.compile(rf"^\s*{word}[\s=]+([^#]+)", re.I) for word in ("host", "include"))


def device(address: str, access: DevicesConfig = DEFAULTS) -> Device:
    """The device behind an address, not yet reached; `BadInput` where it is none."""
    if udid := IOS.fullmatch(address):
        return ios.Apple(udid[1], access.team)
    if serial := ADB.fullmatch(address):
        return android.device(serial[1])
    if not (address == "local" or address.startswith("ssh://")):
        raise BadInput(f"{address!r} is no device: use {FORMS}.")
    where = ssh.place(address)
    assert isinstance(where, Local | Ssh)
    return Computer(where, access.python)


def known() -> list[str]:
    """Addresses: this computer, hosts of the user's ssh configuration, phones on a cable."""
    return ["local", *(f"ssh://{host}" for host in ssh_hosts()), *phones(), *apples()]


def phones() -> list[str]:
    """Addresses of the devices that adb knows, whatever their state; none without adb."""
    if shutil.which("adb") is None:
        return []
    return [f"adb://{serial}" for serial, _ in adb.devices()]


def apples() -> list[str]:
    """Addresses of iPhones and iPads that this Mac knows; none where they cannot be asked for."""
    with suppress(LaptopError):
        return [f"ios://{found.udid}" for found in ios.listed()]
    return []


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


def states(addresses: Sequence[str], access: DevicesConfig = DEFAULTS) -> DeviceList:
    """The states of devices, all of which are asked at once."""
    with ThreadPoolExecutor(max_workers=16) as pool:
        return DeviceList(devices=tuple(pool.map(partial(state, access=access), addresses)))


def state(address: str, access: DevicesConfig = DEFAULTS) -> DeviceEntry:
    """The state of one device, which is asked once: no second try after a lost connection."""
    try:
        target = device(address, access)
        match target:
            case Computer(where=Ssh() as where):
                target = replace(target, where=replace(where, tries=1))
            case android.Android(place=adb.Adb() as place):
                target = replace(target, place=replace(place, tries=1))
        return DeviceEntry(address=address, facts=target.probe(), heat=target.heat())
    except LaptopError as e:
        return DeviceEntry(address=address, error=str(e))


def ssh_hosts(config: Path = SSH_CONFIG) -> list[str]:
    """The hosts that the user's ssh configuration and what it includes name, without patterns."""
    names = (name for line in _lines(config.expanduser(), set()) for name in _words(HOST, line))
    return list(dict.fromkeys(name for name in names if re.fullmatch(r"\w[\w.-]*", name)))


def _lines(config: Path, read: set[Path]) -> Iterator[str]:
    """Of a configuration, with those of the files that it includes in their place, each once."""
    if config in read or not config.is_file() or not os.access(config, os.R_OK):
        return
    read.add(config)
    for line in config.read_text(encoding="utf-8", errors="replace").split("\n"):
        for included in _words(INCLUDE, line):
            # as ssh has it: beside the user's configuration, wherever the including file lies
            name = os.path.expanduser(included)  # noqa: PTH111, of an unknown user it stays as it is
            pattern = SSH_CONFIG.expanduser().parent / name
            root = Path(pattern.anchor)
            for path in sorted(root.glob(str(pattern.relative_to(root)))):
                yield from _lines(path, read)
        yield line


def _words(keyword: re.Pattern[str], line: str) -> list[str]:
    """The arguments of a line that begins with the keyword; none of others."""
    found = keyword.match(line)
    return [word for word in re.split(r'[\s"]+', found[1]) if word] if found else []
