"""A stage whose work all processes share, in one folder that every process sees.

The main process checks the request, announces the folder, and writes the result; the others wait
for the announcement. So all work or none does, and the main process alone reports an error.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from laptop import processes
from laptop.errors import LaptopError
from laptop.run import Overwrite, run_stage

T = TypeVar("T")


@dataclass(frozen=True)
class _Announcement:
    """What the main process tells the others to do, once in a stage."""

    folder: Path | None = None  # to work in; None: the result is finished already
    has_failed: bool = False  # the main process raises an error: exit without a word


class _Announcer:
    """The main process's voice: only the first announcement is sent, the others wait for one."""

    def __init__(self) -> None:
        self.is_done = False

    def announce(self, announcement: _Announcement) -> None:
        if not self.is_done:
            self.is_done = True
            processes.broadcast(announcement)


def run_together(
    name: str,
    out: Path,
    config: object,
    inputs: Mapping[str, Path],
    work: Callable[[Path], T],
    finish: Callable[[Path, T], Mapping[str, object] | None],
    *,
    overwrite: Overwrite = False,
) -> Path:
    """Run a stage (`run.run_stage`) by all processes, which must all call this; returns `out`.

    Each process calls `work(folder)`. When all have returned, the main one calls `finish(folder,
    its own result of work)`, which returns facts for the manifest.
    """
    if processes.is_main():
        _lead(name, out, config, inputs, work, finish, overwrite)
    else:
        _follow(work)
    processes.wait_for_all()
    return out


def _lead(
    name: str,
    out: Path,
    config: object,
    inputs: Mapping[str, Path],
    work: Callable[[Path], T],
    finish: Callable[[Path, T], Mapping[str, object] | None],
    overwrite: Overwrite,
) -> None:
    """Run the stage in the main process."""
    announcer = _Announcer()

    def work_and_finish(folder: Path) -> Mapping[str, object] | None:
        announcer.announce(_Announcement(folder))
        result = work(folder)
        processes.wait_for_all()
        return finish(folder, result)

    try:
        run_stage(name, out, config, inputs, work_and_finish, overwrite=overwrite)
    except LaptopError:
        announcer.announce(_Announcement(has_failed=True))
        raise
    announcer.announce(_Announcement())


def _follow(work: Callable[[Path], T]) -> None:
    """Do in another process what the main one announces."""
    announcement = processes.broadcast(_Announcement())
    if announcement.has_failed:
        raise SystemExit(1)  # the main process says why
    if announcement.folder:
        work(announcement.folder)
        processes.wait_for_all()
