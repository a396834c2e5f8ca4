"""SIGINT and SIGTERM end the command `laptop` with one line, within seconds, and never a traceback.

All work may be killed at any moment and is continued by the same command, so an end that takes too
long is cut short. Only the command installs this; importing `laptop` changes no signal.
"""

import atexit
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import NoReturn

from laptop.processes import is_main

GRACE_S = 4.0  # for what has to be closed, such as a connection, before the process is ended
SIGNALS = (signal.SIGINT, signal.SIGTERM)
LINE = "laptop: stopped. Run the same command again; what is finished is kept."


class State:
    """The state of an interruption in this process."""

    received: int | None = None  # the first signal
    has_spoken = False
    result: int | None = None  # the command's exit code, once its work is done


def run(command: Callable[[], object]) -> NoReturn:
    """Call `command`, which may import for long, and exit with its code, or with 128 + signal."""
    _install()
    code: object = 0
    try:
        command()
    except SystemExit as e:
        code = stopped() if State.received else e.code
    except BaseException:
        if State.received is None:  # else a library has made this error of the interruption
            raise
        code = stopped()
    State.result = code if isinstance(code, int) else int(code is not None)
    _finish(State.result)


def _finish(code: int) -> NoReturn:
    """Exit without taking the interpreter apart, which takes seconds after torch was imported."""
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # nobody reads it any more
            stream.flush()
    os._exit(code)


def stopped() -> int:
    """Print the line, once and in the main process; returns the exit code of an interruption."""
    print(_line(), end="", file=sys.stderr, flush=True)
    return 128 + (State.received or signal.SIGINT)


def _line() -> str:
    """Return the line that is still to be printed."""
    if State.has_spoken or not is_main():
        return ""
    State.has_spoken = True
    shows_cursor = "\x1b[?25h" if sys.stderr.isatty() else ""  # a progress bar hides it
    return f"{shows_cursor}{LINE}\n"


def _install() -> None:
    """A handler that interrupts Python, and a thread that ends what Python cannot interrupt."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(reader,), daemon=True).start()
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as `nohup` and shells may set it
            signal.signal(number, _interrupt)
    of_main, of_thread = sys.unraisablehook, threading.excepthook
    sys.unraisablehook = lambda what: None if State.received else of_main(what)
    threading.excepthook = lambda what: None if State.received else of_thread(what)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Interrupt the work, so that it closes what it has open; or end at once.

    At once: at the second signal, after the work, and in an import, where libraries catch the
    error, print it, or abort the process.
    """
    if State.received is not None or State.result is not None or _is_importing(frame):
        _end(number)
    State.received = number
    raise KeyboardInterrupt


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _watch(reader: int) -> None:
    """Wait for a signal, whatever the main thread does, and then for the process to end."""
    while (number := os.read(reader, 1)[0]) not in SIGNALS:
        continue
    if State.result is None:
        time.sleep(GRACE_S)
    _end(number)


def _end(number: int) -> NoReturn:
    """End now: nothing in this process is worth waiting for."""
    if State.result is not None:
        os._exit(State.result)
    os.write(2, _line().encode())  # not by `print`, which may just be at work
    os._exit(128 + number)
