"""Computers as devices: this one, and Linux boards and Macs that ssh reaches.

`worker.py` and `sensors.py` run there: here as modules, on a board as files that are sent, as
artifacts are, into its `~/.cache/laptop/files` under their sha256, and stay for the next time. A
worker talks through its stdin and stdout, so it ends when this process or the connection does.
After a connection was lost, a new one goes on with the round that was lost.
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
from typing import Annotated, Any, ClassVar, Self, TypeVar

from laptop.benchmarks.devices import sensors
from laptop.benchmarks.devices.device import AtLeast0, Device, Facts, Heat, Ready, Round, Workload
from laptop.benchmarks.devices.ssh_config import ssh_hosts
from laptop.benchmarks.settings import DevicesConfig
from laptop.console import say
from laptop.errors import BadInput, LaptopError
from laptop.export.to_tensorrt import engine, trtexec
from laptop.fields import Range
from laptop.files import files_in, lines, shown
from laptop.hosts import commands, ssh
from laptop.hosts.host import BEGIN, Local, last_line
from laptop.hosts.ssh import SSH_FAILED, Ssh
from laptop.records import built

T = TypeVar("T")
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
NO_ANSWER = "That is no answer of a worker."
ENDS_S = 5  # that a worker may take to end, each time that it is told to


def device(address: str, access: DevicesConfig, tries: int) -> "Computer":
    """The device with the address `local` or `ssh://[user@]host[:port]`, not yet reached."""
    place = ssh.host_at(address)
    return Computer(
        replace(place, tries=tries) if isinstance(place, Ssh) else Local(), access.python
    )


def addresses() -> list[str]:
    """This computer, and the hosts of the user's ssh configuration."""
    return ["local", *(f"ssh://{host}" for host in ssh_hosts())]


@dataclass(frozen=True)
class Computer(Device):
    """A device on which a worker's process runs."""

    refused: ClassVar[tuple[str, ...]] = ("coreml",)
    place: Local | Ssh
    python: str = "python3"  # on a board: one that can import the runtime

    @property
    def address(self) -> str:
        return "local" if isinstance(self.place, Local) else self.place.name

    def probe(self) -> Facts:
        if isinstance(self.place, Local):
            return facts_here()
        how_to = f"pip install it there, for {self.python}"
        return replace(_facts(self._ask("facts")), how_to=how_to)

    def heat(self) -> Heat:
        heat = sensors.heat() if isinstance(self.place, Local) else self._ask("heat")
        return _as(Heat, heat, self.address)

    def has(self, workload: Workload) -> bool:
        if isinstance(self.place, Local):
            return True
        if workload.runtime == "tensorrt":
            return engine.has_graph(self.place, self._home(), Path(workload.source))
        return commands.has_files(self.place, files_of(workload), self._cache())

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
        if isinstance(self.place, Local):
            files = [str(path) for path in files_of(workload)]
            here = {"source": workload.source, "files": files, "path": sys.path}
            return Process(self, workload, order | here)
        folder = self._send(files_of(workload))
        source = f"{folder}/{Path(workload.source).name}"
        files = [f"{folder}/{path.name}" for path in files_of(workload)]
        return Process(self, workload, order | {"source": source, "files": files})

    def command(self) -> list[str]:
        """What starts a worker there, from here."""
        if isinstance(self.place, Local):
            return [sys.executable, "-m", "laptop.benchmarks.devices.worker"]
        begin = f"echo; echo {shlex.quote(BEGIN)}"
        return self.place.command(f"{begin}; exec {self._python} -B {shlex.quote(self._worker())}")

    @property
    def _python(self) -> str:
        """Python for a shell there, as one word; "~/" is the home folder there."""
        if self.python.startswith("~/"):
            return f'"$HOME"/{shlex.quote(self.python[2:])}'
        return shlex.quote(self.python)

    def _worker(self) -> str:
        return f"{self._send(SOURCES)}/worker.py"

    def _ask(self, what: str) -> dict[str, Any]:
        """The JSON that `sensors.py facts` or `heat` prints there; nothing is written."""
        source = Path(sensors.__file__).read_text(encoding="utf-8")
        run = "import sys; del sys.path[0]; exec(sys.stdin.read())"  # no module of its home folder
        script = f"{self._python} -B -c {shlex.quote(run)} {what}"
        done = self.place.run(script, 120, stdin=source)
        if done.code:
            raise LaptopError(
                f"{self.address}: {self.python} is needed there, 3.9 or later, and did not run "
                f"({last_line(done.err)}). Install it, or name "
                "another: --python, or [devices] python in a recipe."
            )
        return _last_json(done.out)

    def _send(self, files: Sequence[Path]) -> str:
        """The folder there that holds these files; they are sent once."""
        return commands.send_files(self.place, files, self._cache())

    def _cache(self) -> str:
        return f"{self._home()}/{CACHE}"

    def _home(self) -> str:
        return commands.checked(self.place, 'echo "$HOME"').strip()

    def _engine(self, workload: Workload) -> dict[str, Any]:
        """The workload as an engine, built there."""
        artifact = Path(workload.source)
        board = engine.probe(self.place)
        made = engine.build(self.place, artifact, board)
        dynamic = {name: workload.shapes[name] for name in made.plan.profile}
        arguments = trtexec.run_arguments(made.plan, made.path, {}, dynamic)
        settings = {"trtexec": board.trtexec, "arguments": arguments[1:]}
        return {"source": made.path, "files": [made.path], "settings": settings}


def _last_json(text: str) -> dict[str, Any]:
    """The object on the last line; `LaptopError` for an answer that is none."""
    line = (lines(text) or [""])[-1]
    try:
        answer = json.loads(line)
    except (ValueError, RecursionError):
        answer = None
    if not isinstance(answer, dict):
        raise LaptopError(f"the device answered {shown(line)}, which is no answer of a worker.")
    return answer


def _as(kind: type[T], answer: Mapping[str, Any], where: str) -> T:
    """An answer as a record; `BadInput` where it does not hold what the record has."""
    return built(answer, kind, f"the answer of {where}", NO_ANSWER)


def facts_here() -> Facts:
    """This computer, with PyTorch as one more runtime."""
    found = _facts(sensors.facts())
    return Facts(**{**vars(found), "runtimes": {**_torch(), **found.runtimes}})


def _torch() -> dict[str, str]:
    import torch

    version = str(torch.__version__)
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    return {"pytorch": version} | {
        f"pytorch:{k}": version for k, is_there in there.items() if is_there
    }


def _facts(answer: Mapping[str, Any]) -> Facts:
    facts = _as(Facts, answer, "the device")
    if "tensorrt" not in facts.runtimes:
        return facts
    version = str(trtexec.read_version(facts.runtimes["tensorrt"]))
    return replace(facts, runtimes={**facts.runtimes, "tensorrt": version})


def files_of(workload: Workload) -> list[Path]:
    """What must lie together for the workload's source to be opened."""
    source = Path(workload.source)
    artifact = workload.artifact
    if artifact is None:
        return []
    if artifact.is_dir():
        return [path for path in files_in(artifact) if path.suffix not in (".json", ".txt")]
    return [source]


@dataclass(frozen=True)
class _Started:
    """What a worker says when it has loaded: the number of its process."""

    pid: Annotated[int, Range(1, 2**31)]


@dataclass(frozen=True)
class _Peak:
    """What a worker says of its memory: the largest resident size so far, in bytes."""

    peak_memory_bytes: Annotated[int, Range(0)] | None = None


@dataclass(frozen=True)
class _Profile:
    """What a worker says of operators: names and median ms, where the runtime tells them."""

    operators: list[tuple[str, AtLeast0]] | None


class Process:
    """A worker's process and what it answers: a `Meter`."""

    def __init__(self, computer: Computer, workload: Workload, order: Mapping[str, Any]):
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
            raise BadInput(f"{self.workload.runtime} does not tell the time of its operators.")
        return [(name, ms) for name, ms in operators]

    def stop(self) -> int | None:
        self._end()
        return self.peak_memory_bytes

    def _begin(self) -> None:
        self._greets = isinstance(self.computer.place, Ssh)  # what comes before it is a shell's
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115, _end closes it
        self._process = subprocess.Popen(
            self.computer.command(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            encoding="utf-8",
            errors="replace",
        )

    def _insist(self, order: Mapping[str, Any], doing: str) -> dict[str, Any]:
        """The answer, from a new process when the connection to this one was lost."""
        where = self.computer.place
        tries, pause_s = (where.tries, where.pause_s) if isinstance(where, Ssh) else (1, 0.0)
        for i in range(tries):
            if i:
                say(f"bench: the connection to {where.name} was lost; once more")
                time.sleep(pause_s * 2 ** (i - 1))
                self._again(is_loading=order is self.order)
            if (answer := self._answer(order)) is not None:
                return answer
            if self._process.wait() != SSH_FAILED or not isinstance(where, Ssh):
                break
        raise self._died(doing)

    def _again(self, *, is_loading: bool) -> None:
        """A new process in place of the lost one, loaded as that was."""
        if not is_loading:
            self.computer.place.run(ENDED.format(pid=self._pid))
        self._end()
        self._begin()
        if not is_loading and (ready := self._answer(self.order)):
            self._pid = _as(_Started, ready, self.computer.address).pid

    def _answer(self, order: Mapping[str, Any]) -> dict[str, Any] | None:
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
        said = self._errors.read().decode(errors="replace").strip()
        was_killed = code < 0 or code in (137, 139)
        cause = (
            "it was killed, most often because memory ran out" if was_killed else last_line(said)
        )
        w = self.workload
        return LaptopError(
            f"bench: the process of {w.label!r} ({w.component} in {w.runtime}, {w.source}) on "
            f"{self.computer.address} ended while {doing} (exit code {code}): {cause}. No report "
            "was written."
        )

    def _end(self) -> None:
        """Let it end by itself, and see to it."""
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
