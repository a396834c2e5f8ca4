"""Facts about the machine: versions, processor, memory of this process, free disk space."""

import contextlib
import platform
import resource
import shutil
import sys
from importlib import metadata
from pathlib import Path
from typing import TypedDict

import psutil

from laptop.errors import NoSpace

CGROUP = Path("/sys/fs/cgroup")  # of a container, on Linux
REPORTED_PACKAGES = (
    "laptop-diff", "torch", "diffusers", "transformers", "onnx", "onnxruntime", "coremltools",
    "executorch",
)  # fmt: skip


class Machine(TypedDict):
    """The versions and the hardware that a result was made with."""

    versions: dict[str, str]
    device: str


def machine() -> Machine:
    """Versions and hardware, for manifests."""
    versions = {"python": platform.python_version()}
    for package in REPORTED_PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return {"versions": versions, "device": platform.processor() or platform.machine()}


def available_memory_bytes() -> int:
    """Memory that this process may still take, within the limits of its container too."""
    free = psutil.virtual_memory().available
    with contextlib.suppress(OSError, ValueError, KeyError):  # no such files, or "max"
        limit, taken = (int((CGROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
        rows = (CGROUP / "memory.stat").read_text().strip().split("\n")
        stat = dict(row.split() for row in rows)
        cached = int(stat["active_file"]) + int(stat["inactive_file"])  # given up when needed
        free = min(free, limit - taken + cached)
    return int(free)


def reset_peak_memory() -> None:
    """Let `peak_memory_bytes` count from now on."""
    with contextlib.suppress(OSError):  # Linux only: VmHWM starts again
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_bytes() -> int:
    """Largest resident size of this process, on Linux since the stage began."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().split("\n"):
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def need_space(folder: Path, size_bytes: int) -> None:
    """Raise `NoSpace` unless the disk of `folder` (or its nearest parent) has `size_bytes` free."""
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < size_bytes:
        raise NoSpace(
            f"{folder} has {free / 1e9:.2f} GB free; about {size_bytes / 1e9:.2f} GB are needed. "
            "Free some space or choose another -o."
        )
