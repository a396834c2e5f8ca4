"""Progress of a command: lines and bars on stderr, printed by the main process only."""

import contextlib
import ctypes
import io
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from laptop.files import printable
from laptop.processes import is_main

T = TypeVar("T")
RECENT_S = 300.0  # the time that is left is estimated from the steps of these last seconds


def say(message: str) -> None:
    """One line of progress on stderr; stdout is for results."""
    from rich.console import Console

    console = Console(stderr=True, highlight=False, soft_wrap=True, quiet=not is_main())
    console.print(printable(message), markup=False)


@contextlib.contextmanager
def progress(what: str, total: int, done: int = 0) -> Iterator[Callable[[], None]]:
    """A progress bar on stderr that starts at `done` of `total`; call what it gives to advance."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    with Progress(
        TextColumn("{task.description:<22}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True, quiet=not is_main()),
        speed_estimate_period=RECENT_S,
    ) as bar:
        task = bar.add_task(what, total=total, completed=done)
        yield lambda: bar.advance(task)


def track(items: Iterable[T], what: str, total: int, done: int = 0) -> Iterator[T]:
    """Go through `items` with a progress bar on stderr that starts at `done` of `total`."""
    with progress(what, total, done) as advance:
        for item in items:
            yield item
            advance()


@contextlib.contextmanager
def quiet(*loggers: str) -> Iterator[None]:
    """Drop what libraries print to stderr, their warnings, and what these loggers say below ERROR.

    Only Python's own `sys.stderr` is meant; `silent_file` also drops what C libraries write.
    """
    levels = {name: logging.getLogger(name).level for name in loggers}
    with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in loggers:
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)


@contextlib.contextmanager
def silent_file(number: int) -> Iterator[None]:
    """Drop what this process writes to its file 1 (stdout) or 2 (stderr), C libraries included."""
    libc = ctypes.CDLL(None) if os.name == "posix" else None
    (sys.stdout if number == 1 else sys.stderr).flush()
    kept = os.dup(number)
    with open(os.devnull, "wb") as nowhere:  # noqa: PTH123 (os.devnull is no path on Windows)
        os.dup2(nowhere.fileno(), number)
    try:
        yield
    finally:
        if libc is not None:
            libc.fflush(None)  # what C still holds back
        os.dup2(kept, number)
        os.close(kept)
