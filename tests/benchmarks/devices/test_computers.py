"""Measuring on a board behind a real OpenSSH server, with ONNX Runtime there: crossing the wire."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from laptop.benchmarks.devices import computer as computers
from laptop.benchmarks.devices import ssh_config
from laptop.benchmarks.devices.addresses import device, state
from laptop.benchmarks.devices.computer import Computer
from laptop.benchmarks.devices.device import Facts, Workload
from laptop.benchmarks.devices.ssh_config import ssh_hosts
from laptop.benchmarks.latency.bench import bench, measure, need_fitting
from laptop.benchmarks.latency.layers import bench_layers
from laptop.errors import BadInput, LaptopError, Unsupported
from laptop.export.artifacts import ExportConfig, check_exported, export_model
from laptop.hosts.host import Local
from laptop.hosts.ssh import Ssh
from support import board as boards
from support.board import Board, Proxy, Server, needs_sshd
from support.onnx_files import onnx_folder
from support.sleepers import QUICK, stand_in

CONFIG = replace(QUICK, components=("unet",))
STATS = "RAM 2/7 (lfb 1x4MB) CPU [3%@729] VDD_IN 5000mW/4900mW VDD_SOC 1500mW/1400mW"


@pytest.fixture
def board(tmp_path: Path) -> Board:
    return boards.make(tmp_path / "board")


@pytest.fixture
def server(board: Board) -> Iterator[Server]:
    with boards.serve(board, board.folder / "sshd") as server:
        yield server


@pytest.fixture
def proxy(server: Server) -> Iterator[Proxy]:
    proxy = Proxy(server.port, cuts=0, after=0)
    yield proxy
    proxy.close()


@pytest.fixture
def remote(server: Server, proxy: Proxy) -> Computer:
    """The board, reached through the proxy."""
    way = Ssh("board", config=server.config(proxy.port), pause_s=0.05)
    return Computer(way, sys.executable)


@pytest.fixture
def graphs(tiny_folder: Path, tmp_path: Path) -> dict[str, Path]:
    config = tiny_folder / "unet" / "config.json"
    return {name: onnx_folder(tmp_path / name, config) for name in ("base", "new")}


def workers(board: Board) -> list[psutil.Process]:
    """The board's processes that time something."""
    folder = str(board.home)
    return [
        p
        for p in psutil.process_iter(["cmdline"])
        if any(part.startswith(folder) for part in p.info["cmdline"] or [])
    ]


def until(condition: Callable[[], bool], seconds: float = 10) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


@needs_sshd
def test_a_probe_says_what_the_board_is(remote: Computer, board: Board) -> None:
    facts = remote.probe()
    assert facts.os == computers.facts_here().os
    assert facts.runtimes["onnxruntime"] == computers.facts_here().runtimes["onnxruntime"]
    assert "pytorch" not in facts.runtimes, "its models are not there"
    assert facts.free_memory_bytes > 1e8
    assert facts.free_disk_bytes > 1e6
    assert not board.kept, "a look writes nothing"
    board.write("nvpmodel", "echo 'NV Power Mode: 15W'; echo 2")
    assert remote.probe().power_mode == "15W"


@needs_sshd
def test_a_measurement_crosses_the_wire_and_files_are_sent_once(
    remote: Computer, board: Board, graphs: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "bench" / "board.json"
    bench(graphs, out, CONFIG, remote)
    found = json.loads(out.read_text())
    assert found["device"]["address"] == "ssh://board"
    assert [r["label"] for r in found["results"]] == ["base", "new"]
    for row in found["results"]:
        assert row["n"] >= 6
        assert row["latency_ms"]["p50"] > 0
        assert row["load_s"]["cold"] > 0
        assert row["peak_memory_bytes"] > 1e7
        assert row["conditions"]["runtime_version"] == found["device"]["runtimes"]["onnxruntime"]
    assert len(found["ratios"]) == 1
    sent = {path: path.stat().st_mtime_ns for path in board.kept if path.is_file()}
    assert {path.name for path in sent} == {"worker.py", "sensors.py", "model.onnx"}
    bench(graphs, tmp_path / "again.json", CONFIG, remote)
    assert {path: path.stat().st_mtime_ns for path in board.kept if path.is_file()} == sent
    assert not board.left
    assert until(lambda: not workers(board))


@needs_sshd
@pytest.mark.parametrize(
    "greeting", ["echo Welcome", "printf Welcome", "echo '{\"a\": 1}'; echo {"]
)
def test_a_board_may_greet(
    remote: Computer, board: Board, graphs: dict[str, Path], greeting: str
) -> None:
    (board.home / ".bashrc").write_text(f"{greeting}\n")
    assert "onnxruntime" in remote.probe().runtimes
    with remote.meter(unet_of(graphs["base"]), 1, 0) as meter:
        assert len(meter.run_round(3, 0).samples_ms) == 3


@needs_sshd
def test_a_connection_that_drops_in_the_middle_is_taken_up_again(
    remote: Computer, proxy: Proxy, board: Board, graphs: dict[str, Path]
) -> None:
    workload = unet_of(graphs["base"])
    with remote.meter(workload, 1, 0) as meter:
        first = meter.run_round(3, 0)
        (before,) = workers(board)
        proxy.cut()
        second = meter.run_round(3, 0)
        (after,) = workers(board)
        assert before.pid != after.pid
        assert meter.stop() > 1e7
    assert len(first.samples_ms) == len(second.samples_ms) == 3
    assert until(lambda: not workers(board))


@needs_sshd
def test_a_board_that_vanishes_is_an_error_that_names_it(
    remote: Computer, proxy: Proxy, graphs: dict[str, Path]
) -> None:
    with remote.meter(unet_of(graphs["base"]), 1, 0) as meter:
        proxy.close()
        with pytest.raises(LaptopError, match="ssh://board"):
            meter.run_round(3, 0)


def unet_of(folder: Path) -> Workload:
    shapes = {"sample": (1, 4, 8, 8), "timestep": (), "encoder_hidden_states": (1, 1, 1)}
    shapes |= {"text_embeds": (1, 1), "time_ids": (1, 1)}
    source = str(folder / "onnx" / "unet" / "model.onnx")
    return Workload("model", "unet", "onnxruntime", "onnx", source, shapes)


@needs_sshd
def test_nothing_runs_on_the_board_when_this_side_is_killed(
    server: Server, board: Board, graphs: dict[str, Path], tmp_path: Path
) -> None:
    script = tmp_path / "main.py"
    script.write_text(
        "import sys, time\nfrom pathlib import Path\nfrom test_computers import unet_of\n"
        "from laptop.benchmarks.devices.computer import Computer\n"
        "from laptop.hosts.ssh import Ssh\n"
        f"way = Ssh('board', config=Path({str(server.config())!r}))\n"
        f"folder = Path({str(graphs['base'])!r})\n"
        "meter = Computer(way, sys.executable).meter(unet_of(folder), 1, 0)\n"
        "print('ready', flush=True)\ntime.sleep(60)\n"
    )
    path = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(script)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=path) as process:
        assert process.stdout.readline() == "ready\n"
        assert len(workers(board)) == 1
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert until(lambda: not workers(board))


@needs_sshd
def test_a_board_without_python_says_what_is_needed(remote: Computer) -> None:
    without = replace(remote, python="python-that-is-not-there")
    with pytest.raises(LaptopError, match=r"is needed there, 3\.9 or later.*\[devices\] python"):
        without.probe()


@needs_sshd
def test_a_model_is_not_timed_where_pytorch_is_not(
    remote: Computer, tiny_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(LaptopError, match="needs pytorch, which is not installed on"):
        bench({"model": tiny_folder}, tmp_path / "x.json", CONFIG, remote)


@needs_sshd
def test_tegrastats_gives_power_and_energy(
    remote: Computer, board: Board, graphs: dict[str, Path], tmp_path: Path
) -> None:
    board.write("tegrastats", f"while :; do echo '{STATS}'; sleep 0.05; done")
    out = tmp_path / "x.json"
    bench(graphs, out, CONFIG, remote)
    for row in json.loads(out.read_text())["results"]:
        assert row["power_w"] == pytest.approx(5)
        assert row["energy_j"] == pytest.approx(5 * row["latency_ms"]["mean"] / 1000)


@needs_sshd
def test_a_finished_report_is_kept_while_its_board_is_away(
    remote: Computer, proxy: Proxy, graphs: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "x.json"
    bench(graphs, out, CONFIG, remote)
    proxy.close()
    before = out.stat().st_mtime_ns
    bench(graphs, out, CONFIG, remote)
    assert out.stat().st_mtime_ns == before
    with pytest.raises(LaptopError, match="ssh://board"):
        bench(graphs, out, replace(CONFIG, rounds=2), remote, overwrite=True)


@needs_sshd
def test_a_full_disk_is_refused_unless_all_is_there_already(
    remote: Computer, graphs: dict[str, Path]
) -> None:
    facts = Facts("board", "Linux", {}, free_disk_bytes=10)
    workload = unet_of(graphs["base"])
    with pytest.raises(LaptopError, match=r"ssh://board has 0\.00 GB free"):
        need_fitting([workload], facts, remote)
    with remote.meter(workload, 1, 0):
        pass
    need_fitting([workload], facts, remote)


@needs_sshd
def test_layers_are_timed_on_the_board(
    remote: Computer, proxy: Proxy, tiny_folder: Path, tmp_path: Path
) -> None:
    out = bench_layers(str(tiny_folder), tmp_path / "table.json", CONFIG, remote, "coarse")
    table = json.loads(out.read_text())
    assert (table["address"], table["runtime"]) == ("ssh://board", "onnxruntime")
    times = [unit["latency_ms"] for unit in table["units"]]
    assert 0 < sum(times) < table["unet_ms"]["p50"]
    before = out.stat().st_mtime_ns
    proxy.close()
    bench_layers(str(tiny_folder), out, CONFIG, remote, "coarse")
    assert out.stat().st_mtime_ns == before, "a finished table needs no board"


@needs_sshd
def test_an_engine_is_built_on_the_board_and_timed_there(
    pruned_xl_folder: Path, board: Board, remote: Computer, tmp_path: Path
) -> None:
    board.install()
    out = tmp_path / "artifacts"
    export_model(
        str(pruned_xl_folder),
        out,
        ExportConfig(("tensorrt",), components=("unet",), steps=1),
        ["a"],
    )
    check_exported(out)
    report = bench({"student": out}, tmp_path / "x.json", CONFIG, remote)
    (row,) = json.loads(report.read_text())["results"]
    assert (row["runtime"], row["precision"]) == ("tensorrt", "fp16")
    assert row["conditions"]["runtime_version"] == "10.3.0"
    assert row["latency_ms"]["p50"] > 0
    assert row["n"] >= 6
    assert len(board.engines) == board.builds == 1


def test_interleaving_works_with_a_device_as_with_this_machine() -> None:
    facts = Facts("a stand-in", "Linux", {})
    report = measure([stand_in("a", 1), stand_in("b", 1)], QUICK, device("local"), facts)
    assert [row.label for row in report.results] == ["a", "b"]


@pytest.mark.parametrize("address", ["orin", "ssh://", "usb://1", ""])
def test_what_is_no_device_is_refused(address: str) -> None:
    with pytest.raises(BadInput, match="is no device: use local"):
        device(address)


def test_an_iphone_is_refused_with_what_is_needed() -> None:
    with pytest.raises(Unsupported, match="an iPhone is measured from a Mac with Xcode"):
        device("ios://1").probe()


def test_this_machine_is_reachable_and_an_unknown_host_says_why() -> None:
    assert state("local").facts.runtimes["pytorch"].startswith("2")
    assert "could not run" in state("ssh://nowhere.invalid").error


def test_hosts_come_from_the_ssh_configuration_without_patterns(tmp_path: Path) -> None:
    config = tmp_path / "config"
    config.write_text('Host orin nano-2 # my boards\n  User me\nHost *\nHOST=!bad ?x "mac.local"\n')
    assert ssh_hosts(config) == ["orin", "nano-2", "mac.local"]
    assert ssh_hosts(tmp_path / "none") == []


def test_hosts_of_included_files_are_listed_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ssh_config, "SSH_CONFIG", tmp_path / "config")
    (tmp_path / "boards.d").mkdir()
    outside = tmp_path / "elsewhere"
    outside.write_text("Host mac\n")
    (tmp_path / "config").write_text(f"Include boards.d/*\nInclude {outside}\nHost own\n")
    (tmp_path / "boards.d" / "1").write_text("Host orin\nInclude config\n")  # in a circle
    assert sorted(ssh_hosts(tmp_path / "config")) == ["mac", "orin", "own"]


def test_this_machine_has_an_address() -> None:
    assert Computer(Local()).address == "local"
