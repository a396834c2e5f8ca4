"""The main job to two targets and on a board, killed at any moment, as a command."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from laptop import contents
from laptop.unfinished import RESUME
from support import board as boards
from support.board import needs_sshd

pytestmark = pytest.mark.long
COMMAND = [sys.executable, "-m", "laptop", "compress", "--model", "tiny-sdxl", "--ratio", "0.5"]


def command(out: Path) -> list[str]:
    return [*COMMAND, "--to", "onnx,coreml", "--smoke", "--json", "-o", str(out)]


def kill_at(out: Path, result: str) -> None:
    """Run the job until it has written a result, and kill it."""
    process = subprocess.Popen(command(out), stdout=subprocess.DEVNULL, start_new_session=True)
    limit = time.monotonic() + 600
    while not (out / result).exists() and time.monotonic() < limit:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, which was killed twice on its way."""
    out = tmp_path_factory.mktemp("smoke") / "run"
    for wait_for in ("score", "data"):
        kill_at(out, wait_for)
    assert not (out / "report.html").exists()
    done = subprocess.run(command(out), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["report"] == str(out / "report.html")
    assert "score: " in done.stderr, "a finished stage is not done again"
    return out


def test_a_run_that_was_killed_twice_is_whole(smoke: Path) -> None:
    assert (smoke / "artifacts/onnx/unet/model.onnx").exists()
    assert (smoke / "artifacts/coreml/unet.mlpackage").exists()
    assert not list(smoke.rglob("*.partial"))
    run = json.loads((smoke / "laptop.json").read_text())
    assert all(stage["state"] == "done" for stage in run["stages"].values())


@needs_sshd
def test_a_board_is_measured_beside_this_machine(smoke: Path, tmp_path: Path) -> None:
    board = boards.make(tmp_path / "board")
    board.write("python3", f'exec {sys.executable} "$@"')
    programs = tmp_path / "bin"
    programs.mkdir()
    with boards.serve(board, board.folder / "sshd") as server:
        for name in ("ssh", "scp"):  # which know the board by a configuration of their own
            program = programs / name
            program.write_text(f'#!/bin/sh\nexec {shutil.which(name)} -F {server.config()} "$@"\n')
            program.chmod(0o755)
        here = os.environ | {"PATH": f"{programs}:{os.environ['PATH']}"}
        again = [*command(smoke), "--device", "local,ssh://board"]
        done = subprocess.run(again, capture_output=True, text=True, timeout=600, env=here)
    assert done.returncode == 0, done.stderr
    assert "bench: " + str(smoke / "bench" / "local.json") + " is up to date" in done.stderr
    report = json.loads((smoke / "bench" / "ssh-board.json").read_text())
    rows = {(r["label"], r["component"]) for r in report["results"]}
    assert {("teacher", "unet"), ("student", "unet"), ("student", "vae_decoder")} <= rows
    assert {r["runtime"] for r in report["results"]} == {"onnxruntime"}
    text = (smoke / "report.md").read_text()
    assert "ONNX Runtime on ssh://board, p50" in text
    assert "### ssh://board: " in text
    assert not board.left


def test_onnx_and_core_ml_are_compared_with_pytorch(smoke: Path) -> None:
    results = json.loads((smoke / "parity/report.json").read_text())["results"]
    states = {
        r["target"]: {x["state"] for x in results if x["target"] == r["target"]} for r in results
    }
    assert states["onnx"] == {"verified"}
    assert "failed" not in states["coreml"]
    assert all(r["samples"] > 0 for r in results)


def test_a_killed_run_ends_with_the_result_of_an_unbroken_one(smoke: Path, tmp_path: Path) -> None:
    out = tmp_path / "whole"
    kill_at(out, "model")  # which is whole then; the exports are not asked for here
    assert (out / "plan.json").read_text() == (smoke / "plan.json").read_text()
    whole, broken = (
        load_file(next((r / "model/unet").glob("*.safetensors"))) for r in (out, smoke)
    )
    assert all(whole[k].equal(v) for k, v in broken.items())


def test_a_target_that_failed_is_tried_again_and_what_follows_with_it(smoke: Path) -> None:
    out = smoke  # the last test: it changes the run
    shutil.rmtree(out / "artifacts" / "coreml")
    listed = json.loads((out / "artifacts" / "artifacts.json").read_text())
    failed = {"target": "coreml", "precision": "fp16", "component": "unet", "error": "bad luck"}
    rows = [row for row in listed["artifacts"] if row["target"] != "coreml"]
    (out / "artifacts" / "artifacts.json").write_text(
        json.dumps(listed | {"artifacts": rows, "failed": [failed]})
    )
    manifest = json.loads((out / "artifacts" / "manifest.json").read_text())
    made = {k: v for k, v in manifest["files"].items() if not k.startswith("coreml/")}
    left = contents.record(out / "artifacts", without=RESUME)
    as_exported = contents.signed(manifest | {"files": made, "result": left})
    (out / "artifacts" / "manifest.json").write_text(json.dumps(as_exported))
    done = subprocess.run([*command(out), "--no-verify"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (out / "artifacts" / "coreml" / "unet.mlpackage").exists()
    assert json.loads((out / "artifacts" / "artifacts.json").read_text())["failed"] == []
