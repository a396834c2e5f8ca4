"""Where commands run and files lie: this machine, or one that ssh reaches.

A `Place` runs POSIX shell scripts and moves files. `Ssh` uses the programs `ssh` and `scp`, so the
user's configuration, keys, agent and known hosts hold, and nothing is asked: a host that they do
not know, or whose key has changed, is an error.

Connections drop. Then the same call is made again, a few times; so **a script must do no harm when
it runs twice**. What takes long goes through `run_long`, which starts it once and asks for its end
with short calls, whatever happens to the connection meanwhile.
"""

import re
import shlex
import shutil
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

from laptop.errors import BadInput, LaptopError
from laptop.files import lines, plain_name, shown
from laptop.scratch import mark

SSH_FAILED = 255  # ssh's own exit code
BEGIN = "laptop: begin"  # what a shell prints before this, such as a greeting, is not a script's
URL = re.compile(
    r"ssh://(?:(?P<user>\w[\w.-]*)@)?(?P<host>\[[\da-fA-F:.]+\]|\w[\w.-]*)(?::(?P<port>\d+))?/?"
)
LOST = re.compile(  # what scp, whose exit code may be 1, says of a connection
    r"Connection (?:closed|reset|refused|timed out|to \S+ closed)|Broken pipe|lost connection"
)
FOREVER = re.compile(
    r"Host key verification failed|IDENTIFICATION HAS CHANGED|Permission denied \("
)


class Done(NamedTuple):
    """How a script ended."""

    code: int
    out: str
    err: str


class Place(Protocol):
    """A machine."""

    @property
    def name(self) -> str:
        """For messages."""

    def run(self, script: str, timeout_s: float = 60) -> Done:
        """Run a POSIX shell script; it may run twice. Raises `LaptopError` where it cannot start
        or takes longer."""

    def put(self, source: Path, target: str) -> None:
        """Copy a file there, whole or not at all; the folder of `target` exists."""

    def get(self, source: str, target: Path) -> None:
        """Copy a file here, whole or not at all."""


@dataclass(frozen=True)
class Local:
    """This machine."""

    name: str = "this machine"

    def run(self, script: str, timeout_s: float = 60, given: str | None = None) -> Done:
        return called(["sh", "-c", script], timeout_s, self.name, given)

    def put(self, source: Path, target: str) -> None:
        _copy(source, Path(target))

    def get(self, source: str, target: Path) -> None:
        _copy(Path(source), target)


def _copy(source: Path, target: Path) -> None:
    part = target.with_name(f"{target.name}.part")
    shutil.copyfile(source, part)
    part.replace(target)


@dataclass(frozen=True)
class Ssh:
    """A machine that ssh reaches."""

    host: str
    user: str | None = None
    port: int | None = None  # None: as ssh's configuration says
    config: Path | None = None  # instead of the user's own configuration
    tries: int = 4  # calls before a connection that drops is an error
    pause_s: float = 1  # before the second call; doubles each time

    @property
    def name(self) -> str:
        login = f"{self.user}@{self._bracketed}" if self.user else self._bracketed
        return f"ssh://{login}{f':{self.port}' if self.port else ''}"

    @property
    def _login(self) -> str:
        return f"{self.user}@{self.host}" if self.user else self.host

    @property
    def _bracketed(self) -> str:
        """The host; an address of IPv6 in brackets, for its colons."""
        return f"[{self.host}]" if ":" in self.host else self.host

    def run(self, script: str, timeout_s: float = 60, given: str | None = None) -> Done:
        """As a `Place` does; `given` is the script's input."""
        # its own 255 would pass for ssh's
        command = self.command(
            f"echo; echo {shlex.quote(BEGIN)}\n( {script}\n)\n"
            f"s=$?; [ $s -eq {SSH_FAILED} ] && s=254; exit $s"
        )
        done = self._insist(
            lambda: called(command, timeout_s, self.name, given),
            "run a command",
            lambda done: done.code == SSH_FAILED,
        )
        return done._replace(out=done.out.partition(f"{BEGIN}\n")[2])

    def command(self, script: str) -> list[str]:
        """The command line, for here, that runs a shell script there."""
        return ["ssh", *self._options("-p"), "-T", self._login, f"sh -c {shlex.quote(script)}"]

    def _at(self, path: str) -> str:
        """A path there, as scp takes it."""
        host = self._bracketed
        return f"{self.user}@{host}:{path}" if self.user else f"{host}:{path}"

    def put(self, source: Path, target: str) -> None:
        part = f"{target}.part"
        here = str(source.absolute())  # begins with "/": no option, no host
        self._copy([here, self._at(part)], f"send {source.name}")
        # the first of two calls may have moved it already
        script = f"[ ! -e {shlex.quote(part)} ] || mv {shlex.quote(part)} {shlex.quote(target)}"
        checked(self, script)

    def get(self, source: str, target: Path) -> None:
        part = target.with_name(f"{target.name}.part")
        try:
            self._copy([self._at(source), str(part.absolute())], f"fetch {source}")
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)

    def _copy(self, files: Sequence[str], what: str) -> None:
        command = ["scp", *self._options("-P"), *files]
        done = self._insist(
            lambda: called(command, None, self.name),
            what,
            lambda done: done.code != 0 and bool(LOST.search(done.err) or FOREVER.search(done.err)),
        )
        if done.code:
            raise LaptopError(f"{self.name}: could not {what}: {done.err.strip()}")

    def _options(self, port_flag: str) -> list[str]:
        """BatchMode: nothing is asked. A connection that says nothing for 45 s is given up."""
        return [
            *(["-F", str(self.config)] if self.config else []),
            *([port_flag, str(self.port)] if self.port else []),
            *("-o", "BatchMode=yes", "-o", "ConnectTimeout=15"),
            *("-o", "ServerAliveInterval=15", "-o", "ServerAliveCountMax=3"),
        ]

    def _insist(self, call: Callable[[], Done], what: str, is_lost: Callable[[Done], bool]) -> Done:
        """Call again while the connection drops; `LaptopError` for what more calls do not help."""
        done = Done(SSH_FAILED, "", "")
        for i in range(self.tries):
            if i:
                time.sleep(self.pause_s * 2 ** (i - 1))
            done = call()
            if not is_lost(done):
                return done
            if FOREVER.search(done.err):
                raise LaptopError(self._refused(done.err))
        raise LaptopError(
            f"{self.name}: could not {what}: {last_line(done.err)} ({self.tries} tries). "
            f"Does `ssh {shlex.join([*self._options('-p'), self._login])} true` work?"
        )

    @property
    def _known_as(self) -> str:
        """The host, as known_hosts has it."""
        return f"[{self.host}]:{self.port}" if self.port and self.port != 22 else self.host

    def _refused(self, said: str) -> str:
        if "HAS CHANGED" in said:
            return (
                f"{self.name}: its host key is not the known one. If the machine was set up anew, "
                f"remove the old key with `ssh-keygen -R {shlex.quote(self._known_as)}`; otherwise "
                "something else answers in its place."
            )
        if "Host key" in said:
            return (
                f"{self.name}: its host key is not known. Run `ssh {self._login}` once, and look."
            )
        return f"{self.name} refuses the login: {last_line(said)} Run `ssh-copy-id {self._login}`."


def called(
    command: Sequence[str], timeout_s: float | None, where: str, given: str | None = None
) -> Done:
    """How a program of this machine ended that `where` needs; `LaptopError` as `Place.run` has."""
    try:
        done = subprocess.run(
            command,
            input=given or "",
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=timeout_s,
        )
    except FileNotFoundError:
        raise LaptopError(f"{where} needs the program {command[0]!r}, which is missing.") from None
    except subprocess.TimeoutExpired:
        raise LaptopError(f"{where}: no end after {timeout_s:g} s: {command[-1][:200]}") from None
    return Done(done.returncode, done.stdout, done.stderr)


def last_line(text: str) -> str:
    """For messages: the last line is where programs say what is wrong."""
    return (lines(text.strip()) or ["it said nothing"])[-1]


def place(address: str) -> Place:
    """`local`, or `ssh://[user@]host[:port]`; raises `BadInput` for anything else."""
    if address == "local":
        return Local()
    match = URL.fullmatch(address)
    if match is None:
        raise BadInput(f"{shown(address)} is no device: use local or ssh://[user@]host[:port].")
    port = int(match["port"][:9]) if match["port"] else None
    if port is not None and not 0 < port < 65536:
        raise BadInput(f"{shown(address)}: port {port} is none; ports are 1 to 65535.")
    return Ssh(match["host"].strip("[]"), match["user"], port)


def checked(where: Place, script: str, timeout_s: float = 60) -> str:
    """The output of a script that must not fail."""
    done = where.run(script, timeout_s)
    if done.code:
        raise LaptopError(
            f"{where.name}: exit code {done.code} of `{script[:200]}`: {last_line(done.err)}"
        )
    return done.out


def send(where: Place, files: Mapping[Path, str], folder: str) -> None:
    """Copy files (with their sha256) into a folder there, those that it has not yet."""
    for path in files:
        plain_name(path.name, str(path.parent))  # an older scp hands it to a shell there
    checked(where, f"mkdir -p {shlex.quote(folder)}")
    for path, sha256 in files.items():
        target = f"{folder}/{path.name}"
        if not has(where, target, sha256):
            where.put(path, target)
            if not has(where, target, sha256):
                raise LaptopError(f"{where.name}: {target} arrived damaged; is the disk full?")


def has(where: Place, path: str, sha256: str) -> bool:
    """Whether a file of this content lies there."""
    at = shlex.quote(path)
    found = where.run(f"[ -f {at} ] && {{ sha256sum {at} || shasum -a 256 {at}; }}", 600)
    return found.code == 0 and found.out.split()[:1] == [sha256]


def holds(where: Place, files: Mapping[Path, str], folder: str) -> bool:
    """Whether a folder there has files of these names and contents (their sha256)."""
    return all(has(where, f"{folder}/{path.name}", sha256) for path, sha256 in files.items())


@contextmanager
def scratch(where: Place) -> Iterator[str]:
    """A temporary folder there, gone at the end, with what `run_long` still runs in it."""
    name = f"laptop.{uuid.uuid4().hex[:12]}"  # ours, so that a second call makes no second one
    base = checked(where, 'echo "${TMPDIR:-/tmp}"').strip()
    folder = f"{base}/{name}"
    at = shlex.quote(folder)
    checked(where, f"mkdir -p -m 700 {at}")
    if isinstance(where, Local):
        mark(Path(folder))
    try:
        yield folder
    finally:
        end = f"for p in {at}/*/pid; do [ -f $p ] && kill -- -$(cat $p) 2>/dev/null; done"
        with suppress(LaptopError):  # an error on the way here says more
            where.run(f"{end}; rm -rf {at}")


def run_long(
    where: Place,
    folder: str,
    command: Sequence[str],
    timeout_s: float,
    poll_s: float = 2,
    first_s: float = 0.1,
) -> Done:
    """Run a command of minutes; what it prints comes as one text.

    `folder` is a new one in a `scratch`, for its marks. The command is started once, also when the
    connection drops while it starts, and goes on without one. The first look at it is after
    `first_s`: each costs the other machine some time.
    """
    at = shlex.quote(folder)
    inner = (
        f"echo $$ >{at}/pid; {shlex.join(command)} >{at}/log 2>&1; "
        f"echo $? >{at}/code.part; mv {at}/code.part {at}/code"
    )
    start = (
        f"mkdir {at} 2>/dev/null || exit 0\n"
        f"setsid sh -c {shlex.quote(inner)} </dev/null >/dev/null 2>&1 &"
    )
    lives = f"{{ [ ! -s {at}/pid ] || kill -0 $(cat {at}/pid) 2>/dev/null; }}"  # or is starting
    poll = (
        f"[ -f {at}/code ] && exec cat {at}/code\n{lives} && exit 0\n"
        f"sleep 0.2; [ -f {at}/code ] && exec cat {at}/code\n{lives} || echo gone"
    )
    checked(where, start)
    end = time.monotonic() + timeout_s
    wait = min(first_s, timeout_s)
    while not (code := checked(where, poll).strip()):
        if time.monotonic() > end:
            raise LaptopError(f"{where.name}: no end after {timeout_s:g} s: {shlex.join(command)}")
        time.sleep(wait)
        wait = min(2 * wait, poll_s)
    if code == "gone":
        raise LaptopError(
            f"{where.name}: `{shlex.join(command)[:200]}` was killed, mostly for lack of memory."
        )
    return Done(int(code), checked(where, f"cat {at}/log"), "")
