"""A stage that several processes make together, in one folder that all of them see."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from laptop import processes
from laptop.errors import LaptopError
from laptop.run import Overwrite, run_stage

FAILED = "failed"  # what the main process sends in place of a folder


def run_together(
    name: str,
    out: Path,
    config: object,
    inputs: Mapping[str, Path],
    share: Callable[[Path], None],
    finish: Callable[[Path], Mapping[str, Any] | None],
    *,
    overwrite: Overwrite = False,
) -> Path:
    """`run.run_stage` by all processes: each does `share(folder)`, then the main one `finish`.

    The main process alone says what cannot be done.
    """
    announced = False

    def work(folder: Path) -> Mapping[str, Any] | None:
        nonlocal announced
        announced = True
        processes.from_main(folder)
        share(folder)
        processes.wait_for_all()
        return finish(folder)

    if processes.is_main():
        try:
            run_stage(name, out, config, inputs, work, overwrite=overwrite)
        except LaptopError:
            if not announced:
                processes.from_main(FAILED)
            raise
        if not announced:
            processes.from_main(None)
    elif folder := processes.from_main(None):
        if folder == FAILED:
            raise SystemExit(1)  # the main process says why
        share(folder)
        processes.wait_for_all()
    processes.wait_for_all()
    return out
