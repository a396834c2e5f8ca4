"""Android devices, reached by the program `adb`: a phone on a cable, or one in the network.

`adb` and its server are the user's own: started by `adb` itself if needed, and chosen by
the environment as always (ANDROID_ADB_SERVER_PORT, ANDROID_SERIAL). What a phone asks is answered
on the phone.

When a device goes in the middle of a command, `adb shell` may end with exit code 0 and no word
(seen with 29.0.6). So each script ends by saying so, and what does not was not finished.
"""

import re
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import dataclass

from laptop.errors import DeviceError
from laptop.files import lines
from laptop.hosts.host import Done, called, last_line
from laptop.hosts.remote import Remote

TMP = "/data/local/tmp"  # where adb's user may write and run programs
END = "laptop: end of script"
OWN_CODES = (0, 1, 255)  # exit codes that are adb's own where the script's end is missing
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
class Adb(Remote):
    """An Android device that adb reaches."""

    FOREVER = FOREVER
    serial: str = ""  # as `adb devices` shows it, host:port in the network; "": the only one

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
            lambda done: END not in done.err and END not in done.out and done.code in OWN_CODES,
        )
        if END in done.out:
            raise DeviceError(
                f"{self.name} reports no exit codes; adb's shell does since Android 7. "
                "Use a newer device."
            )
        return done._replace(err=done.err.replace(f"{END}\n", ""))

    def _copy(self, source: str, target: str, *, sends: bool) -> Done:
        return self._call("push" if sends else "pull", source, target, timeout_s=COPY_S)

    def _lost_copy(self, done: Done) -> bool:
        return bool(TRANSPORT.search(self._complaint(done)))

    def _said(self, done: Done) -> str:
        return done.err + done.out  # copies complain on either output

    def _complaint(self, done: Done) -> str:
        errors = [line for line in lines(self._said(done)) if "error" in line]
        return errors[0].removeprefix("adb: ").removeprefix("error: ") if errors else ""

    def _reconnect(self) -> None:
        if NETWORK.fullmatch(self.serial):  # adb's server forgets those that go
            call(["connect", self.serial], 60, self.name)

    def _call(self, *arguments: str, timeout_s: float) -> Done:
        chosen = ["-s", self.serial] if self.serial else []
        return call([*chosen, *arguments], timeout_s, self.name)

    def _refusal(self, said: str) -> str:
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

    def _loss(self, done: Done) -> str:
        said = self._complaint(done)
        if "offline" in said:
            cause = "it is offline. Take the cable out and in, or turn USB debugging off and on"
        elif "not found" in said or "no devices" in said:
            cause = (
                f"there is no such device; adb knows {_listed(devices())}. Connect it and turn on "
                "USB debugging"
            )
        else:
            cause = f"it went away ({said or 'adb says nothing'}). Look at its cable or network"
        return f"{cause} ({self.tries} tries)."


def call(arguments: Sequence[str], timeout_s: float, user: str) -> Done:
    """Run `adb` for the host `user`; the result is without what it says of starting its server."""
    if shutil.which("adb") is None:
        raise DeviceError(f"{user} needs the program 'adb', which is missing. {INSTALL}")
    done = called(["adb", *arguments], timeout_s, user)
    return done._replace(err=re.sub(r"^\* daemon.*\n?", "", done.err, flags=re.MULTILINE))


def devices() -> list[tuple[str, str]]:
    """Serial and state of each device that adb knows, such as `device` or `unauthorized`."""
    return read_devices(call(["devices", "-l"], 60, "adb").out)


def read_devices(text: str) -> list[tuple[str, str]]:
    """Serial and state of each device, from what `adb devices -l` prints."""
    rows = (line for line in lines(text) if not line.startswith(("*", "List of")))
    return [(match[1], match[2]) for row in rows if (match := ROW.match(row))]


def _listed(states: Sequence[tuple[str, str]]) -> str:
    return ", ".join(f"{serial} ({state})" for serial, state in states) or "no device"
