"""Engines built by the stand-in trtexec, here and on a board behind a real OpenSSH server.

No real TensorRT runs in these tests: the stand-in checks flags as each version does and computes
with ONNX Runtime, so that what is tested is everything around the engine.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from laptop.errors import BadInput, LaptopError, Unsupported
from laptop.export import components, parity
from laptop.export.artifacts import ExportConfig, check_exported, export_model
from laptop.export.closeness import psnr
from laptop.export.inputs import record
from laptop.export.settings import TensorrtConfig, VerifyConfig
from laptop.export.targets import PRECISIONS
from laptop.export.to_tensorrt import engine, trtexec
from laptop.export.to_tensorrt import target as to_tensorrt
from laptop.export.to_tensorrt.trtexec import Gpu, Version
from laptop.hosts.host import Host, Local
from laptop.hosts.ssh import Ssh
from laptop.models import loading
from laptop.pruning.sampling_config import Sampling
from support import board as boards
from support.board import Board, Proxy, Server, needs_sshd

PROMPTS = ["a large red circle on white"]


@pytest.fixture(scope="module")
def exported(pruned_xl_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """U-Net and a text encoder of a pruned model, shapes static."""
    config = ExportConfig(("tensorrt",), components=("text_encoder", "unet"), steps=1)
    out = tmp_path_factory.mktemp("trt") / "out"
    export_model(str(pruned_xl_folder), out, config, PROMPTS)
    check_exported(out)
    return out


@pytest.fixture(scope="module")
def dynamic(pruned_xl_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The U-Net with a profile of one to two pictures."""
    profile = TensorrtConfig(batch=(1, 1, 2), optimization_level=2, workspace_mib=64)
    config = ExportConfig(("tensorrt",), components=("unet",), steps=1, tensorrt=profile)
    out = tmp_path_factory.mktemp("trt") / "out"
    export_model(str(pruned_xl_folder), out, config, PROMPTS)
    check_exported(out)
    return out


@pytest.fixture
def board(tmp_path: Path) -> Board:
    return boards.make(tmp_path / "board").install()


@pytest.fixture
def here(board: Board, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    """This machine as if it were the board."""
    for name, value in board.environment.items():
        monkeypatch.setenv(name, value)
    engine.is_here.cache_clear()
    yield Local()
    engine.is_here.cache_clear()


@pytest.fixture
def server(board: Board) -> Iterator[Server]:
    with boards.serve(board, board.folder / "sshd") as server:
        yield server


def unet(folder: Path) -> Path:
    return folder / "tensorrt/unet/model.onnx"


def real_inputs(model: Path) -> tuple[components.Graph, dict[str, torch.Tensor]]:
    """The U-Net in PyTorch, and what it gets in a sampling."""
    pipe = loading.load_pipeline(str(model))
    return components.graph(pipe, "unet"), record(pipe, PROMPTS, Sampling(1), seed=1)["unet"][0]


def arrays(tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    return {name: tensor.numpy() for name, tensor in tensors.items()}


@needs_sshd
def test_a_board_builds_and_computes_what_pytorch_computes(
    exported: Path, pruned_xl_folder: Path, board: Board, server: Server
) -> None:
    run = engine.load(Ssh("board", config=server.config()), unet(exported))
    graph, given = real_inputs(pruned_xl_folder)
    expected = components.run(graph, given)["out_sample"].numpy()
    got = run(arrays(given))["out_sample"]
    assert psnr(expected, got) >= PRECISIONS["fp16"].floor_db
    wrong = {**arrays(given), "timestep": np.float32(3)}
    assert psnr(expected, run(wrong)["out_sample"]) < PRECISIONS["fp16"].floor_db, "inputs are read"
    assert not board.left, "nothing is left in the board's temporary folder"
    assert len(board.engines) == board.builds == 1


@pytest.mark.parametrize("version", ["8.6.2", "10.3.0", "11.1.0"])
def test_integer_inputs_arrive_in_the_type_of_the_version(
    version: str, exported: Path, board: Board, here: Host, pruned_xl_folder: Path
) -> None:
    board.install(version)
    run = engine.load(here, exported / "tensorrt/text_encoder/model.onnx")
    pipe = loading.load_pipeline(str(pruned_xl_folder))
    graph = components.graph(pipe, "text_encoder")
    given = record(pipe, PROMPTS, Sampling(1), seed=0)["text_encoder"][0]
    got = run(arrays(given))
    for name, expected in components.run(graph, given).items():
        assert psnr(expected.numpy(), got[name]) >= PRECISIONS["fp16"].floor_db, name


def test_a_profile_is_built_and_any_shape_within_it_runs(
    dynamic: Path, pruned_xl_folder: Path, board: Board, here: Host
) -> None:
    run = engine.load(here, unet(dynamic))
    graph, given = real_inputs(pruned_xl_folder)
    more = {k: torch.cat([v, v]) if v.ndim else v for k, v in given.items()}
    for tensors in (given, more):
        expected = components.run(graph, tensors)["out_sample"].numpy()
        assert psnr(expected, run(arrays(tensors))["out_sample"]) >= PRECISIONS["fp16"].floor_db
    calls = (board.folder / "calls").read_text()
    assert "--maxShapes=sample:4x4x8x8," in calls
    assert "--builderOptimizationLevel=2 --memPoolSize=workspace:64 --skipInference" in calls
    assert "--shapes=sample:4x4x8x8," in calls
    with pytest.raises(BadInput, match=r"sample has shape \(2, 4, 8\); the engine takes \(-1, 4"):
        run({**arrays(given), "sample": np.zeros((2, 4, 8))})


@needs_sshd
def test_an_engine_and_its_graph_are_made_and_sent_once(
    exported: Path, board: Board, server: Server, tmp_path: Path
) -> None:
    place = Ssh("board", config=server.config())
    first = engine.build(place, unet(exported))
    graph = next(board.home.rglob("model.onnx"))
    written = graph.stat().st_mtime_ns
    second = engine.build(place, unet(exported))
    assert (first.is_new, second.is_new, board.builds) == (True, False, 1)
    assert first.key == second.key
    board.engines[0].unlink()
    assert engine.build(place, unet(exported)).is_new
    assert graph.stat().st_mtime_ns == written, "the graph was there"
    fetched = engine.fetch(place, second, tmp_path / "fetched")
    assert fetched.read_bytes() == board.engines[0].read_bytes()
    key = json.loads(fetched.with_suffix(".json").read_text())["key"]
    assert (key["tensorrt"], key["gpu"], key["capability"]) == ("10.3.0", "Orin", "8.7")
    (timing,) = (board.home / ".cache/laptop/tensorrt/timing").iterdir()
    assert timing.name == "Orin-10-3-0.cache"
    assert len(timing.read_text().splitlines()) == 2, "both builds used it"


@pytest.mark.parametrize(
    "other",
    [
        {"version": "10.3.1"},
        {"version": "11.0.0"},
        {"gpu": "Orin Nano"},
        {"gpu": "NVIDIA RTX A2000", "capability": "8.6"},
    ],
)
def test_an_engine_for_another_gpu_or_version_is_not_used(
    other: dict[str, str], exported: Path, board: Board, here: Host
) -> None:
    old = engine.build(here, unet(exported))
    board.install(**other)  # type: ignore[arg-type]
    new = engine.build(here, unet(exported))
    assert new.is_new
    assert new.path != old.path
    # and were it offered, the device would refuse it
    plan, now = old.plan, engine.probe(here)
    given = {k: np.zeros([abs(d) for d in t.shape]) for k, t in plan.inputs.items()}
    with pytest.raises(LaptopError, match=r"Version tag does not match|an incompatible device"):
        engine.compute(here, now, old, given)


def test_an_engine_is_not_used_when_its_record_or_bytes_are_others(
    exported: Path, board: Board, here: Host
) -> None:
    made = engine.build(here, unet(exported))
    record_path = Path(made.path).with_suffix(".json")
    content = json.loads(record_path.read_text())
    content["key"]["gpu"] = "Orin Nano"
    record_path.write_text(json.dumps(content))
    assert engine.build(here, unet(exported)).is_new
    with Path(made.path).open("ab") as file:
        file.write(b"x")
    assert engine.build(here, unet(exported)).is_new
    record_path.write_text("{")
    assert engine.build(here, unet(exported)).is_new
    assert not engine.build(here, unet(exported)).is_new


@needs_sshd
def test_a_build_goes_on_while_the_connection_drops(
    exported: Path, board: Board, server: Server
) -> None:
    board.install(seconds=1.5)
    proxy = Proxy(server.port, cuts=12, after=6000)  # cuts the sending, and calls while it builds
    try:
        config = server.config(proxy.port)
        made = engine.build(Ssh("board", config=config, tries=14, pause_s=0.01), unet(exported))
    finally:
        proxy.close()
    assert made.is_new
    assert proxy.connections > 12
    assert board.builds == 1
    assert not board.left


@needs_sshd
def test_a_changed_host_key_ends_it_before_anything_is_sent(
    exported: Path, board: Board, server: Server
) -> None:
    config = server.config(known=server.folder / "changed")
    with pytest.raises(LaptopError, match="its host key is not the known one"):
        engine.build(Ssh("board", config=config), unet(exported))
    assert not board.kept


def test_flags_that_its_help_does_not_list_are_refused_before_anything_is_sent(
    exported: Path, board: Board, here: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    board.install("11.0.0")
    monkeypatch.setattr(trtexec, "precision_flags", lambda *_: ["--fp16"])
    with pytest.raises(Unsupported, match=r"trtexec \(TensorRT 11\.0\.0\) does not know --fp16"):
        engine.build(here, unet(exported))
    assert not board.kept


def test_flags_that_trtexec_refuses_are_an_error_that_names_them(
    exported: Path, board: Board, here: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    board.install("11.0.0")
    monkeypatch.setattr(trtexec, "precision_flags", lambda *_: ["--fp16"])
    monkeypatch.setattr(trtexec, "unlisted", lambda *_: [])
    with pytest.raises(Unsupported, match=r"\(TensorRT 11\.0\.0\) does not know --fp16"):
        engine.build(here, unet(exported))
    assert not board.engines
    assert not board.left


@pytest.mark.parametrize(
    ("version", "flags", "said"),
    [
        ("8.6.2", ["--stronglyTyped"], "does not know --stronglyTyped"),
        ("8.6.2", [], "fp16 is not configured in the builder"),
        ("10.3.0", [], "fp16 is not configured in the builder"),
        ("10.3.0", ["--stronglyTyped", "--optShapes=sample:2x4x8x8"], "Static model does not take"),
    ],
)
def test_what_a_version_does_not_build_is_told_in_its_words(
    version: str,
    flags: list[str],
    said: str,
    exported: Path,
    board: Board,
    here: Host,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    board.install(version)
    monkeypatch.setattr(trtexec, "build_flags", lambda *_: flags)
    monkeypatch.setattr(trtexec, "unlisted", lambda *_: [])
    with pytest.raises(LaptopError, match=said):
        engine.build(here, unet(exported))
    assert not board.engines


def test_too_little_memory_is_refused_with_the_figures(
    exported: Path, board: Board, here: Host
) -> None:
    board.install(free_mib=3)
    with pytest.raises(BadInput, match=r"at least 0\.0 GB of memory, twice the graph; 0\.0 GB"):
        engine.build(here, unet(exported))
    assert not board.kept


def test_a_gpu_that_trtexec_does_not_confirm_is_an_error(
    exported: Path, board: Board, here: Host
) -> None:
    board.install(gpu="NVIDIA A2", capability="8.6", says=("NVIDIA H200", "9.0"))
    with pytest.raises(LaptopError, match="Is there more than one GPU"):
        engine.build(here, unet(exported))
    assert not board.engines


def test_a_probe_tells_version_gpu_and_memory(board: Board, here: Host) -> None:
    found = engine.probe(here)
    assert found.version == Version(10, 3, 0)
    assert found.device == ("Orin", "8.7")
    assert found.free_memory_bytes == 8000 * 2**20
    assert found.home == str(board.home)


@pytest.mark.parametrize(
    ("said", "device", "free"),
    [
        ({"smi": "NVIDIA H200, 9.0, 140000"}, Gpu("NVIDIA H200", "9.0"), 140000 * 2**20),
        (
            {
                "smi": "Orin (nvgpu), [N/A], [N/A]",
                "board": "NVIDIA Jetson Orin Nano Developer Kit",
                "available": "5000",
            },
            Gpu("NVIDIA Jetson Orin Nano Developer Kit", ""),
            5000 * 1024,
        ),
        ({"smi": "", "board": "Jetson AGX Orin"}, Gpu("Jetson AGX Orin", ""), 0),
        ({"smi": "Orin (nvgpu), 8.7, [N/A]", "available": "7"}, Gpu("Orin", "8.7"), 7168),
        ({"smi": ""}, None, 0),
    ],
)
def test_a_gpu_is_named_by_what_knows_it(
    said: dict[str, str], device: Gpu | None, free: int
) -> None:
    assert engine._gpu(said) == (device, free)


def test_a_machine_without_trtexec_says_where_it_was_looked_for(
    board: Board, here: Host, exported: Path
) -> None:
    (board.folder / "bin" / "trtexec").unlink()
    with pytest.raises(LaptopError, match="has no trtexec on its PATH, in /usr/src/tensorrt/bin"):
        engine.probe(here)
    assert not engine.is_here()
    assert to_tensorrt.checked("fp16") == to_tensorrt.NO_ENGINE


def test_an_old_tensorrt_is_refused(board: Board, here: Host) -> None:
    board.install("8.5.2")
    with pytest.raises(Unsupported, match=r"TensorRT 8\.5\.2 is too old"):
        engine.probe(here)


def test_where_an_engine_can_be_built_parity_is_that_of_the_engine(
    exported: Path, pruned_xl_folder: Path, board: Board, here: Host, tmp_path: Path
) -> None:
    config = VerifyConfig(steps=1)
    out = parity.verify(exported, str(pruned_xl_folder), tmp_path / "parity", config, PROMPTS)
    rows = json.loads((out / "report.json").read_text())["results"]
    assert {row["state"] for row in rows} == {"verified"}
    assert board.builds == 2, "U-Net and text encoder"
    assert len(board.engines) == 2


def test_the_command_builds_every_graph_and_fetches_the_engines(
    exported: Path, board: Board, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "laptop.export.to_tensorrt.engine", str(exported)]

    def call(*more: str) -> Any:
        return subprocess.run(
            [*command, *more], env=board.environment, capture_output=True, text=True
        )

    done = call("-o", str(tmp_path / "engines"))
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert [row["component"] for row in rows] == ["text_encoder", "unet"]
    assert all(Path(row["fetched"]).is_file() and row["is_new"] for row in rows)
    failed = call("--device", "nowhere")
    assert (failed.returncode, failed.stdout) == (1, "")
    assert "'nowhere' is no device" in failed.stderr


def test_an_artifacts_folder_without_tensorrt_is_an_error(tmp_path: Path) -> None:
    content = {"schema": "laptop.artifacts/1", "artifacts": []}
    (tmp_path / "artifacts.json").write_text(json.dumps(content))
    with pytest.raises(BadInput, match="has no TensorRT graphs; export with --to tensorrt"):
        engine.build_all(tmp_path, Local())
