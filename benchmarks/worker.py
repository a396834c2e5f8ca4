"""A process of its own for each measured model, so that none shares memory or threads with another.

The parent says when to run; a worker that is not asked waits without using the processor, so that
several of them can take turns (`latency.py`).
"""

import gc
import importlib
import math
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

from laptop.benchmarks.runtimes import Loaded, Workload
from laptop.errors import LaptopError
from laptop.machine import peak_memory_bytes


@dataclass(frozen=True)
class Ready:
    """What a worker found before its first round."""

    cold_s: float  # the first load of the process, its files not in the page cache (on Linux)
    warm_s: float  # the second one
    first_ms: float  # the first inference
    precision: str
    params: int | None


def serve(connection: Connection, workload: Workload, iterations: int, seconds: float) -> None:
    """The worker's side: load twice, warm up, then time rounds until None comes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    for name in workload.imports:
        importlib.import_module(name)
    drop_page_cache(workload.artifact)
    cold_s, loaded = _load(workload)
    del loaded
    gc.collect()
    warm_s, loaded = _load(workload)
    first_ms = run_round(loaded.run, 1, 0)[0]
    run_round(loaded.run, iterations, seconds)
    connection.send(Ready(cold_s, warm_s, first_ms, loaded.precision, loaded.params))
    while (order := connection.recv()) is not None:
        loaded.run()  # untimed: the others had the caches meanwhile
        connection.send(run_round(loaded.run, *order))
    connection.send(peak_memory_bytes())


def _load(workload: Workload) -> tuple[float, Loaded]:
    start = time.perf_counter()
    loaded = workload.load(workload)
    return time.perf_counter() - start, loaded


def run_round(run: Callable[[], object], iterations: int, seconds: float) -> list[float]:
    """Latencies in ms of at least `iterations` runs that take at least `seconds` together."""
    samples: list[float] = []
    total_ms = 0.0
    while len(samples) < iterations or total_ms < 1000 * seconds:
        start = time.perf_counter_ns()
        run()
        samples.append((time.perf_counter_ns() - start) / 1e6)
        total_ms += samples[-1]
    return samples


def drop_page_cache(artifact: Path | None) -> None:
    """Ask the system to forget the files' cached pages, so that a cold load reads the disk."""
    if artifact is None or not hasattr(os, "posix_fadvise"):
        return
    for path in [artifact] if artifact.is_file() else artifact.iterdir():
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class Worker:
    """The parent's side of one worker; a context manager that leaves no process behind."""

    def __init__(self, workload: Workload, warmup_iterations: int, warmup_s: float):
        self.workload = workload
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        arguments = (theirs, workload, warmup_iterations, warmup_s)
        self._process = context.Process(target=serve, args=arguments, daemon=True)
        self._process.start()
        theirs.close()  # or its end would never be seen here
        self.samples: list[list[float]] = []  # ms, by round
        self.ready: Ready = self._receive("loading")

    def run_round(self, iterations: int, seconds: float) -> None:
        """Time one round (see `run_round` above) and append it to `samples`."""
        self._send((iterations, seconds))
        self.samples.append(self._receive("running"))

    def stop(self) -> int:
        """End the process; returns its peak memory in bytes, the runtime's own included."""
        self._send(None)
        peak: int = self._receive("ending")
        return peak

    def _send(self, order: tuple[int, float] | None) -> None:
        try:
            self._connection.send(order)
        except ConnectionError:
            raise self._died("waiting") from None

    def _receive(self, doing: str) -> Any:
        try:
            return self._connection.recv()
        except (EOFError, ConnectionError):
            raise self._died(doing) from None

    def _died(self, doing: str) -> LaptopError:
        self._process.join(5)
        code = self._process.exitcode
        cause = (
            "it was killed, most often because memory ran out"
            if code is not None and code < 0
            else "the traceback above tells why"
        )
        w = self.workload
        return LaptopError(
            f"bench: the process of {w.label!r} ({w.component} in {w.runtime}, {w.source}) ended "
            f"while {doing} (exit code {code}): {cause}. Nothing was written."
        )

    def __enter__(self) -> "Worker":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._connection.close()
        self._process.join(2 if kind is None else 0)
        if self._process.is_alive():
            self._process.terminate()
            self._process.join()


def share(total: float, rounds: int) -> int:
    """How many of `total` iterations one of `rounds` must do."""
    return max(1, math.ceil(total / rounds))
