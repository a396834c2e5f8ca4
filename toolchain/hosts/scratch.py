"""Temporary folders that outlive a killed process: marked with their owner, removed later.

A process that is killed removes nothing. So each temporary folder holds a file that names
its process, and the next one removes the folders of processes that have ended.
"""

import json
import os
import platform
import shutil
import tempfile
from functools import cache
from pathlib import Path

OWNER = ".laptop-owner"
NAMES = ("pymp-*", "laptop-*", "laptop.*")  # multiprocessing's, and ours here and of `places`


def mark(folder: Path) -> None:
    """Note that `folder` belongs to this process."""
    if not (folder / OWNER).exists():
        owner = {"host": platform.node(), "pid": os.getpid(), "started": _started(os.getpid())}
        (folder / OWNER).write_text(json.dumps(owner), encoding="utf-8")


@cache
def remove_orphans() -> None:
    """Remove, once in this process, the marked folders of this user whose process has ended."""
    base = Path(tempfile.gettempdir())
    for folder in (path for name in NAMES for path in base.glob(name)):
        if _is_orphan(folder):
            shutil.rmtree(folder, ignore_errors=True)


def _is_orphan(folder: Path) -> bool:
    """Whether the mark in `folder` is of this user and machine, and of a process that has ended."""
    try:
        if folder.is_symlink() or folder.stat().st_uid != os.getuid():
            return False
        owner = json.loads((folder / OWNER).read_bytes())
        pid, started = int(owner["pid"]), float(owner["started"])
        return owner["host"] == platform.node() and _started(pid) != started
    except (OSError, ValueError, KeyError, TypeError):  # not marked, or just removed
        return False


def _started(pid: int) -> float | None:
    """When a process began, in seconds since 1970; None for one that has ended."""
    import psutil

    try:
        return float(psutil.Process(pid).create_time())
    except psutil.Error:
        return None
