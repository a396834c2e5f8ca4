"""Unfinished work in `.NAME.partial`: one process claims it, and the same key continues it."""

import contextlib
import errno
import shutil
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from laptop.errors import BadInput, LaptopError, NoSpace, OutputExists
from laptop.files import KEY

RESUME = ".resume"  # in a partial folder: what is needed to go on, with KEY, and
LOCK = "lock"  # in there: held by the process that works on it
FULL_DISK_BYTES = 1 << 20


@contextlib.contextmanager
def claimed(partial: Path) -> Iterator[None]:
    """Work on `partial` alone; `OutputExists` when another process does already."""
    lock = FileLock(resume_folder(partial) / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise OutputExists(
            f"another process is at work in {partial}. Wait until it is done, or choose another -o."
        ) from None
    try:
        yield
    finally:
        lock.release()


def resume_folder(partial: Path) -> Path:
    """Where work keeps what it needs to go on after a kill; gone once the result stands."""
    folder = partial / RESUME
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise BadInput(f"cannot write to {partial.parent}: {e.strerror}. Choose another -o.") from e
    return folder


def prepare(partial: Path, key: str, overwrite: bool) -> None:
    """Make `partial` the place for the work `key`: what it holds of other work goes, or is kept."""
    mark = partial / RESUME / KEY
    if mark.is_file() and mark.read_bytes() == key.encode():
        return
    if mark.exists() and not overwrite and not is_empty(partial):
        raise OutputExists(
            f"{partial} holds unfinished work made with other settings. Run that command again "
            "to finish it, pass --overwrite to discard it, or choose another -o."
        )
    for path in [*partial.iterdir(), *(partial / RESUME).iterdir()]:
        if path.is_dir() and path.name != RESUME:
            shutil.rmtree(path)
        elif path.name not in (RESUME, LOCK):
            path.unlink()
    mark.write_text(key)


def is_empty(partial: Path) -> bool:
    """Whether nothing was done there yet, so that it is no obstacle to other work."""
    return {p.name for p in partial.rglob("*")} == {RESUME, KEY, LOCK}


@contextlib.contextmanager
def full_disk_reported(partial: Path) -> Iterator[None]:
    """Turn the errors of a full disk into `NoSpace`; remove a folder in which nothing was done."""
    try:
        yield
    except LaptopError:
        if is_empty(partial):
            shutil.rmtree(partial)
        raise
    except (OSError, RuntimeError, SafetensorError) as e:  # what writers raise on a full disk
        if _is_disk_full(e, partial):
            raise NoSpace(
                f"the disk is full at {partial}. Free some space and run the same command again; "
                "finished work is kept."
            ) from e
        raise


def _is_disk_full(error: Exception, folder: Path) -> bool:
    """torch and safetensors raise errors of their own, the former without saying why."""
    no_space = getattr(error, "errno", None) == errno.ENOSPC or "os error 28" in str(error)
    return no_space or shutil.disk_usage(folder).free < FULL_DISK_BYTES
