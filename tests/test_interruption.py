"""SIGINT and SIGTERM end a command with one line, within seconds, at any moment."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from laptop.interruption import LINE

SCRIPT = """
import atexit, os, signal, sys, threading, time
from laptop import interruption

interruption.GRACE_S = 0.3
interrupt = lambda: os.kill(os.getpid(), signal.SIGINT)

class Swallows:
    def __del__(self):
        interrupt()

def command():
    {body}

interruption.run(command)
"""
STOPPED = {
    "in a sleep": "interrupt(); time.sleep(60)",
    "at the second signal": "threading.Timer(0.1, interrupt).start(); interrupt(); time.sleep(60)",
    "made another error": "\n    try: interrupt(); time.sleep(60)"
    "\n    except BaseException: raise RuntimeError('a library says')",
    "swallowed": "\n    while True:\n        try: interrupt(); time.sleep(60)"
    "\n        except BaseException: pass",
    "swallowed in a destructor": "\n    Swallows(); time.sleep(60)",
    "in an import": "sys.path.insert(0, sys.argv[1]); import interrupts_itself",
    "in a cleaning up that hangs": "atexit.register(time.sleep, 60); interrupt(); time.sleep(60)",
    "in another thread's call": "\n    threading.Thread(target=time.sleep, args=(60,)).start()"
    "\n    interrupt()",
}


@pytest.fixture(autouse=True)
def _interruptible() -> None:
    """A shell starts what runs in its background with SIGINT ignored, and children inherit that."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def of_script(body: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", SCRIPT.format(body=body), str(folder)],
        capture_output=True,
        text=True,
        timeout=30,
    )


@pytest.mark.parametrize("moment", STOPPED)
def test_an_interruption_is_one_line_however_the_code_takes_it(moment: str, tmp_path: Path) -> None:
    (tmp_path / "interrupts_itself.py").write_text(
        "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n"
    )
    done = of_script(STOPPED[moment], tmp_path)
    assert done.stderr == f"{LINE}\n"
    assert done.returncode == 130


def test_a_signal_after_the_work_changes_nothing_of_its_result(tmp_path: Path) -> None:
    start = time.perf_counter()
    body = "print('a result'); atexit.register(time.sleep, 60); atexit.register(interrupt)"
    done = of_script(body, tmp_path)
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "a result\n")
    assert time.perf_counter() - start < 20


@pytest.mark.parametrize(
    ("body", "code", "words"),
    [("pass", 0, ""), ("sys.exit(2)", 2, ""), ("raise ValueError('a bug')", 1, "Traceback")],
)
def test_without_a_signal_nothing_changes(body: str, code: int, words: str, tmp_path: Path) -> None:
    done = of_script(body, tmp_path)
    assert done.returncode == code
    assert words in done.stderr
    assert LINE not in done.stderr


def is_ready(pid: int) -> bool:
    """Whether a process handles SIGTERM, which Python does not by itself."""
    status = Path(f"/proc/{pid}/status").read_text()
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize(
    ("number", "after_s"), [("SIGINT", 0.0), ("SIGINT", 1.0), ("SIGTERM", 0.4)]
)
def test_a_command_is_stopped_in_its_imports(number: str, after_s: float, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "laptop", "score", "--model", "tiny-sdxl"]
    process = subprocess.Popen(
        [*command, "-o", str(tmp_path / "scores")], stderr=subprocess.PIPE, text=True
    )
    while not is_ready(process.pid):
        time.sleep(0.005)
    time.sleep(after_s)
    process.send_signal(getattr(signal, number))
    _, said = process.communicate(timeout=20)
    assert said.splitlines()[-1:] == [LINE]
    assert "Traceback" not in said
    assert process.returncode == 128 + getattr(signal, number)


APART = """
import sys
from laptop import interruption
from laptop.export import job

job.IMPORTS[:] = ["slow_import"]
interruption.run(lambda: job.run_apart("a test", print))
"""


def test_the_fork_server_is_silent_when_its_imports_are_interrupted(tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    (tmp_path / "slow_import.py").write_text(
        f"import pathlib, time\npathlib.Path({str(begun)!r}).touch()\ntime.sleep(1)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "TMPDIR": str(tmp_path)}
    process = subprocess.Popen(
        [sys.executable, "-c", APART],
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )
    while not begun.exists():
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, said = process.communicate(timeout=20)
    assert said == f"{LINE}\n"
    assert process.returncode == 130
    assert {p.name for p in tmp_path.iterdir()} - {"__pycache__"} == {"begun", "slow_import.py"}
