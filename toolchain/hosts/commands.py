"""Work on a place: checked scripts, files that are sent once, scratch folders, long commands."""

import shlex
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from laptop.errors import LaptopError
from laptop.files import plain_name
from laptop.hosts.place import Done, Local, Place, last_line
from laptop.scratch import mark


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
