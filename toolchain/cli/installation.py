"""Look up installed packages, missing extras, and the known models on this machine.

The lists come from this package's own metadata (what `pyproject.toml` declares), so they cannot
fall behind it. Nothing here touches the network; torch is imported for the devices only, last.
"""

import os
import platform
import shutil
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from packaging.requirements import Requirement

from laptop import __version__
from laptop.models import locating
from laptop.records import Record

if TYPE_CHECKING:
    from rich.console import Console

DISTRIBUTION = "laptop-diff"
GIVES = {  # extra: what it is for; a test holds that each extra for users stands here
    "onnx": "export to ONNX, its parity and its latency on ONNX Runtime",
    "coreml": "export to Core ML packages, computed by an interpreter where no Mac is",
    "executorch": "export to ExecuTorch programs for phones (XNNPACK), and their parity",
    "tensorrt": "graphs for TensorRT, which itself comes from NVIDIA, with JetPack or the SDK",
    "train": "training data in Hugging Face datasets and in tar shards",
    "adam8bit": 'optimizer = "adamw-8bit" in a recipe\'s [train]',
    "optimum": "loading the ONNX folder with optimum's ONNX Runtime pipelines",
}
PROGRAMS = {
    "trtexec": "TensorRT engines on this machine",
    "ssh": "engines and measurements on a board",
    "adb": "measurements on Android devices",
}
RUNNERS_GIVE = {
    "onnxruntime_perf_test": "latency of ONNX on Android",
    "executor_runner": "latency of ExecuTorch programs on Android",
}


@dataclass(frozen=True, kw_only=True)
class Package(Record):
    """A needed distribution against what is installed."""

    name: str
    needed: str  # the range of versions, or "any"
    installed: str | None
    ok: bool


@dataclass(frozen=True, kw_only=True)
class Extra(Record):
    """An extra of this package: what it is for, its packages, and the command that installs it."""

    name: str
    gives: str
    packages: tuple[Package, ...]
    ok: bool
    install: str


@dataclass(frozen=True, kw_only=True)
class ModelRow(Record):
    """A known model; `local` is the folder with its weights, None if they must be fetched."""

    name: str
    title: str
    unet_params: int
    resolution: int  # pixels
    source: str
    local: str | None


@dataclass(frozen=True, kw_only=True)
class InstalledProgram(Record):
    """A program that some targets and devices use; `path` is None if it is missing."""

    name: str
    gives: str
    path: str | None


@dataclass(frozen=True, kw_only=True)
class AndroidRunner(Record):
    """A program that measures on Android devices; `abis` is empty if none is built."""

    name: str
    gives: str
    abis: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Processor(Record):
    """A device of torch; an Apple GPU shares the system's memory."""

    name: str
    title: str
    memory_bytes: int


@dataclass(frozen=True, kw_only=True)
class Disk(Record):
    """The disk of the current folder."""

    folder: str
    free_bytes: int


@dataclass(frozen=True, kw_only=True)
class Installation(Record):
    """Everything that `laptop doctor` prints."""

    SCHEMA = "laptop.doctor/1"

    laptop: str = __version__
    python: str = field(default_factory=platform.python_version)
    executable: str = sys.executable
    platform: str = field(default_factory=platform.platform)
    disk: Disk
    packages: tuple[Package, ...]
    extras: tuple[Extra, ...]
    models: tuple[ModelRow, ...]
    programs: tuple[InstalledProgram, ...]
    android_runners: tuple[AndroidRunner, ...]
    devices: tuple[Processor, ...] = ()


def report(*, devices: bool = True) -> Installation:
    """Look at this machine; the devices, for which torch is imported, last."""
    here = Path.cwd()
    return Installation(
        disk=Disk(folder=str(here), free_bytes=shutil.disk_usage(here).free),
        packages=core_packages(),
        extras=extras(),
        models=known_models(),
        programs=programs(),
        android_runners=android_runners(),
        devices=processors() if devices else (),
    )


def android_runners() -> tuple[AndroidRunner, ...]:
    """The programs that measure on Android devices."""
    from laptop.benchmarks.devices.android import runners_here

    return tuple(
        AndroidRunner(
            name=name, gives=f"{RUNNERS_GIVE[name]} (docs/guides/android.md)", abis=tuple(abis)
        )
        for name, abis in runners_here().items()
    )


def programs() -> tuple[InstalledProgram, ...]:
    """The programs that some targets and devices use."""
    places = f"{os.environ.get('PATH', os.defpath)}:/usr/src/tensorrt/bin:/opt/tensorrt/bin"
    return tuple(
        InstalledProgram(name=name, gives=gives, path=shutil.which(name, path=places))
        for name, gives in PROGRAMS.items()
    )


def known_models() -> tuple[ModelRow, ...]:
    """The models with a short name."""
    return tuple(
        ModelRow(
            name=name,
            title=model.title,
            unet_params=model.unet_params,
            resolution=model.resolution,
            source="this package" if model.source == str(locating.EMBEDDED) else model.source,
            local=_local_folder(model),
        )
        for name, model in locating.MODELS.items()
    )


def _local_folder(model: locating.NamedModel) -> str | None:
    """The folder that holds the model's weights on this machine; None when they must be fetched."""
    from huggingface_hub import try_to_load_from_cache

    folder = Path(model.source)
    if not folder.is_absolute():
        index = try_to_load_from_cache(model.source, "model_index.json")
        if not isinstance(index, str):
            return None
        folder = Path(index).parent
    return str(folder) if any(folder.glob("unet/*.safetensors")) else None


def _requirements() -> list[Requirement]:
    return [Requirement(text) for text in metadata.requires(DISTRIBUTION) or []]


def _package(requirement: Requirement) -> Package:
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        version = None
    return Package(
        name=requirement.name,
        needed=str(requirement.specifier) or "any",
        installed=version,
        ok=version is not None and requirement.specifier.contains(version, prereleases=True),
    )


def core_packages() -> tuple[Package, ...]:
    """The packages that every command may need."""
    return tuple(_package(r) for r in _requirements() if r.marker is None or r.marker.evaluate())


def extras() -> tuple[Extra, ...]:
    """Each extra of `GIVES`."""
    return tuple(
        Extra(
            name=name,
            gives=gives,
            packages=(packages := _packages_of(name)),
            ok=all(package.ok for package in packages),
            install=f"pip install '{DISTRIBUTION}[{name}]'",
        )
        for name, gives in GIVES.items()
    )


def _packages_of(extra: str) -> tuple[Package, ...]:
    return tuple(
        _package(r)
        for r in _requirements()
        if r.marker and not r.marker.evaluate() and r.marker.evaluate({"extra": extra})
    )


def processors() -> tuple[Processor, ...]:
    """The devices that torch can compute on."""
    import psutil
    import torch

    memory_bytes = psutil.virtual_memory().total
    title = f"{platform.machine()}, {psutil.cpu_count(logical=False)} cores"
    devices = [Processor(name="cpu", title=title, memory_bytes=memory_bytes)]
    for i in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(i)
        devices.append(Processor(name=f"cuda:{i}", title=card.name, memory_bytes=card.total_memory))
    if torch.backends.mps.is_available():
        devices.append(Processor(name="mps", title="Apple GPU", memory_bytes=memory_bytes))
    return tuple(devices)


def print_report(console: "Console | None" = None) -> None:
    """Print what is installed as text, the quick parts first."""
    out, machine = console or _stdout(), report(devices=False)
    out.print(f"laptop {machine.laptop}, Python {machine.python}, {machine.platform}")
    out.print(f"Free disk space in {machine.disk.folder}: {machine.disk.free_bytes / 1e9:.1f} GB\n")
    _print_packages(machine.packages, out)
    _print_extras(machine.extras, out)
    _print_models(machine.models, out)
    rows = [(p.name, p.gives, p.path or "missing") for p in machine.programs]
    rows += [(r.name, r.gives, ", ".join(r.abis) or "missing") for r in machine.android_runners]
    _print_table(("program", "gives", "found"), rows, out)
    devices = [(d.name, d.title, f"{d.memory_bytes / 1e9:.1f} GB") for d in processors()]
    _print_table(("device", "what", "memory"), devices, out)


def print_models(console: "Console | None" = None) -> None:
    """Print the known models as a table."""
    _print_models(known_models(), console or _stdout())


def _print_models(models: Iterable[ModelRow], out: "Console") -> None:
    rows = [
        (
            m.name,
            m.title,
            f"{m.unet_params / 1e6:,.1f} M",
            f"{m.resolution}",
            m.source,
            "yes" if m.local else "no",
        )
        for m in models
    ]
    _print_table(("model", "what", "U-Net", "pixels", "source", "local"), rows, out)


def _print_packages(packages: tuple[Package, ...], out: "Console") -> None:
    rows = [(p.name, p.needed, _installed(p)) for p in packages]
    _print_table(("package", "needed", "installed"), rows, out)
    if wrong := [p for p in packages if not p.ok]:
        names = " ".join(f"'{p.name}{p.needed}'" for p in wrong)
        out.print(f"Repair with: pip install {names}\n", markup=False, soft_wrap=True)


def _installed(package: Package) -> str:
    version = package.installed or "missing"
    return version if package.ok or package.installed is None else f"{version} (does not fit)"


def _print_extras(extras: tuple[Extra, ...], out: "Console") -> None:
    rows = [
        (
            f"[{extra.name}]",
            extra.gives,
            ", ".join(f"{p.name} {_installed(p)}" for p in extra.packages),
            "yes" if extra.ok else "no",
        )
        for extra in extras
    ]
    _print_table(("extra", "gives", "packages", "installed"), rows, out)
    for extra in extras:
        if not extra.ok:  # outside the table, where a narrow terminal would cut it
            line = f"For {extra.name}: {extra.install}"
            out.print(line, markup=False, soft_wrap=True)


def _print_table(columns: tuple[str, ...], rows: Iterable[tuple[str, ...]], out: "Console") -> None:
    from rich.box import SIMPLE
    from rich.table import Column, Table
    from rich.text import Text

    table = Table(*(Column(c, overflow="fold") for c in columns), box=SIMPLE, pad_edge=False)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))  # Text: "[onnx]" is no markup here
    out.print(table)


def _stdout() -> "Console":
    from rich.console import Console

    return Console(highlight=False)
