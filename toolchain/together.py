"""A stage at which all processes of a launcher work; the main one answers for its result."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from laptop.errors import LaptopError
from laptop.processes import from_main, is_main, wait_for_all
from laptop.run import Overwrite, run_stage

FAILED = "failed"  # passed in place of the folder: there will be none


def run_stage_together(
    name: str,
    out: Path,
    config: object,
    inputs: Mapping[str, Path],
    work: Callable[[Path], Mapping[str, Any] | None],
    *,
    overwrite: Overwrite = False,
) -> Path:
    """`run_stage`, but every process does `work(folder)`; the main one's facts count.

    Where the result stands already, or is refused, no process works. `work` shares the items out
    and waits for the other processes itself.
    """
    announced = False

    def main_work(folder: Path) -> Mapping[str, Any] | None:
        nonlocal announced
        announced = True
        from_main(folder)
        return work(folder)

    if is_main():
        try:
            run_stage(name, out, config, inputs, main_work, overwrite=overwrite)
        except LaptopError:
            if not announced:
                from_main(FAILED)
            raise
        if not announced:
            from_main(None)
    elif folder := from_main(None):
        if folder == FAILED:
            raise SystemExit(1)  # the main process says why
        work(folder)
    wait_for_all()
    return out
