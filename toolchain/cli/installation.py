"""What is installed, what a missing extra would give, and which known models are on this machine.

The lists come from this package's own metadata (what `pyproject.toml` declares), so they cannot
fall behind it. Nothing here touches the network; torch is imported for the devices only, last.
"""

import os
import platform
import shutil
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packaging.requirements import Requirement

from laptop import __version__
from laptop.models import locating

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


def report() -> dict[str, Any]:
    """All that `laptop doctor` says, as JSON can hold it."""
    return {
        "schema": "laptop.doctor/1",
        **_system(),
        "packages": core_packages(),
        "extras": extras(),
        **models_report(),
        "programs": programs(),
        "android_runners": android_runners(),
        "devices": devices(),
    }


def android_runners() -> list[dict[str, Any]]:
    """Programs that measure on Android devices, built for them; `abis` is empty without any."""
    from laptop.benchmarks.devices.android import runners_here

    return [
        {
            "name": name,
            "gives": f"{RUNNERS_GIVE[name]} (docs/guides/android.md)",
            "abis": list(abis),
        }
        for name, abis in runners_here().items()
    ]


def programs() -> list[dict[str, Any]]:
    """Programs that some targets and devices use; `path` is None where one is missing."""
    places = f"{os.environ.get('PATH', os.defpath)}:/usr/src/tensorrt/bin:/opt/tensorrt/bin"
    return [
        {"name": name, "gives": gives, "path": shutil.which(name, path=places)}
        for name, gives in PROGRAMS.items()
    ]


def models_report() -> dict[str, Any]:
    """The known models; `local` is the folder with the weights, None when they must be fetched."""
    return {
        "models": [
            {
                "name": name,
                "title": model.title,
                "unet_params": model.unet_params,
                "resolution": model.resolution,
                "source": "this package"
                if model.source == str(locating.EMBEDDED)
                else model.source,
                "local": _local_folder(model),
            }
            for name, model in locating.MODELS.items()
        ]
    }


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


def _system() -> dict[str, Any]:
    here = Path.cwd()
    return {
        "laptop": __version__,
        "python": platform.python_version(),
        "executable": sys.executable,
        "platform": platform.platform(),
        "disk": {"folder": str(here), "free_bytes": shutil.disk_usage(here).free},
    }


def _requirements() -> list[Requirement]:
    return [Requirement(text) for text in metadata.requires(DISTRIBUTION) or []]


def _package(requirement: Requirement) -> dict[str, Any]:
    """One requirement against what is installed."""
    try:
        found = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        found = None
    return {
        "name": requirement.name,
        "needed": str(requirement.specifier) or "any",
        "installed": found,
        "ok": found is not None and requirement.specifier.contains(found, prereleases=True),
    }


def core_packages() -> list[dict[str, Any]]:
    """The packages that every command may need: name, needed range, installed version, ok."""
    return [_package(r) for r in _requirements() if r.marker is None or r.marker.evaluate()]


def extras() -> list[dict[str, Any]]:
    """Each extra of `GIVES`: what it gives, its packages, whether they are there, the command."""
    return [
        {
            "name": name,
            "gives": gives,
            "packages": (packages := _packages_of(name)),
            "ok": all(p["ok"] for p in packages),
            "install": f"pip install '{DISTRIBUTION}[{name}]'",
        }
        for name, gives in GIVES.items()
    ]


def _packages_of(extra: str) -> list[dict[str, Any]]:
    return [
        _package(r)
        for r in _requirements()
        if r.marker and not r.marker.evaluate() and r.marker.evaluate({"extra": extra})
    ]


def devices() -> list[dict[str, Any]]:
    """What torch can compute on: name, description, memory (an Apple GPU shares the system's)."""
    import psutil
    import torch

    found: list[dict[str, Any]] = [
        {
            "name": "cpu",
            "title": f"{platform.machine()}, {psutil.cpu_count(logical=False)} cores",
            "memory_bytes": psutil.virtual_memory().total,
        }
    ]
    for i in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(i)
        found.append({"name": f"cuda:{i}", "title": card.name, "memory_bytes": card.total_memory})
    if torch.backends.mps.is_available():
        found.append(
            {"name": "mps", "title": "Apple GPU", "memory_bytes": found[0]["memory_bytes"]}
        )
    return found


def print_report(console: "Console | None" = None) -> None:
    """`report()` as text, the quick parts first."""
    out = console or _stdout()
    system = _system()
    out.print(f"laptop {system['laptop']}, Python {system['python']}, {system['platform']}")
    free = system["disk"]["free_bytes"]
    out.print(f"Free disk space in {system['disk']['folder']}: {free / 1e9:.1f} GB\n")
    _print_packages(core_packages(), out)
    _print_extras(extras(), out)
    print_models(out)
    rows = [(p["name"], p["gives"], p["path"] or "missing") for p in programs()]
    rows += [(r["name"], r["gives"], ", ".join(r["abis"]) or "missing") for r in android_runners()]
    _print_table(("program", "gives", "found"), rows, out)
    _print_table(
        ("device", "what", "memory"),
        [
            (
                d["name"],
                d["title"],
                f"{d['memory_bytes'] / 1e9:.1f} GB" if d["memory_bytes"] else "",
            )
            for d in devices()
        ],
        out,
    )


def print_models(console: "Console | None" = None) -> None:
    """The known models as a table."""
    _print_table(
        ("model", "what", "U-Net", "pixels", "source", "local"),
        [
            (
                m["name"],
                m["title"],
                f"{m['unet_params'] / 1e6:,.1f} M",
                f"{m['resolution']}",
                m["source"],
                "yes" if m["local"] else "no",
            )
            for m in models_report()["models"]
        ],
        console or _stdout(),
    )


def _print_packages(packages: list[dict[str, Any]], out: "Console") -> None:
    rows = [(p["name"], p["needed"], _installed(p)) for p in packages]
    _print_table(("package", "needed", "installed"), rows, out)
    if wrong := [p for p in packages if not p["ok"]]:
        names = " ".join(f"'{p['name']}{p['needed']}'" for p in wrong)
        out.print(f"Repair with: pip install {names}\n", markup=False, soft_wrap=True)


def _installed(package: dict[str, Any]) -> str:
    found = package["installed"] or "missing"
    return found if package["ok"] or package["installed"] is None else f"{found} (does not fit)"


def _print_extras(found: list[dict[str, Any]], out: "Console") -> None:
    rows = [
        (
            f"[{e['name']}]",
            e["gives"],
            ", ".join(f"{p['name']} {_installed(p)}" for p in e["packages"]),
            "yes" if e["ok"] else "no",
        )
        for e in found
    ]
    _print_table(("extra", "gives", "packages", "installed"), rows, out)
    for extra in found:
        if not extra["ok"]:  # outside the table, where a narrow terminal would cut it
            line = f"For {extra['name']}: {extra['install']}"
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
