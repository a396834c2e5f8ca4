"""One component for one target, exported in a process of its own.

So each starts with all memory free, its peak is its own, and one that dies takes nothing with it.
They are forked from a process that has done the common imports and nothing else.
"""

import importlib
import multiprocessing
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import resource_tracker, util
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, SpawnContext
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

from laptop.errors import LaptopError
from laptop.export.settings import ExportConfig
from laptop.export.targets import TARGETS
from laptop.hosts import scratch
from laptop.machine import peak_memory_bytes
from laptop.records import Record

if TYPE_CHECKING:
    from torch import Tensor

    from laptop.export.arrays import Array, ArrayFunction

# Most of the seconds that a small export takes. In forked processes no thread has run before.
IMPORTS = [
    "laptop.export.components",
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
    "diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl",
]


@dataclass(frozen=True, kw_only=True)
class ProcessCost(Record):
    """Time and memory of one process."""

    seconds: float
    peak_memory_bytes: int


@dataclass(frozen=True)
class Job:
    """One component for one target: what to export, from which inputs, and where to."""

    target: str
    component: str
    precision: str  # of this component
    model: str  # a diffusers folder or a Hub id
    inputs: Path  # recorded inputs of this component
    path: Path  # where the artifact goes; its folder exists
    config: ExportConfig

    def examples(self) -> "list[dict[str, Tensor]]":
        """The component's inputs during a sampling, in float32, in the order of the steps."""
        from safetensors.torch import load_file

        rows: dict[str, dict[str, Tensor]] = {}
        for key, value in load_file(self.inputs).items():
            number, _, name = key.partition(".")
            rows.setdefault(number, {})[name] = value
        return [rows[number] for number in sorted(rows)]

    def feeds(self) -> "list[dict[str, Array]]":
        """The component's inputs during a sampling, as arrays."""
        return [{name: value.numpy() for name, value in row.items()} for row in self.examples()]


def save_examples(examples: "list[dict[str, Tensor]]", path: Path) -> None:
    """Save the recorded inputs of a component, in the order of the steps."""
    from safetensors.torch import save_file

    save_file(
        {f"{i:03d}.{k}": v.contiguous() for i, row in enumerate(examples) for k, v in row.items()},
        path,
    )


def example_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Shape of each input in a file of `save_examples`, by name."""
    from safetensors import safe_open

    with safe_open(path, framework="np") as file:
        first = [key for key in file.keys() if key.startswith("000.")]  # noqa: SIM118
        return {key.partition(".")[2]: tuple(file.get_slice(key).get_shape()) for key in first}


class TargetModule(Protocol):
    """The module of a target."""

    def export(self, job: Job) -> None:
        """Write one component to its file; called in a process of its own."""

    def complete(self, model: str, folder: Path) -> None:
        """Write the files that all components of a target share; left out where there are none."""

    def load(self, path: Path) -> "ArrayFunction":
        """The artifact as a function of arrays."""

    def wide_scores(self, path: Path) -> Callable[[str], bool]:
        """Whether a half-precision artifact computes the attention scores of a module in float32.

        Left out where the target has no half precision.
        """

    def checked(self, precision: str) -> str | None:
        """The state of an artifact that `load` ran here well; None where it cannot run here."""


def module_of(target: str) -> TargetModule:
    """The target's module; importing it may take seconds."""
    return cast(TargetModule, importlib.import_module(TARGETS[target].module))


def export(job: Job) -> None:
    """Write the artifact of a job."""
    module_of(job.target).export(job)


def complete(target: str, model: str, folder: Path) -> None:
    """Write the files that a target's components share, if there are any."""
    module = module_of(target)
    if hasattr(module, "complete"):
        module.complete(model, folder)


def run_apart(
    what: str, work: Callable[..., None], *arguments: object, temporary: Path | None = None
) -> ProcessCost:
    """Call `work(*arguments)` in a new process; returns what the process took.

    Its temporary files are in the folder `temporary` (the system's when None) and are removed when
    it ends, however it does. A `LaptopError` there is raised here; another end of the process
    becomes one.
    """
    context = _context()
    ours, theirs = context.Pipe()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="laptop-", dir=temporary) as folder:
        scratch.mark(Path(folder))
        process = context.Process(
            target=_serve, args=(theirs, folder, work, arguments), daemon=True
        )
        with _without_interrupts():
            process.start()
        theirs.close()
        try:
            answer = ours.recv()
        except EOFError:
            process.join()
            raise LaptopError(_died(what, process.exitcode)) from None
        except BaseException:  # this call is given up
            process.kill()
            raise
        finally:
            process.join()
            ours.close()
    if isinstance(answer, LaptopError):
        raise answer
    return ProcessCost(seconds=round(time.perf_counter() - start, 3), peak_memory_bytes=answer)


def _context() -> SpawnContext | ForkServerContext:
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    scratch.mark(Path(util.get_temp_dir()))  # of the fork server's socket
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTS)
    return context


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Ctrl-C waits here, and never reaches a process that starts here: its end is this one's task.

    Else the fork server prints a traceback when it is interrupted in its imports.
    """
    resource_tracker.ensure_running()  # which would let interrupts through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _died(what: str, code: int | None) -> str:
    if code is not None and code < 0:
        return f"{what}: the process was killed by signal {-code}, most often for lack of memory."
    return f"{what}: the process failed (exit code {code}); the traceback above says why."


def _serve(
    connection: Connection, temporary: str, work: Callable[..., None], arguments: tuple[object, ...]
) -> None:
    """The process's side. It ends without the functions by which libraries clean up at exit."""
    tempfile.tempdir = temporary
    threading.Thread(target=_end_with_parent, args=(connection,), daemon=True).start()
    answer: LaptopError | int
    try:
        work(*arguments)
        answer = peak_memory_bytes()
    except LaptopError as e:
        answer = e
    with suppress(BrokenPipeError):  # the other process has ended meanwhile
        connection.send(answer)


def _end_with_parent(connection: Connection) -> None:
    """Nothing is ever sent this way, so what comes is the end of the other process."""
    try:
        connection.recv()
    finally:
        os._exit(1)
