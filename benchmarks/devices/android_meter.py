"""One workload on an Android device: its files sent once, its runner called round by round.

    /data/local/tmp/laptop/files/SHA256/     a model with its weights, a runner with its libraries

A folder's name is the hash of its content, which is checked on the device before it is used.
"""

import math
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from laptop.benchmarks.devices.android_runners import Call, PhoneRunner, complaint
from laptop.benchmarks.devices.device import Ready, Round, Workload
from laptop.errors import DeviceError
from laptop.hosts.adb import TMP
from laptop.hosts.commands import checked, run_long, scratch, send_files
from laptop.hosts.host import Host

FILES = f"{TMP}/laptop/files"
LOAD_S = 900  # the first load on an accelerator compiles the model
PATIENCE = 10  # times what the last call took: a phone that is throttled, not one that hangs
DF = re.compile(r"\d+\s+\d+\s+(\d+)\s+\d+%")  # of `df -k`: blocks, used, free, share
Warmth = Callable[[], tuple[float | None, str | None]]  # °C; how the system says it is throttled


class PhoneMeter:
    """A `Meter` that runs a process on the device for every turn."""

    ready: Ready

    def __init__(self, turn: Callable[[int, float], Call], warmth: Warmth):
        self.turn, self.warmth = turn, warmth
        self.peak_bytes = 0
        self.mean_ms, self.load_s = 0.0, 0.0

    def warm_up(self, iterations: int, seconds: float) -> None:
        """Load twice, run at least `iterations` times and `seconds` long."""
        cold = self._call(0)
        warm = self._calls(iterations, seconds)[0]
        first_ms = cold.first_ms if warm.first_ms is None else warm.first_ms
        self.ready = Ready(cold.load_s, warm.load_s, first_ms)

    def run_round(self, iterations: int, seconds: float) -> Round:
        """Call the runner until there are enough samples, which take long enough together.

        A runner that reports means only is called once, and gives one sample.
        """
        calls = self._calls(iterations, seconds)
        temperature_c, throttled = self.warmth()
        samples = tuple(ms for call in calls for ms in call.samples_ms)
        return Round(samples, temperature_c=temperature_c, throttled=throttled)

    def stop(self) -> int | None:
        """Nothing runs between rounds."""
        return self.peak_bytes or None

    def _calls(self, iterations: int, seconds: float) -> list[Call]:
        calls: list[Call] = []
        count, total_ms = 0, 0.0
        while not calls or (calls[-1].is_raw and (count < iterations or total_ms < 1000 * seconds)):
            left_ms = 1000 * seconds - total_ms
            by_time = math.ceil(left_ms / self.mean_ms) if self.mean_ms else 1
            times = max(1, iterations - count, by_time)
            calls.append(self._call(times))
            if calls[-1].is_raw and not calls[-1].samples_ms:
                raise DeviceError(
                    f"the runner was to run {times} times after the first and reported no time: "
                    "it is of another version. docs/guides/android.md lists those that work."
                )
            count += len(calls[-1].samples_ms)
            total_ms += sum(calls[-1].samples_ms)
        return calls

    def _call(self, times: int) -> Call:
        call = self.turn(times, self.load_s + (times + 1) * self.mean_ms / 1000)
        self.peak_bytes = max(self.peak_bytes, call.peak_bytes or 0)
        self.load_s = call.load_s or 0.0
        if samples := call.samples_ms or ((call.first_ms,) if call.first_ms else ()):
            self.mean_ms = sum(samples) / len(samples)
        return call


@dataclass
class Turns:
    """Calls of a runner on files of the device; results go to a temporary folder there."""

    host: Host
    runner: PhoneRunner
    options: Sequence[str]
    program: str
    model: str
    folder: str
    count: int = 0

    def __call__(self, times: int, expected_s: float) -> Call:
        self.count += 1
        at = f"{self.folder}/{self.count}"
        call = self.runner.command(self.program, self.options, self.model, times, f"{at}.csv")
        libraries = f"LD_LIBRARY_PATH={self.program.rpartition('/')[0]}"
        timeout_s = LOAD_S + PATIENCE * expected_s
        command = ["env", libraries, "ORT_DISABLE_TELEMETRY=1", *call]
        done = run_long(self.host, at, command, timeout_s, first_s=max(0.1, expected_s))
        if done.code:
            raise DeviceError(
                f"{self.host.name}: {self.runner.program} ended with exit code {done.code}: "
                f"{complaint(done.out)}"
            )
        rows = self.host.run(f"cat {shlex.quote(at)}.csv 2>/dev/null").out
        return self.runner.read(done.out, rows)


@contextmanager
def measured(
    host: Host,
    workload: Workload,
    runner: PhoneRunner,
    program: Sequence[Path],
    warmup: tuple[int, float],
    warmth: Warmth,
) -> Iterator[PhoneMeter]:
    """A warmed-up meter; `program` is the runner on this machine, then its libraries."""
    options, files = runner.options(workload), runner.files(workload)
    path = f"{send(host, program)}/{program[0].name}"
    model = f"{send(host, files)}/{files[0].name}"
    with scratch(host) as folder:
        meter = PhoneMeter(Turns(host, runner, options, path, model, folder), warmth)
        meter.warm_up(*warmup)
        yield meter


def send(host: Host, files: Sequence[Path]) -> str:
    """Send files unless the device has them, whole; returns their folder on the device."""
    folder = send_files(host, files, FILES)
    checked(host, f"chmod 755 {shlex.quote(folder)}/*")  # adb gives files the mode they have here
    return folder


def free_bytes(df: str) -> int | None:
    """The free space that `df -k FOLDER` prints."""
    blocks = DF.findall(df)
    return 1024 * int(blocks[-1]) if blocks else None
