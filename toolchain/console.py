"""What a command says while it works: lines and progress bars on stderr, of the main process."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from laptop.files import printable
from laptop.processes import is_main

T = TypeVar("T")


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
    ) as bar:
        task = bar.add_task(what, total=total, completed=done)
        yield lambda: bar.advance(task)


def track(items: Iterable[T], what: str, total: int, done: int = 0) -> Iterator[T]:
    """Go through `items` with a progress bar on stderr that starts at `done` of `total`."""
    with progress(what, total, done) as advance:
        for item in items:
            yield item
            advance()
