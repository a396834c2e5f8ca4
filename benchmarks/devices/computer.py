"""Computers as devices: this one, and Linux boards and Macs that ssh reaches.

`worker.py` and `sensors.py` run on them: here as modules, on a board as files, which are sent like
artifacts into its `~/.cache/laptop/files` under their sha256 and stay for the next time. A worker
talks through its stdin and stdout, so it ends when this process or the connection does. After a
lost connection, a new one repeats the round that was lost.
"""

import json
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Annotated, ClassVar, Self, TypeVar

from laptop.benchmarks.devices import sensors
from laptop.benchmarks.devices.device import AtLeast0, Device, Facts, Heat, Ready, Round, Workload
from laptop.benchmarks.devices.ssh_config import ssh_hosts
from laptop.benchmarks.settings import DevicesConfig
from laptop.console import say
from laptop.errors import BadInput, DeviceError, LaptopError
from laptop.export.to_tensorrt import trtexec
from laptop.fields import Range
from laptop.files import files_in, lines, shown
from laptop.hosts import commands, ssh
from laptop.hosts.host import BEGIN, Local, last_line
from laptop.hosts.ssh import SSH_FAILED, Ssh
from laptop.records import built

T = TypeVar("T")
Answer = Mapping[str, object]  # JSON, before it is checked
LOADERS = {"pytorch": "laptop.benchmarks.devices.eager:load"}  # others are the worker's own
IMPORTS = {  # modules of each runtime, imported before the clock of the first load starts
    "pytorch": ("torch", "diffusers.models.unets.unet_2d_condition"),
    "onnxruntime": ("onnxruntime",),
    "executorch": ("executorch.runtime",),
}
CACHE = ".cache/laptop/files"
SOURCES = tuple(Path(__file__).with_name(name) for name in ("worker.py", "sensors.py"))
ENDED = """is_ours() {{
  {{ cat /proc/{pid}/cmdline || ps -ww -p {pid} -o args=; }} 2>/dev/null | grep -q worker.py
}}
is_ours && kill {pid}
for i in 1 2 3 4 5 6 7 8 9 10; do is_ours || exit 0; sleep 0.5; done
kill -9 {pid}"""  # the number may be another process's by now, after a new start of the board
ANSWER_BYTES = 64 << 20  # of one line; a longer one is no answer
NO_ANSWER = "It is no answer of a worker."
ENDS_S = 5  # that a worker may take to end before it is ended more forcefully


def device(address: str, access: DevicesConfig, tries: int) -> "Computer":
    """The device with the address `local` or `ssh://[user@]host[:port]`, not yet reached."""
    host = ssh.host_at(address)
    return Computer(replace(host, tries=tries) if isinstance(host, Ssh) else Local(), access.python)


def addresses() -> list[str]:
    """This computer, and the hosts of the user's ssh configuration."""
    return ["local", *(f"ssh://{host}" for host in ssh_hosts())]


@dataclass(frozen=True)
class Computer(Device):
    """A device on which a worker's process runs."""

    refused: ClassVar[tuple[str, ...]] = ("coreml",)
    host: Local | Ssh
    python: str = "python3"  # on a board: one that can import the runtime

    @property
    def address(self) -> str:
        return "local" if isinstance(self.host, Local) else self.host.name

    def probe(self) -> Facts:
        if isinstance(self.host, Local):
            return facts_here()
        how_to = f"pip install it there, for {self.python}"
        return replace(_facts(self._ask("facts")), how_to=how_to)

    def heat(self) -> Heat:
        heat = sensors.heat() if isinstance(self.host, Local) else self._ask("heat")
        return _as(Heat, heat, self.address)

    def has(self, workload: Workload) -> bool:
        if isinstance(self.host, Local):
            return True
        if workload.runtime == "tensorrt":
            from laptop.export.to_tensorrt import engine  # imports torch

            return engine.has_graph(self.host, self._home(), Path(workload.source))
        return commands.has_files(self.host, files_of(workload), self._cache())

    def meter(self, workload: Workload, warmup_iterations: int, warmup_s: float) -> "Process":
        kind = workload.runtime.partition(":")[0]
        order = {
            "loader": workload.loader or LOADERS.get(kind, kind),
            "runtime": workload.runtime,
            "component": workload.component,
            "shapes": {name: list(shape) for name, shape in workload.shapes.items()},
            "threads": workload.threads,
            "seed": workload.seed,
            "imports": IMPORTS.get(kind, ()),
            "warmup_iterations": warmup_iterations,
            "warmup_s": warmup_s,
        }
        if workload.runtime == "tensorrt":
            return Process(self, workload, order | self._engine(workload))
        if isinstance(self.host, Local):
            files = [str(path) for path in files_of(workload)]
            here = {"source": workload.source, "files": files, "path": sys.path}
            return Process(self, workload, order | here)
        folder = self._send(files_of(workload))
        source = f"{folder}/{Path(workload.source).name}"
        files = [f"{folder}/{path.name}" for path in files_of(workload)]
        return Process(self, workload, order | {"source": source, "files": files})

    def command(self) -> list[str]:
        """The command line on this machine that starts a worker on the computer."""
        if isinstance(self.host, Local):
            return [sys.executable, "-m", "laptop.benchmarks.devices.worker"]
        begin = f"echo; echo {shlex.quote(BEGIN)}"
        return self.host.command(f"{begin}; exec {self._python} -B {shlex.quote(self._worker())}")

    @property
    def _python(self) -> str:
        """Python as one word for the computer's shell; "~/" is the home folder there."""
        if self.python.startswith("~/"):
            return f'"$HOME"/{shlex.quote(self.python[2:])}'
        return shlex.quote(self.python)

    def _worker(self) -> str:
        return f"{self._send(SOURCES)}/worker.py"

    def _ask(self, what: str) -> Answer:
        """The JSON that `sensors.py facts` or `heat` prints there; writes no file."""
        source = Path(sensors.__file__).read_text(encoding="utf-8")
        run = "import sys; del sys.path[0]; exec(sys.stdin.read())"  # no module of its home folder
        script = f"{self._python} -B -c {shlex.quote(run)} {what}"
        done = self.host.run(script, 120, stdin=source)
        if done.code:
            raise DeviceError(
                f"{self.address}: {self.python} is needed there, 3.9 or later, and did not run "
                f"({last_line(done.err)}). Install it, or name "
                "another: --python, or [devices] python in a recipe."
            )
        return _last_json(done.out)

    def _send(self, files: Sequence[Path]) -> str:
        """The folder there that holds these files; they are sent once."""
        return commands.send_files(self.host, files, self._cache())

    def _cache(self) -> str:
        return f"{self._home()}/{CACHE}"

    def _home(self) -> str:
        return commands.checked(self.host, 'echo "$HOME"').strip()

    def _engine(self, workload: Workload) -> dict[str, object]:
        """The part of a worker's order for an engine, which is built on the computer."""
        from laptop.export.to_tensorrt import engine

        board = engine.probe(self.host)
        ready = engine.build(self.host, Path(workload.source), board)
        dynamic = {name: workload.shapes[name] for name in ready.plan.profile}
        arguments = trtexec.run_arguments(ready.plan, ready.path, {}, dynamic)
        settings = {"trtexec": board.trtexec, "arguments": arguments[1:]}
        return {"source": ready.path, "files": [ready.path], "settings": settings}


def _last_json(text: str) -> Answer:
    """The JSON object on the last line; `LaptopError` if it holds none."""
    line = (lines(text) or [""])[-1]
    try:
        answer = json.loads(line)
    except (ValueError, RecursionError):
        answer = None
    if not isinstance(answer, dict):
        raise DeviceError(f"the device answered {shown(line)}, which is no answer of a worker.")
    return answer


def _as(kind: type[T], answer: Answer, where: str) -> T:
    """An answer as a record; `BadInput` if it does not hold the record's fields."""
    return built(answer, kind, f"the answer of {where}", NO_ANSWER)


def facts_here() -> Facts:
    """The facts of this computer, with PyTorch as one more runtime."""
    facts = _facts(sensors.facts())
    return replace(facts, runtimes={**_torch(), **facts.runtimes})


def _torch() -> dict[str, str]:
    import torch

    version = str(torch.__version__)
    gpus = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    return {"pytorch": version} | {f"pytorch:{gpu}": version for gpu in gpus if gpus[gpu]}


def _facts(answer: Answer) -> Facts:
    facts = _as(Facts, answer, "the device")
    if "tensorrt" not in facts.runtimes:
        return facts
    version = str(trtexec.read_version(facts.runtimes["tensorrt"]))
    return replace(facts, runtimes={**facts.runtimes, "tensorrt": version})


def files_of(workload: Workload) -> list[Path]:
    """The files that must be in one folder for the workload's source to be opened."""
    source = Path(workload.source)
    artifact = workload.artifact
    if artifact is None:
        return []
    if artifact.is_dir():
        return [path for path in files_in(artifact) if path.suffix not in (".json", ".txt")]
    return [source]


@dataclass(frozen=True)
class _Started:
    """The part of a worker's first answer that names its process."""

    pid: Annotated[int, Range(1, 2**31)]


@dataclass(frozen=True)
class _Peak:
    """The part of a worker's answer about memory: the largest resident size so far, in bytes."""

    peak_memory_bytes: Annotated[int, Range(0)] | None = None


@dataclass(frozen=True)
class _Profile:
    """A worker's profile: names of operators and median ms; None if the runtime has no profile."""

    operators: list[tuple[str, AtLeast0]] | None


class Process:
    """A `Meter`: a worker's process and its answers."""

    def __init__(self, computer: Computer, workload: Workload, order: Mapping[str, object]):
        self.computer, self.workload, self.order = computer, workload, order
        self.peak_memory_bytes: int | None = None
        self._begin()
        try:
            ready = self._insist(order, "loading")
            self._pid = _as(_Started, ready, computer.address).pid
            self.ready = _as(Ready, ready, computer.address)
        except BaseException:
            self._process.terminate()
            self._end()
            raise

    def run_round(self, iterations: int, seconds: float) -> Round:
        answer = self._insist({"iterations": iterations, "seconds": seconds}, "running")
        self.peak_memory_bytes = _as(_Peak, answer, self.computer.address).peak_memory_bytes
        return _as(Round, answer, self.computer.address)

    def profile(self, iterations: int) -> list[tuple[str, float]]:
        """Names and median ms of the graph's operators, in the order in which they run."""
        answer = self._insist({"profile": iterations}, "profiling")
        operators = _as(_Profile, answer, self.computer.address).operators
        if operators is None:
            raise BadInput(f"{self.workload.runtime} does not report the time of its operators.")
        return [(name, ms) for name, ms in operators]

    def stop(self) -> int | None:
        self._end()
        return self.peak_memory_bytes

    def _begin(self) -> None:
        self._greets = isinstance(self.computer.host, Ssh)  # what comes before it is a shell's
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115, _end closes it
        self._process = subprocess.Popen(
            self.computer.command(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            encoding="utf-8",
            errors="replace",
        )

    def _insist(self, order: Mapping[str, object], doing: str) -> Answer:
        """The answer to an order, from a new process if the connection to this one is lost."""
        host = self.computer.host
        tries, pause_s = (host.tries, host.pause_s) if isinstance(host, Ssh) else (1, 0.0)
        for i in range(tries):
            if i:
                say(f"bench: the connection to {host.name} was lost; trying again")
                time.sleep(pause_s * 2 ** (i - 1))
                self._again(is_loading=order is self.order)
            if (answer := self._answer(order)) is not None:
                return answer
            if self._process.wait() != SSH_FAILED or not isinstance(host, Ssh):
                break
        raise self._died(doing)

    def _again(self, *, is_loading: bool) -> None:
        """Start a new process in place of the lost one, with the same workload loaded."""
        if not is_loading:
            self.computer.host.run(ENDED.format(pid=self._pid))
        self._end()
        self._begin()
        if not is_loading and (ready := self._answer(self.order)):
            self._pid = _as(_Started, ready, self.computer.address).pid

    def _answer(self, order: Mapping[str, object]) -> Answer | None:
        """The answer to an order; None if the process has ended."""
        assert self._process.stdin
        assert self._process.stdout
        try:
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
            while self._greets and (line := self._process.stdout.readline(ANSWER_BYTES)):
                self._greets = line != f"{BEGIN}\n"
            line = self._process.stdout.readline(ANSWER_BYTES)
        except BrokenPipeError:
            return None
        return _last_json(line) if line.endswith("\n") else None

    def _died(self, doing: str) -> LaptopError:
        code = self._process.wait()
        self._errors.seek(0)
        errors = self._errors.read().decode(errors="replace").strip()
        was_killed = code < 0 or code in (137, 139)
        cause = (
            "it was killed, most often because memory ran out" if was_killed else last_line(errors)
        )
        w = self.workload
        return LaptopError(
            f"bench: the process of {w.label!r} ({w.component} in {w.runtime}, {w.source}) on "
            f"{self.computer.address} ended while {doing} (exit code {code}): {cause}. No report "
            "was written."
        )

    def _end(self) -> None:
        """Close the pipes, so that the process ends; terminate and kill it if it does not."""
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe
            try:
                pipe.close()
            except BrokenPipeError:  # what was not sent yet
                continue
        for insist in (self._process.terminate, self._process.kill):
            try:
                self._process.wait(ENDS_S)
                break
            except subprocess.TimeoutExpired:
                insist()
        self._process.wait()
        self._errors.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            self._process.terminate()
        self._end()
