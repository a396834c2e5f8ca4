"""A phone for tests: a daemon that speaks adb's protocol on the loopback address.

The real `adb` client connects to it as to any network device. It knows what that client asks of a
phone of today: shells with separate outputs and exit codes (shell protocol v2), and the sync
service's stat, send and receive. Commands really run, in this machine's /bin/sh; a scratch folder
stands for `/data/local/tmp`, and programs in its `bin` for Android's own.

The protocol is described in AOSP's packages/modules/adb: protocol.txt, SYNC.TXT, shell_protocol.h.
"""

import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

VERSION = 0x01000001  # from this one on, checksums of payloads are 0
MAX_PAYLOAD = 64 * 1024
CHUNK = 32 * 1024
STDOUT, STDERR, EXIT = 1, 2, 3  # shell_protocol.h
TMP = "/data/local/tmp"
NO_ENTRY = 2
TOKEN, PUBLIC_KEY = 1, 3  # kinds of AUTH


class Stream:
    """One service that the client has opened; bytes both ways, a message at a time."""

    def __init__(self, connection: "Connection", ours: int, theirs: int):
        self.connection, self.ours, self.theirs = connection, ours, theirs
        self.received = bytearray()
        self.news = threading.Condition()
        self.may_send = True
        self.is_open = True

    def on(self, command: bytes, payload: bytes) -> None:
        """A message of the client to this service."""
        with self.news:
            if command == b"OKAY":
                self.may_send = True
            elif command == b"CLSE":
                self.is_open = False
            else:
                self.received += payload
            self.news.notify_all()

    def write(self, data: bytes) -> None:
        for start in range(0, len(data), MAX_PAYLOAD):
            with self.news:
                self.news.wait_for(lambda: self.may_send or not self.is_open)
                if not self.is_open:
                    raise ConnectionError
                self.may_send = False
            self.connection.send(b"WRTE", self.ours, self.theirs, data[start : start + MAX_PAYLOAD])

    def read(self, count: int) -> bytes:
        with self.news:
            self.news.wait_for(lambda: len(self.received) >= count or not self.is_open)
            if len(self.received) < count:
                raise ConnectionError
            data = bytes(self.received[:count])
            del self.received[:count]
            return data

    def close(self) -> None:
        with suppress(OSError):
            self.connection.send(b"CLSE", self.ours, self.theirs)


class Connection:
    """One adb server's connection, over which its clients' services run side by side."""

    def __init__(self, phone: "Phone", link: socket.socket):
        self.phone, self.link = phone, link
        self.lock = threading.Lock()
        self.streams: dict[int, Stream] = {}
        self.threads: list[threading.Thread] = []

    def send(self, command: bytes, first: int, second: int, payload: bytes = b"") -> None:
        (number,) = struct.unpack("<I", command)
        header = struct.pack(
            "<4sIIIII", command, first, second, len(payload), 0, number ^ 0xFFFFFFFF
        )
        with self.lock:
            self.link.sendall(header + payload)

    def serve(self) -> None:
        try:
            with suppress(OSError):
                self._answer_all()
        finally:
            for stream in self.streams.values():
                stream.on(b"CLSE", b"")
            for thread in self.threads:
                thread.join(10)
            self.link.close()

    def _answer_all(self) -> None:
        while True:
            command, first, second, length, _, _ = struct.unpack("<4sIIIII", self._exactly(24))
            payload = self._exactly(length)
            if not self.phone.trusts and command in (b"CNXN", b"AUTH"):
                if first != PUBLIC_KEY:  # with which the client asks; nobody answers
                    self.send(b"AUTH", TOKEN, 0, bytes(20))
            elif command == b"CNXN":
                banner = f"device::ro.product.model=Standin;features={self.phone.features}"
                self.send(b"CNXN", VERSION, MAX_PAYLOAD, banner.encode())
            elif command == b"OPEN":
                self._open(first, payload.rstrip(b"\0").decode())
            elif stream := self.streams.get(second):
                if command == b"WRTE":
                    self.send(b"OKAY", stream.ours, stream.theirs)
                stream.on(command, payload)

    def _open(self, theirs: int, service: str) -> None:
        stream = Stream(self, len(self.streams) + 1, theirs)
        self.streams[stream.ours] = stream
        self.send(b"OKAY", stream.ours, theirs)
        thread = threading.Thread(target=self._run, args=(stream, service))
        self.threads.append(thread)
        thread.start()

    def _run(self, stream: Stream, service: str) -> None:
        kind, _, rest = service.partition(":")
        with suppress(OSError):
            if kind.split(",")[:2] == ["shell", "v2"]:
                run_shell(stream, self.phone, rest)
            elif kind == "shell":  # as before Android 7: one output, no exit code
                stream.write(self.phone.start(rest).communicate()[0])
            elif kind == "sync":
                serve_files(stream, self.phone)
        stream.close()

    def _exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            if not (more := self.link.recv(count - len(data))):
                raise ConnectionError
            data += more
        return data


def run_shell(stream: Stream, phone: "Phone", command: str) -> None:
    """A command with its two outputs and its exit code; it ends when the client goes."""
    process = phone.start(command)

    def pump(pipe: int, kind: int) -> None:
        with suppress(OSError):
            while data := os.read(pipe, CHUNK):
                stream.write(struct.pack("<BI", kind, len(data)) + data)

    def watch() -> None:
        with stream.news:
            stream.news.wait_for(lambda: not stream.is_open)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGHUP)

    assert process.stdout
    assert process.stderr
    pipes = ((process.stdout.fileno(), STDOUT), (process.stderr.fileno(), STDERR))
    pumps = [threading.Thread(target=pump, args=pipe) for pipe in pipes]
    watcher = threading.Thread(target=watch)
    for thread in (*pumps, watcher):
        thread.start()
    for thread in pumps:
        thread.join()
    code = process.wait()
    with suppress(OSError):
        stream.write(struct.pack("<BIB", EXIT, 1, code if code >= 0 else 128 - code))
    stream.on(b"CLSE", b"")
    watcher.join()
    process.stdout.close()
    process.stderr.close()


def serve_files(stream: Stream, phone: "Phone") -> None:
    """The sync service: requests one after the other, until the client quits."""
    while True:
        command, length = struct.unpack("<4sI", stream.read(8))
        name = phone.mapped(stream.read(length).decode())
        if command == b"QUIT":
            return
        if command in (b"STA2", b"LST2"):
            stream.write(command + _stat(Path(name)))
        elif command == b"SEND":
            phone.received.append(Path(name.rsplit(",", 1)[0]).name.removesuffix(".part"))
            _take(stream, *name.rsplit(",", 1))
        elif command == b"RECV":
            _give(stream, Path(name))


def _stat(path: Path) -> bytes:
    if not path.exists():
        return struct.pack("<IQQIIIIQqqq", NO_ENTRY, *[0] * 10)
    s = path.stat()
    times = (int(s.st_atime), int(s.st_mtime), int(s.st_ctime))
    return struct.pack(
        "<IQQIIIIQqqq",
        *(0, s.st_dev, s.st_ino, s.st_mode, s.st_nlink, s.st_uid, s.st_gid, s.st_size, *times),
    )


def _take(stream: Stream, name: str, mode: str) -> None:
    path = Path(name)
    problem = "" if path.parent.is_dir() else f"couldn't create file: {name}: No such directory"
    with Path(os.devnull if problem else name).open("wb") as file:
        while True:
            command, length = struct.unpack("<4sI", stream.read(8))
            if command == b"DONE":
                break
            file.write(stream.read(length))
    if not problem:
        path.chmod(int(mode) & 0o777)
    answer = (b"FAIL", problem.encode()) if problem else (b"OKAY", b"")
    stream.write(struct.pack("<4sI", answer[0], len(answer[1])) + answer[1])


def _give(stream: Stream, path: Path) -> None:
    with path.open("rb") as file:
        while data := file.read(CHUNK):
            stream.write(struct.pack("<4sI", b"DATA", len(data)) + data)
    stream.write(struct.pack("<4sI", b"DONE", 0))


class Phone:
    """A folder that stands for a phone's `/data/local/tmp`, beside `bin`, and its daemon.

    Where it does not trust, it asks for a key that it knows, and knows none.
    """

    def __init__(self, folder: Path, features: str = "shell_v2,cmd,stat_v2,ls_v2"):
        self.folder, self.features = folder, features
        self.trusts = True
        self.received: list[str] = []  # names of files that were sent
        self.tmp, self.bin = folder / "tmp", folder / "bin"
        for each in (self.tmp, self.bin):
            each.mkdir(parents=True)
        self.server = socket.create_server(("127.0.0.1", 0))
        self.port: int = self.server.getsockname()[1]
        self.connections: list[Connection] = []
        self.threads = [threading.Thread(target=self._accept)]
        self.threads[0].start()

    def install(self, name: str, script: str) -> None:
        """Put a program on the phone's PATH."""
        path = self.bin / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    def says(self, name: str, text: str) -> None:
        """Let a program print a text."""
        (self.bin / f"{name}.txt").write_text(text)
        self.install(name, f"cat {self.bin / name}.txt")

    def mapped(self, text: str) -> str:
        """A command or path of the phone's as it is on this machine."""
        return re.sub(rf"{TMP}\b", str(self.tmp), text)

    def start(self, command: str) -> "subprocess.Popen[bytes]":
        has_v2 = "shell_v2" in self.features
        return subprocess.Popen(
            ["/bin/sh", "-c", self.mapped(command)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE if has_v2 else subprocess.STDOUT,
            env={"PATH": f"{self.bin}:/usr/bin:/bin", "HOME": "/"},
            start_new_session=True,
        )

    def _accept(self) -> None:
        while True:
            try:
                link, _ = self.server.accept()
            except OSError:
                return
            self.connections.append(Connection(self, link))
            self.threads.append(threading.Thread(target=self.connections[-1].serve))
            self.threads[-1].start()

    def vanish(self) -> None:
        """As when the cable is pulled; nothing answers from now on."""
        with suppress(OSError):
            self.server.shutdown(socket.SHUT_RDWR)
        self.server.close()
        for connection in self.connections:
            with suppress(OSError):
                connection.link.shutdown(socket.SHUT_RDWR)
        for thread in self.threads:
            thread.join(10)


needs_adb = pytest.mark.skipif(
    shutil.which("adb") is None, reason="needs the adb client (apt-get install adb)"
)


@contextmanager
def private_server(home: Path) -> Iterator[None]:
    """Let adb have a server, keys and settings that are no user's; both end here."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(home))
        patch.setenv("ANDROID_ADB_SERVER_PORT", str(port))
        for name in ("ADB_SERVER_SOCKET", "ANDROID_SERIAL", "ADB_VENDOR_KEYS"):
            patch.delenv(name, raising=False)
        try:
            yield
        finally:
            subprocess.run(["adb", "kill-server"], capture_output=True, check=True)


def connect(port: int) -> str:
    """Make it known to adb's server; its serial."""
    serial = f"127.0.0.1:{port}"
    subprocess.run(["adb", "connect", serial], capture_output=True, check=True)
    return serial


@contextmanager
def phone_at(folder: Path, features: str = "shell_v2,cmd,stat_v2,ls_v2") -> Iterator[Phone]:
    phone = Phone(folder, features)
    try:
        yield phone
    finally:
        phone.vanish()
