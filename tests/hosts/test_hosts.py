"""Running and copying on this machine and over a real OpenSSH server on the loopback address."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from laptop.errors import BadInput, LaptopError
from laptop.hosts import commands, ssh
from laptop.hosts.host import Host, Local
from laptop.hosts.ssh import Ssh
from support import board as boards
from support.board import Board, Proxy, Server, needs_sshd

Ways = Callable[..., tuple[Ssh, Proxy]]


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Board:
    return boards.make(tmp_path_factory.mktemp("board") / "board")


@pytest.fixture(scope="module")
def server(board: Board) -> Iterator[Server]:
    with boards.serve(board, board.folder / "sshd") as server:
        yield server


@pytest.fixture(params=["local", pytest.param("ssh", marks=needs_sshd)])
def place(request: pytest.FixtureRequest, board: Board, monkeypatch: pytest.MonkeyPatch) -> Host:
    if request.param == "ssh":
        return Ssh("board", config=request.getfixturevalue("server").config(), pause_s=0.05)
    monkeypatch.setenv("TMPDIR", str(board.tmp))
    return Local()


@pytest.fixture
def cut(server: Server) -> Iterator[Ways]:
    """Ways to the board on which connections are cut."""
    made: list[Proxy] = []

    def way(cuts: int, after: int, known: str = "known_hosts") -> tuple[Ssh, Proxy]:
        made.append(Proxy(server.port, cuts, after))
        config = server.config(made[-1].port, server.folder / known)
        return Ssh("board", config=config, pause_s=0.05), made[-1]

    yield way
    for proxy in made:
        proxy.close()


def test_a_script_runs_in_a_shell_and_tells_how_it_ended(place: Host) -> None:
    done = place.run('echo "it\'s $((6 * 7))"; echo no >&2; exit 3')
    assert done == (3, "it's 42\n", "no\n")
    with pytest.raises(LaptopError, match=r"exit code 5 of `echo bad >&2; exit 5`: bad"):
        commands.checked(place, "echo bad >&2; exit 5")


def test_a_script_that_takes_too_long_is_an_error(place: Host) -> None:
    with pytest.raises(LaptopError, match=r"no end after 0\.5 s"):
        place.run("sleep 5", timeout_s=0.5)


def test_files_go_there_and_back_whole(place: Host, board: Board, tmp_path: Path) -> None:
    source = tmp_path / "a file"
    source.write_bytes(os.urandom(300_000))
    target = board.tmp / "copy"
    place.put(source, str(target))
    assert target.read_bytes() == source.read_bytes()
    place.get(str(target), tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == source.read_bytes()
    target.unlink()
    assert not list(board.tmp.iterdir())


def test_a_missing_file_is_an_error_that_leaves_nothing(place: Host, tmp_path: Path) -> None:
    with pytest.raises((LaptopError, FileNotFoundError), match="nowhere"):
        place.get("/nowhere/file", tmp_path / "back")
    assert not list(tmp_path.iterdir())


def test_a_scratch_folder_goes_with_what_runs_in_it(place: Host, board: Board) -> None:
    def run() -> None:
        with commands.scratch(place) as scratch:
            assert list(board.tmp.iterdir()) == [Path(scratch)]
            commands.run_long(place, f"{scratch}/x", ["sleep", "4711"], timeout_s=0.5, poll_s=0.1)

    with pytest.raises(LaptopError, match=r"no end after 0\.5 s"):
        run()
    assert not list(board.tmp.iterdir())
    running = [p.info["cmdline"] for p in psutil.process_iter(["cmdline", "status"])]
    assert ["sleep", "4711"] not in running


def test_a_long_command_tells_how_it_ended_and_what_it_printed(place: Host) -> None:
    with commands.scratch(place) as scratch:
        command = ["sh", "-c", "echo out; echo err >&2; exit 255"]
        done = commands.run_long(place, f"{scratch}/x", command, 10, poll_s=0.1)
    assert done == (255, "out\nerr\n", "")


def test_a_long_command_that_is_killed_is_an_error(place: Host) -> None:
    with commands.scratch(place) as scratch:
        # the shell that notes the exit code goes too, as when a board's memory ends
        command = ["sh", "-c", f"kill -9 $(cat {scratch}/x/pid); sleep 0.2"]
        with pytest.raises(LaptopError, match="was killed, mostly for lack of memory"):
            commands.run_long(place, f"{scratch}/x", command, 10, poll_s=0.1)


@needs_sshd
def test_a_command_whose_connection_drops_is_run_again(cut: Ways) -> None:
    ssh, proxy = cut(cuts=2, after=1000)
    assert ssh.run("echo here").out == "here\n"
    assert proxy.connections == 3


@needs_sshd
def test_a_copy_that_is_cut_in_the_middle_is_made_again(
    cut: Ways, board: Board, tmp_path: Path
) -> None:
    source = tmp_path / "large"
    source.write_bytes(os.urandom(2_000_000))
    ssh, proxy = cut(cuts=1, after=1_000_000)
    ssh.put(source, str(board.tmp / "large"))
    assert (board.tmp / "large").read_bytes() == source.read_bytes()
    assert proxy.connections == 3, "two for the copy, one for the name"
    (board.tmp / "large").unlink()
    assert not list(board.tmp.iterdir())


@needs_sshd
def test_a_long_command_is_started_once_whatever_the_connection_does(
    cut: Ways, board: Board
) -> None:
    ssh, _ = cut(cuts=6, after=5000)  # after the login, so that the command has started
    count = board.home / "count"
    with commands.scratch(ssh) as scratch:
        command = ["sh", "-c", f"echo x >>{count}; sleep 1; echo done"]
        done = commands.run_long(ssh, f"{scratch}/x", command, 20, poll_s=0.1)
    assert done.out == "done\n"
    assert count.read_text() == "x\n"
    assert not list(board.tmp.iterdir())


@needs_sshd
def test_a_machine_that_does_not_answer_is_an_error_after_some_tries(cut: Ways) -> None:
    ssh, proxy = cut(cuts=99, after=100)
    with pytest.raises(LaptopError, match=r"ssh://board: could not run a command: .*\(4 tries\)"):
        ssh.run("true")
    assert proxy.connections == 4


@needs_sshd
def test_a_changed_host_key_is_an_error_at_once(cut: Ways, tmp_path: Path) -> None:
    ssh, proxy = cut(cuts=0, after=0, known="changed")
    with pytest.raises(LaptopError, match=r"host key is not the known one.*ssh-keygen -R board"):
        ssh.run("true")
    with pytest.raises(LaptopError, match="host key is not the known one"):
        ssh.get("/etc/hostname", tmp_path / "got")
    assert proxy.connections == 2, "no second try"
    assert not list(tmp_path.iterdir())


@needs_sshd
def test_an_unknown_host_key_is_an_error_and_not_taken_in(server: Server) -> None:
    known = server.folder / "empty"
    with pytest.raises(LaptopError, match=r"its host key is not known\. Run `ssh board` once"):
        Ssh("board", config=server.config(known=known)).run("true")
    assert known.read_text() == ""


@needs_sshd
def test_a_refused_login_says_what_helps(server: Server) -> None:
    config = server.config()
    text = config.read_text().replace(str(server.folder / "user"), str(server.folder / "other"))
    other = server.folder / "config-other"
    other.write_text(text)
    with pytest.raises(LaptopError, match=r"refuses the login: .*(Run|Try) `ssh-copy-id board`"):
        Ssh("board", config=other).run("true")


@pytest.mark.parametrize(
    ("address", "place"),
    [
        ("local", Local()),
        ("ssh://orin", Ssh("orin")),
        ("ssh://me@10.0.0.7:2222", Ssh("10.0.0.7", "me", 2222)),
        ("ssh://[fe80::1]:22/", Ssh("fe80::1", None, 22)),
    ],
)
def test_an_address_names_a_place(address: str, place: Host) -> None:
    assert ssh.host_at(address) == place


def test_an_address_of_ipv6_has_brackets_in_its_name() -> None:
    assert ssh.host_at("ssh://me@[::1]:2222").name == "ssh://me@[::1]:2222"
    assert ssh.host_at("ssh://orin:2222").name == "ssh://orin:2222"


@pytest.mark.parametrize(
    "address", ["orin", "ssh://", "ssh://-oProxyCommand=x", "ssh://a b", "ssh://-o@host", "adb://1"]
)
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(BadInput, match=r"use local or ssh://\[user@\]host\[:port\]"):
        ssh.host_at(address)


def test_a_missing_program_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(LaptopError, match="ssh://orin needs the program 'ssh'"):
        Ssh("orin").run("true")
