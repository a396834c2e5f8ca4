"""Work on a host: checked scripts, files that are sent once, scratch folders, long commands."""

import hashlib
import shlex
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from laptop.errors import DeviceError, LaptopError
from laptop.files import plain_name, sha256
from laptop.hosts.host import Done, Host, Local, last_line
from laptop.hosts.scratch import mark


def checked(host: Host, script: str, timeout_s: float = 60) -> str:
    """The output of a script that must not fail."""
    done = host.run(script, timeout_s)
    if done.code:
        raise DeviceError(
            f"{host.name}: exit code {done.code} of `{script[:200]}`: {last_line(done.err)}"
        )
    return done.out


def send_files(host: Host, files: Sequence[Path], root: str) -> str:
    """The folder in `root` on the host that holds these files; sends those that it lacks."""
    folder, digests = folder_of(files, root)
    send(host, digests, folder)
    return folder


def has_files(host: Host, files: Sequence[Path], root: str) -> bool:
    """Whether `send_files` has sent these files to the host, and all are whole."""
    folder, digests = folder_of(files, root)
    return holds(host, digests, folder)


def folder_of(files: Sequence[Path], root: str) -> tuple[str, dict[Path, str]]:
    """The folder in `root` for these files, named by the hash of them all, and their sha256."""
    digests = {path: sha256(path) for path in files}
    text = " ".join(f"{path.name} {digest}" for path, digest in digests.items())
    return f"{root}/{hashlib.sha256(text.encode()).hexdigest()}", digests


def send(host: Host, digests: Mapping[Path, str], folder: str) -> None:
    """Copy files (with their sha256) into a folder on the host, those that it has not yet."""
    for path in digests:
        plain_name(path.name, str(path.parent))  # an older scp hands it to a shell there
    checked(host, f"mkdir -p {shlex.quote(folder)}")
    for path, digest in digests.items():
        target = f"{folder}/{path.name}"
        if not has(host, target, digest):
            host.put(path, target)
            if not has(host, target, digest):
                raise DeviceError(f"{host.name}: {target} arrived damaged; is the disk full?")


def has(host: Host, path: str, digest: str) -> bool:
    """Whether the host has a file of this sha256 at `path`."""
    at = shlex.quote(path)
    done = host.run(f"[ -f {at} ] && {{ sha256sum {at} || shasum -a 256 {at}; }}", 600)
    return done.code == 0 and done.out.split()[:1] == [digest]


def holds(host: Host, digests: Mapping[Path, str], folder: str) -> bool:
    """Whether a folder on the host has files of these names and contents (their sha256)."""
    return all(has(host, f"{folder}/{path.name}", digest) for path, digest in digests.items())


@contextmanager
def scratch(host: Host) -> Iterator[str]:
    """A temporary folder on the host, removed at the end with what `run_long` still runs in it."""
    name = f"laptop.{uuid.uuid4().hex[:12]}"  # ours, so that a second call makes no second one
    base = checked(host, 'echo "${TMPDIR:-/tmp}"').strip()
    folder = f"{base}/{name}"
    at = shlex.quote(folder)
    checked(host, f"mkdir -p -m 700 {at}")
    if isinstance(host, Local):
        mark(Path(folder))
    try:
        yield folder
    finally:
        end = f"for p in {at}/*/pid; do [ -f $p ] && kill -- -$(cat $p) 2>/dev/null; done"
        with suppress(LaptopError):  # an error on the way here says more
            host.run(f"{end}; rm -rf {at}")


def run_long(
    host: Host,
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
    checked(host, start)
    end = time.monotonic() + timeout_s
    wait = min(first_s, timeout_s)
    while not (code := checked(host, poll).strip()):
        if time.monotonic() > end:
            raise DeviceError(f"{host.name}: no end after {timeout_s:g} s: {shlex.join(command)}")
        time.sleep(wait)
        wait = min(2 * wait, poll_s)
    if code == "gone":
        raise DeviceError(
            f"{host.name}: `{shlex.join(command)[:200]}` was killed, mostly for lack of memory."
        )
    return Done(int(code), checked(host, f"cat {at}/log"), "")
