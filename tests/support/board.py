"""A board for tests: a home with a stand-in trtexec, and a real OpenSSH server for it."""

import os
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

STANDIN = Path(__file__).parent / "standin_trtexec.py"
SSHD = shutil.which("sshd") or shutil.which("sshd", path="/usr/sbin:/usr/local/sbin")
needs_sshd = pytest.mark.skipif(
    not (SSHD and shutil.which("ssh") and shutil.which("scp")),
    reason="needs OpenSSH's sshd, ssh and scp (apt-get install openssh-server openssh-client)",
)


@dataclass(frozen=True)
class Board:
    folder: Path

    @property
    def home(self) -> Path:
        return self.folder / "home"

    @property
    def tmp(self) -> Path:
        return self.folder / "tmp"

    @property
    def environment(self) -> dict[str, str]:
        path = f"{self.folder / 'bin'}:/usr/bin:/bin"
        return {"HOME": str(self.home), "TMPDIR": str(self.tmp), "PATH": path}

    @property
    def left(self) -> list[Path]:
        """What we left in its temporary folder; the stand-in's ONNX Runtime puts `.ses` there."""
        return list(self.tmp.glob("laptop*"))

    @property
    def kept(self) -> list[Path]:
        """What was sent there or made there."""
        return list((self.home / ".cache/laptop").rglob("*"))

    @property
    def engines(self) -> list[Path]:
        return sorted((self.home / ".cache/laptop/tensorrt/engines").glob("*.plan"))

    @property
    def builds(self) -> int:
        """How often trtexec was called to build."""
        log = self.folder / "calls"
        return log.read_text().count("--saveEngine") if log.exists() else 0

    def install(
        self,
        version: str = "10.3.0",
        gpu: str = "Orin",
        capability: str = "8.7",
        *,
        free_mib: int = 8000,
        seconds: float = 0,
        says: tuple[str, str] | None = None,  # what trtexec says of the GPU, if it is another
    ) -> "Board":
        """Put a trtexec and an nvidia-smi of these on the board."""
        name, number = says or (gpu, capability)
        standin = f"{version},{name},{number},{seconds}"
        command = shlex.join([sys.executable, str(STANDIN), f"--standin={standin}"])
        log = shlex.quote(str(self.folder / "calls"))
        self.write("trtexec", f'echo "$@" >> {log}\nexec {command} "$@"')
        self.write("nvidia-smi", f"echo {shlex.quote(f'{gpu}, {capability}, {free_mib}')}")
        return self

    def write(self, name: str, content: str) -> None:
        """Put a shell script on its PATH."""
        path = self.folder / "bin" / name
        path.write_text(f"#!/bin/sh\n{content}\n")
        path.chmod(0o755)


def make(folder: Path) -> Board:
    for name in ("bin", "home", "tmp"):
        (folder / name).mkdir(parents=True)
    return Board(folder)


class Proxy:
    """Hands connections on to a port; cuts the first `cuts` of them after `after` bytes sent."""

    def __init__(self, port: int, cuts: int, after: int):
        self.target, self.cuts, self.after = port, cuts, after
        self.connections = 0
        self.server = socket.create_server(("127.0.0.1", 0))
        self.port = self.server.getsockname()[1]
        self.sockets = [self.server]
        self.threads = [threading.Thread(target=self._serve)]
        self.threads[0].start()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self.server.accept()
            except OSError:
                return
            self.connections += 1
            limit = self.after if self.connections <= self.cuts else None
            board = socket.create_connection(("127.0.0.1", self.target))
            self.sockets += [client, board]
            for source, sink, most in ((client, board, limit), (board, client, None)):
                thread = threading.Thread(target=self._pump, args=(source, sink, most))
                self.threads.append(thread)
                thread.start()

    @staticmethod
    def _pump(source: socket.socket, sink: socket.socket, most: int | None) -> None:
        passed = 0
        with suppress(OSError):
            while data := source.recv(4096):
                passed += len(data)
                if most is not None and passed > most:
                    break
                sink.sendall(data)
        _shut(source, sink)

    def cut(self) -> None:
        """Drop what is connected now."""
        _shut(*self.sockets[1:])

    def close(self) -> None:
        _shut(*self.sockets)
        for thread in self.threads:
            thread.join(10)
        for each in self.sockets:
            each.close()


def _shut(*sockets: socket.socket) -> None:
    for each in sockets:
        with suppress(OSError):
            each.shutdown(socket.SHUT_RDWR)


@dataclass(frozen=True)
class Server:
    """An OpenSSH server whose logins land on a board."""

    folder: Path
    port: int

    def config(self, port: int | None = None, known: Path | None = None) -> Path:
        """A client's configuration in which `board` is this server, or a proxy before it."""
        path = self.folder / f"config-{port}-{known.name if known else ''}"
        path.write_text(
            f"Host board\n  HostName 127.0.0.1\n  Port {port or self.port}\n  HostKeyAlias board\n"
            f"  UserKnownHostsFile {known or self.folder / 'known_hosts'}\n"
            f"  IdentityFile {self.folder / 'user'}\n  IdentitiesOnly yes\n"
            "  StrictHostKeyChecking yes\n  LogLevel ERROR\n"
        )
        return path


@contextmanager
def serve(board: Board, folder: Path) -> Iterator[Server]:
    """Run sshd as an ordinary process, with keys of its own, on a free port."""
    assert SSHD
    folder.mkdir()
    for name in ("host", "user", "other"):
        key = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)]
        subprocess.run(key, check=True)
    shutil.copy(folder / "user.pub", folder / "authorized")
    (folder / "known_hosts").write_text(f"board {(folder / 'host.pub').read_text()}")
    (folder / "changed").write_text(f"board {(folder / 'other.pub').read_text()}")
    (folder / "empty").write_text("")
    if os.geteuid() == 0:  # else sshd does not start as root
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    settings = " ".join(f"{k}={v}" for k, v in board.environment.items())
    (folder / "sshd_config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {folder / 'host'}\n"
        f"AuthorizedKeysFile {folder / 'authorized'}\nStrictModes no\nUsePAM no\n"
        f"PasswordAuthentication no\nKbdInteractiveAuthentication no\nPidFile none\n"
        f"PermitRootLogin prohibit-password\nMaxStartups 100\nSubsystem sftp internal-sftp\n"
        f"SetEnv {settings}\n"
    )
    with (folder / "sshd.log").open("w") as log:
        command = [SSHD, "-D", "-e", "-f", str(folder / "sshd_config")]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            _wait_for(port, process, folder / "sshd.log")
            yield Server(folder, port)
        finally:
            process.terminate()
            process.wait(10)


def _wait_for(port: int, process: "subprocess.Popen[bytes]", log: Path) -> None:
    for _ in range(100):
        assert process.poll() is None, log.read_text()
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            time.sleep(0.05)
        else:
            return
    raise AssertionError(log.read_text())
