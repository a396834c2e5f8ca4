"""Android devices, reached by the program `adb`: a phone on a cable, or one in the network.

`adb` and its server are the user's own: started by `adb` itself where none runs, and told apart by
the environment as always (ANDROID_ADB_SERVER_PORT, ANDROID_SERIAL). What a phone asks is answered
on the phone.

When a device goes in the middle of a command, `adb shell` may end with exit code 0 and no word
(seen with 29.0.6). So each script ends by saying so, and what does not was not finished.
"""

import re
import shlex
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from laptop.errors import LaptopError
from laptop.files import lines
from laptop.hosts.commands import checked
from laptop.hosts.place import Done, called, last_line

TMP = "/data/local/tmp"  # where adb's user may write and run programs
END = "laptop: end of script"
TELLS_CODE = (0, 1, 255)  # exit codes that are adb's own where the end is not told
LOST = re.compile(  # what adb says of a device that is not there, or of its connection
    r"device '.*' not found|no devices/emulators found|device offline|device still \w+"
    r"|error: closed|connect failed|protocol fault|connection reset|broken pipe"
    r"|couldn't read from device|failed to read copy response",
    re.IGNORECASE,
)
FOREVER = re.compile(r"more than one (?:device|emulator)|unauthorized|insufficient permissions")
TRANSPORT = re.compile(f"{LOST.pattern}|{FOREVER.pattern}", re.IGNORECASE)
COPY_S = 3600  # a phone that hangs is given up; a model of 5 GB takes minutes
NETWORK = re.compile(r".+:\d+")  # a serial that `adb connect` takes
ROW = re.compile(  # of `adb devices -l`; a serial may hold spaces
    r"(.+?)\s+(device|offline|unauthorized|authorizing|connecting|recovery|rescue|sideload"
    r"|bootloader|host|unknown|detached|no permissions)\b"
)
INSTALL = (
    "Install Android's platform-tools: `apt install adb`, `brew install android-platform-tools`, "
    "or https://developer.android.com/tools/releases/platform-tools, and have adb on PATH."
)


@dataclass(frozen=True)
class Adb:
    """An Android device that adb reaches; a `Place`."""

    serial: str = ""  # as `adb devices` shows it, host:port in the network; "": the only one
    tries: int = 4  # calls before a device that is gone is an error
    pause_s: float = 1  # before the second call; doubles each time

    @property
    def name(self) -> str:
        return f"adb://{self.serial}"

    def run(self, script: str, timeout_s: float = 60) -> Done:
        guarded = (
            f'export TMPDIR="${{TMPDIR:-{TMP}}}"\n( {script}\n)\ns=$?; echo "{END}" >&2; exit $s'
        )
        done = self._insist(
            lambda: self._call("shell", f"sh -c {shlex.quote(guarded)}", timeout_s=timeout_s),
            "run a command",
            lambda done: END not in done.err and END not in done.out and done.code in TELLS_CODE,
        )
        if END in done.out:
            raise LaptopError(
                f"{self.name} tells no exit codes; adb's shell does since Android 7. "
                "Use a newer device."
            )
        return done._replace(err=done.err.replace(f"{END}\n", ""))

    def put(self, source: Path, target: str) -> None:
        part = shlex.quote(f"{target}.part")
        self._copy("push", str(source.absolute()), f"{target}.part", f"send {source.name}")
        # the first of two calls may have moved it already
        checked(self, f"[ ! -e {part} ] || mv {part} {shlex.quote(target)}")

    def get(self, source: str, target: Path) -> None:
        part = target.with_name(f"{target.name}.part")
        try:
            self._copy("pull", source, str(part.absolute()), f"fetch {source}")
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)

    def _copy(self, verb: str, source: str, target: str, what: str) -> None:
        done = self._insist(
            lambda: self._call(verb, source, target, timeout_s=COPY_S),
            what,
            lambda done: done.code != 0 and bool(TRANSPORT.search(_said(done))),
        )
        if done.code:
            raise LaptopError(f"{self.name}: could not {what}: {_said(done)}")

    def _call(self, *arguments: str, timeout_s: float) -> Done:
        which = ["-s", self.serial] if self.serial else []
        return call([*which, *arguments], timeout_s, self.name)

    def _insist(
        self, attempt: Callable[[], Done], what: str, is_lost: Callable[[Done], bool]
    ) -> Done:
        """Call again while the device is gone; `LaptopError` for what more calls do not help."""
        done = Done(1, "", "")
        for i in range(self.tries):
            if i:
                time.sleep(self.pause_s * 2 ** (i - 1))
                if NETWORK.fullmatch(self.serial):  # adb's server forgets those that go
                    call(["connect", self.serial], 60, self.name)
            done = attempt()
            if not is_lost(done):
                return done
            if FOREVER.search(said := done.err + done.out):
                raise LaptopError(self._refused(said))
        raise LaptopError(self._gone(what, _said(done)))

    def _refused(self, said: str) -> str:
        if "unauthorized" in said:
            return (
                f"{self.name} does not trust this computer. Unlock its screen and accept "
                "“Allow USB debugging?”; if nothing is asked, take the cable out and in."
            )
        if "more than one" in said:
            return f"adb:// means the only device; adb knows {_listed(devices())}. Name one."
        return (
            f"{self.name}: this user may not open the device: {last_line(said)} "
            "Install udev rules: `apt install android-sdk-platform-tools-common`, join plugdev."
        )

    def _gone(self, what: str, said: str) -> str:
        if "offline" in said:
            cause = "it is offline. Take the cable out and in, or turn USB debugging off and on"
        elif "not found" in said or "no devices" in said:
            cause = (
                f"there is no such device; adb knows {_listed(devices())}. Connect it and turn on "
                "USB debugging"
            )
        else:
            cause = f"it went away ({said or 'adb says nothing'}). Look at its cable or network"
        return f"{self.name}: could not {what}: {cause} ({self.tries} tries)."


def call(arguments: Sequence[str], timeout_s: float, where: str) -> Done:
    """How `adb` ended, without what it says when it starts its server."""
    if shutil.which("adb") is None:
        raise LaptopError(f"{where} needs the program 'adb', which is missing. {INSTALL}")
    done = called(["adb", *arguments], timeout_s, where)
    return done._replace(err=re.sub(r"^\* daemon.*\n?", "", done.err, flags=re.MULTILINE))


def _said(done: Done) -> str:
    """What adb complains of: of copies on either output."""
    errors = [line for line in lines(done.err + done.out) if "error" in line]
    return errors[0].removeprefix("adb: ").removeprefix("error: ") if errors else ""


def devices() -> list[tuple[str, str]]:
    """Serial and state of each device that adb knows, such as `device` or `unauthorized`."""
    return read_devices(call(["devices", "-l"], 60, "adb").out)


def read_devices(text: str) -> list[tuple[str, str]]:
    """The rows of `adb devices -l`."""
    rows = (line for line in lines(text) if not line.startswith(("*", "List of")))
    return [(found[1], found[2]) for row in rows if (found := ROW.match(row))]


def _listed(found: Sequence[tuple[str, str]]) -> str:
    return ", ".join(f"{serial} ({state})" for serial, state in found) or "no device"
