"""The transport to Android devices: the real adb client, and a daemon that speaks its protocol."""

import os
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from laptop.errors import LaptopError
from laptop.hosts import adb, commands
from laptop.hosts.adb import Adb
from support.board import Proxy
from support.device_daemon import TMP, Phone, connect, needs_adb, phone_at, private_server

Ways = Callable[[int, int], tuple[Adb, Proxy]]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with private_server(tmp_path_factory.mktemp("home")):
        yield


@pytest.fixture
def phone(server: None, tmp_path: Path) -> Iterator[Phone]:
    with phone_at(tmp_path / "phone") as phone:
        yield phone
        adb.call(["disconnect"], 10, "adb")


@pytest.fixture
def place(phone: Phone) -> Adb:
    return Adb(connect(phone.port), pause_s=0.05)


@pytest.fixture
def cut(phone: Phone) -> Iterator[Ways]:
    """Ways to the phone on which connections are cut; the first one is made by `connect`."""
    made: list[Proxy] = []

    def way(cuts: int, after: int) -> tuple[Adb, Proxy]:
        made.append(Proxy(phone.port, cuts, after))
        return Adb(connect(made[-1].port), pause_s=0.1), made[-1]

    yield way
    for proxy in made:
        adb.call(["disconnect", f"127.0.0.1:{proxy.port}"], 10, "adb")
        proxy.close()


@needs_adb
@pytest.mark.parametrize("code", [0, 1, 3, 255])
def test_a_script_runs_in_a_shell_and_tells_how_it_ended(place: Adb, code: int) -> None:
    done = place.run(f'echo "it\'s $((6 * 7))"; echo error: closed >&2; exit {code}')
    assert done == (code, "it's 42\n", "error: closed\n")


@needs_adb
def test_a_script_that_fails_is_named_with_what_it_said(place: Adb) -> None:
    with pytest.raises(LaptopError, match=r"exit code 5 of `echo bad >&2; exit 5`: bad"):
        commands.checked(place, "echo bad >&2; exit 5")


@needs_adb
def test_a_script_that_takes_too_long_is_an_error(place: Adb) -> None:
    with pytest.raises(LaptopError, match=r"no end after 0\.5 s"):
        place.run("sleep 5", timeout_s=0.5)


@needs_adb
def test_files_go_there_and_back_whole(place: Adb, phone: Phone, tmp_path: Path) -> None:
    source = tmp_path / "a file"
    source.write_bytes(os.urandom(300_000))
    place.put(source, f"{TMP}/a copy")
    assert [p.name for p in phone.tmp.iterdir()] == ["a copy"]
    assert (phone.tmp / "a copy").read_bytes() == source.read_bytes()
    place.get(f"{TMP}/a copy", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == source.read_bytes()
    assert not (tmp_path / "back.part").exists()


@needs_adb
def test_a_missing_file_is_an_error_that_leaves_nothing(place: Adb, tmp_path: Path) -> None:
    with pytest.raises(LaptopError, match=r"could not fetch /nowhere/file: .*No such file"):
        place.get("/nowhere/file", tmp_path / "back")
    assert not list(tmp_path.glob("back*"))


@needs_adb
def test_a_file_that_the_phone_does_not_take_is_an_error(place: Adb, tmp_path: Path) -> None:
    (tmp_path / "model").write_text("")
    with pytest.raises(LaptopError, match=r"could not send model: .*couldn't create file"):
        place.put(tmp_path / "model", f"{TMP}/nowhere/model")


@needs_adb
def test_a_scratch_folder_goes_with_what_runs_in_it(place: Adb, phone: Phone) -> None:
    def run() -> None:
        with commands.scratch(place) as scratch:
            assert list(phone.tmp.iterdir()) == [Path(scratch)]
            commands.run_long(place, f"{scratch}/x", ["sleep", "4712"], timeout_s=0.5, poll_s=0.1)

    with pytest.raises(LaptopError, match=r"no end after 0\.5 s"):
        run()
    assert not list(phone.tmp.iterdir())
    running = [p.info["cmdline"] for p in psutil.process_iter(["cmdline"])]
    assert ["sleep", "4712"] not in running


@needs_adb
def test_a_command_whose_connection_drops_is_run_again(cut: Ways, phone: Phone) -> None:
    place, proxy = cut(2, 450)  # bytes, which the greeting and half of the command need
    assert place.run(f"echo here # {'x' * 200}").out == "here\n"
    assert proxy.connections > 2


@needs_adb
def test_a_copy_that_is_cut_in_the_middle_is_made_again(
    cut: Ways, phone: Phone, tmp_path: Path
) -> None:
    source = tmp_path / "large"
    source.write_bytes(os.urandom(2_000_000))
    place, proxy = cut(1, 1_000_000)
    place.put(source, f"{TMP}/large")
    assert (phone.tmp / "large").read_bytes() == source.read_bytes()
    assert [p.name for p in phone.tmp.iterdir()] == ["large"]
    assert proxy.connections > 1


@needs_adb
def test_a_long_command_is_started_once_whatever_the_connection_does(
    cut: Ways, phone: Phone
) -> None:
    place, proxy = cut(4, 1500)
    with commands.scratch(place) as scratch:
        command = ["sh", "-c", f"echo x >>{TMP}/count; sleep 1; echo done"]
        done = commands.run_long(place, f"{scratch}/x", command, 20, poll_s=0.1)
    assert done.out == "done\n"
    assert (phone.tmp / "count").read_text() == "x\n"
    assert proxy.connections > 4


@needs_adb
def test_a_command_that_a_vanished_phone_did_not_end_is_no_success(phone: Phone) -> None:
    place = Adb(connect(phone.port), tries=1)
    timer = threading.Timer(0.5, phone.vanish)
    timer.start()
    with pytest.raises(LaptopError, match=r"could not run a command: it went away .*1 tries"):
        place.run("echo begun; sleep 5")
    timer.join()


@needs_adb
def test_a_phone_that_does_not_come_back_is_an_error_after_some_tries(
    place: Adb, phone: Phone, tmp_path: Path
) -> None:
    (tmp_path / "model").write_text("x")
    phone.vanish()
    gone = r"(it is offline|there is no such device).*\(4 tries\)"
    with pytest.raises(LaptopError, match=f"could not send model: {gone}"):
        place.put(tmp_path / "model", f"{TMP}/model")
    with pytest.raises(LaptopError, match=f"could not fetch {TMP}/model: {gone}"):
        place.get(f"{TMP}/model", tmp_path / "back")
    assert not list(tmp_path.glob("back*"))


@needs_adb
def test_an_unknown_serial_is_an_error_that_lists_the_known_ones(place: Adb) -> None:
    known = re.escape(f"adb knows {place.serial} (device)")
    with pytest.raises(LaptopError, match=f"adb://nope: .*no such device; {known}"):
        Adb("nope", pause_s=0.01).run("true")


@needs_adb
def test_no_serial_means_the_only_device(place: Adb, tmp_path: Path) -> None:
    assert Adb().run("echo here").out == "here\n"
    with phone_at(tmp_path / "second") as second:
        connect(second.port)
        with pytest.raises(LaptopError, match="means the only device") as error:
            Adb().run("echo here")
    for port in (place.serial.split(":")[1], second.port):
        assert f"127.0.0.1:{port} (device)" in str(error.value)


@needs_adb
def test_a_network_device_is_connected_where_it_is_not(phone: Phone) -> None:
    assert Adb(f"127.0.0.1:{phone.port}", pause_s=0.01).run("echo here").out == "here\n"


@needs_adb
def test_a_phone_that_does_not_trust_this_computer_is_an_error_at_once(phone: Phone) -> None:
    phone.trusts = False
    place = Adb(connect(phone.port), pause_s=60)
    with pytest.raises(LaptopError, match=r"does not trust this computer\. Unlock its screen"):
        place.run("true")
    assert (place.serial, "unauthorized") in adb.devices()


@needs_adb
def test_a_phone_whose_shell_tells_no_exit_codes_is_refused(server: None, tmp_path: Path) -> None:
    with phone_at(tmp_path / "old", features="cmd") as old:
        with pytest.raises(LaptopError, match=r"reports no exit codes; .* since Android 7"):
            Adb(connect(old.port), pause_s=0.01).run("true")
        adb.call(["disconnect"], 10, "adb")


def test_without_adb_an_error_says_where_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(LaptopError, match=r"adb://x needs the program 'adb'.*`apt install adb`"):
        Adb("x").run("true")
    with pytest.raises(LaptopError, match="needs the program 'adb'"):
        adb.devices()


def test_the_list_of_devices_is_read_with_their_states() -> None:
    text = """* daemon not running; starting now at tcp:5037
* daemon started successfully
List of devices attached
emulator-5554          offline
0123456789ABCDEF       device usb:1-1 product:shiba model:Pixel_8 device:shiba transport_id:2
192.168.1.20:5555      unauthorized transport_id:4
adb-R58N-x (2)._adb-tls-connect._tcp device product:a model:b device:c transport_id:9
FA6A00000000           no permissions (user in plugdev group; are your udev rules wrong?); see [http://developer.android.com/tools/device.html] usb:1-4

"""  # noqa: E501
    assert adb.read_devices(text) == [
        ("emulator-5554", "offline"),
        ("0123456789ABCDEF", "device"),
        ("192.168.1.20:5555", "unauthorized"),
        ("adb-R58N-x (2)._adb-tls-connect._tcp", "device"),
        ("FA6A00000000", "no permissions"),
    ]
