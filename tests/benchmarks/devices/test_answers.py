"""Answers of boards and files of unfinished work may hold anything: what comes out is a message."""

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from laptop.benchmarks import quality
from laptop.benchmarks.devices.computer import _as, _facts, _Peak, _Profile, _Started
from laptop.benchmarks.devices.device import Heat, Ready, Round
from laptop.export.to_tensorrt import engine, trtexec
from laptop.hosts.host import Done
from laptop.pruning import plan
from laptop.pruning.latency_table import with_table
from laptop.pruning.plan_file import Plan
from laptop.pruning.scores import Scores
from laptop.pruning.settings import PlanConfig
from laptop.pruning.surgery import check_plan
from support.garbage import accepted, refused_in
from support.scores import scores_for, table_for

FACTS = {"name": "Orin", "os": "Linux", "runtimes": {"tensorrt": "[TensorRT v100300]"}, "cores": 6}
STARTED = {"cold_s": 1.0, "warm_s": 0.5, "first_ms": 20.0, "params": 9, "pid": 100}
TURN = {"samples_ms": [1.5], "temperature_c": 40.0, "others": 0.1, "peak_memory_bytes": 10}


TABLE = {"name": "out", "dimensions": "1x2", "values": [1, 2.5]}


def started(answer: Any) -> None:
    _as(_Started, answer, "ssh://board")
    _as(Ready, answer, "ssh://board")


def turned(answer: Any) -> None:
    _as(_Peak, answer, "ssh://board")
    assert all(ms >= 0 for ms in _as(Round, answer, "ssh://board").samples_ms)


@pytest.mark.parametrize(
    ("answer", "read", "place"),
    [
        (FACTS, _facts, "runtimes"),
        (STARTED, started, "pid"),
        (TURN, turned, "samples_ms.0"),
        ({"why": "hot", "temperature_c": 8.0}, lambda x: _as(Heat, x, "board"), "temperature_c"),
        ({"operators": [["Conv", 0.5]]}, lambda x: _as(_Profile, x, "board"), "operators.0.1"),
        ([TABLE], lambda x: trtexec.read_output(json.dumps(x)), "0.dimensions"),
    ],
)
def test_an_answer_of_a_board_is_used_or_refused(answer: Any, read: Any, place: str) -> None:
    read(answer)
    taken = accepted(answer, read)
    assert f"{place} = {{'a': 1}}" not in taken
    assert f"{place} = [None]" not in taken


@pytest.mark.parametrize("said", ["", "[]", "12", "[" * 100_000, '{"key": 1}', "{}"])
def test_what_lies_beside_an_engine_may_be_anything(said: str) -> None:
    key = trtexec.EngineKey("ab12", "10.3.0", "Orin", "8.7", ("--stronglyTyped",))

    class Board:
        def run(self, script: str, timeout_s: float) -> Done:
            return Done(0, f"{said}\n{'0' * 64}  engine.plan\n", "")

    assert not engine.is_there(Board(), "engine.plan", key)  # type: ignore[arg-type]


def test_pictures_of_unfinished_work_are_drawn_again_unless_they_are_whole(tmp_path: Path) -> None:
    path = tmp_path / "000000.npz"
    images, bad = np.zeros((2, 4, 6, 3), np.uint8), np.zeros(2, bool)
    assert quality._kept(path, 2, (4, 6)) is None
    for wrong in (
        {"images": images},
        {"images": images.astype(float), "bad": bad},
        {"images": images[:1], "bad": bad[:1]},
        {"images": images[0], "bad": bad},
        {"images": images[:, :2], "bad": bad},
        {"images": images, "bad": np.zeros((2, 2), bool)},
        {"images": np.array([None]), "bad": bad},
    ):
        np.savez(path, **wrong)
        assert quality._kept(path, 2, (4, 6)) is None
    np.savez(path, images=images, bad=bad)
    assert quality._kept(path, 2, (4, 6)) is not None
    whole = path.read_bytes()
    single = tmp_path / "single.npy"
    np.save(single, images)
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("images.npy", "x")
        archive.writestr("bad.npy", "x")
    others = [(tmp_path / name).read_bytes() for name in ("single.npy", "other.zip")]
    for damaged in (b"", whole[:-100], whole[:100], b"x" * 500, *others):
        path.write_bytes(damaged)
        assert quality._kept(path, 2, (4, 6)) is None


def test_files_of_stages_are_used_or_refused(tiny_pipe: Any, tmp_path: Path) -> None:
    scores = scores_for(tiny_pipe.unet, "coarse")
    anatomy = scores.anatomy
    removed = plan.choose(scores, PlanConfig(ratio=0.3))
    documents: dict[str, tuple[Any, Any]] = {
        "scores.json": (
            scores.as_json(),
            lambda path: plan.choose(Scores.read(path), PlanConfig(ratio=0.1)),
        ),
        "table.json": (table_for(scores), lambda path: with_table(anatomy, path)),
        "plan.json": (
            plan.as_plan("tiny-sdxl", anatomy, [u.name for u in removed], {}).as_json(),
            lambda path: check_plan(Plan.read(path), tiny_pipe.unet, str(path)),
        ),
    }
    for name, (document, read) in documents.items():
        path = tmp_path / name
        path.write_text(json.dumps(document))
        assert refused_in(path, lambda path=path, read=read: read(path)) > 50, name  # type: ignore
